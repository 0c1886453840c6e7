"""What the broker's answer means for a row. Pure: no I/O, the policy and the random numbers are arguments.

| answer | the row |
| --- | --- |
| confirmed | is done: deleted, with a receipt |
| returned | waits as `unroutable`; done where nobody listening is fine |
| silent | waits as `retrying`, no attempt is counted |
| nacked | waits as `retrying`, never gives up; no attempt is counted |
| refused | waits as `retrying`, after `OUTBOX_MAX_ATTEMPTS` it is `dead` |
| lost, or not sent | stays as it is and goes out again |
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.process.backoff import Backoff
from outbox.relay.broker import Answer, Outcome
from outbox.tables import State

if TYPE_CHECKING:
    import random

    from outbox.store.relaying import Row


@dataclass(frozen=True, slots=True)
class Policy:
    """How patient the relay is."""

    exchange: str
    max_attempts: int = 10
    backoff: Backoff = Backoff()  # noqa: RUF009 - immutable
    #: How often a message that no queue took is tried again. Short: a person has just started the service and is waiting.
    unheard_seconds: float = 5.0


@dataclass(frozen=True, slots=True)
class Done:
    """The broker has the message, or nobody was to have it."""


@dataclass(frozen=True, slots=True)
class Again:
    """Undecided, and not the message's fault: nothing changes in the database."""


@dataclass(frozen=True, slots=True)
class Hold:
    """Not delivered: the row waits in *state*, and later messages of its key wait with it."""

    state: State
    #: Failed attempts in this state; while `retrying` those of the message's own fault.
    attempts: int
    wait_seconds: float
    error: str


Verdict = Done | Again | Hold

DONE = Done()
AGAIN = Again()


def of(row: Row, answer: Answer, policy: Policy, rng: random.Random, nacks: int = 0) -> Verdict:
    """Return what *answer* means for *row*, which was nacked *nacks* times before."""
    if answer.outcome is Outcome.CONFIRMED:
        return DONE
    if answer.outcome in (Outcome.LOST, Outcome.NOT_SENT):
        return AGAIN
    if answer.outcome is Outcome.RETURNED:
        return _returned(row, policy)
    attempts = row.attempts if row.state == State.RETRYING else 0
    if answer.outcome is Outcome.SILENT:
        error = f"not confirmed: a queue of {row.topic!r} is silent (without a majority?), while others answer"
        return Hold(State.RETRYING, attempts, policy.backoff.wait(1, rng), error)
    detail = _clean(answer.detail)
    if answer.outcome is Outcome.NACKED:
        return Hold(State.RETRYING, attempts, policy.backoff.wait(nacks + 1, rng), f"a queue refused it (full){detail}")
    attempts += 1
    wait = policy.backoff.wait(attempts, rng)
    if attempts < policy.max_attempts:
        return Hold(State.RETRYING, attempts, wait, f"refused, attempt {attempts} of {policy.max_attempts}{detail}")
    return Hold(
        State.DEAD, attempts, 0.0, f"refused {attempts} times; it waits for `outbox requeue` or `outbox discard`{detail}"
    )


def _returned(row: Row, policy: Policy) -> Verdict:
    if row.unheard == "drop":
        return DONE
    attempts = row.attempts + 1 if row.state == State.UNROUTABLE else 1
    error = (
        f"no queue on exchange {policy.exchange!r} takes {row.topic!r}; it waits, and goes out when one is bound: "
        "outbox topology check"
    )
    return Hold(State.UNROUTABLE, attempts, policy.unheard_seconds, error)


def _clean(detail: str) -> str:
    """A database text holds no NUL and no lone surrogate, and a row no novel."""
    text = detail.replace("\0", "").encode(errors="replace").decode()
    return f": {text[:500]}" if text else ""
