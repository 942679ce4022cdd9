"""What can be set on the views: a dataclass each, made with knob(). No torch: forms and help are drawn from this."""

from __future__ import annotations
