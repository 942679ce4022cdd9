"""Protocols by name. A new one is a file here and a line below; the command line, tables and reports follow."""

from mega_core.evaluation.protocols.base import PROTOCOLS
from mega_core.evaluation.protocols.rome import ROME

for protocol in (ROME,):
    PROTOCOLS.add(protocol.name, protocol)

__all__ = ["PROTOCOLS"]
