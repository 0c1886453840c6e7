"""How much waits: counting looks at every pending row, so a thread with a connection of its own does it."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

from outbox import database
from outbox.relay import telemetry
from outbox.store import relaying

if TYPE_CHECKING:
    from collections.abc import Callable

    from sqlalchemy.engine import Engine

#: The age of the oldest message is looked at this often.
_LAG_SECONDS = 2.0
#: Rows are counted as often, and at most about a fiftieth of the time: ten million every two minutes or so.
_COUNT_SPACING = 50.0


class Counting:
    """Keeps the numbers of what waits up to date; while the database is away they stay as they were."""

    def __init__(self, engine: Engine, clock: Callable[[], float] = time.monotonic) -> None:
        self._reading = database.reading(engine)
        self._clock = clock
        self._count_at = 0.0
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._run, name="outbox-counting", daemon=True)

    def start(self) -> None:
        """Begin to count."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread, unless it waits for the database: then the process does not wait for it."""
        self._stopping.set()
        if self._thread.is_alive():
            self._thread.join(1.0)

    def _run(self) -> None:
        while not self._stopping.is_set():
            try:
                self.count()
            except Exception as error:
                if not relaying.is_trouble(error):
                    raise
            self._stopping.wait(_LAG_SECONDS)

    def count(self) -> None:
        """Look at the oldest message, and count all when it is time."""
        with self._reading.connect() as connection:
            telemetry.LAG.set(relaying.lag(connection))
            began = self._clock()
            if began < self._count_at:
                return
            telemetry.show(relaying.census(connection))
            ended = self._clock()
            self._count_at = ended + (ended - began) * _COUNT_SPACING
