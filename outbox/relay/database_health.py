"""Whether the database answers. The relay outlives its database: what fails is kept, and tried again."""

from __future__ import annotations

import contextlib
import logging
from typing import TYPE_CHECKING

from outbox.database import Meaning, meaning
from outbox.process.backoff import Backoff
from outbox.relay.telemetry import Announcer
from outbox.store import relaying

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

log = logging.getLogger(__name__)

#: Longer than any call of a relay takes on a database that is well.
_SLOW_SECONDS = 10.0
#: What an error means, where it is not silence: whoever reads it should look elsewhere than at the network.
_SAID = {
    Meaning.REFUSED: "does not let the relay in",
    Meaning.FORBIDDEN: "does not permit what the relay must do",
    Meaning.READ_ONLY: "takes no writes",
    Meaning.BUSY: "is busy with others for too long",
    Meaning.CANCELLED: "cancels what the relay asks",
    Meaning.UNMIGRATED: "lacks a table or column",
}


class Availability:
    """Says once that the database is away, and once that it is back; paces new attempts meanwhile."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._announcer = Announcer(log)
        self._announcer.first("database", "answers")
        self._backoff = Backoff(0.2, 5.0)
        self._failures = 0
        self._retry_at = 0.0
        #: What the driver said; empty while the database answers.
        self.problem = ""
        self._used_since: float | None = None

    @property
    def in_use(self) -> bool:
        """A call is under way, which may take as long as the database takes."""
        return self._used_since is not None

    def complaint(self) -> str:
        """Return why the database is of no use now, empty while it is; from any thread, also while a call hangs in a lock."""
        since = self._used_since
        waited = 0.0 if since is None else self._clock() - since
        return self.problem or (f"no answer for {waited:.0f} s" if waited > _SLOW_SECONDS else "")

    def may_try(self, now: float) -> bool:
        """Say whether the database answered, or it is time to see whether it does."""
        return now >= self._retry_at

    @contextlib.contextmanager
    def attempt(self) -> Iterator[None]:
        """Run a block that uses the database; its failures end the block and are kept here."""
        self._used_since = self._clock()
        try:
            yield
        except Exception as error:
            if not relaying.is_trouble(error):
                raise
            self._failed(error)
        else:
            self._worked()
        finally:
            self._used_since = None

    def within(self, use: Callable[[], None]) -> bool:
        """Call *use*; False when the database failed, or failed a moment ago."""
        if not self.may_try(self._clock()):
            return False
        with self.attempt():
            use()
            return True
        return False

    def _failed(self, error: Exception) -> None:
        problem = relaying.describe(error)
        self._failures += 1
        self._retry_at = self._clock() + self._backoff.ceiling(self._failures)
        self.problem = problem
        self._announcer.state(
            "database",
            "lost",
            logging.WARNING,
            f"the database {_SAID.get(meaning(error), 'does not answer')}; what was confirmed is kept and settled later",
            problem=problem,
        )

    def _worked(self) -> None:
        if self.problem:
            self._announcer.state("database", "answers", logging.INFO, "the database answers again")
        self._failures, self.problem, self._retry_at = 0, "", 0.0
