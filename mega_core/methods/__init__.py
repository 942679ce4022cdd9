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

# In the order in which a person reads them: the best known first, then kin beside kin.
for method in (
    ROME,
    MEGA,
    MEMIT,
    ALPHAEDIT,
    PMET,
    ACE,
    FT_M,
    FT_L,
    FT,
    LORA,
    IKE,
    SAKE,
    MEAN_SHIFT,
    GRACE,
    WISE,
):
    METHODS.add(method.name, method)

__all__ = ["METHODS"]
