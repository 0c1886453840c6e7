"""One plain sentence when something is stuck, and what to do about it. Pure."""

from __future__ import annotations

from typing import TYPE_CHECKING

from outbox.cli import text

if TYPE_CHECKING:
    from outbox.store.status import Overview, Relay, Stuck

#: A relay that was not heard of for this long is taken for gone; it writes a heartbeat several times in that time.
SILENT_SECONDS = 15.0
#: Waiting longer than this, with all well, deserves a sentence.
_SLOW_SECONDS = 60.0


def is_live(relay: Relay) -> bool:
    """Say whether *relay* was heard of lately."""
    return relay.seen_age_seconds <= SILENT_SECONDS


def spokesman(overview: Overview) -> Relay | None:
    """Return the live relay whose broker connection stands for the broker: one that owns shards, if there is one."""
    live = [relay for relay in overview.relays if is_live(relay)]
    return max(live, key=lambda relay: (relay.shards > 0, -relay.seen_age_seconds), default=None)


def advice(overview: Overview) -> str | None:
    """Return what is stuck and the next step, None when nothing is."""
    relay = spokesman(overview)
    if relay is None:
        return _no_relay(overview)
    if not relay.broker_connected:
        why = f": {relay.broker_detail}" if relay.broker_detail else ""
        # A running relay has read its settings: another user or password in BROKER_URL is for the next one.
        end = "; after a change of BROKER_URL start it again" if "BROKER_URL" in why else ""
        return f"the broker is not connected{why}; nothing is lost, the relay goes on by itself once it is{end}: outbox doctor"
    if relay.broker_blocked:
        why = f" ({relay.broker_detail})" if relay.broker_detail else ""
        return f"the broker takes no messages{why}; free memory or disk there, the relay goes on by itself"
    if relay.trouble:
        return relay.trouble
    if overview.stuck:
        return _stuck(overview.stuck[0], overview)
    if overview.lag_seconds > _SLOW_SECONDS:
        return (
            f"the oldest message has waited {text.age(overview.lag_seconds)} although {relay.id} runs; "
            "if the lag does not fall, look at the relay's log: outbox doctor"
        )
    return None


def _no_relay(overview: Overview) -> str | None:
    if not overview.pending:
        return None
    last = overview.relays[0] if overview.relays else None
    seen = f" (the last one, {last.id}, was seen {text.age(last.seen_age_seconds)} ago)" if last else ""
    wait = "waits" if overview.pending == 1 else "wait"
    return f"no relay is running{seen} and {text.amount(overview.pending, 'message')} {wait}; start one: outbox relay"


def _stuck(first: Stuck, overview: Overview) -> str:
    behind = f", {text.amount(first.behind, 'message')} of key {first.key} behind it" if first.behind else ""
    if first.state == "dead":
        more = f" and {overview.dead - 1:,} more" if overview.dead > 1 else ""
        error = f" ({text.one_line(first.last_error)})" if first.last_error else ""
        return (
            f"message {first.id}{more}: given up after {text.amount(first.attempts, 'attempt')}{error}{behind}; "
            f"outbox show {first.id}, then outbox requeue or outbox discard"
        )
    if first.state == "unroutable":
        more = f" and {overview.unroutable - 1:,} more" if overview.unroutable > 1 else ""
        return (
            f"message {first.id}{more}: no queue takes {first.topic!r}{behind}; "
            "it goes out by itself when one is bound: outbox topology check"
        )
    error = f" ({text.one_line(first.last_error)})" if first.last_error else ""
    return (
        f"message {first.id}: {first.topic!r} is not taken{error}{behind}; "
        "it is tried again by itself, look at the length and the members of its queues"
    )
