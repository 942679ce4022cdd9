"""The app with the frozen service, to look at pages without a model: python -m tests.ui.show PORT."""

import sys
from pathlib import Path

from streamlit import config
from streamlit.web import bootstrap

from mega_core.service import Service
from tests.ui.fake import EVIL, WORKS, FakeService

desk = FakeService()
desk.visited(WORKS, "someone")
desk.visited(EVIL, "someone")
Service.open = classmethod(lambda cls, *_, **__: desk)  # type: ignore[method-assign, assignment]
if "busy" in sys.argv:
    from tests.ui.fake import running

    desk.view = running("e" * 64)
config.set_option("server.port", int(sys.argv[1]))
bootstrap.run(str(Path(__file__).resolve().parents[2] / "app.py"), False, [], {})
