"""Nothing outlives the tests: a small process that kills what pytest left behind when pytest itself was killed.

Children run in process groups of their own. The guardian reads orders from a pipe whose other end pytest holds; when it
closes, however pytest ended, it kills each group it still knows and removes each folder. One line is one order:

    group PGID SIGNAL    kill this group with this signal number, and with SIGKILL a second later
    spare PGID           it has ended by itself
    folder PATH          remove it
    namespace NAME       delete this network namespace
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from functools import cache
from pathlib import Path
from typing import IO

_GRACE_SECONDS = 1.0


class Guardian:
    """The end of the pipe that pytest holds."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # A session of its own: Ctrl-C in the terminal must reach pytest, not the one who tidies up after it.
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.kit.guardian"],
            stdin=subprocess.PIPE,
            text=True,
            start_new_session=True,
            cwd=Path(__file__).resolve().parents[2],
        )

    def watch(self, process_group: int, last_signal: signal.Signals = signal.SIGKILL) -> None:
        """Kill *process_group* with *last_signal* when the tests end without having done so."""
        self._order(f"group {process_group} {int(last_signal)}")

    def spare(self, process_group: int) -> None:
        """Forget *process_group*: it ended, and its number may soon belong to another."""
        self._order(f"spare {process_group}")

    def remove(self, folder: Path) -> None:
        """Remove *folder* in the end."""
        self._order(f"folder {folder}")

    def remove_namespace(self, name: str) -> None:
        """Delete the network namespace *name* in the end, if it is still there."""
        self._order(f"namespace {name}")

    def _order(self, line: str) -> None:
        pipe = self._process.stdin
        assert pipe is not None
        with self._lock:
            print(line, file=pipe, flush=True)


@cache
def guardian() -> Guardian:
    """The one guardian of this test run, started when first needed."""
    return Guardian()


def _kill(process_group: int, number: int) -> bool:
    try:
        os.killpg(process_group, number)
    except (ProcessLookupError, PermissionError):  # gone; or, on macOS, a zombie
        return False
    return True


def _guard(orders: IO[str]) -> None:
    last_signals: dict[int, int] = {}
    folders: list[str] = []
    namespaces: list[str] = []
    for order in orders:
        verb, _, rest = order.rstrip("\n").partition(" ")
        if verb == "group":
            group, _, number = rest.partition(" ")
            last_signals[int(group)] = int(number)
        elif verb == "spare":
            last_signals.pop(int(rest), None)
        elif verb == "folder":
            folders.append(rest)
        elif verb == "namespace":
            namespaces.append(rest)
    for process_group, last_signal in last_signals.items():
        _kill(process_group, signal.SIGCONT)  # a stopped process takes no other signal than SIGKILL
        _kill(process_group, last_signal)
    deadline = time.monotonic() + _GRACE_SECONDS
    pause = threading.Event()
    while time.monotonic() < deadline and any(_kill(process_group, 0) for process_group in last_signals):
        pause.wait(0.02)
    for process_group in last_signals:
        _kill(process_group, signal.SIGKILL)
    for folder in folders:
        shutil.rmtree(folder, ignore_errors=True)
    for namespace in namespaces:
        subprocess.run(["ip", "netns", "del", namespace], check=False, stderr=subprocess.DEVNULL)


if __name__ == "__main__":
    _guard(sys.stdin)
