"""How a process of ours is asked to end: by SIGTERM or SIGINT, in order; by a second one, at once."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

#: What asks for an end.
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


@contextmanager
def on_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first SIGTERM or SIGINT call *stop* and the second end the process; outside the main thread, nothing.

    *stop* is called in a thread of its own. In a signal handler it could not take a lock, which every event does: the main
    thread, in whose middle the handler runs, may hold it. And a main thread that waits in a C library for a silent server
    runs no handler at all, while the interpreter still writes the number of the signal into its wake-up socket.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers, pushed = socket.socketpair()
    pushed.setblocking(False)
    thread = threading.Thread(target=_listen, args=(numbers, stop), name="signals", daemon=True)
    before = {number: signal.signal(number, _nothing) for number in _SIGNALS}
    wakeup = signal.set_wakeup_fd(pushed.fileno(), warn_on_full_buffer=False)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(wakeup)
        for number, handler in before.items():
            signal.signal(number, handler)
        pushed.close()  # the thread reads its end
        thread.join()
        numbers.close()


def _nothing(*_: object) -> None:
    """The handler of Python's side: the thread has the number already."""


def _listen(numbers: socket.socket, stop: Callable[[], None]) -> None:
    asked = False
    with contextlib.suppress(OSError):
        while number := numbers.recv(1):
            if number[0] in _SIGNALS:  # others may have Python handlers of somebody else's
                if asked:
                    os._exit(128 + number[0])
                asked = True
                stop()
