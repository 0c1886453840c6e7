"""What a worker has in hand, seen from outside: when one message takes long, the others are taken out of that hand.

Messages share a worker and mostly a transaction, so one that hangs would keep all of them. A worker that has been with one
message for more than a few seconds, and than its handler usually takes, is *stuck*: it keeps that message and the others of
its key; the rest is for other workers. Where they share the transaction, it is ended from outside: its connection is shut
down, the server rolls back, and the worker finds out when the handler returns. Who is alone in a transaction may take as
long as it likes, and what was cut off is alone the next time.

Not on SQLite: a file has one writer, and whoever hangs in its transaction keeps all others out of it anyway.
"""

from __future__ import annotations

import contextlib
import os
import socket
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from outbox.consumer.transaction import Cut

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from sqlalchemy.engine import Connection

    from outbox.consumer.delivery import Arrival

#: A message may keep others waiting for so long ...
STUCK_SECONDS = 5.0
#: ... or for so many times what is usual for its handler, whichever is longer.
_UNUSUAL = 2.0
#: How long it may take to ask a server to cancel a statement.
_CANCEL_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class Freed:
    """What need not wait for a stuck worker any more, in order."""

    others: list[Arrival]
    #: What the worker is stuck with; None: a statement of the runtime, and nobody knows yet for whose sake it waits.
    stuck: Arrival | None
    #: Whether the transaction that they shared was ended.
    cut: bool


class _Wire:
    """The connection of a transaction, to be shut down by another thread than the one that uses it."""

    def __init__(self, connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        self._driver = driver
        # A number of our own: should the connection be closed meanwhile, its number may already be another one's.
        self._number = os.dup(driver.fileno())

    def cancel(self) -> None:
        """Ask the server to cancel the statement it is at: it looks at the wire only between two."""
        with contextlib.suppress(Exception):  # then the transaction ends when that statement does
            if hasattr(self._driver, "cancel_safe"):
                self._driver.cancel_safe(timeout=_CANCEL_SECONDS)
            else:
                self._driver.cancel()  # psycopg2

    def shut_down(self) -> None:
        """Let the server see the connection end, and whoever uses it; it stays to be closed."""
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(self._number)) as wire:
            wire.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        os.close(self._number)


class _Settling:
    """A transaction under way."""

    def __init__(self, batch: Sequence[Arrival], connection: Connection, now: float) -> None:
        #: Only what is shared is ever ended.
        self.wire = _Wire(connection) if len(batch) > 1 else None
        self.current = batch[0] if len(batch) == 1 else None
        self.since = now
        self.patience_seconds = STUCK_SECONDS
        self.cut = False


class Hand:
    """What one worker thread has in hand. The thread says what it does; another one looks, and takes messages away."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._unsettled: Sequence[Arrival] = ()
        #: Whom the worker was stuck with: all others were taken away.
        self._kept: object | None = None
        self._settling: _Settling | None = None

    # --- by its worker ------------------------------------------------------------------------------------------------

    def take(self, batch: Sequence[Arrival]) -> None:
        """Begin with *batch*."""
        with self._lock:
            self._unsettled, self._kept = batch, None

    def holds(self, unsettled: Sequence[Arrival]) -> None:
        """Only these are still to be settled."""
        with self._lock:
            self._unsettled = unsettled

    def keeps(self, arrival: Arrival) -> bool:
        """Say whether *arrival* was not taken away."""
        with self._lock:
            return self._kept is None or self._kept == _lane(arrival)

    @contextmanager
    def settling(self, batch: Sequence[Arrival], connection: Connection) -> Iterator[None]:
        """Settle *batch* in the transaction on *connection*. Raises Cut if it was ended; behind the block it can't be."""
        if connection.dialect.name == "sqlite":
            yield
            return
        with self._lock:
            self._settling = _Settling(batch, connection, self._clock())
        try:
            yield
        except BaseException as error:
            if self._is_over():
                raise Cut from error
            raise
        if self._is_over():
            raise Cut

    def _is_over(self) -> bool:
        """Let nobody end the transaction any more; say whether somebody did."""
        with self._lock:
            settling, self._settling = self._settling, None
            if settling is None:
                return False
            if settling.wire is not None:
                settling.wire.close()
            return settling.cut

    def handles(self, arrival: Arrival, usual_seconds: float) -> None:
        """The handler of *arrival* is about to be called. Raises Cut if the transaction was ended."""
        self._goes_on(arrival, usual_seconds)

    def handled(self) -> None:
        """All handlers were called. Raises Cut if the transaction was ended."""
        self._goes_on(None, 0.0)

    def _goes_on(self, arrival: Arrival | None, usual_seconds: float) -> None:
        with self._lock:
            settling = self._settling
            if settling is None:
                return
            if settling.cut:
                raise Cut
            if settling.wire is not None:
                settling.current = arrival
            settling.since = self._clock()
            settling.patience_seconds = max(STUCK_SECONDS, _UNUSUAL * usual_seconds)

    # --- from outside -------------------------------------------------------------------------------------------------

    def is_stuck(self) -> bool:
        """Say whether the worker has been with one message for long."""
        with self._lock:
            settling = self._settling
            return settling is not None and self._clock() - settling.since > settling.patience_seconds

    def free(self) -> Freed | None:
        """Take from a worker that is stuck what need not wait for it; None: there is nothing."""
        with self._lock:
            settling = self._settling
            if settling is None or settling.cut or self._clock() - settling.since <= settling.patience_seconds:
                return None
            others = self._others(settling.current)
            settling.cut = settling.wire is not None  # from here on it can't be committed
            if not others and not settling.cut:
                return None
        if settling.wire is not None:
            self._end(settling, settling.wire)
        return Freed(others, settling.current, settling.cut)

    def _others(self, stuck: Arrival | None) -> list[Arrival]:
        if stuck is None:
            return []
        self._kept = _lane(stuck)
        others = [each for each in self._unsettled if _lane(each) != self._kept]
        self._unsettled = [each for each in self._unsettled if _lane(each) == self._kept]
        return others

    def _end(self, settling: _Settling, wire: _Wire) -> None:
        wire.cancel()
        with self._lock:
            if self._settling is settling:  # else the worker has found out and rolled back
                wire.shut_down()


def _lane(arrival: Arrival) -> object:
    """What no two workers may have in hand: the key, without one the message."""
    return arrival.key or ("", *arrival.identity)
