from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from tests.kit.ports import free_port
from tests.kit.processes import ROOT, environment, run
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from pathlib import Path

    from tests.conftest import Spawn

_ENDLESS = "print('ready 42'); import threading; threading.Event().wait()"


def _state(pid: int) -> str:
    """The state letter of a process; empty when there is none of that number."""
    shown = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], stdout=subprocess.PIPE, text=True)
    return shown.stdout[:1]


def _alive(pid: int) -> bool:
    return _state(pid) not in ("", "Z")


def test_a_printed_line_is_awaited_and_its_groups_returned(spawn: Spawn) -> None:
    process = spawn("python", "-c", _ENDLESS)
    assert process.wait_for_line(r"ready (\d+)$")[1] == "42"
    assert process.exit_code is None


def test_a_process_that_ends_before_its_line_fails_at_once_with_its_output(spawn: Spawn) -> None:
    process = spawn("python", "-c", "raise SystemExit('no database')")
    with pytest.raises(RuntimeError, match=r"ended before it printed 'ready'(.|\n)*no database"):
        process.wait_for_line("ready")
    assert process.wait() == 1


def test_a_killed_process_says_by_which_signal(spawn: Spawn) -> None:
    process = spawn("python", "-c", _ENDLESS)
    process.kill()
    process.kill()
    assert process.exit_code == -signal.SIGKILL


def test_terminate_asks_and_wait_returns_the_answer(spawn: Spawn) -> None:
    handler = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7)); "
    process = spawn("python", "-c", handler + _ENDLESS)
    process.wait_for_line("ready")
    process.terminate()
    assert process.wait() == 7


def test_waiting_for_the_end_of_an_endless_process_fails_with_its_output(spawn: Spawn) -> None:
    process = spawn("python", "-c", _ENDLESS)
    process.wait_for_line("ready")
    with pytest.raises(AssertionError, match=r"still runs after 0\.05 s:\nready 42"):
        process.wait(timeout=0.05)


def test_a_stopped_process_hangs_until_it_is_continued(spawn: Spawn) -> None:
    process = spawn("python", "-c", _ENDLESS)
    process.stop()
    eventually(lambda: process.stopped, what="the process to be stopped")
    assert _state(process.pid) == "T"
    process.cont()
    eventually(lambda: _state(process.pid) in ("R", "S"), what="the process to go on")
    assert not process.stopped


def test_killing_takes_the_children_too(spawn: Spawn) -> None:
    process = spawn(
        "python",
        "-c",
        "import subprocess, sys; child = subprocess.Popen([sys.executable, '-c', 'import threading; "
        "threading.Event().wait()']); print('child', child.pid, flush=True); child.wait()",
    )
    child = int(process.wait_for_line(r"child (\d+)")[1])
    assert _alive(child)
    process.kill()
    eventually(lambda: not _alive(child), what="the child's end")


def test_an_http_answer_is_awaited(spawn: Spawn, tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("hello")
    port = free_port()
    process = spawn("python", "-m", "http.server", str(port), "--bind", "127.0.0.1", cwd=tmp_path)
    assert process.wait_for_http(f"http://127.0.0.1:{port}/") == "hello"
    assert "File not found" in process.wait_for_http(f"http://127.0.0.1:{port}/missing", status=404)
    process.kill()
    with pytest.raises(RuntimeError, match="ended before"):
        process.wait_for_http(f"http://127.0.0.1:{port}/")


def test_settings_of_the_caller_do_not_reach_a_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OUTBOX_LEASE", "1s")
    monkeypatch.setenv("DATABASE_URL", "sqlite:////nowhere")
    monkeypatch.setenv("TEST_DATABASE_URL", "kept")
    given = environment({"BROKER_URL": "amqp://"})
    assert not {"OUTBOX_LEASE", "DATABASE_URL"} & given.keys()
    assert (given["TEST_DATABASE_URL"], given["BROKER_URL"]) == ("kept", "amqp://")


def test_a_command_run_to_its_end_gives_both_streams_and_its_exit_code() -> None:
    done = run("python", "-c", "import sys; print(input()); print('bad', file=sys.stderr); sys.exit(3)", stdin="good\n")
    assert (done.returncode, done.stdout, done.stderr) == (3, "good\n", "bad\n")


def test_nothing_survives_a_test_run_that_was_killed(tmp_path: Path) -> None:
    script = (
        "import sys, threading; from pathlib import Path; from tests.kit.processes import Process; "
        "from tests.kit.guardian import guardian; folder = Path(sys.argv[1]); "
        "child = Process('python', '-c', 'import threading; threading.Event().wait()', log=folder / 'log'); "
        "child.stop(); guardian().remove(folder); print(child.pid, flush=True); threading.Event().wait()"
    )
    folder = tmp_path / "folder"
    folder.mkdir()
    with subprocess.Popen([sys.executable, "-c", script, str(folder)], cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        child = int(tests.stdout.readline())
        assert _alive(child)
        tests.kill()
    eventually(lambda: not _alive(child), what="the guardian to kill the child")
    eventually(lambda: not folder.exists(), what="the guardian to remove the folder")
