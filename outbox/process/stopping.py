"""How a process of ours is asked to end: by SIGTERM, SIGINT or SIGHUP, in order; by a second one, at once."""

from __future__ import annotations

import logging
import os
import signal
import socket
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

log = logging.getLogger(__name__)

#: What asks for an end. A terminal that is closed sends SIGHUP, which Windows does not have.
_SIGNALS = tuple(signal.Signals[name] for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))
#: Even to say a word may hang: for whoever holds the lock of the log, or no longer reads it.
_LAST_WORD_SECONDS = 1.0


@contextmanager
def on_signals(stop: Callable[[], None], *, patience_seconds: float | None = None) -> Iterator[None]:
    """Let the first SIGTERM, SIGINT or SIGHUP call *stop* and the second end the process; outside the main thread, nothing.

    A process that has not ended *patience_seconds* after it was asked to hangs somewhere, and is ended, too. `nohup` is
    obeyed: SIGHUP stays ignored where it was.

    *stop* is called in a thread of its own. In a signal handler it could not take a lock, which every event does: the main
    thread, in whose middle the handler runs, may hold it. And a main thread that waits in a C library for a silent server
    runs no handler at all, while the interpreter still writes the number of the signal into its wake-up socket.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers, pushed = socket.socketpair()
    pushed.setblocking(False)
    heard = [number for number in _SIGNALS if number.name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN]
    thread = threading.Thread(target=_listen, args=(numbers, heard, stop, patience_seconds), name="signals", daemon=True)
    before = {number: signal.signal(number, _nothing) for number in heard}
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


def _listen(
    numbers: socket.socket, heard: Sequence[signal.Signals], stop: Callable[[], None], patience_seconds: float | None
) -> None:
    asked = 0
    try:
        while number := numbers.recv(1):
            if number[0] in heard:  # others may have Python handlers of somebody else's
                if asked:
                    os._exit(128 + number[0])
                asked = number[0]
                numbers.settimeout(patience_seconds)
                stop()
    except TimeoutError:
        late = f"asked to end, it has not within {patience_seconds or 0:g} s: some call does not return; it ends without it"
        word = threading.Thread(target=say, args=(log, logging.ERROR, "process.overdue", late), daemon=True)
        word.start()
        word.join(_LAST_WORD_SECONDS)
        os._exit(128 + asked)
    except OSError:
        return
