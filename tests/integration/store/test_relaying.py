"""The statements of the relay, on SQLite and PostgreSQL."""

from __future__ import annotations

import struct
from random import Random
from typing import TYPE_CHECKING, Any
from uuid import UUID

import pytest
import sqlalchemy as sa

from outbox import database, tables
from outbox.errors import InvalidMessage
from outbox.message import Message
from outbox.store import leases, locks, relaying, settling
from outbox.store.relaying import Ahead, Exclusions
from outbox.store.settling import Change, Confirmed
from outbox.tables import State
from tests.kit.builders import message, write, write_message, write_pending
from tests.kit.costs import looked_at

if TYPE_CHECKING:
    from sqlalchemy.engine import Engine


def keyed(topic: str = "x", key: str = "a") -> Message:
    return message(topic, key)


def written(engine: Engine, *messages: Message, **how: object) -> list[int]:
    with engine.begin() as connection:
        return write(connection, *messages, **how)  # type: ignore[arg-type]


def read(engine: Engine, *, after: int = 0, limit: int = 100, exclude: Exclusions | None = None) -> list[int]:
    with database.reading(engine).connect() as connection:
        return [row.id for row in relaying.read(connection, after=after, limit=limit, exclude=exclude or Exclusions()).rows]


def states(engine: Engine) -> dict[int, str]:
    with engine.connect() as connection:
        return {row.id: row.state for row in connection.execute(sa.select(tables.pending.c.id, tables.pending.c.state))}


# --- read ---


def test_rows_come_in_order_of_their_ids_above_a_given_one_up_to_a_limit(engine: Engine) -> None:
    ids = written(engine, *(message() for _ in range(5)))
    assert read(engine) == ids
    assert read(engine, after=ids[1], limit=2) == ids[2:4]


def test_a_row_comes_with_all_the_relay_decides_by(engine: Engine) -> None:
    each = keyed("session.modified", "event:1")
    written(engine, each, state=State.RETRYING, attempts=3, unheard="drop")
    with engine.connect() as connection:
        row = relaying.read(connection, after=0, limit=1, exclude=Exclusions()).rows[0]
    assert row[2:] == (row.shard, "session.modified", "event:1", 1, 3, "retrying", "drop")
    assert row.shard in range(64)


def test_rows_not_yet_due_are_left_out(engine: Engine) -> None:
    later = written(engine, message(), available_in=60.0)
    due = written(engine, message(), available_in=-60.0)
    assert read(engine) == due
    assert later != due


@pytest.mark.parametrize("state", [State.RETRYING, State.UNROUTABLE])
def test_the_row_that_holds_its_key_is_read_when_due_and_its_followers_are_not(engine: Engine, state: State) -> None:
    head = written(engine, keyed(), state=state)
    written(engine, keyed(), keyed())
    free = written(engine, keyed(key="b"), message())
    assert read(engine) == head + free


@pytest.mark.parametrize("state", [State.RETRYING, State.UNROUTABLE, State.DEAD])
def test_a_hold_not_due_keeps_its_followers_out_before_the_limit_is_counted(engine: Engine, state: State) -> None:
    written(engine, keyed(), state=state, available_in=60.0)
    written(engine, *(keyed() for _ in range(20)))
    free = written(engine, message())
    assert read(engine, limit=1) == free


def test_an_unroutable_message_holds_only_those_of_its_topic(engine: Engine) -> None:
    written(engine, keyed("x"), state=State.UNROUTABLE, available_in=60.0)
    other = written(engine, keyed("y"))
    written(engine, keyed("x"))
    assert read(engine) == other


def test_a_dead_or_discarded_message_is_never_read_and_a_discarded_one_holds_nothing(engine: Engine) -> None:
    written(engine, keyed(key="a"), state=State.DISCARDED)
    written(engine, message(), state=State.DEAD)
    follower = written(engine, keyed(key="a"))
    assert read(engine) == follower


def test_a_hold_does_not_hold_what_was_before_it(engine: Engine) -> None:
    first = written(engine, keyed())
    written(engine, keyed(), state=State.DEAD)
    assert read(engine) == first


def test_what_is_in_memory_is_left_out_in_the_statement(engine: Engine) -> None:
    ids = written(engine, message(), message("x"), keyed("y", "hot"), message("y"), message("z"))
    assert read(engine, limit=1, exclude=Exclusions(ids=ids[:2])) == [ids[2]]
    assert read(engine, limit=1, exclude=Exclusions(ids=ids[:2], keys=["hot"])) == [ids[3]]
    assert read(engine, limit=5, exclude=Exclusions(topics=["x", "y"])) == [ids[0], ids[4]]


def test_unroutable_rows_of_a_topic_can_be_left_out_while_new_ones_of_it_come(engine: Engine) -> None:
    written(engine, message("x"), state=State.UNROUTABLE)
    new = written(engine, message("x"))
    assert read(engine, exclude=Exclusions(unheard_topics=["x"])) == new


def test_keys_and_topics_are_compared_byte_by_byte(engine: Engine) -> None:
    names = ["Straße", "STRASSE", "ключ", 'quote"d', "back\\slash", "{a,b}"]
    ids = written(engine, *(keyed(key=name) for name in names))
    for name, id_ in zip(names, ids, strict=True):
        assert read(engine, exclude=Exclusions(keys=[other for other in names if other != name])) == [id_]


def test_what_holds_a_key_is_found_by_the_small_index_of_holding_rows_and_without_a_join(engine: Engine) -> None:
    """Whatever the statistics say: a plan that walks a backlog for each row would stop a relay when it matters."""
    explain = "EXPLAIN QUERY PLAN" if engine.dialect.name == "sqlite" else "EXPLAIN"
    plans: list[str] = []

    def keep_plan(connection: sa.Connection, cursor: Any, statement: str, parameters: Any, *_: Any) -> None:
        if "outbox_pending AS h" in statement and not plans:
            plans.append("")
            rows = connection.exec_driver_sql(f"{explain} {statement}", parameters).all()
            plans[0] = "\n".join(str(row) for row in rows)

    sa.event.listen(engine, "after_cursor_execute", keep_plan)
    try:
        read(engine)
    finally:
        sa.event.remove(engine, "after_cursor_execute", keep_plan)
    assert "outbox_pending_holds" in plans[0]
    assert "SubPlan" in plans[0] or "CORRELATED SCALAR SUBQUERY" in plans[0]
    assert "Seq Scan on outbox_pending h" not in plans[0]


def test_a_read_looks_at_so_many_rows_and_says_where_the_next_begins(engine: Engine) -> None:
    written(engine, keyed(), state=State.DEAD)
    held = written(engine, *(keyed() for _ in range(30)))
    free = written(engine, message())
    with database.reading(engine).connect() as connection:
        pages, after = [], 0
        while True:
            page = relaying.read(connection, after=after, limit=5, exclude=Exclusions(), scanned=10)
            pages.append(page)
            if page.end is None:
                break
            assert after < page.end
            after = page.end
    assert [row.id for page in pages for row in page.rows] == free
    assert 4 <= len(pages) <= 5
    assert pages[0].end == held[8] - 1


def test_a_read_that_found_enough_ends_with_the_last_it_found(engine: Engine) -> None:
    ids = written(engine, *(message() for _ in range(10)))
    with database.reading(engine).connect() as connection:
        page = relaying.read(connection, after=0, limit=3, exclude=Exclusions())
        assert ([row.id for row in page.rows], page.end) == (ids[:3], ids[2])
        page = relaying.read(connection, after=0, limit=3, exclude=Exclusions(), upto=ids[1])
        assert ([row.id for row in page.rows], page.end) == (ids[:2], ids[1])
        page = relaying.read(connection, after=0, limit=10, exclude=Exclusions(), scanned=4)
        assert ([row.id for row in page.rows], page.end) == (ids[:3], ids[3] - 1)


def test_a_topic_that_is_not_read_now_holds_the_later_messages_of_its_keys_and_no_others(engine: Engine) -> None:
    before = written(engine, keyed("y"))
    closed = written(engine, keyed("x"))
    behind = written(engine, keyed("y"))
    free = written(engine, keyed("y", "b"), message("y"))
    assert read(engine) == before + closed + behind + free
    assert read(engine, exclude=Exclusions(closed_topics=["x"])) == before + free
    assert read(engine, exclude=Exclusions(topics=["x"])) == before + behind + free


@pytest.mark.postgres
def test_what_was_discarded_costs_the_rest_of_its_key_nothing(postgres: Engine) -> None:
    written(postgres, *(keyed() for _ in range(300)), state=State.DISCARDED)
    ids = written(postgres, *(keyed() for _ in range(50)))
    with looked_at(postgres, "outbox_pending") as visited:
        assert read(postgres, limit=500) == ids
    assert visited[0] == 350


@pytest.mark.postgres
def test_a_read_costs_the_rows_of_a_page_however_many_must_wait(postgres: Engine) -> None:
    written(postgres, keyed(), state=State.DEAD)
    costs = []
    for more in (2000, 10_000):
        _many(postgres, more)
        with postgres.begin() as connection:  # by chance the server looked at the table when it was nearly empty
            connection.execute(sa.text("ANALYZE outbox_pending"))
        with looked_at(postgres, "outbox_pending") as visited, database.reading(postgres).connect() as connection:
            relaying.read(connection, after=0, limit=500, exclude=Exclusions(), scanned=80)
        costs.append(visited[0])
    assert costs[0] == costs[1] <= 2 * 81


# --- messages ---


def test_messages_come_by_row_number_as_they_were_stored(engine: Engine) -> None:
    one = message("x", "a", b'{"n":"\xc3\xa4"}', headers={"traceparent": "00-1"}, content_type="application/json")
    with engine.begin() as connection:
        row = write_message(connection, one, 7)
        connection.execute(sa.update(tables.message).values(headers='{"traceparent": "00-1"}'))
    with engine.connect() as connection:
        found, ids, postponed, _ = relaying.messages(connection, [row], max_bytes=1000)
    got = found[row]
    assert ids == {row: one.id}
    assert isinstance(got, Message)
    assert got.sequence == 7
    assert (got.id, got.body, got.headers, got.created_at) == (one.id, one.body, {"traceparent": "00-1"}, one.created_at)
    assert not postponed


def test_bodies_are_bounded_by_bytes_and_the_rest_is_postponed(engine: Engine) -> None:
    with engine.begin() as connection:
        rows = [write_message(connection, message(body=b"x" * 100), None) for _ in range(5)]
    with engine.connect() as connection:
        found, _, postponed, _ = relaying.messages(connection, rows, max_bytes=250)
        assert (list(found), postponed) == (rows[:3], frozenset(rows[3:]))
        alone, *_ = relaying.messages(connection, rows, max_bytes=1)
        assert list(alone) == rows[:1]
        everything, _, none, _ = relaying.messages(connection, rows, max_bytes=500)
        assert (list(everything), none) == (rows, frozenset())


def test_a_missing_message_is_neither_found_nor_postponed(engine: Engine) -> None:
    with engine.begin() as connection:
        row = write_message(connection, message(), None)
    with engine.connect() as connection:
        found, _, postponed, _ = relaying.messages(connection, [row, row + 1], max_bytes=1000)
    assert (list(found), postponed) == ([row], frozenset())


@pytest.mark.parametrize("broken", [{"topic": "a*b"}, {"headers": "[1]"}, {"headers": "no json"}, {"headers": '{"id":"x"}'}])
def test_a_stored_row_that_can_be_no_message_is_told_from_the_others(engine: Engine, broken: dict[str, str]) -> None:
    with engine.begin() as connection:
        rows = [write_message(connection, message(), None) for _ in range(2)]
        connection.execute(sa.update(tables.message).where(tables.message.c.id == rows[0]).values(**broken))
    with engine.connect() as connection:
        found, *_ = relaying.messages(connection, rows, max_bytes=1000)
    assert isinstance(found[rows[0]], InvalidMessage)
    assert isinstance(found[rows[1]], Message)


# --- predecessors ---


def ahead(engine: Engine, *ids: int) -> dict[int, Ahead]:
    with engine.connect() as connection:
        return relaying.predecessors(connection, ids)


@pytest.mark.parametrize("state", [State.PENDING, State.RETRYING, State.DEAD, State.UNROUTABLE])
def test_an_earlier_message_of_the_key_that_is_still_there_is_waited_for(engine: Engine, state: State) -> None:
    first = written(engine, keyed(), state=state)
    second = written(engine, keyed())
    assert ahead(engine, *first, *second) == {first[0]: Ahead.NOTHING, second[0]: Ahead.WAITS}


def test_discarded_ones_and_unroutable_ones_of_another_topic_are_not_waited_for(engine: Engine) -> None:
    written(engine, keyed("x"), state=State.DISCARDED)
    written(engine, keyed("x"), state=State.UNROUTABLE)
    other = written(engine, keyed("y"))
    assert ahead(engine, *other) == {other[0]: Ahead.PASSABLE}


def test_what_waits_behind_an_unroutable_one_of_its_topic_is_not_waited_for_by_other_topics(engine: Engine) -> None:
    before = written(engine, keyed("x"))
    written(engine, keyed("x"), state=State.UNROUTABLE)
    behind = written(engine, keyed("x"))
    other = written(engine, keyed("y"))
    assert ahead(engine, *behind, *other) == {behind[0]: Ahead.WAITS, other[0]: Ahead.WAITS}
    settle(engine, confirmed(engine, *before))
    assert ahead(engine, *behind, *other) == {behind[0]: Ahead.WAITS, other[0]: Ahead.PASSABLE}


def test_a_row_that_is_gone_or_was_discarded_meanwhile_gets_no_answer(engine: Engine) -> None:
    discarded = written(engine, keyed(), state=State.DISCARDED)
    assert ahead(engine, *discarded, 9999) == {}


def test_order_is_by_sequence_even_if_ids_say_otherwise(engine: Engine) -> None:
    with engine.begin() as connection:
        each = keyed()
        row = write_message(connection, each, 2)
        second = write_pending(connection, row, each, 2, id=100)
        first = write_pending(connection, row, each, 1, id=200)
    assert ahead(engine, first, second) == {first: Ahead.NOTHING, second: Ahead.WAITS}


def test_the_first_message_of_each_topic_decides_whatever_waits_behind_it(engine: Engine) -> None:
    """Against the rule said row by row, with keys of several topics and all states."""
    random = Random(7)
    for number in range(60):
        state = random.choice([*State, State.PENDING, State.PENDING])
        written(engine, keyed(random.choice("xyz"), f"k{number % 4}"), state=state)
    with engine.connect() as connection:
        rows = connection.execute(sa.select(tables.pending).order_by(tables.pending.c.id)).all()

    def before(row: Any) -> Ahead:
        earlier = [e for e in rows if e.key == row.key and e.sequence < row.sequence and e.state != State.DISCARDED]
        for each in earlier:
            unheard = [u for u in earlier if u.topic == each.topic and u.sequence <= each.sequence]
            if each.topic == row.topic or all(u.state != State.UNROUTABLE for u in unheard):
                return Ahead.WAITS
        return Ahead.PASSABLE if earlier else Ahead.NOTHING

    asked = [row for row in rows if row.state != State.DISCARDED]
    assert ahead(engine, *(row.id for row in rows)) == {row.id: before(row) for row in asked}


@pytest.mark.postgres
@pytest.mark.parametrize("state", [State.PENDING, State.DISCARDED])
def test_a_look_for_earlier_messages_costs_the_topics_of_the_key_and_not_what_waits_in_it(
    postgres: Engine, state: State
) -> None:
    written(postgres, keyed("unheard"), state=State.UNROUTABLE)
    costs = []
    for more in (100, 10_000):
        _many(postgres, more, topic="unheard", state=state)
        last = written(postgres, keyed("heard"))
        with looked_at(postgres, "outbox_pending") as visited:
            assert ahead(postgres, *last) == {last[0]: Ahead.PASSABLE}
        settle(postgres, confirmed(postgres, *last))
        costs.append(visited[0])
    assert costs[0] == costs[1] <= 20


def _many(engine: Engine, count: int, *, topic: str = "x", key: str = "a", state: State = State.PENDING) -> None:
    """Write *count* rows to outbox_pending alone, in one statement."""
    with engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO outbox_pending (message_row, shard, topic, key, sequence, available_at, state) "
            "SELECT n, 0, %s, %s::text, n + (SELECT max(sequence) FROM outbox_pending WHERE key = %s), now(), %s "
            "FROM generate_series(1, %s) n",
            (topic, key, key, state.value, count),
        )
        connection.exec_driver_sql(
            "UPDATE outbox_key SET sequence = (SELECT max(sequence) FROM outbox_pending WHERE key = %s) WHERE key = %s",
            (key, key),
        )


# --- settle ---


def confirmed(engine: Engine, *ids: int) -> list[Confirmed]:
    with engine.connect() as connection:
        rows = connection.execute(
            sa.select(tables.pending.c.id, tables.pending.c.message_row, tables.message.c.message_id)
            .join(tables.message, tables.message.c.id == tables.pending.c.message_row)
            .where(tables.pending.c.id.in_(ids))
            .order_by(tables.pending.c.id)
        )
        return [Confirmed(id_, row, message_id, 1.5, 0.25) for id_, row, message_id in rows]


def settle(engine: Engine, done: list[Confirmed], changes: list[Change] | None = None, relay: str = "me") -> settling.Settled:
    with engine.begin() as connection:
        return settling.settle(connection, relay, done, changes or [])


def test_a_confirmed_row_is_deleted_and_its_receipt_says_when_by_whom_and_which(engine: Engine) -> None:
    one, two = message(), message()
    ids = written(engine, one, two)
    done = confirmed(engine, *ids)
    assert settle(engine, done).deleted == 2
    assert states(engine) == {}
    with engine.connect() as connection:
        receipt = connection.execute(sa.select(tables.receipt)).one()
    assert (receipt.relay, receipt.messages) == ("me", 2)
    assert (receipt.first_row, receipt.last_row) == (done[0].message_row, done[1].message_row)
    assert struct.unpack(">2q", receipt.pending_ids) == tuple(ids)
    assert [UUID(bytes=receipt.message_ids[n : n + 16]) for n in (0, 16)] == [one.id, two.id]
    assert (receipt.oldest_age_seconds, receipt.duration_seconds) == (1.5, 0.25)


def test_settling_again_after_an_unknown_commit_counts_nothing_twice(engine: Engine) -> None:
    ids = written(engine, message(), message(), message())
    done = confirmed(engine, *ids)
    settle(engine, done[:2])
    again = settle(engine, done)
    assert (again.deleted, again.gone) == (1, frozenset(ids[:2]))
    assert settle(engine, done).deleted == 0
    with engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.sum(tables.receipt.c.messages))) == 3
        assert connection.scalar(sa.select(sa.func.count()).select_from(tables.receipt)) == 2


def test_a_confirm_is_recorded_whoever_owns_the_shard(engine: Engine) -> None:
    ids = written(engine, message())
    with engine.begin() as connection:
        leases.take(connection, "another", 60.0)
    settle(engine, confirmed(engine, *ids))
    assert states(engine) == {}


def change(each: Message, id_: int, shard: int, epoch: int, was: State = State.PENDING) -> Change:
    return Change(id_, each.id, shard, epoch, (was, 0), State.RETRYING, 3, 60.0, "a queue refused it")


def test_an_undelivered_row_waits_with_its_reason(engine: Engine) -> None:
    each = keyed()
    (id_,) = written(engine, each)
    with engine.begin() as connection:
        epochs = leases.take(connection, "me", 60.0)
        assert isinstance(epochs, dict)
        shard = connection.scalar(sa.select(tables.pending.c.shard))
        assert shard is not None
    settle(engine, [], [change(each, id_, shard, epochs[shard])])
    assert read(engine) == []  # not due for a minute
    with engine.connect() as connection:
        row = connection.execute(sa.select(tables.pending)).one()
    assert (row.state, row.attempts, row.error) == ("retrying", 3, "a queue refused it")


@pytest.mark.parametrize(("relay", "epoch_off"), [("me", 1), ("me", -1), ("another", 0)])
def test_a_relay_that_lost_its_shard_changes_nothing(engine: Engine, relay: str, epoch_off: int) -> None:
    each = message()
    (id_,) = written(engine, each)
    with engine.begin() as connection:
        epochs = leases.take(connection, "me", 60.0)
        assert isinstance(epochs, dict)
        shard = connection.scalar(sa.select(tables.pending.c.shard))
        assert shard is not None
    settle(engine, [], [change(each, id_, shard, epochs[shard] + epoch_off)], relay)
    assert states(engine) == {id_: "pending"}


def test_a_message_a_person_discarded_meanwhile_stays_discarded(engine: Engine) -> None:
    each = message()
    (id_,) = written(engine, each, state=State.DISCARDED)
    with engine.begin() as connection:
        epochs = leases.take(connection, "me", 60.0)
        assert isinstance(epochs, dict)
        shard = connection.scalar(sa.select(tables.pending.c.shard))
        assert shard is not None
    settle(engine, [], [change(each, id_, shard, epochs[shard])])
    assert states(engine) == {id_: "discarded"}


def test_a_row_of_another_message_under_a_remembered_id_is_neither_deleted_nor_changed(engine: Engine) -> None:
    """A database that went back in time draws the same ids again, and its shards have the same owner and epoch."""
    one, two, stranger, other = (keyed(key=key) for key in ("a", "b", "c", "d"))
    ids = written(engine, stranger, other)
    shard, epoch = owned(engine)
    answer = Confirmed(ids[0], 1, one.id, 0.0, 0.0)
    found = settle(engine, [answer], [change(two, ids[1], shard, epoch)])
    assert (found.strangers, found.deleted, found.receipt) == (frozenset(ids), 0, None)
    assert states(engine) == dict.fromkeys(ids, "pending")


def test_a_database_without_the_last_receipt_does_not_remember(engine: Engine) -> None:
    ids = written(engine, message(), message())
    done = confirmed(engine, *ids)
    first = settle(engine, done[:1])
    assert first.world.remembers
    assert first.receipt is not None
    with engine.begin() as connection:
        assert settling.settle(connection, "me", [], [], receipt_id=first.receipt).world.remembers
        assert not settling.settle(connection, "me", [], [], receipt_id=first.receipt + 1).world.remembers
        assert not settling.settle(connection, "another", [], [], receipt_id=first.receipt).world.remembers


def owned(engine: Engine, relay: str = "me") -> tuple[int, int]:
    """Let *relay* take the shards; return the shard of the first row, and its epoch."""
    with engine.begin() as connection:
        epochs = leases.take(connection, relay, 60.0)
        assert isinstance(epochs, dict)
        shard = connection.scalar(sa.select(tables.pending.c.shard).order_by(tables.pending.c.id).limit(1))
        assert shard is not None
        return shard, epochs[shard]


def test_what_a_person_requeued_meanwhile_stays_requeued(engine: Engine) -> None:
    each = message()
    (id_,) = written(engine, each)
    settle(engine, [], [change(each, id_, *owned(engine), was=State.RETRYING)])
    assert states(engine) == {id_: "pending"}


@pytest.mark.postgres
def test_rows_that_somebody_has_locked_are_left_and_the_others_are_settled(postgres: Engine) -> None:
    messages = [message() for _ in range(4)]
    ids = written(postgres, *messages)
    done = confirmed(postgres, ids[0], ids[1])
    shard, epoch = owned(postgres)
    with postgres.connect() as person:
        person.execute(sa.select(tables.pending).where(tables.pending.c.id.in_([ids[1], ids[3]])).with_for_update())
        changes = [change(messages[n], ids[n], shard, epoch) for n in (2, 3)]
        found = settle(postgres, done, changes)
        assert (found.locked, found.deleted, found.gone) == (frozenset([ids[1], ids[3]]), 1, frozenset())
        with postgres.connect() as connection:
            assert any(f"process {backend(person)}" in words for words in locks.holders(connection, [ids[1]]))
            assert locks.holders(connection, [ids[2]]) == []
    assert states(postgres) == {ids[1]: "pending", ids[2]: "retrying", ids[3]: "pending"}


def backend(connection: sa.Connection) -> int:
    return int(connection.scalar(sa.select(sa.func.pg_backend_pid())) or 0)


@pytest.mark.postgres
def test_a_shard_cannot_be_taken_between_the_look_at_its_owner_and_the_commit_of_a_change(postgres: Engine) -> None:
    each = message()
    (id_,) = written(postgres, each)
    shard, epoch = owned(postgres)
    with postgres.connect() as old, postgres.connect() as new:
        settling.settle(old, "me", [], [change(each, id_, shard, epoch)])
        new.execute(sa.text("SET LOCAL lock_timeout = '50ms'"))
        with pytest.raises(sa.exc.OperationalError, match="lock timeout"):
            new.execute(sa.update(tables.shard).where(tables.shard.c.id == shard).values(owner="you", epoch=epoch + 1))
        old.commit()


# --- census ---


def test_a_census_counts_what_waits_and_how_long_the_oldest_has(engine: Engine) -> None:
    written(engine, keyed(key="a"), state=State.UNROUTABLE)
    written(engine, keyed(key="b"), keyed(key="c"), state=State.DEAD)
    written(engine, message(), available_in=60.0)
    written(engine, message(), message())
    with engine.connect() as connection:
        census = relaying.census(connection)
    assert census.by_state == {"unroutable": 1, "dead": 2, "pending": 3}
    assert census.scheduled == 1
    assert census.held_keys == 3
    assert 0.0 <= census.lag_seconds < 60.0


def test_an_empty_outbox_has_no_lag(engine: Engine) -> None:
    with engine.connect() as connection:
        census = relaying.census(connection)
    assert census == relaying.Census(by_state={}, scheduled=0, held_keys=0, lag_seconds=0.0)
