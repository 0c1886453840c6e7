"""The end of a process: asked for by signals, whatever the main thread is doing."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
from typing import TYPE_CHECKING

import pytest

from outbox.process import stopping
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture
def child() -> Iterator[list[subprocess.Popen[str]]]:
    started: list[subprocess.Popen[str]] = []
    yield started
    for each in started:
        each.kill()
        each.communicate()


def script(body: str, started: list[subprocess.Popen[str]]) -> subprocess.Popen[str]:
    """Run *body* in a Python process of its own, and return when it has printed a line."""
    pipe = subprocess.PIPE
    process = subprocess.Popen([sys.executable, "-c", textwrap.dedent(body)], stdin=pipe, stdout=pipe, text=True)
    started.append(process)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def test_the_first_signal_calls_stop_once_and_everything_is_as_before_at_the_end() -> None:
    calls: list[int] = []
    before = signal.getsignal(signal.SIGTERM)
    with stopping.on_signals(lambda: calls.append(threading.get_ident())):
        os.kill(os.getpid(), signal.SIGTERM)
        eventually(lambda: calls, what="stop to be called")
    assert len(calls) == 1
    assert calls != [threading.get_ident()]  # the main thread may hold any lock
    assert signal.getsignal(signal.SIGTERM) is before
    assert signal.set_wakeup_fd(-1) == -1


def test_another_signal_that_python_handles_is_none_of_its_business() -> None:
    seen: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _frame: seen.append(number))
    try:
        with stopping.on_signals(lambda: seen.append(0)):
            os.kill(os.getpid(), signal.SIGUSR1)
            eventually(lambda: seen, what="the other handler to be called")
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert seen == [signal.SIGUSR1]


def test_a_lock_that_the_main_thread_holds_and_stop_needs_is_no_deadlock(child: list[subprocess.Popen[str]]) -> None:
    process = script(
        """
        import sys, threading
        from outbox.process import stopping
        lock, ended = threading.Lock(), threading.Event()
        def stop():
            with lock:
                ended.set()
        with stopping.on_signals(stop):
            with lock:
                print("ready", flush=True)
                sys.stdin.readline()
            ended.wait()
        """,
        child,
    )
    process.send_signal(signal.SIGTERM)
    process.communicate("go on\n", timeout=20)
    assert process.returncode == 0


def test_a_second_signal_ends_a_process_whose_main_thread_is_stuck_in_a_library(child: list[subprocess.Popen[str]]) -> None:
    process = script(
        """
        import ctypes
        from outbox.process import stopping
        libc = ctypes.CDLL(None)
        with stopping.on_signals(lambda: print("asked", flush=True)):
            print("ready", flush=True)
            while True:
                libc.sigsuspend(ctypes.create_string_buffer(128))  # returns to Python at a signal, and is called again
        """,
        child,
    )
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGINT)
    assert process.wait(20) == 128 + signal.SIGINT


_WAITS = """
import threading
from outbox.process import stopping
ended = threading.Event()
with stopping.on_signals(ended.set):
    print("ready", flush=True)
    ended.wait()
print("in order", flush=True)
"""


def test_a_closed_terminal_asks_for_an_end_in_order(child: list[subprocess.Popen[str]]) -> None:
    process = script(_WAITS, child)
    process.send_signal(signal.SIGHUP)
    assert process.communicate(timeout=20)[0] == "in order\n"
    assert process.returncode == 0


def test_a_process_started_with_nohup_survives_its_terminal(child: list[subprocess.Popen[str]]) -> None:
    process = script("import signal; signal.signal(signal.SIGHUP, signal.SIG_IGN)\n" + _WAITS, child)
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGTERM)  # the one signal that it hears: it ends in order, not by the second of two
    assert process.communicate(timeout=20)[0] == "in order\n"
    assert process.returncode == 0


def test_a_process_that_hangs_although_it_was_asked_to_end_is_ended(child: list[subprocess.Popen[str]]) -> None:
    process = script(
        """
        import ctypes
        from outbox.process import stopping
        libc = ctypes.CDLL(None)
        with stopping.on_signals(lambda: None, patience_seconds=0.2):
            print("ready", flush=True)
            while True:
                libc.sigsuspend(ctypes.create_string_buffer(128))
        """,
        child,
    )
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 128 + signal.SIGTERM


def test_outside_the_main_thread_signals_are_left_alone() -> None:
    found: list[object] = []

    def run() -> None:
        with stopping.on_signals(lambda: None):
            found.append(signal.getsignal(signal.SIGTERM))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert found == [signal.getsignal(signal.SIGTERM)]
