"""The demo's own manners; its counts are checked by running it (`DEMO=brief make demo`)."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from tests.conftest import Spawn

_STORY = """
import contextlib, threading
from publisher import demo

@contextlib.contextmanager
def running(self):
    print("everything runs", flush=True)
    try:
        yield
    finally:
        print("everything has ended", flush=True)

demo.Demo.running = running
demo.CHAPTERS = (("a long chapter", lambda demo: threading.Event().wait()),)
raise SystemExit(demo.main())
"""


@pytest.mark.parametrize("end", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_whatever_ends_the_demo_ends_what_it_started(spawn: Spawn, end: signal.Signals) -> None:
    demo = spawn("python", "-c", _STORY)
    demo.wait_for_line("a long chapter")
    os.kill(demo.pid, end)
    assert demo.wait() == 0
    assert "everything has ended" in demo.output
    assert "Traceback" not in demo.output
