"""Protocols by name. A new one is a file here and a line below; the command line, tables and reports follow."""

from mega_core.evaluation.protocols.base import PROTOCOLS
from mega_core.evaluation.protocols.easyedit import EASYEDIT
from mega_core.evaluation.protocols.mega import MEGA
from mega_core.evaluation.protocols.mquake import MQUAKE
from mega_core.evaluation.protocols.ours import OURS
from mega_core.evaluation.protocols.ripple import RIPPLE
from mega_core.evaluation.protocols.rome import ROME
from mega_core.evaluation.protocols.rome_text import ROME_TEXT

for protocol in (ROME, ROME_TEXT, EASYEDIT, MEGA, RIPPLE, MQUAKE, OURS):
    PROTOCOLS.add(protocol.name, protocol)

__all__ = ["PROTOCOLS"]
