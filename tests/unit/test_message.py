"""The envelope: what it may hold, and its bytes on the wire, with the CloudEvents project's own package as the judge."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import enum
import json
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any
from uuid import UUID

import pytest
from cloudevents.core.formats.json import JSONFormat
from cloudevents.core.v1.event import CloudEvent
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.orm import DeclarativeBase, Mapped, MappedAsDataclass, mapped_column

from outbox.errors import InvalidMessage
from outbox.message import JSON, RESERVED_HEADERS, Message, cloud_event, encode, new_id, received
from tests.kit import builders

_LIMIT = 256 * 1024


class Base(MappedAsDataclass, DeclarativeBase):
    """For objects of a database."""


class Talk(Base):
    __tablename__ = "talk"
    id: Mapped[int] = mapped_column(primary_key=True, init=False)
    title: Mapped[str] = mapped_column(default="")


class Colour(enum.Enum):
    RED = "red"


class Level(enum.IntEnum):
    HIGH = 3


@dataclasses.dataclass
class Room:
    name: str
    seats: int
    opened: date | None = None


# --- data → bytes -------------------------------------------------------------------------------------------------------

_json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**63) | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=15,
)


@given(_json)
def test_json_reads_back_as_it_was(data: Any) -> None:
    assert json.loads(encode(data, limit=_LIMIT)) == data


def test_the_bytes_are_compact_utf_8_in_the_order_of_the_fields() -> None:
    assert encode({"b": 1, "a": "Grüße"}, limit=_LIMIT) == '{"b":1,"a":"Grüße"}'.encode()


@pytest.mark.parametrize(
    ("value", "written"),
    [
        (datetime(2026, 3, 1, 12, 30, tzinfo=UTC), "2026-03-01T12:30:00Z"),
        (datetime(2026, 3, 1, 12, 30, tzinfo=timezone(timedelta(hours=2))), "2026-03-01T12:30:00+02:00"),
        (datetime(2026, 3, 1, 12, 30), "2026-03-01T12:30:00"),  # noqa: DTZ001
        (date(2026, 3, 1), "2026-03-01"),
        (time(9, 5), "09:05:00"),
        (timedelta(minutes=90), 5400.0),
        (Decimal("19.90"), "19.90"),
        (UUID(int=1), "00000000-0000-0000-0000-000000000001"),
        (Colour.RED, "red"),
        (Level.HIGH, 3),
        (Room("A", 80, date(2026, 3, 1)), {"name": "A", "seats": 80, "opened": "2026-03-01"}),
        ((1, 2), [1, 2]),
    ],
)
def test_what_json_does_not_know_is_written_in_the_usual_way(value: Any, written: Any) -> None:
    assert json.loads(encode({"value": value}, limit=_LIMIT)) == {"value": written}


@pytest.mark.parametrize(
    ("value", "said"),
    [
        (float("nan"), "data.talk[1] is nan, which JSON can't express"),
        (float("inf"), "data.talk[1] is inf, which JSON can't express"),
        (b"bytes", "data.talk[1] is a bytes, which JSON can't express"),
        ({1, 2}, "data.talk[1] is a set, which JSON can't express"),
        ("\ud800", "data.talk[1] is text that UTF-8 can't express"),
        (Talk(title="x"), "data.talk[1] is a Talk, a database object; send its id"),
        (Room(name=object(), seats=1), "data.talk[1].name is a object"),  # type: ignore[arg-type]
        ({(1, 2): 3}, "data.talk[1] has the key (1, 2), which JSON can't express"),
    ],
)
def test_what_can_not_be_written_is_refused_with_its_place(value: Any, said: str) -> None:
    with pytest.raises(InvalidMessage) as refused:
        encode({"id": 1, "talk": [0, value]}, limit=_LIMIT)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("value", [{float("nan"): 1}, {"\ud800": 1}])
def test_a_key_that_can_not_be_written_is_refused_too(value: Any) -> None:
    with pytest.raises(InvalidMessage, match=r"data has the key .*, which JSON can't express; use text"):
        encode(value, limit=_LIMIT)


def test_data_that_contains_itself_or_is_too_deep_is_refused() -> None:
    cycle: dict[str, Any] = {}
    cycle["self"] = cycle
    room = Room("A", 1)
    room.name = room  # type: ignore[assignment]
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    for data in (cycle, room, deep):
        with pytest.raises(InvalidMessage, match="contains itself or is nested too deep"):
            encode(data, limit=_LIMIT)


def test_the_limit_counts_bytes_and_takes_the_last_one() -> None:
    assert len(encode("ü" * 10, limit=22)) == 22
    with pytest.raises(InvalidMessage, match="the data has 22 bytes, more than OUTBOX_MAX_BODY=21; send ids or a link"):
        encode("ü" * 10, limit=21)


# --- the envelope -------------------------------------------------------------------------------------------------------


def test_ids_are_version_7_and_sort_by_time() -> None:
    first, *_, last = ids = [new_id() for _ in range(1000)]
    assert {(each.version, each.variant) for each in ids} == {(7, "specified in RFC 4122")}
    assert len(set(ids)) == 1000
    assert first.int >> 80 <= last.int >> 80
    assert abs((first.int >> 80) / 1000 - datetime.now(UTC).timestamp()) < 60


@pytest.mark.parametrize("topic", ["", "a b", "a\n", "a.*", "a.#", "\u200b", "ü" * 128, "\ud800", 7])
def test_a_topic_that_is_no_routing_key_is_refused(topic: Any) -> None:
    with pytest.raises(InvalidMessage, match=r"^topic "):
        builders.message(topic)


@pytest.mark.parametrize("key", ["", "a\tb", "x" * 256, "\x00", 7])
def test_a_key_that_can_not_travel_is_refused(key: Any) -> None:
    with pytest.raises(InvalidMessage, match=r"^key "):
        builders.message(key=key)


def test_names_up_to_255_bytes_are_fine() -> None:
    assert builders.message("t" * 255, key="ü" * 127 + "x", source="/s").topic == "t" * 255


@pytest.mark.parametrize("name", ["", "Upper", "with-dash", "x" * 21, "ü", 7, "a\n", *sorted(RESERVED_HEADERS)])
def test_a_header_name_that_means_something_else_is_refused(name: Any) -> None:
    with pytest.raises(InvalidMessage, match=r"^header "):
        builders.message(headers={name: "x"})


@pytest.mark.parametrize("value", ["x" * 256, "a\nb", "\ud800", 7, None])
def test_a_header_value_that_can_not_travel_is_refused(value: Any) -> None:
    with pytest.raises(InvalidMessage, match=r"^header 'tenant': its value must be printable text"):
        builders.message(headers={"tenant": value})


def test_a_time_without_zone_is_refused() -> None:
    with pytest.raises(InvalidMessage, match="has no time zone"):
        builders.message(created_at=datetime(2026, 1, 1))  # noqa: DTZ001


# --- message ⇄ wire -----------------------------------------------------------------------------------------------------

_printable = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp", "Zs")), min_size=1
)
_name = _printable.filter(lambda text: len(text.encode()) <= 255 and text.isprintable())
_topic = _name.filter(lambda text: not set(text) & set("*#"))
_header = st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True).filter(lambda name: name not in RESERVED_HEADERS)
_times = st.datetimes(datetime(1970, 1, 1), datetime(9999, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001


@st.composite
def _messages(draw: st.DrawFn) -> tuple[Message, Any]:
    """A message and the data a consumer is to read."""
    binary = draw(st.booleans())
    raw = draw(st.binary(max_size=50))
    data = draw(_json)
    key = draw(st.none() | _name)
    message = Message(
        id=new_id(),
        source=draw(_name),
        topic=draw(_topic),
        key=key,
        sequence=None if key is None else draw(st.integers(1, 2**63 - 1)),
        body=raw if binary else encode(data, limit=10**6),
        content_type="application/octet-stream" if binary else JSON,
        headers=draw(st.dictionaries(_header, _name | st.just(""), max_size=3)),
        created_at=draw(_times),
    )
    return message, (raw or None) if binary else data


@given(_messages())
def test_a_consumer_reads_what_was_sent(pair: tuple[Message, Any]) -> None:
    message, data = pair
    found = received(cloud_event(message))
    assert (found.id, found.source, found.topic) == (str(message.id), message.source, message.topic)
    assert (found.key, found.sequence, found.created_at) == (message.key, message.sequence, message.created_at)
    assert dict(found.headers) == dict(message.headers)
    assert found.data == data
    assert found.late is False
    if message.body:
        assert found.content_type == message.content_type


@given(_messages())
def test_the_cloudevents_package_reads_the_same(pair: tuple[Message, Any]) -> None:
    message, data = pair
    event = JSONFormat().read(CloudEvent, cloud_event(message))
    assert (event.get_id(), event.get_source(), event.get_type()) == (str(message.id), message.source, message.topic)
    assert (event.get_subject(), event.get_extension("partitionkey")) == (message.key, message.key)
    assert event.get_time() == message.created_at
    assert event.get_extension("sequence") == (None if message.sequence is None else f"{message.sequence:020d}")
    assert {name: event.get_extension(name) for name in message.headers} == dict(message.headers)
    assert event.get_data() == data
    assert event.get_datacontenttype() == (message.content_type if message.body or message.content_type != JSON else None)


@given(_messages())
def test_what_the_cloudevents_package_writes_is_read_the_same(pair: tuple[Message, Any]) -> None:
    message, _ = pair
    ours = received(cloud_event(message))
    theirs = received(JSONFormat().write(JSONFormat().read(CloudEvent, cloud_event(message))))
    assert theirs == ours


def test_the_body_goes_out_byte_for_byte() -> None:
    body = b'{"b" : 1.0, "a":\t[ ], "a": "\\u00fc"}'
    assert body in cloud_event(builders.message(body=body))


def test_sequences_sort_as_text_as_they_do_as_numbers() -> None:
    texts = [json.loads(cloud_event(builders.message(key="k", sequence=number)))["sequence"] for number in (9, 10, 2**63 - 1)]
    assert texts == sorted(texts)


def test_an_empty_body_is_an_event_without_data() -> None:
    event = json.loads(cloud_event(builders.message(body=b"")))
    assert not {"data", "data_base64", "datacontenttype"} & set(event)
    assert received(cloud_event(builders.message(body=b""))).data is None


# --- what others publish ------------------------------------------------------------------------------------------------


def _event(**attributes: Any) -> bytes:
    return json.dumps({"specversion": "1.0", "id": "1", "source": "/other", "type": "a.b", **attributes}).encode()


def test_the_smallest_event_is_enough() -> None:
    found = received(_event())
    assert (found.id, found.topic, found.key, found.sequence, found.data, found.created_at) == (
        "1",
        "a.b",
        None,
        None,
        None,
        None,
    )
    assert (found.content_type, dict(found.headers)) == (JSON, {})


def test_null_means_that_an_attribute_is_not_there() -> None:
    found = received(_event(partitionkey=None, sequence=None, time=None, datacontenttype=None, tenant=None, data=None))
    assert found == received(_event())


def test_extensions_are_text_as_cloudevents_writes_them() -> None:
    assert dict(received(_event(flag=True, other=False, number=7)).headers) == {"flag": "true", "other": "false", "number": "7"}


@pytest.mark.parametrize("sequence", ["", "-1", "1.5", "x", "٣", 7, True, str(2**63), "9" * 5000])
def test_a_sequence_that_is_no_number_says_nothing_about_order(sequence: Any) -> None:
    assert received(_event(sequence=sequence)).sequence is None


@pytest.mark.parametrize(
    "text", ["yesterday", "2026-01-01T00:00:00", 7, "0001-01-01T00:00:00+14:00", "9999-12-31T23:59:59-12:00"]
)
def test_a_time_that_is_none_is_left_out(text: Any) -> None:
    assert received(_event(time=text)).created_at is None


@pytest.mark.parametrize(
    ("content_type", "data"),
    [
        (None, {"a": 1}),
        ("application/json; charset=utf-8", {"a": 1}),
        ("application/vnd.shop+json", {"a": 1}),
        ("text/plain", b'{"a":1}'),
        ("application/jsonl", b'{"a":1}'),
    ],
)
def test_data_in_base64_is_what_its_content_type_says(content_type: str | None, data: Any) -> None:
    encoded = base64.b64encode(b'{"a":1}').decode()
    assert received(_event(data_base64=encoded, datacontenttype=content_type)).data == data


@pytest.mark.parametrize(
    ("wire", "said"),
    [
        (b"", "no JSON"),
        (b"\xff\xfe\xfd", "no JSON"),
        (b"[" * 100_000, "no JSON"),
        (b"[]", "the JSON is no object but list"),
        (b"{}", "specversion is not '1.0'"),
        (_event(specversion="0.3"), "specversion is not '1.0'"),
        (_event(id=""), "id is no text"),
        (_event(id=7), "id is no text"),
        (_event(source=None), "source is missing"),
        (_event(type=["a"]), "type is no text"),
        (_event(partitionkey=7), "partitionkey is no text"),
        (_event(data_base64="*"), "event 1: data_base64 is not base64"),
        (_event(data_base64=7), "event 1: data_base64 is not base64"),
        (_event(data_base64="ew=="), "event 1: data_base64 holds no application/json: JSONDecodeError"),
        (_event(data_base64="/w==", datacontenttype="text/json"), "data_base64 holds no text/json: UnicodeDecodeError"),
    ],
)
def test_anything_else_is_refused_with_what_is_wrong(wire: bytes, said: str) -> None:
    with pytest.raises(InvalidMessage, match=said):
        received(wire)


@given(st.binary(max_size=200) | _json.map(lambda data: json.dumps(data).encode()))
def test_no_bytes_from_the_wire_raise_anything_but_invalid_message(wire: bytes) -> None:
    with pytest.raises(InvalidMessage):
        received(wire)


@given(
    st.dictionaries(st.sampled_from(["id", "source", "type", "time", "sequence", "partitionkey", "data", "data_base64"]), _json)
)
def test_no_attribute_raises_anything_but_invalid_message(attributes: dict[str, Any]) -> None:
    with contextlib.suppress(InvalidMessage):
        received(_event(**attributes))
