"""A message as it came from the broker: its raw bytes, who is to be acknowledged, and what could be read of it.

The body alone decides what a message is; kombu's content types, encodings and compression are not looked at. Of the
headers only the broker's own are read.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from outbox.consumer.failures import storable
from outbox.errors import InvalidMessage
from outbox.message import MAX_NAME_BYTES, Received, check_name, received

if TYPE_CHECKING:
    from outbox.consumer.acks import Receipt

#: Deliveries that came to nothing before this one: from here on the message may be what killed the process.
SUSPECT_AFTER = 3
_MAX_PROPERTIES = 64 * 1024
_NONE: Mapping[str, Any] = MappingProxyType({})

Identity = tuple[str, str]
Key = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One delivery. Compared by identity: the same message delivered twice is two of them."""

    body: bytes
    #: What could be read; None where the body is no CloudEvent.
    message: Received | None
    #: Why it can't be read.
    problem: str = ""
    routing_key: str = ""
    properties: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    #: Earlier deliveries that were not acknowledged.
    returns: int = 0
    #: The broker gave it up: it comes from the service's dead-letter queue.
    dead_lettered: bool = False
    #: For whoever acknowledges it: only the connection that brought it can.
    receipt: Receipt | None = None

    @property
    def identity(self) -> Identity:
        """What the inbox knows it by: source and message id; for an unreadable body its digest."""
        if self.message is None:
            return "", f"sha256:{hashlib.sha256(self.body).hexdigest()}"
        return self.message.source, self.message.id

    @property
    def key(self) -> Key | None:
        """Source and key: the messages that share them are applied in order."""
        if self.message is None or self.message.key is None:
            return None
        return self.message.source, self.message.key

    @property
    def topic(self) -> str:
        """The message's topic; for an unreadable body the routing key."""
        return self.message.topic if self.message is not None else storable(self.routing_key)[:MAX_NAME_BYTES]

    @property
    def suspect(self) -> bool:
        """Whether it was delivered so often that it may be what killed the process."""
        return self.returns >= SUSPECT_AFTER


def read(
    body: bytes,
    *,
    routing_key: str = "",
    properties: Mapping[str, Any] = _NONE,
    headers: Mapping[str, Any] = _NONE,
    redelivered: bool = False,
    dead_lettered: bool = False,
    receipt: Receipt | None = None,
) -> Arrival:
    """Return the arrival for *body*; never raises, whatever the bytes and headers are."""
    message, problem = _decoded(body)
    return Arrival(
        body=body,
        message=message,
        problem=problem,
        routing_key=routing_key,
        properties=properties,
        returns=_returns(headers, redelivered=redelivered),
        dead_lettered=dead_lettered,
        receipt=receipt,
    )


def of_message(message: Received, body: bytes) -> Arrival:
    """Return the arrival of a message that is already decoded."""
    return Arrival(body=body, message=message)


def again(arrival: Arrival) -> Arrival:
    """Return *arrival* as it came: whoever had it in hand may have changed the data of its message."""
    return dataclasses.replace(arrival, message=_decoded(arrival.body)[0])


def _decoded(body: bytes) -> tuple[Received | None, str]:
    try:
        message = received(body)
        for what in ("id", "source", "topic"):
            check_name(what, getattr(message, what))
        if message.key is not None:
            check_name("key", message.key)
    except InvalidMessage as error:
        return None, storable(str(error))
    except Exception as error:  # noqa: BLE001 - a body that breaks the decoder must be parked, not come back for ever
        return None, f"it can't be read: {type(error).__name__}"
    return message, ""


def _returns(headers: Mapping[str, Any], *, redelivered: bool) -> int:
    """RabbitMQ 4.3 leaves a requeueing `basic.nack` out of `x-delivery-count`; `x-acquired-count` is what it was before."""
    counts = [headers.get(name) for name in ("x-delivery-count", "x-acquired-count")]
    known = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
    if not known and redelivered and UNREADABLE_PROPERTIES in headers:
        return SUSPECT_AFTER  # the count is among what can't be read
    return max(known, default=0)


#: Header that stands for properties which can't be decoded; it holds their bytes.
UNREADABLE_PROPERTIES = "x-unreadable-properties"


def properties_as_text(properties: Mapping[str, Any]) -> str:
    """Return *properties* as JSON for people, whatever they hold; cut when they are huge."""
    try:
        text = json.dumps({str(name): value for name, value in properties.items()}, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps({"unreadable": repr(properties)})
    return text if len(text) <= _MAX_PROPERTIES else json.dumps({"cut": text[:_MAX_PROPERTIES]})
