"""What a service tells about itself: metrics, and one log line for each thing a person should know."""

from __future__ import annotations

import logging
from datetime import UTC, datetime
from typing import TYPE_CHECKING

from outbox.consumer.outcomes import Outcome
from outbox.consumer.tables import Reason
from outbox.process import metrics
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Iterable

    from outbox.consumer.batch import Settled
    from outbox.consumer.parking import Aside
    from outbox.consumer.service import Service

log = logging.getLogger(__name__)

messages = metrics.counter(
    "consumer_messages_total",
    "Deliveries settled: applied, late (applied too), duplicate, parked.",
    ("service", "topic", "outcome"),
)
handler_seconds = metrics.histogram("consumer_handler_seconds", "Time in the handler.", ("service", "topic"))
end_to_end_seconds = metrics.histogram(
    "consumer_end_to_end_seconds", "From sending a signal to the commit of its effect.", ("service", "topic")
)
oldest_call_seconds = metrics.gauge(
    "consumer_oldest_handler_seconds", "For how long the message that takes longest has been in its handler.", ("service",)
)
parked_messages = metrics.gauge("consumer_parked_messages", "Messages set aside, discarded ones not counted.", ("service",))


def settled(service: Service, results: Iterable[Settled]) -> None:
    """Count what was settled, and say which messages were given up."""
    now = datetime.now(UTC)
    for result in results:
        # A topic that is not ours may be anything: as a label it would be without bound.
        topic = result.arrival.topic if service.handler(result.arrival.topic) else "other"
        late = result.late and result.outcome is Outcome.APPLIED
        messages.labels(service.name, topic, "late" if late else result.outcome.value).inc()
        if result.outcome is Outcome.APPLIED:
            handler_seconds.labels(service.name, topic).observe(result.handler_seconds)
            sent = result.arrival.message.created_at if result.arrival.message else None
            if sent is not None:
                end_to_end_seconds.labels(service.name, topic).observe(max(0.0, (now - sent).total_seconds()))
        elif result.aside is not None and result.aside.reason is not Reason.BEHIND:  # of these the first one was said
            _say_parked(service, result, result.aside)


def _why(aside: Aside) -> str:
    """What a log may say: of an exception its class and its place; its text, which may hold payload, for `Retry` alone."""
    if aside.reason is Reason.LATER:
        return f"{aside.reason}: {aside.error}"
    return f"{aside.reason}: {aside.place}" if aside.place else aside.reason.value


def _say_parked(service: Service, result: Settled, aside: Aside) -> None:
    arrival = result.arrival
    source, message_id = arrival.identity
    held = f"; later messages of key {arrival.key[1]!r} wait" if arrival.key and aside.holds(arrival.key) else ""
    show = f"outbox consumer parked show {service.typed} {message_id}"
    say(
        log,
        logging.WARNING,
        "consumer.parked",
        f"message {message_id} was parked ({_why(aside)}){held}: {show}",
        service=service.name,
        topic=arrival.topic,
        source=source,
        reason=aside.reason.value,
        attempts=aside.attempts,
    )
