"""Knowledge-editing methods by name. A new one is a file here and a line below; forms and command line follow."""

from mega_core.methods.base import METHODS
from mega_core.methods.rome import ROME

METHODS.add(ROME.name, ROME)

__all__ = ["METHODS"]
