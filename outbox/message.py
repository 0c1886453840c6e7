"""The envelope: what a message is, what it may hold, and its bytes on the wire. No SQL and no AMQP here.

On the wire a message is a CloudEvents 1.0 event in structured JSON mode. The data was encoded once, when the signal was
sent; `cloud_event` only puts the attributes in front of those bytes, so what a consumer reads is what was sent, byte for byte.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import dataclasses
import json
import os
import re
import time
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, timedelta
from datetime import time as time_of_day
from decimal import Decimal
from enum import Enum
from itertools import accumulate
from types import MappingProxyType
from typing import TYPE_CHECKING, Any
from uuid import UUID

from outbox.errors import InvalidMessage

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

JSON = "application/json"

#: An AMQP 0-9-1 short string: topics are routing keys, keys travel in headers.
MAX_NAME_BYTES = 255
#: All headers together, as AMQP counts them: with key and topic they fit into the smallest frame a broker may ask for, 4 KiB.
MAX_HEADERS_BYTES = 2048
#: Objects and lists in one another: decoders of every language have a limit, Python's falls with the depth of its own calls.
MAX_NESTING = 200
#: Twenty digits hold every 64-bit number, so that text order is number order.
SEQUENCE_DIGITS = 20

#: Beyond these an instant has no UTC, or none in a database's time zone: it could be neither stored nor read back.
_EARLIEST, _LATEST = datetime(1, 1, 3, tzinfo=UTC), datetime(9999, 12, 29, tzinfo=UTC)

_ATTRIBUTE = re.compile(r"[a-z0-9]{1,20}")
#: Names that mean something to CloudEvents, to RabbitMQ or to kombu: a header of that name would be read as that.
RESERVED_HEADERS = frozenset(
    "id source type specversion subject time datacontenttype dataschema data partitionkey sequence sequencetype "
    "cc bcc compression expiration priority".split()
)
_NO_HEADERS: Mapping[str, str] = MappingProxyType({})


@dataclass(frozen=True, kw_only=True, slots=True)
class Message:
    """What travels, unchanged, from capture to handler. Raises InvalidMessage; nothing is truncated."""

    #: Made once by the application (UUIDv7); every redelivery and every replay keeps it.
    id: UUID
    #: Which application said it: a CloudEvents URI reference such as `/openevent`.
    source: str
    #: 1 to 255 bytes of UTF-8, printable, no blank, `*` or `#`. The routing key.
    topic: str
    #: Messages that share it arrive in commit order; None: no order. 1 to 255 bytes, no control characters.
    key: str | None = None
    #: The gapless number within the key, from 1; given when the message is written, None before and without a key.
    sequence: int | None = None
    #: The encoded data, frozen when the signal was sent; at most `OUTBOX_MAX_BODY` bytes.
    body: bytes = b""
    #: 1 to 255 bytes, an AMQP short string too.
    content_type: str = JSON
    #: CloudEvents extension attributes, also AMQP headers: names of 1-20 lower-case letters and digits, values under 256 bytes;
    #: in a message that is sent now all of them together at most `MAX_HEADERS_BYTES`.
    headers: Mapping[str, str] = field(default_factory=lambda: _NO_HEADERS)
    #: When the signal was sent, in UTC.
    created_at: datetime

    def __post_init__(self) -> None:
        check_name("topic", self.topic, forbidden="*#", blanks=False)
        if self.key is not None:
            check_name("key", self.key)
        check_name("source", self.source, blanks=False)
        if self.content_type != JSON:
            check_name("content_type", self.content_type)
        for name, value in self.headers.items():
            _check_header(name, value)
        if self.created_at.tzinfo is None:
            raise InvalidMessage(f"created_at {self.created_at} has no time zone; give it in UTC")


@dataclass(frozen=True, kw_only=True, slots=True)
class Received:
    """A message as a consumer gets it: any CloudEvents 1.0 event, also one that another program published."""

    #: Unique within `source`; ours are UUIDs, others' may be any text.
    id: str
    source: str
    topic: str
    key: str | None
    sequence: int | None
    #: The decoded data: whatever the JSON held; bytes for other content types; None where there was none.
    data: Any
    content_type: str
    headers: Mapping[str, str]
    created_at: datetime | None
    #: True when the service has already applied a later message of this key (a restored database, a released hold).
    late: bool = False


def check_name(what: str, value: str, *, forbidden: str = "", blanks: bool = True) -> None:
    """Raise InvalidMessage unless *value* can be a routing key, an AMQP header and a database text."""
    if not isinstance(value, str):
        raise InvalidMessage(f"{what} {value!r} is no text but {type(value).__name__}")
    try:
        size = len(value.encode())
    except UnicodeEncodeError as error:
        raise InvalidMessage(f"{what} {value!r} is not valid Unicode text: {error.reason}") from error
    if not 1 <= size <= MAX_NAME_BYTES:
        shown = value if size <= 60 else value[:40] + "…"
        raise InvalidMessage(f"{what} {shown!r} has {size} bytes; it must have 1 to {MAX_NAME_BYTES}")
    barred = forbidden if blanks else forbidden + " "
    if not value.isprintable() or any(character in value for character in barred):
        wrong = next(character for character in value if character in barred or not character.isprintable())
        raise InvalidMessage(f"{what} {value!r} holds {wrong!r}, which a {what} can't hold")


def _check_header(name: str, value: str) -> None:
    if not isinstance(name, str) or not _ATTRIBUTE.fullmatch(name):
        raise InvalidMessage(f"header {name!r}: a name is 1 to 20 lower-case letters and digits, as in CloudEvents")
    if name in RESERVED_HEADERS:
        raise InvalidMessage(f"header {name!r} is reserved; choose another name")
    if not isinstance(value, str) or len(value.encode(errors="surrogatepass")) > MAX_NAME_BYTES or not value.isprintable():
        raise InvalidMessage(f"header {name!r}: its value must be printable text of at most {MAX_NAME_BYTES} bytes")


def check_headers(headers: Mapping[str, str]) -> None:
    """Raise InvalidMessage unless all *headers*, valid each for itself, can be sent in one frame.

    Not asked of every Message: what version 0.1.0 has stored may be longer, and most brokers take it.
    """
    size = sum(len(name) + len(value.encode()) + _HEADER_OVERHEAD for name, value in headers.items())
    if size > MAX_HEADERS_BYTES:
        raise InvalidMessage(
            f"the {len(headers)} headers have {size} bytes together, more than {MAX_HEADERS_BYTES}; send long texts in the data"
        )


#: Length and type of a name and of a value in an AMQP table.
_HEADER_OVERHEAD = 6


def new_id() -> UUID:
    """Return a UUIDv7 (RFC 9562): the first 48 bits are Unix milliseconds, so ids sort about as they were made."""
    milliseconds = time.time_ns() // 1_000_000
    value = (milliseconds << 80) | int.from_bytes(os.urandom(10), "big")
    value = (value & ~(0xF << 76)) | (7 << 76)
    value = (value & ~(0x3 << 62)) | (2 << 62)
    return UUID(int=value)


# --- data → bytes ------------------------------------------------------------------------------------------------------


def encode(data: Any, *, limit: int) -> bytes:
    """Return *data* as compact JSON in UTF-8.

    Besides what JSON knows: date, time and datetime (ISO 8601), timedelta (seconds), Decimal and UUID (text), Enum (its
    value), dataclasses (objects). Raises InvalidMessage, naming the field, for anything else, for NaN and infinities, for
    cycles, and for more than *limit* bytes.
    """
    try:
        body = json.dumps(
            data, ensure_ascii=False, allow_nan=False, check_circular=True, separators=(",", ":"), default=_plain
        ).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidMessage(_explain(data, error)) from error
    if len(body) > limit:
        raise InvalidMessage(
            f"the data has {len(body)} bytes, more than OUTBOX_MAX_BODY={limit}; send ids or a link instead of the content"
        )
    _check_nesting(body)
    return body


def encoded(data: Any, content_type: str, *, limit: int) -> bytes:
    """Return *data*, which is bytes of *content_type* already. Raises InvalidMessage where a consumer could not read them."""
    if not isinstance(data, (bytes, bytearray)) or len(data) > limit:
        raise InvalidMessage(f"data of content type {content_type!r} must be bytes, at most OUTBOX_MAX_BODY={limit} of them")
    body = bytes(data)
    if is_json(content_type):
        _json(body, f"the data is no JSON in UTF-8, which content type {content_type!r} says it is")
        _check_nesting(body)
    return body


def _check_nesting(body: bytes) -> None:
    if body.count(b"[") + body.count(b"{") > MAX_NESTING:  # else it can't be nested deeper
        opened_and_closed = _ALL_BUT_BRACKETS.sub(b"", body)
        if max(accumulate(1 if byte in b"[{" else -1 for byte in opened_and_closed)) > MAX_NESTING:
            raise InvalidMessage(f"the data is nested deeper than {MAX_NESTING} lists and objects; send it flatter")


_ALL_BUT_BRACKETS = re.compile(rb'"(?:[^"\\]+|\\.)*"|[^\[\]{}"]+', re.DOTALL)


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat().replace("+00:00", "Z")
    if isinstance(value, (date, time_of_day)):
        return value.isoformat()
    if isinstance(value, timedelta):
        return value.total_seconds()
    if isinstance(value, (Decimal, UUID)):
        return str(value)
    if isinstance(value, Enum):
        return value.value
    if _is_plain(value):
        return {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    raise TypeError(type(value).__name__)


def _explain(data: Any, error: Exception) -> str:
    if not isinstance(error, RecursionError) and "Circular" not in str(error):
        with contextlib.suppress(RecursionError):
            return _fault(data, "data") or f"the data can't be written as JSON: {error}"
    return "the data contains itself or is nested too deep for JSON"


def _fault(value: Any, path: str) -> str | None:
    """Return what can't be written and where, the first one in *value*."""
    for name, inner in _parts(value):
        if isinstance(value, dict) and not _is_writable({name: 0}):
            return f"{path} has the key {name!r}, which JSON can't express; use text"
        found = _fault(inner, f"{path}[{name}]" if isinstance(value, (list, tuple)) else f"{path}.{name}")
        if found:
            return found
    if _is_plain(value) or _is_writable(value):
        return None
    if hasattr(type(value), "__mapper__"):
        return f"{path} is a {type(value).__name__}, a database object; send its id or the fields a consumer needs"
    if isinstance(value, float):
        return f"{path} is {value!r}, which JSON can't express; send None or a text instead"
    if isinstance(value, str):
        return f"{path} is text that UTF-8 can't express (a lone surrogate)"
    return f"{path} is a {type(value).__name__}, which JSON can't express; send text, numbers, lists or objects"


def _parts(value: Any) -> Iterable[tuple[Any, Any]]:
    if isinstance(value, dict):
        return value.items()
    if isinstance(value, (list, tuple)):
        return enumerate(value)
    if _is_plain(value):
        return ((item.name, getattr(value, item.name)) for item in dataclasses.fields(value))
    return ()


def _is_plain(value: Any) -> bool:
    """Say whether *value* is a dataclass that is no database object."""
    return dataclasses.is_dataclass(value) and not isinstance(value, type) and not hasattr(type(value), "__mapper__")


def _is_writable(value: Any) -> bool:
    try:
        json.dumps(value, ensure_ascii=False, allow_nan=False, default=_plain).encode()
    except (TypeError, ValueError):
        return False
    return True


# --- message ⇄ wire ----------------------------------------------------------------------------------------------------


def cloud_event(message: Message) -> bytes:
    """Return the event in structured JSON mode: the attributes, then the stored body bytes, not encoded again."""
    attributes = {
        "specversion": "1.0",
        "id": str(message.id),
        "source": message.source,
        "type": message.topic,
        "time": message.created_at.astimezone(UTC).isoformat().replace("+00:00", "Z"),
    }
    if message.key is not None:
        attributes["subject"] = attributes["partitionkey"] = message.key
    if message.sequence is not None:
        attributes["sequence"] = f"{message.sequence:0{SEQUENCE_DIGITS}d}"
    attributes.update(message.headers)
    if message.body or message.content_type != JSON:
        attributes["datacontenttype"] = message.content_type
    if not message.body:
        return json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode()
    head = json.dumps(attributes, ensure_ascii=False, separators=(",", ":")).encode()[:-1]
    if message.content_type == JSON:
        return b"".join((head, b',"data":', message.body, b"}"))
    return b"".join((head, b',"data_base64":"', base64.b64encode(message.body), b'"}'))


def received(wire: bytes) -> Received:
    """Return what a structured CloudEvents 1.0 event says; raise InvalidMessage, saying what is wrong, for anything else."""
    event = _object(wire)
    if event.pop("specversion", None) != "1.0":
        raise InvalidMessage("no CloudEvents 1.0 event: specversion is not '1.0'")
    id_, source, topic = (_text(event, name) for name in ("id", "source", "type"))
    content_type = _text(event, "datacontenttype", default=JSON)
    key = _text(event, "partitionkey", default="") or None
    event.pop("subject", None)
    data, encoded = event.pop("data", None), event.pop("data_base64", None)
    if encoded is not None:
        try:
            data = base64.b64decode(encoded, validate=True)
        except (binascii.Error, TypeError, ValueError) as error:
            raise InvalidMessage(f"event {id_}: data_base64 is not base64") from error
        if is_json(content_type):  # base64 is only its dress: `datacontenttype` says what the data is
            data = _json(data, f"event {id_}: data_base64 holds no {content_type}")
    return Received(
        id=id_,
        source=source,
        topic=topic,
        key=key,
        sequence=_number(event.pop("sequence", None)),
        created_at=_time(event.pop("time", None)),
        data=data,
        content_type=content_type,
        headers=MappingProxyType({name: _canonical(value) for name, value in event.items()}),
    )


def structured(attributes: Mapping[str, Any], body: bytes, content_type: object) -> bytes:
    """Return an event in binary mode, whose *attributes* and *content_type* came beside its *body*, in structured mode.

    Without a content type a body is taken for JSON where it is that. Raises InvalidMessage for one that says it is JSON.
    """
    event = {name: _attribute(value) for name, value in attributes.items() if name not in _DATA}
    if isinstance(content_type, str) and content_type:
        event["datacontenttype"] = content_type
    elif not _is_json_text(body):
        event["datacontenttype"] = "application/octet-stream"
    try:
        head = json.dumps(event, ensure_ascii=False, separators=(",", ":")).encode()[:-1]
    except ValueError as error:
        raise InvalidMessage(f"no CloudEvents event: an attribute is no text: {error}") from error
    if not body:
        return head + b"}"
    if not is_json(event.get("datacontenttype", JSON)):
        return b"".join((head, b',"data_base64":"', base64.b64encode(body), b'"}'))
    _json(body, f"the data of the event in binary mode is no {content_type}")  # it must not end the object it is put into
    return b"".join((head, b',"data":', body, b"}"))


#: What carries an event's data in structured mode; in binary mode the body does.
_DATA = frozenset({"data", "data_base64", "datacontenttype"})


def _attribute(value: object) -> str:
    if isinstance(value, datetime):  # an AMQP timestamp: seconds, in UTC
        return value.replace(tzinfo=value.tzinfo or UTC).isoformat()
    if isinstance(value, (str, bool, int)):
        return _canonical(value)
    raise InvalidMessage(f"no CloudEvents event: an attribute is a {type(value).__name__}")


def is_json(content_type: str) -> bool:
    """Say whether data of *content_type* is JSON: `application/json`, `text/json`, `application/vnd.x+json`, …"""
    subtype = content_type.partition(";")[0].strip().lower().partition("/")[2]
    return subtype == "json" or subtype.endswith("+json")


def _is_json_text(body: bytes) -> bool:
    try:
        _json(body, "")
    except InvalidMessage:
        return False
    return True


def _json(text: bytes, problem: str) -> Any:
    try:
        return json.loads(text.decode())
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"{problem}: {type(error).__name__}") from error


def _object(wire: bytes) -> dict[str, Any]:
    try:
        event = json.loads(wire)
    except (ValueError, RecursionError) as error:
        raise InvalidMessage(f"no JSON: {error}") from error
    if not isinstance(event, dict):
        raise InvalidMessage(f"no CloudEvents event: the JSON is no object but {type(event).__name__}")
    return {name: value for name, value in event.items() if value is not None}  # null means: not there


def _canonical(value: object) -> str:
    """Return an attribute as CloudEvents writes it in text."""
    return str(value).lower() if isinstance(value, bool) else str(value)


def _text(event: dict[str, Any], name: str, default: str | None = None) -> str:
    value = event.pop(name, default)
    if not isinstance(value, str) or (not value and default is None):
        raise InvalidMessage(f"no CloudEvents event: {name} is {'missing' if value is None else 'no text'}")
    return value


def _number(value: object) -> int | None:
    """Foreign events may carry any sequence; only a plain 64-bit number says something about order."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,64}", value):  # int() of thousands of digits raises
        return None
    number = int(value)
    return number if number < 2**63 else None


def _time(value: object) -> datetime | None:
    try:
        moment = datetime.fromisoformat(value) if isinstance(value, str) else None
    except ValueError:
        return None
    return moment if moment is not None and moment.tzinfo and _EARLIEST < moment < _LATEST else None
