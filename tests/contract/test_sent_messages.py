"""What `send()` accepts reaches a consumer as it was: nothing that it takes is refused on the way, or changed."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pika import frame
from sqlalchemy.orm import Session
from sqlalchemy.pool import StaticPool

from outbox import InvalidMessage, Outbox, migrations, tables
from outbox.database import create_engine
from outbox.message import JSON, RESERVED_HEADERS, Message, is_json, received
from outbox.relay.rabbitmq.frames import PublishEncoder
from outbox.store import relaying

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

_GOOD = st.text(st.characters(categories=("L", "N", "P"), exclude_characters="*#"), min_size=1, max_size=60)
_BAD = st.one_of(st.text(max_size=20), st.text(st.sampled_from("a.*# é😀\x00\x7f\u2028\ud800"), max_size=5))
_LONG = st.text("aé", min_size=200, max_size=260)
_TEXTS = st.sampled_from([_GOOD] * 8 + [_LONG, _BAD]).flatmap(lambda texts: texts)
_NAMES = st.sampled_from(
    [st.from_regex(r"[a-z0-9]{1,20}", fullmatch=True)] * 30 + [st.sampled_from([*sorted(RESERVED_HEADERS), "CC"])]
)
_HEADERS: st.SearchStrategy[dict[str, str]] = st.dictionaries(_NAMES.flatmap(lambda names: names), _TEXTS, max_size=5)
_LEAVES = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text())
_JSON = st.recursive(
    _LEAVES, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4)
)
_TYPES = st.sampled_from(["text/plain", "image/png", "text/json", "a/b+json; c=d", "x" * 255]) | _TEXTS
_DATA = st.one_of(
    st.tuples(_JSON, st.just(JSON)), st.tuples(st.binary(max_size=60), _TYPES), st.tuples(st.just(b"[1]"), _TYPES)
)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    engine = create_engine("sqlite://", poolclass=StaticPool)
    migrations.upgrade(engine)
    yield engine
    engine.dispose()


def written(engine: Engine, **arguments: Any) -> Message | None:
    """Return what the relay reads after `send()` and a commit; None where `send()` refuses it."""
    outbox = Outbox(source="/tests", engine=engine)
    with Session(engine) as session:
        session.begin()
        try:
            outbox.send(session=session, **arguments)
        except InvalidMessage:
            return None
        session.commit()
        row = session.scalars(sa.select(sa.func.max(tables.message.c.id))).one()
        found = relaying.messages(session.connection(), [row], max_bytes=2**20).found[row]
    assert isinstance(found, Message)
    return found


def on_the_wire(sent: Message) -> bytes:
    """Return the body that a consumer gets, where a broker asks for the smallest frames that AMQP allows."""
    encoder = PublishEncoder(channel=1, exchange="e" * 255, app_id="a" * 255, frame_max=4096)
    wire, body = encoder.encode(sent, str(sent.id)), b""
    while wire:
        used, found = frame.decode_frame(wire)
        assert found is not None
        assert used <= 4096
        body += getattr(found, "fragment", b"")
        wire = wire[used:]
    return body


@settings(max_examples=120, deadline=None)
@given(topic=_TEXTS, key=st.none() | _TEXTS, data=_DATA, headers=_HEADERS)
@example(topic="é" * 127, key="é" * 127, data=(1, JSON), headers={f"n{number:019}": "x" * 255 for number in range(7)})
@example(topic="a", key=None, data=(b"", "text/plain"), headers={"correlationid": "c" * 255})
def test_what_is_accepted_is_read_as_it_was_sent(
    engine: Engine, topic: str, key: str | None, data: tuple[Any, str], headers: dict[str, str]
) -> None:
    sent = written(engine, topic=topic, key=key, data=data[0], content_type=data[1], headers=headers)
    if sent is None:
        return
    read = received(on_the_wire(sent))
    assert (read.id, read.source, read.topic, read.key) == (str(sent.id), "/tests", topic, key)
    assert (read.content_type, read.headers, read.created_at) == (data[1], headers, sent.created_at)
    assert (read.sequence is None) == (key is None)
    if data[1] == JSON:
        assert same(read.data, data[0])
    elif not is_json(data[1]):
        assert read.data == (data[0] or None)


def same(one: Any, other: Any) -> bool:
    """Say whether two pieces of JSON are equal, with -0.0 and 0.0, 1 and True told apart."""
    if isinstance(one, float) and isinstance(other, float):
        return one == other and math.copysign(1, one) == math.copysign(1, other)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(same, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(same(one[name], other[name]) for name in one)
    return type(one) is type(other) and bool(one == other)
