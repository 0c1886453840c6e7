"""What the relay says of itself: each change of state once in the log, numbers for a scrape."""

from __future__ import annotations

import logging
from typing import TYPE_CHECKING, Any

from outbox.process import metrics
from outbox.process.logs import say
from outbox.relay.broker import Cause, Outcome

if TYPE_CHECKING:
    from outbox.relay.broker import Answer, BrokerState
    from outbox.store.relaying import Census

PENDING = metrics.gauge("outbox_pending_messages", "Rows of outbox_pending, by state.", ["state"])
LAG = metrics.gauge("outbox_lag_seconds", "Age of the oldest pending message that is due.")
HELD_KEYS = metrics.gauge("outbox_held_keys", "Keys that wait for a message that was not delivered.")
PUBLISHED = metrics.counter("outbox_published_total", "Messages the broker confirmed.", ["topic"])
FAILURES = metrics.counter("outbox_publish_failures_total", "Messages that were not confirmed.", ["reason"])
DELIVERY = metrics.histogram("outbox_delivery_seconds", "From signal to confirm.")
CONFIRM = metrics.histogram("outbox_confirm_seconds", "From publish to confirm.")
SHARDS_OWNED = metrics.gauge("outbox_shards_owned", "Shards this relay works on.")
LEASES_LOST = metrics.counter("outbox_leases_lost_total", "Times that another relay took this relay's shards.")
CONNECTED = metrics.gauge("outbox_broker_connected", "1 while connected to the broker.")
BLOCKED = metrics.gauge("outbox_broker_blocked", "1 while the broker takes nothing from publishers.")

_REASONS = {
    Outcome.RETURNED: "returned",
    Outcome.NACKED: "nacked",
    Outcome.REFUSED: "refused",
}
_LOSSES = {Cause.SILENCE: "silent", Cause.BLOCKED: "blocked"}


def reason(answer: Answer) -> str:
    """Return the label for an answer that is no confirm."""
    return _REASONS.get(answer.outcome) or _LOSSES.get(answer.cause, "lost")


def show(census: Census) -> None:
    """Put a census into the gauges."""
    for state in ("pending", "retrying", "unroutable", "dead", "discarded"):
        PENDING.labels(state).set(census.by_state.get(state, 0))
    LAG.set(census.lag_seconds)
    HELD_KEYS.set(census.held_keys)


def show_broker(state: BrokerState) -> None:
    """Put the broker's state into the gauges."""
    CONNECTED.set(state.connected)
    BLOCKED.set(state.blocked)


class Announcer:
    """Logs the state of a thing when it changes, and only then."""

    def __init__(self, logger: logging.Logger) -> None:
        self._logger = logger
        self._last: dict[str, tuple[str, str]] = {}

    def state(self, thing: str, state: str, level: int, sentence: str, **fields: Any) -> None:
        """Say that *thing* is in *state* (event `thing.state`), unless that was the last thing said of it."""
        if self._last.get(thing) == (state, sentence):
            return
        self._last[thing] = (state, sentence)
        say(self._logger, level, f"{thing}.{state}", sentence, **fields)

    def first(self, thing: str, state: str) -> None:
        """Take *state* as known, without a word."""
        self._last.setdefault(thing, (state, ""))
