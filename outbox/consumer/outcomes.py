"""What can become of a delivery, and what a handler may raise to say so."""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum

from outbox.errors import OutboxError


class Outcome(StrEnum):
    """What became of one delivery; it is acknowledged after any of these."""

    APPLIED = "applied"
    #: Its id was in the inbox.
    DUPLICATE = "duplicate"
    #: Set aside in `consumer_parked`.
    PARKED = "parked"


class Retry(Exception):
    """Raise in a handler: not now, and it is not the message's fault (a mail server that is down).

    Costs no attempt. Later messages of its key wait, all others go on. It is tried again *after* that time, or else after
    longer and longer ones; up to five seconds a worker keeps it in hand, then it is set aside until it is due. What still
    asks after an hour (or, where that is longer, ten times *after*) is parked as failed, for a person.

    *reason* says what it waits for, in logs and in `outbox consumer parked list`: no payload. With *everybody* the whole
    service waits, for longer and longer up to a minute: what is away is what each message needs.
    """

    def __init__(self, after: float | timedelta | None = None, reason: str = "", *, everybody: bool = False) -> None:
        seconds = after.total_seconds() if isinstance(after, timedelta) else after
        if seconds is not None and not 0 <= seconds <= 366 * 86_400:
            raise ValueError(f"Retry(after={after}): it must be 0 seconds to 366 days")
        super().__init__(reason or "the handler asked to try again later")
        self.after_seconds = seconds
        self.everybody = everybody


class Reject(Exception):
    """Raise in a handler: this message can't be applied, and trying again would not help.

    It is parked at once, with *reason*, for a person to requeue or discard. Later messages of its key wait behind it, so
    that a requeued one is still applied in order; with *hold* False they do not: for effects that no other depends on,
    such as a letter.
    """

    def __init__(self, reason: str, *, hold: bool = True) -> None:
        super().__init__(reason)
        self.hold = hold


class HandlerMistake(OutboxError):
    """A handler did with its session what only the runtime may do, or left it in a state nobody can go on from."""


class Incomplete(OutboxError):
    """A message lacks fields that its handler needs: the message's fault, and no attempt will help."""
