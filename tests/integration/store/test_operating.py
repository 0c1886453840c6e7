"""The statements of the operator's commands, on each database."""

from __future__ import annotations

from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox import database, migrations, tables
from outbox.errors import OutboxError
from outbox.message import new_id
from outbox.store import operating, status
from outbox.store.operating import Filter
from outbox.tables import State
from tests.kit import builders

if TYPE_CHECKING:
    from collections.abc import Iterator
    from uuid import UUID

    from sqlalchemy.engine import Connection, Engine

    from outbox.message import Message


@pytest.fixture(scope="module", params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def engine(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Engine]:
    """One database for all tests here: each of them rolls back."""
    with ExitStack() as stack:
        if request.param == "sqlite":
            url = f"sqlite:///{tmp_path_factory.mktemp('operate')}/outbox.db"
        else:
            url = stack.enter_context(request.getfixturevalue("postgres_server").database())
        made = database.create_engine(url)
        stack.callback(made.dispose)
        migrations.upgrade(made)
        yield made


@pytest.fixture
def connection(engine: Engine) -> Iterator[Connection]:
    with engine.connect() as opened, opened.begin() as transaction:
        yield opened
        transaction.rollback()


def _put(
    connection: Connection, *messages: Message, state: State | None = State.PENDING, error: str | None = None
) -> list[UUID]:
    """Write *messages* in *state*; None: published, hence without a pending row."""
    for row in builders.write(connection, *messages, state=state or State.PENDING):
        if state is None:
            connection.execute(sa.delete(tables.pending).where(tables.pending.c.id == row))
        elif error is not None:
            connection.execute(sa.update(tables.pending).where(tables.pending.c.id == row).values(error=error))
    return [message.id for message in messages]


def _receipt(connection: Connection, relay: str, settled_at: datetime, *ids: UUID) -> None:
    rows = [entry.row for entry in operating.find(connection, ids)]
    connection.execute(
        sa.insert(tables.receipt).values(
            relay=relay,
            settled_at=settled_at,
            messages=len(ids),
            first_row=min(rows),
            last_row=max(rows),
            pending_ids=b"".join(row.to_bytes(8, "big") for row in rows),
            message_ids=b"".join(id_.bytes for id_ in ids),
            oldest_age_seconds=1.0,
            duration_seconds=0.1,
        )
    )


def _row(connection: Connection, id_: UUID) -> int:
    return operating.find(connection, [id_])[0].row


def _heartbeat(connection: Connection, id: str, seen_ago: float, **values: object) -> None:
    now = datetime.now(UTC)
    given = {"state": "running", "broker_connected": True, "broker_blocked": False, **values}
    connection.execute(
        sa.insert(tables.relay).values(
            id=id, host="host", pid=1, version="1", started_at=now, seen_at=now - timedelta(seconds=seen_ago), **given
        )
    )


# --- list ---------------------------------------------------------------------------------------------------------------


def test_messages_are_listed_newest_first_with_their_states(connection: Connection) -> None:
    published = _put(connection, builders.message(), state=None)
    dead = _put(connection, builders.message(key="k"), state=State.DEAD, error="406 too large")
    pending = _put(connection, builders.message(key="k"))
    found = operating.entries(connection, Filter(), limit=10)
    assert [(entry.id, entry.state) for entry in found] == [
        (pending[0], "pending"),
        (dead[0], "dead"),
        (published[0], "published"),
    ]
    assert (found[1].key, found[1].sequence, found[1].last_error) == ("k", 1, "406 too large")
    assert (found[2].attempts, found[2].last_error, found[2].available_at) == (0, None, None)


@pytest.mark.parametrize("state", operating.STATES)
def test_a_state_lists_its_messages_alone(connection: Connection, state: str) -> None:
    ids = {
        each: _put(connection, builders.message(), state=None if each == "published" else State(each))[0]
        for each in operating.STATES
    }
    assert [entry.id for entry in operating.entries(connection, Filter(state=state), limit=10)] == [ids[state]]


@pytest.mark.parametrize("state", [None, "pending", "published", "unroutable"])
def test_topic_and_key_narrow_every_list(connection: Connection, state: str | None) -> None:
    as_state = None if state == "published" else State(state or "pending")
    wanted, *_ = _put(
        connection,
        builders.message("a", key="1"),
        builders.message("a", key="2"),
        builders.message("b", key="1"),
        builders.message("a"),
        state=as_state,
    )
    assert [entry.id for entry in operating.entries(connection, Filter(state=state, topic="a", key="1"), limit=9)] == [wanted]


@pytest.mark.parametrize("state", [None, "pending"])
def test_pages_follow_each_other_without_gap_or_overlap(connection: Connection, state: str | None) -> None:
    ids = _put(connection, *(builders.message() for _ in range(25)))
    seen: list[UUID] = []
    before = None
    while page := operating.entries(connection, Filter(state=state), limit=10, before=before):
        seen += [entry.id for entry in page]
        before = page[-1].row
    assert seen == ids[::-1]


def test_all_unknown_ids_are_named(connection: Connection) -> None:
    (known,) = _put(connection, builders.message())
    strangers = [new_id(), new_id()]
    with pytest.raises(OutboxError) as refused:
        operating.find(connection, [strangers[0], known, strangers[1]])
    assert str(refused.value).splitlines() == [f"message {each} is not in this outbox" for each in strangers]


def test_an_id_given_twice_is_one_message(connection: Connection) -> None:
    (known,) = _put(connection, builders.message())
    assert [entry.id for entry in operating.find(connection, [known, known])] == [known]


# --- show ---------------------------------------------------------------------------------------------------------------


def test_a_message_tells_when_it_was_published_and_by_whom(connection: Connection) -> None:
    ids = _put(connection, *(builders.message() for _ in range(6)), state=None)
    first, second = datetime(2026, 1, 1, tzinfo=UTC), datetime(2026, 1, 2, tzinfo=UTC)
    # Both span the rows of all six: only the packed ids tell whose they are.
    _receipt(connection, "relay-1", first, ids[0], ids[2], ids[5])
    _receipt(connection, "relay-2", second, ids[0], ids[1], ids[5])

    def published(id_: UUID) -> list[tuple[str, datetime]]:
        return [(item.relay, item.at) for item in operating.detail(connection, id_).publications]

    assert published(ids[0]) == [("relay-1", first), ("relay-2", second)]
    assert published(ids[1]) == [("relay-2", second)]
    assert published(ids[2]) == [("relay-1", first)]
    assert published(ids[3]) == []


def test_an_id_that_only_straddles_two_packed_ids_is_not_published() -> None:
    wanted = new_id().bytes
    straddling = b"\0" * 8 + wanted + b"\0" * 8
    assert not operating._holds(straddling, wanted)
    assert operating._holds(straddling + wanted, wanted)


def test_a_message_shows_its_body_and_headers_as_stored(connection: Connection) -> None:
    (id_,) = _put(connection, builders.message(body=b'{"a": 1}'))
    connection.execute(sa.update(tables.message).values(headers='{"traceparent":"00-ab"}'))
    found = operating.detail(connection, id_)
    assert (found.body, found.headers, found.content_type) == (b'{"a": 1}', {"traceparent": "00-ab"}, "application/json")


def test_a_pending_message_names_the_one_that_holds_its_key(connection: Connection) -> None:
    _put(connection, builders.message("a", key="k"), state=None)
    (holder,) = _put(connection, builders.message("b", key="k"), state=State.DEAD)
    _put(connection, builders.message("a", key="other"), state=State.DEAD)
    (waiting,) = _put(connection, builders.message("a", key="k"))
    held_by = operating.detail(connection, waiting).held_by
    assert held_by is not None
    assert held_by.id == holder
    assert operating.detail(connection, holder).held_by is None


def test_an_unroutable_message_holds_only_its_topic_and_a_discarded_one_nothing(connection: Connection) -> None:
    (unroutable,) = _put(connection, builders.message("a", key="k"), state=State.UNROUTABLE)
    _put(connection, builders.message("b", key="k"), state=State.DISCARDED)
    same, other = _put(connection, builders.message("a", key="k"), builders.message("b", key="k"))
    held_by = operating.detail(connection, same).held_by
    assert held_by is not None
    assert held_by.id == unroutable
    assert operating.detail(connection, other).held_by is None


# --- requeue and discard ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("state", operating.ACTIONABLE)
def test_requeue_makes_a_message_pending_now_in_its_old_place(connection: Connection, state: State) -> None:
    (id_,) = _put(connection, builders.message(key="k"), state=state, error="406 too large")
    before = connection.execute(sa.select(tables.pending)).one()
    connection.execute(sa.update(tables.pending).values(attempts=10, available_at=datetime(2030, 1, 1, tzinfo=UTC)))
    assert operating.requeue(connection, [_row(connection, id_)], actor="ada@host") == [id_]
    after = connection.execute(sa.select(tables.pending)).one()
    assert (after.id, after.sequence, after.shard) == (before.id, before.sequence, before.shard)
    assert (after.state, after.attempts, after.error) == ("pending", 0, None)
    assert after.available_at <= datetime.now(UTC) + timedelta(seconds=5)
    (action,) = operating.detail(connection, id_).actions
    assert (action.action, action.actor, action.reason) == ("requeue", "ada@host", f"was {state}: 406 too large")


def test_discard_keeps_the_message_with_the_reason_and_frees_its_key(connection: Connection) -> None:
    (id_,) = _put(connection, builders.message(key="k"), state=State.DEAD, error="406 too large")
    (waiting,) = _put(connection, builders.message(key="k"))
    assert operating.discard(connection, [_row(connection, id_)], actor="ada@host", reason="a test message") == [id_]
    found = operating.detail(connection, id_)
    assert (found.entry.state, found.entry.last_error) == ("discarded", "406 too large")
    assert [(item.action, item.reason) for item in found.actions] == [("discard", "a test message")]
    assert operating.detail(connection, waiting).held_by is None
    assert status.overview(connection).held_keys == 0


def test_a_message_that_has_moved_on_is_left_as_it_is(connection: Connection) -> None:
    (pending,) = _put(connection, builders.message())
    (published,) = _put(connection, builders.message(), state=None)
    (discarded,) = _put(connection, builders.message(), state=State.DISCARDED)
    rows = [_row(connection, id_) for id_ in (pending, published, discarded)]
    assert operating.requeue(connection, rows, actor="ada@host") == []
    assert operating.discard(connection, rows, actor="ada@host", reason="x") == []
    assert connection.scalar(sa.select(sa.func.count()).select_from(tables.action)) == 0
    assert [entry.state for entry in operating.find(connection, [pending, published, discarded])] == [
        "pending",
        "published",
        "discarded",
    ]


def test_a_filter_counts_and_walks_its_messages_once(connection: Connection) -> None:
    wanted = _put(connection, *(builders.message("a") for _ in range(5)), state=State.UNROUTABLE)
    _put(connection, builders.message("b"), state=State.UNROUTABLE)
    _put(connection, builders.message("a"), state=State.DEAD)
    which = Filter(state="unroutable", topic="a")
    assert operating.count(connection, which) == 5
    rows = operating.matching(connection, which, after=0)
    assert sorted(row for _, row in rows) == sorted(entry.row for entry in operating.find(connection, wanted))
    assert operating.matching(connection, which, after=rows[-1][0]) == []


def test_known_topics_are_those_seen_lately_the_stuck_ones_included(connection: Connection) -> None:
    _put(connection, builders.message("stuck"), state=State.UNROUTABLE)
    _put(connection, *(builders.message("next") for _ in range(3)))
    _put(connection, *(builders.message("newest") for _ in range(3)), state=None)
    assert operating.topics(connection, sample=2) == ["newest", "next", "stuck"]


# --- status -------------------------------------------------------------------------------------------------------------


def test_an_empty_outbox_is_all_zeros(connection: Connection) -> None:
    found = status.overview(connection)
    numbers = (found.pending, found.retrying, found.scheduled, found.unroutable, found.dead, found.discarded, found.held_keys)
    assert numbers == (0,) * 7
    assert (found.lag_seconds, found.published_total, found.published_per_second, found.last_published_at) == (
        0.0,
        0,
        0.0,
        None,
    )
    assert (found.stuck, found.relays, found.counted_all) == ((), (), True)


def test_messages_are_counted_by_what_they_wait_for(connection: Connection) -> None:
    _put(connection, builders.message(), builders.message())
    builders.write(connection, builders.message(), available_in=3600)
    builders.write(connection, builders.message(), state=State.RETRYING, available_in=3600)
    for state, number in ((State.UNROUTABLE, 3), (State.DEAD, 2), (State.DISCARDED, 1)):
        _put(connection, *(builders.message() for _ in range(number)), state=state)
    _put(connection, builders.message(), state=None)
    found = status.overview(connection)
    assert (found.pending, found.retrying, found.scheduled) == (3, 1, 1)
    assert (found.unroutable, found.dead, found.discarded, found.held_keys) == (3, 2, 1, 0)


def test_lag_is_the_age_of_the_oldest_message_that_is_due(connection: Connection) -> None:
    def aged(seconds: float) -> Message:
        return builders.message(created_at=datetime.now(UTC) - timedelta(seconds=seconds))

    _put(connection, aged(900), state=None)
    _put(connection, aged(800), state=State.DEAD)
    builders.write(connection, aged(700), available_in=3600)
    assert status.overview(connection).lag_seconds == 0.0
    _put(connection, aged(60), aged(50))
    assert status.overview(connection).lag_seconds == pytest.approx(60, abs=20)


def test_held_keys_come_with_what_holds_them_and_how_many_wait(connection: Connection) -> None:
    (dead,) = _put(connection, builders.message("a", key="1"), state=State.DEAD, error="406 too large")
    (unroutable,) = _put(connection, builders.message("a", key="2"), state=State.UNROUTABLE)
    _put(connection, builders.message("a"), state=State.UNROUTABLE)
    _put(connection, builders.message("a", key="3"), state=State.DISCARDED)
    for key in ("1", "2", "3"):
        _put(connection, builders.message("a", key=key), builders.message("b", key=key))
    found = status.overview(connection)
    assert found.held_keys == 2
    first, second, third = found.stuck
    assert (first.id, first.state, first.key, first.behind, first.last_error) == (dead, "dead", "1", 2, "406 too large")
    assert (second.id, second.state, second.key, second.behind) == (unroutable, "unroutable", "2", 1)
    assert (third.key, third.behind) == (None, 0)


def test_what_was_published_is_summed_from_receipts(connection: Connection) -> None:
    ids = _put(connection, *(builders.message() for _ in range(3)), state=None)
    now = datetime.now(UTC)
    _receipt(connection, "relay-1", now - timedelta(hours=1), *ids)
    _receipt(connection, "relay-1", now - timedelta(seconds=5), *ids[:2])
    found = status.overview(connection)
    assert found.published_total == 5
    assert found.published_per_second == pytest.approx(2 / 60)
    assert found.last_published_at is not None
    assert abs((found.last_published_at - now).total_seconds()) < 60


def test_relays_come_latest_first_with_the_shards_they_hold_now(connection: Connection) -> None:
    _heartbeat(connection, "gone", 7200, broker_connected=False, broker_detail="refused")
    _heartbeat(connection, "here", 0)
    _heartbeat(connection, "forgotten", 100_000)
    lease = datetime.now(UTC) + timedelta(minutes=5)
    owned = tables.shard.c.id < 48
    connection.execute(sa.update(tables.shard).where(owned).values(owner="here", lease_until=lease))
    connection.execute(sa.update(tables.shard).where(~owned).values(owner="gone", lease_until=lease - timedelta(hours=1)))
    here, gone = status.overview(connection).relays
    assert (here.id, here.shards, here.state) == ("here", 48, "running")
    assert (gone.id, gone.shards, gone.broker_connected, gone.broker_detail) == ("gone", 0, False, "refused")
    assert here.seen_age_seconds < 60
    assert gone.seen_age_seconds == pytest.approx(7200, abs=60)


def test_more_than_are_counted_is_said_to_be_a_lower_bound(connection: Connection, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "COUNTED", 3)
    _put(connection, *(builders.message() for _ in range(5)))
    _put(connection, builders.message(), state=State.DEAD)
    found = status.overview(connection)
    assert (found.pending, found.counted_all, found.dead) == (3, False, 1)


def test_whatever_looks_for_stuck_messages_uses_their_small_index(engine: Engine) -> None:
    asked: list[tuple[str, Any]] = []

    def remember(_connection: object, _cursor: object, statement: str, parameters: Any, *_: object) -> None:
        if "outbox_pending.state <> 'pending'" in statement:
            asked.append((statement, parameters))

    with engine.begin() as connection:
        if connection.dialect.name == "postgresql":
            connection.exec_driver_sql("SET LOCAL enable_seqscan = off")  # an empty table is as well read whole
        sa.event.listen(engine, "before_cursor_execute", remember)
        status.overview(connection)
        operating.entries(connection, Filter(state="dead"), limit=1)
        operating.count(connection, Filter(state="dead"))
        operating.topics(connection)
        sa.event.remove(engine, "before_cursor_execute", remember)
        assert len(asked) >= 8
        explain = "EXPLAIN " if connection.dialect.name == "postgresql" else "EXPLAIN QUERY PLAN "
        for statement, parameters in asked:
            plan = " ".join(str(row) for row in connection.exec_driver_sql(explain + statement, parameters))
            assert "outbox_pending_hold" in plan, (statement, plan)


def test_new_rows_are_read_from_a_floor(connection: Connection) -> None:
    old = _put(connection, builders.message())
    floor = operating.newest_row(connection)
    a, b = _put(connection, builders.message("a"), builders.message("b"))
    assert operating.by_rows(connection, operating.rows_above(connection, floor, None, 10)) == operating.find(
        connection, [a, b]
    )
    assert [entry.id for entry in operating.by_rows(connection, operating.rows_above(connection, floor, "b", 10))] == [b]
    assert old
