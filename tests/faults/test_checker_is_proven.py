"""A checker that never complained proves nothing: known mistakes are made on purpose, and each must get its verdict.

Every scenario runs twice on a real database: as the code is, without any problem, and with one mistake planted.
"""

from __future__ import annotations

import sqlite3
from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from outbox import tables
from outbox.relay import verdict
from outbox.relay.broker import Answer, Outcome
from outbox.relay.forwarder import Forwarder
from outbox.relay.order import topic_probes
from outbox.relay.order.item import Item
from outbox.relay.order.lanes import Lanes, _Lane
from outbox.relay.order.read_position import Position, Span
from outbox.relay.shards import Shards
from outbox.store import relaying, settling
from tests.faults.verdicts import entry
from tests.integration.relay.stage import Stage
from tests.kit.builders import message, write_message, write_pending
from tests.kit.history import Verdict, judge

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence
    from uuid import UUID

    from sqlalchemy.engine import Connection, Engine

    from outbox.message import Message

pytestmark = pytest.mark.faults

Patch = pytest.MonkeyPatch


def verdict_on(stage: Stage, written: Iterable[Message], arrived: Sequence[Message] | None = None) -> Verdict:
    """What the checker says of a run of the relay that had all the time it needs."""
    return judge([entry(each) for each in written], [entry(each) for each in arrived or stage.delivered()])


# --- scenarios ------------------------------------------------------------------------------------------------------------


class Weather:
    """A broker's script: some messages are refused, returned, lost or left unanswered when they come for the first time."""

    def __init__(self) -> None:
        self._seen: set[Any] = set()
        #: By number: what becomes of it the first time.
        self.first = {5: Outcome.NACKED, 12: Outcome.LOST, 19: Outcome.RETURNED, 26: Outcome.NACKED, 33: Outcome.LOST, 40: None}

    def __call__(self, each: Message) -> Outcome | None:
        if each.id in self._seen:
            return Outcome.CONFIRMED
        self._seen.add(each.id)
        return self.first.get(int(each.body), Outcome.CONFIRMED)


def in_all_weathers(engine: Engine) -> Verdict:
    """Sixty messages of three keys, and what can become of them."""
    stage = Stage(engine, Weather())
    # Numbered in tens, so that what is refused has followers of its key on the way.
    written = [message("x", f"key-{number % 3}" if number % 5 else None, b"%d" % number) for number in range(60)]
    stage.write(*written)
    for _ in range(100):
        stage.turn(4)
        for each in stage.broker.flying:
            stage.broker.answer(each)
        stage.make_due()
        if not stage.rows():
            break
    return verdict_on(stage, written)


def overtaken(engine: Engine) -> Verdict:
    """The second message of a key is read before the first, whose id was drawn earlier and whose commit came later."""
    stage = Stage(engine)
    first, second, other = (message("x", key, body) for key, body in (("a", b"1"), ("a", b"2"), (None, b"3")))

    def commit(each: Message, id_: int, sequence: int | None) -> None:
        with engine.begin() as connection:
            write_pending(connection, write_message(connection, each, sequence), each, sequence, id=id_)

    commit(other, 1000, None)
    stage.until(lambda: len(stage.delivered()) == 1)
    stage.turn(1, seconds=5.0)
    stage.turn(2, seconds=0.0)  # a read from the start has just been made, and the floor is at 1000
    stage.relay.wake()
    commit(first, 500, 1)
    commit(second, 1001, 2)
    stage.turn(1, seconds=0.0)
    stage.turn(200)
    return verdict_on(stage, [other, first, second])


WINDOW = 5


def frozen_and_replaced(engine: Engine) -> Verdict:
    """A relay freezes with its window open, another one sends everything, and the first one thaws."""
    frozen = Stage(engine, lambda _: None, window=WINDOW, batch_size=50)
    written = [message("xy"[number % 2], None, b"%d" % number) for number in range(40)]  # one topic leaves room for others
    frozen.write(*written)
    frozen.broker.script = lambda _: None if frozen.delivered() else Outcome.CONFIRMED  # the first one goes alone
    frozen.until(lambda: len(frozen.broker.flying) == WINDOW and frozen.published_total() == 1)

    frozen.expire_leases()
    successor = Stage(engine)
    successor.run_dry()
    frozen.clock.now += 60
    frozen.broker.script = lambda _: Outcome.CONFIRMED
    for each in frozen.broker.flying:
        frozen.broker.answer(each)
    frozen.turn(50)
    before, after = frozen.delivered()[:1], frozen.delivered()[1:]
    return verdict_on(frozen, written, [*before, *successor.delivered(), *after])


def restored(engine: Engine) -> Verdict:
    """The database goes back to a copy while messages are in flight, and new ones are written before they are answered."""
    stage = Stage(engine, lambda _: None if stage.delivered() else Outcome.CONFIRMED)
    first, *new = (message("x", None, b"%d" % number) for number in range(16))
    stage.write(first)
    stage.until(lambda: stage.published_total() == 1)
    with sqlite3.connect(":memory:") as copy, sqlite3.connect(str(engine.url.database)) as live:
        live.backup(copy)
        stage.write(*(message("x") for _ in range(20)))
        stage.until(lambda: len(stage.broker.flying) == 20)
        copy.backup(live)
    stage.write(*new)
    for each in stage.broker.flying:
        stage.broker.answer(each)
    stage.broker.script = lambda _: Outcome.CONFIRMED
    stage.turn(200)
    present = {each.id for each in (first, *new)}  # the twenty are of a time that never was
    return verdict_on(stage, [first, *new], [each for each in stage.delivered() if each.id in present])


def a_silent_topic(engine: Engine) -> Verdict:
    """The queue of one topic confirms nothing for ten minutes, then it has its majority back."""
    silent = True
    stage = Stage(engine, lambda each: Outcome.SILENT if silent and each.topic == "s" else Outcome.CONFIRMED, max_attempts=3)
    written = [message(topic, topic, b"%d" % number) for number in range(10) for topic in ("s", "h")]
    stage.write(*written)
    for minute in range(20):
        silent = minute < 10
        for _ in range(8):
            stage.make_due()
            stage.turn(2, seconds=4.0)
    return verdict_on(stage, written)


def two_refusing_topics(engine: Engine) -> Verdict:
    """Of two topics that refuse, one is well again; its first message waits behind one of the other, the next need not."""
    refusing = {"v", "t"}
    stage = Stage(engine, lambda each: Outcome.NACKED if each.topic in refusing else Outcome.CONFIRMED)
    stage.write(*(message(topic, f"{topic}-{number}") for topic in "vt" for number in range(6)))
    stage.turn(10)
    with engine.begin() as connection:
        connection.execute(sa.delete(tables.pending).where(tables.pending.c.state == "retrying"))
    free = message("t", "free")
    # The probes of v take their time to reach the one that holds the key of both.
    stage.write(*(message("v", f"before-{n}") for n in range(60)), message("v", "both"), message("t", "both"), free)
    refusing.remove("t")
    for _ in range(60):
        stage.make_due()
        stage.turn(2, seconds=0.5)
    return verdict_on(stage, [free], [each for each in stage.delivered() if each.key == "free"])


# --- mistakes -------------------------------------------------------------------------------------------------------------


def settled_without_a_confirm(patch: Patch) -> None:
    def take_losses(self: Forwarder, lost: list[tuple[Item, Answer]], _were_flying: int, now: float, wall: Any) -> None:
        for item, answer in lost:
            self._apply(item, replace(answer, outcome=Outcome.CONFIRMED), now, wall)

    patch.setattr(Forwarder, "_take_losses", take_losses)


def _answers(patch: Patch, change: Callable[[list[Answer]], list[Answer]]) -> None:
    honest = Forwarder._take_in
    patch.setattr(Forwarder, "_take_in", lambda self, answers: honest(self, change(list(answers))))


def not_mandatory(patch: Patch) -> None:
    """What a broker says of unroutable messages that were not published with `mandatory`."""
    _answers(
        patch,
        lambda answers: [replace(a, outcome=Outcome.CONFIRMED) if a.outcome is Outcome.RETURNED else a for a in answers],
    )


def an_ack_is_taken_for_the_next_message(patch: Patch) -> None:
    def shifted(answers: list[Answer]) -> list[Answer]:
        tokens = [answer.token for answer in answers]
        return [replace(answer, token=token) for answer, token in zip(answers, [*tokens[1:], *tokens[:1]], strict=True)]

    _answers(patch, shifted)


def one_failure_sends_all_of_them_again(patch: Patch) -> None:
    def all_lost(answers: list[Answer]) -> list[Answer]:
        if not any(answer.outcome is Outcome.NACKED for answer in answers):
            return answers
        return [a if a.outcome is Outcome.NACKED else replace(a, outcome=Outcome.LOST) for a in answers]

    _answers(patch, all_lost)


def two_of_a_key_in_flight(patch: Patch) -> None:
    init, start, advance = Lanes.__init__, Lanes._start, Lanes._advance

    def advance_regardless(self: Lanes, key: str, lane: Any) -> None:
        flying = lane.flying
        if flying is None or not lane.waiting:
            advance(self, key, lane)
            return
        lane.waiting[0].proven = True
        lane.flying = None
        advance(self, key, lane)
        lane.flying = flying

    def start_and_go_on(self: Lanes, item: Item) -> None:
        start(self, item)
        if item.row.key is not None and self._lanes[item.row.key].waiting:
            advance_regardless(self, item.row.key, self._lanes[item.row.key])

    def with_lanes_for_ever(self: Lanes, **sizes: Any) -> None:
        init(self, **sizes)
        self._lanes = defaultdict(_Lane)  # one of two may land after its lane seemed to be done

    patch.setattr(Lanes, "__init__", with_lanes_for_ever)
    patch.setattr(Lanes, "_advance", advance_regardless)
    patch.setattr(Lanes, "_start", start_and_go_on)


def no_question_by_key(patch: Patch) -> None:
    patch.setattr(relaying, "predecessors", lambda _connection, ids: dict.fromkeys(ids, relaying.Ahead.NOTHING))


def a_hold_kept_only_in_memory(patch: Patch) -> None:
    """The statements know nothing of holds; what the relay remembers of them ends with the next read."""
    no_question_by_key(patch)
    patch.setattr(relaying, "_held", lambda _row: sa.literal(value=False))
    # Statements are built once: these are built anew, and thrown away again afterwards.
    for name in ("_waiting", "_predecessors"):
        patch.setattr(relaying, name, getattr(relaying, name).__wrapped__)


def a_cursor_that_never_goes_back(patch: Patch) -> None:
    patch.setattr(Position, "next", lambda self, _now, _revisit: Span(self._cursor))


def an_id_forgotten_before_its_delete_was_seen(patch: Patch) -> None:
    land = Lanes._land

    def forget(self: Lanes, item: Item, blocks: str | None) -> None:
        land(self, item, blocks)
        if blocks is None:
            self._unsettled.pop(item.row.id)

    patch.setattr(Lanes, "_land", forget)


def a_lease_that_nobody_looks_at(patch: Patch) -> None:
    keep = Shards.keep
    patch.setattr(Shards, "valid", lambda self: self.owned)
    patch.setattr(Shards, "keep", lambda self: False if self.owned else keep(self))


def settled_by_id(patch: Patch) -> None:
    """A row is taken for that of the message whose row had its number before."""
    look, delete = settling._locked_rows, settling._delete_rows

    def believed(connection: Connection, ids: dict[int, UUID]) -> dict[int, settling.Present]:
        return {id_: row._replace(message_id=ids[id_]) for id_, row in look(connection, ids).items()}

    def believing(connection: Connection, confirmed: Sequence[settling.Confirmed]) -> frozenset[int]:
        there = {id_: row.message_id for id_, row in look(connection, [each.id for each in confirmed]).items()}
        return delete(connection, [replace(each, message_id=there.get(each.id) or each.message_id) for each in confirmed])

    patch.setattr(settling, "_locked_rows", believed)
    patch.setattr(settling, "_delete_rows", believing)


def silence_blamed_on_a_message(patch: Patch) -> None:
    decide = verdict.of

    def blame(row: Any, answer: Answer, *rest: Any) -> verdict.Verdict:
        return decide(row, replace(answer, outcome=_BLAME.get(answer.outcome, answer.outcome)), *rest)

    patch.setattr(verdict, "of", blame)


_BLAME = {Outcome.SILENT: Outcome.REFUSED}


def a_probe_chosen_when_it_is_read(patch: Patch) -> None:
    """The first row of the topic that is read is the one to ask, though it may have to wait."""
    honest, chosen = topic_probes.Topics.admit, dict[str, int]()

    def admit(self: topic_probes.Topics, row: Any, now: float) -> bool:
        if self.gated(row) and chosen.setdefault(row.topic, row.id) != row.id:
            return False
        return honest(self, row, now)

    patch.setattr(topic_probes.Topics, "admit", admit)


MISTAKES = [
    (settled_without_a_confirm, in_all_weathers, "lost"),
    (not_mandatory, in_all_weathers, "lost"),
    (an_ack_is_taken_for_the_next_message, in_all_weathers, "lost"),
    (one_failure_sends_all_of_them_again, in_all_weathers, "duplicates"),
    (an_id_forgotten_before_its_delete_was_seen, in_all_weathers, "duplicates"),
    (two_of_a_key_in_flight, in_all_weathers, "reordered"),
    (a_hold_kept_only_in_memory, in_all_weathers, "reordered"),
    (no_question_by_key, overtaken, "reordered"),
    (a_cursor_that_never_goes_back, overtaken, "lost"),
    (settled_by_id, restored, "lost"),
    (silence_blamed_on_a_message, a_silent_topic, "lost"),
    (a_probe_chosen_when_it_is_read, two_refusing_topics, "lost"),
    (a_lease_that_nobody_looks_at, frozen_and_replaced, "duplicates"),
]


@pytest.mark.parametrize(("mistake", "scenario", "expected"), MISTAKES, ids=lambda value: getattr(value, "__name__", value))
def test_a_mistake_of_the_relay_is_found(
    new_engine: Callable[[], Engine],
    mistake: Callable[[Patch], None],
    scenario: Callable[[Engine], Verdict],
    expected: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Only the frozen relay makes duplicates by right: its open window, once.
    allowed = WINDOW if scenario is frozen_and_replaced else 0
    honest = scenario(new_engine())
    assert honest.problems() == {}
    assert honest.duplicates <= allowed

    with monkeypatch.context() as patch:
        mistake(patch)
        found = scenario(new_engine())
    if expected == "duplicates":
        assert found.duplicates > allowed
    else:
        assert expected in found.problems()
