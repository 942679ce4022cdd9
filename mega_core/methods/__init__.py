"""Knowledge-editing methods by name. A new one is a file here and a line below; forms and command line follow."""

from mega_core.methods.ace import ACE
from mega_core.methods.alphaedit import ALPHAEDIT
from mega_core.methods.base import METHODS
from mega_core.methods.ft import FT, FT_L, FT_M
from mega_core.methods.grace import GRACE
from mega_core.methods.ike import IKE
from mega_core.methods.lora import LORA
from mega_core.methods.mean_shift import MEAN_SHIFT
from mega_core.methods.mega import MEGA
from mega_core.methods.memit import MEMIT
from mega_core.methods.pmet import PMET
from mega_core.methods.rome import ROME
from mega_core.methods.sake import SAKE
from mega_core.methods.wise import WISE

METHODS.add(ROME.name, ROME)
METHODS.add(MEMIT.name, MEMIT)
METHODS.add(ALPHAEDIT.name, ALPHAEDIT)
METHODS.add(PMET.name, PMET)
METHODS.add(ACE.name, ACE)
METHODS.add(FT.name, FT)
METHODS.add(FT_L.name, FT_L)
METHODS.add(FT_M.name, FT_M)
METHODS.add(LORA.name, LORA)
METHODS.add(SAKE.name, SAKE)
METHODS.add(MEAN_SHIFT.name, MEAN_SHIFT)
METHODS.add(GRACE.name, GRACE)
METHODS.add(IKE.name, IKE)
METHODS.add(WISE.name, WISE)
METHODS.add(MEGA.name, MEGA)

__all__ = ["METHODS"]
