"""What is said of a broker in the log: each change of state once, however often it is found again."""

from __future__ import annotations

import logging

from outbox.logs import say

log = logging.getLogger(__name__)


class News:
    """The log of one broker connection. Not thread-safe: one thread tells."""

    def __init__(self) -> None:
        #: Troubles told since all was well. A broker that blocks, refuses or loses us in turn is told of once each.
        self._told: set[str] = set()
        self._in_doubt = False

    def trouble(self, event: str, sentence: str, level: int = logging.WARNING) -> None:
        """Tell *sentence*, unless it was told since all was well."""
        if sentence not in self._told:
            self._told.add(sentence)
            say(log, level, f"broker.{event}", sentence)

    def doubt(self, in_doubt: bool) -> None:
        """Say whether the last connection stood and yet confirmed nothing: then the next one proves nothing by standing."""
        self._in_doubt = in_doubt

    def connected(self, sentence: str) -> None:
        """Tell that a connection stands, unless that proves nothing."""
        if not self._in_doubt:
            self.well(sentence)

    def confirmed(self, sentence: str) -> None:
        """Tell that the broker takes messages, if that was in doubt."""
        if self._in_doubt:
            self.well(sentence)

    def well(self, sentence: str) -> None:
        """Tell that all is well, and forget all troubles."""
        self._in_doubt = False
        self._told.clear()
        say(log, logging.INFO, "broker.connected", sentence)
