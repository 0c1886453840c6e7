"""The demo's own manners; its counts are checked by running it (`DEMO=brief make demo`)."""

from __future__ import annotations

import os
import signal
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn

_STORY = """
import contextlib, pathlib, sys, threading
from publisher import demo

demo.CHECKOUT = pathlib.Path(sys.argv[1])
demo.INSTANCE = demo.CHECKOUT / "instance"
demo.MARK = demo.INSTANCE / demo.MARK.name

@contextlib.contextmanager
def running(self):
    demo.prepare_folder()
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
def test_whatever_ends_the_demo_ends_what_it_started(spawn: Spawn, tmp_path: Path, end: signal.Signals) -> None:
    demo = spawn("python", "-c", _STORY, tmp_path)
    demo.wait_for_line("a long chapter")
    os.kill(demo.pid, end)
    assert demo.wait() == 0
    assert "everything has ended" in demo.output
    assert "Traceback" not in demo.output


def test_a_second_demo_in_a_checkout_is_refused_until_the_first_has_ended_however_it_ends(spawn: Spawn, tmp_path: Path) -> None:
    first = spawn("python", "-c", _STORY, tmp_path)
    first.wait_for_line("a long chapter")
    kept = tmp_path / "instance" / "openevent.db"
    kept.touch()
    second = spawn("python", "-c", _STORY, tmp_path)
    assert second.wait() == 1
    assert second.output == (
        f"another demo works in {tmp_path}/instance; end it with Ctrl-C where it runs, or: kill {first.pid}\n"
    )
    assert kept.exists()
    first.kill()
    spawn("python", "-c", _STORY, tmp_path).wait_for_line("a long chapter")
