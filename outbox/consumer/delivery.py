"""A message as it came from the broker: its raw bytes, who is to be acknowledged, and what could be read of it.

The body alone decides what a message is; kombu's content types, encodings and compression are not looked at. Only where
it is no event, the headers are asked whether they make it one (CloudEvents in binary mode): then the body becomes the
event in structured mode, which from here on is the only form there is.
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
from outbox.message import MAX_NAME_BYTES, Received, check_name, received, structured

if TYPE_CHECKING:
    from outbox.consumer.acks import Receipt
    from outbox.consumer.spool import Spool, Spooled

#: Deliveries that came to nothing before this one: from here on the message may be what killed the process.
SUSPECT_AFTER = 3
_MAX_PROPERTIES = 64 * 1024
#: A body over this is decoded again when its turn comes: decoded JSON takes up to twenty times its bytes.
LARGE_BYTES = 16 * 1024
#: How bindings of CloudEvents begin the names of headers that are attributes: AMQP, AMQP through JMS, HTTP and Kafka.
_BINARY_PREFIXES = ("cloudEvents:", "cloudEvents_", "ce-", "ce_")
#: What brokers write into headers: it differs between two deliveries of one message.
_BROKERS_HEADERS = ("x-delivery-count", "x-acquired-count", "x-death", "x-first-death-", "x-last-death-", "x-opt-")
_NONE: Mapping[str, Any] = MappingProxyType({})

Identity = tuple[str, str]
Key = tuple[str, str]


@dataclass(frozen=True, slots=True, eq=False)
class Arrival:
    """One delivery. Compared by identity: the same message delivered twice is two of them."""

    body: bytes
    #: What could be read; None where the body is no CloudEvent.
    message: Received | None
    #: Why it, or with a message its data, can't be read.
    problem: str = ""
    routing_key: str = ""
    properties: Mapping[str, Any] = field(default_factory=lambda: _NONE)
    #: Earlier deliveries that were not acknowledged.
    returns: int = 0
    #: The broker gave it up: it comes from the service's dead-letter queue.
    dead_lettered: bool = False
    #: For whoever acknowledges it: only the connection that brought it can.
    receipt: Receipt | None = None
    #: Stands for the message id where the message can't be read.
    digest: str = ""
    #: The message's data was dropped to save memory: `again` reads it from the body.
    slim: bool = False
    #: Where its body is, if that was dropped to save memory, too.
    spooled: Spooled | None = None

    @property
    def size(self) -> int:
        """How many bytes its body has, wherever that is."""
        return len(self.body) if self.spooled is None else self.spooled.size

    @property
    def identity(self) -> Identity:
        """What the inbox knows it by: source and message id; for an unreadable one its digest."""
        if self.message is None:
            return "", self.digest
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
    digest: str = "",
) -> Arrival:
    """Return the arrival for *body*; never raises, whatever the bytes and headers are.

    *digest*: what a message that can't be read was known by before.
    """
    if dead_lettered:
        routing_key = _first_routing_key(headers) or routing_key
    message, problem = _decoded(body)
    if message is None and (attributes := _binary_attributes(headers)):
        body, message, problem = _from_binary(body, properties.get("content_type"), attributes)
    if message is None:
        digest = digest or _digest(body, routing_key, properties, headers)
    return Arrival(
        body=body,
        message=message,
        problem=problem,
        routing_key=routing_key,
        properties=properties,
        returns=_returns(headers, redelivered=redelivered),
        dead_lettered=dead_lettered,
        receipt=receipt,
        digest=digest,
    )


def slim(arrival: Arrival) -> Arrival:
    """Return *arrival* without its decoded data when that is large: for one that has to wait."""
    if arrival.message is None or len(arrival.body) <= LARGE_BYTES:
        return arrival
    return dataclasses.replace(arrival, message=dataclasses.replace(arrival.message, data=None), slim=True)


def spooled(arrival: Arrival, spool: Spool) -> Arrival:
    """Return *arrival* with its body in *spool* when that is large and finds room there."""
    kept = spool.put(arrival.body) if len(arrival.body) > LARGE_BYTES else None
    return arrival if kept is None else dataclasses.replace(arrival, body=b"", spooled=kept, slim=True)


def of_message(message: Received, body: bytes) -> Arrival:
    """Return the arrival of a message that is already decoded."""
    return Arrival(body=body, message=message)


def again(arrival: Arrival) -> Arrival:
    """Return *arrival* as it came: whoever had it in hand may have changed the data of its message.

    One that can't be read this time (too little memory) is the same message, with its id and key, and a problem.
    """
    if arrival.spooled is not None:
        arrival = dataclasses.replace(arrival, body=arrival.spooled.read(), spooled=None)
    message, problem = _decoded(arrival.body)
    if message is None:
        return dataclasses.replace(arrival, problem=problem) if arrival.message is not None else arrival
    return dataclasses.replace(arrival, message=message, problem="", slim=False)


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


def _binary_attributes(headers: Mapping[str, Any]) -> dict[str, Any]:
    """Return the attributes that *headers* hold of a CloudEvents event in binary mode; none, if it is no such event."""
    for prefix in _BINARY_PREFIXES:
        found = {name[len(prefix) :]: value for name, value in headers.items() if name.startswith(prefix)}
        if "specversion" in found:
            return found
    return {}


def _from_binary(body: bytes, content_type: Any, attributes: Mapping[str, Any]) -> tuple[bytes, Received | None, str]:
    """Return body, message and problem of an event in binary mode; one that can't be read keeps its body."""
    try:
        event = structured(attributes, body, content_type)
    except InvalidMessage as error:
        return body, None, storable(str(error))
    message, problem = _decoded(event)
    return (body if message is None else event), message, problem


def _digest(body: bytes, routing_key: str, properties: Mapping[str, Any], headers: Mapping[str, Any]) -> str:
    """Return what tells an unreadable message from others: all that its publisher said, and nothing that brokers add.

    Its body would not do: events in a form we can't read carry their id in properties or headers.
    """
    said = {name: value for name, value in properties.items() if name not in ("headers", "expiration")}
    own = {name: value for name, value in headers.items() if not name.startswith(_BROKERS_HEADERS)}
    around = "\0".join([routing_key, *_lines(said), "", *_lines(own)])
    digest = hashlib.sha256(f"{len(body)}:".encode() + body)
    digest.update(around.encode(errors="surrogatepass"))
    return f"sha256:{digest.hexdigest()}"


def _lines(values: Mapping[str, Any]) -> list[str]:
    return [f"{name}={_text(value)}" for name, value in sorted(values.items())]


def _text(value: Any) -> str:
    try:
        return json.dumps(value, sort_keys=True, default=repr)
    except (TypeError, ValueError, RecursionError):  # tables within tables without end say nothing about who sent them
        return type(value).__name__


def _first_routing_key(headers: Mapping[str, Any]) -> str | None:
    """Return under which routing key a dead-lettered message was published; the last entry of `x-death` is the first death."""
    deaths = headers.get("x-death")
    last = deaths[-1] if isinstance(deaths, list) and deaths else None
    keys = last.get("routing-keys") if isinstance(last, dict) else None
    return keys[0] if isinstance(keys, list) and keys and isinstance(keys[0], str) else None


def _returns(headers: Mapping[str, Any], *, redelivered: bool) -> int:
    """RabbitMQ 4.3 leaves a requeueing `basic.nack` out of `x-delivery-count`; `x-acquired-count` is what it was before.

    A first delivery was counted by nobody: RabbitMQ passes on whatever its publisher wrote into these headers.
    """
    if not redelivered:
        return 0
    counts = [headers.get(name) for name in ("x-delivery-count", "x-acquired-count")]
    known = [count for count in counts if isinstance(count, int) and not isinstance(count, bool) and count >= 0]
    if not known and UNREADABLE_PROPERTIES in headers:
        return SUSPECT_AFTER  # the count is among what can't be read
    return max(known, default=0)


#: Header that stands for properties which can't be decoded; it holds their bytes.
UNREADABLE_PROPERTIES = "x-unreadable-properties"


def properties_as_text(properties: Mapping[str, Any]) -> str:
    """Return *properties* as JSON for people, whatever they hold; cut when they are huge."""
    try:
        text = json.dumps({str(name): value for name, value in properties.items()}, default=repr)
    except (TypeError, ValueError, RecursionError):
        text = json.dumps({"unreadable": _flat(properties)})
    return text if len(text) <= _MAX_PROPERTIES else json.dumps({"cut": text[:_MAX_PROPERTIES]})


def _flat(properties: Mapping[str, Any]) -> str:
    try:
        return repr(properties)
    except RecursionError:
        return f"nested too deep: {', '.join(map(str, properties))}"
