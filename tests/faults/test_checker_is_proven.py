"""A checker that never complained proves nothing: known mistakes are made on purpose, and each must get its verdict.

Every scenario runs twice on a real database: as the code is, without any problem, and with one mistake planted.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox import migrations
from outbox.consumer import delivery, inbox, topology
from outbox.consumer.acks import Acks
from outbox.consumer.link import Link
from outbox.consumer.outcomes import Outcome as Applied
from outbox.database import create_engine
from outbox.message import cloud_event
from outbox.relay.broker import Answer, Outcome
from outbox.relay.lanes import Item, Lanes, _Lane
from outbox.relay.position import Position
from outbox.relay.pump import Pump
from outbox.relay.shards import Shards
from outbox.store import drain
from tests.builders import message, write_message, write_pending
from tests.consuming import Desk, Recorder, series
from tests.integration.relay.stage import Stage
from tests.kit.history import Entry, Verdict, digest, judge
from tests.kit.recorder import DONE, NAME, REFUSED
from tests.kit.waiting import eventually
from tests.kit.world import arrival
from tests.kit.writers import Writer, ledger, metadata

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Iterator, Sequence
    from pathlib import Path

    from sqlalchemy.engine import Engine

    from outbox.consumer.arrival import Arrival
    from outbox.message import Message
    from tests.kit.world import World

pytestmark = pytest.mark.faults

Patch = pytest.MonkeyPatch


@pytest.fixture
def new_engine(tmp_path: Path) -> Iterator[Callable[[], Engine]]:
    """Make engines on empty outboxes."""
    made: list[Engine] = []

    def make() -> Engine:
        engine = create_engine(f"sqlite:///{tmp_path / f'outbox-{len(made)}.db'}")
        migrations.upgrade(engine)
        made.append(engine)
        return engine

    yield make
    for engine in made:
        engine.dispose()


def entry(each: Message) -> Entry:
    return Entry(id=str(each.id), key=each.key, sequence=each.sequence, digest=digest(each.body))


def verdict_on(stage: Stage, written: Iterable[Message], arrived: Sequence[Message] | None = None) -> Verdict:
    """What the checker says of a relay's run; what is still waiting can't be lost yet, so nothing may wait."""
    return judge([entry(each) for each in written], [entry(each) for each in arrived or stage.delivered()])


# --- the relay ------------------------------------------------------------------------------------------------------------


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
    written = [message("x", None, b"%d" % number) for number in range(40)]
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


def settled_without_a_confirm(patch: Patch) -> None:
    def take_losses(self: Pump, lost: list[tuple[Item, Answer]], _were_flying: int, now: float, wall: Any) -> None:
        for item, answer in lost:
            self._apply(item, replace(answer, outcome=Outcome.CONFIRMED), now, wall)

    patch.setattr(Pump, "_take_losses", take_losses)


def _answers(patch: Patch, change: Callable[[list[Answer]], list[Answer]]) -> None:
    honest = Pump._take_in
    patch.setattr(Pump, "_take_in", lambda self, answers: honest(self, change(list(answers))))


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
    patch.setattr(drain, "predecessors", lambda _connection, ids: dict.fromkeys(ids, False))


def a_hold_kept_only_in_memory(patch: Patch) -> None:
    """The statements know nothing of holds; what the relay remembers of them ends with the next read."""
    no_question_by_key(patch)
    patch.setattr(drain, "_holds", lambda _earlier, _later: sa.false())
    # Statements are built once: these are built anew, and thrown away again afterwards.
    for name in ("_waiting", "_predecessors"):
        patch.setattr(drain, name, getattr(drain, name).__wrapped__)


def a_cursor_that_never_goes_back(patch: Patch) -> None:
    patch.setattr(Position, "next", lambda self, _now, _revisit: self._cursor)


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


# --- the consumer ---------------------------------------------------------------------------------------------------------


def test_a_sequence_taken_for_the_test_of_a_duplicate_misses_effects(
    new_engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict() -> Verdict:
        recorder, engine = Recorder(), new_engine()
        first, second = series("a", 2)
        for each in (second, first):  # as after a restored database
            recorder.service.deliver(each, engine)
        sent = [entry(first), entry(second)]
        return judge(sent, sent, effects=_effects(recorder, engine))

    assert verdict().problems() == {}
    take = delivery._Batch._take

    def by_sequence(self: Any, arrival: Arrival, aside: Any) -> Any:
        sequence = arrival.message.sequence if arrival.message else None
        if arrival.key is not None and sequence is not None and sequence <= self._marks[arrival.key].sequence:
            return self._duplicate(arrival)
        return take(self, arrival, aside)

    monkeypatch.setattr(delivery._Batch, "_take", by_sequence)
    assert verdict().effect_missing != []


def test_an_inbox_that_is_not_asked_makes_effects_twice(
    new_engine: Callable[[], Engine], monkeypatch: pytest.MonkeyPatch
) -> None:
    def verdict() -> Verdict:
        recorder, engine = Recorder(), new_engine()
        sent = series("a", 3)
        for each in (*sent, *sent[1:]):  # as after a crash between the commit and the acknowledgement
            recorder.service.deliver(each, engine)
        entries = [entry(each) for each in sent]
        return judge(entries, entries, effects=_effects(recorder, engine))

    assert verdict().problems() == {}
    monkeypatch.setattr(inbox, "take", lambda _connection, _service, identities, _now: set(identities))
    assert len(verdict().effect_twice) == 2


def _effects(recorder: Recorder, engine: Engine) -> list[str]:
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        return list(connection.scalars(sa.select(recorder.effects.c.message_id)))


class Crashing:
    """A queue and its consumer, which dies once: what it had not acknowledged comes again."""

    def __init__(self, acks: Acks, sent: Sequence[Message], recorder: Recorder, engine: Engine) -> None:
        self._acks, self._sent, self._recorder, self._engine = acks, sent, recorder, engine

    def die(self, *, settled: Iterable[int], acknowledged_early: bool = False) -> Verdict:
        """Die when the messages at these places were committed and all that may be acknowledged was."""
        for tag, _ in enumerate(self._sent):
            self._acks.delivered(tag, None)  # type: ignore[arg-type]
        for tag in settled:
            assert self._recorder.service.deliver(self._sent[tag], self._engine) is Applied.APPLIED
            self._acks.settled(tag)
        if acknowledged_early:
            for tag, _ in enumerate(self._sent):
                self._acks.settled(tag)
        ready = self._acks.ready()
        acknowledged = ready[-1] + 1 if ready else 0
        for each in self._sent[acknowledged:]:
            self._recorder.service.deliver(each, self._engine)
        entries = [entry(each) for each in self._sent]
        return judge(entries, entries, effects=_effects(self._recorder, self._engine))


def test_an_acknowledgement_past_another_threads_work_misses_effects(new_engine: Callable[[], Engine]) -> None:
    class UpToTheLast(Acks):
        def ready(self) -> list[Any]:
            return list(range(max(self._settled) + 1))

    sent = [*series("a", 2), *series("b", 2)]
    assert Crashing(Acks(), sent, Recorder(), new_engine()).die(settled=[2, 3]).problems() == {}
    missing = Crashing(UpToTheLast(), sent, Recorder(), new_engine()).die(settled=[2, 3]).effect_missing
    assert missing == [str(each.id) for each in sent[:2]]


def test_an_acknowledgement_before_the_commit_misses_effects(new_engine: Callable[[], Engine]) -> None:
    sent = series("a", 3)
    assert Crashing(Acks(), sent, Recorder(), new_engine()).die(settled=[0]).problems() == {}
    found = Crashing(Acks(), sent, Recorder(), new_engine()).die(settled=[0], acknowledged_early=True)
    assert found.effect_missing == [str(each.id) for each in sent[1:]]


def test_a_farewell_to_the_broker_hands_the_next_consumer_later_messages_first(
    broker_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _handed_over(broker_url, "dropped").problems() == {}
    drop = Link.drop

    def farewell(self: Link) -> None:
        for channel, _ in self._channels[:1]:
            channel.basic_cancel("openevent.cancelled")
        drop(self)

    monkeypatch.setattr(Link, "drop", farewell)
    assert _handed_over(broker_url, "cancelled").reordered != []


def _handed_over(broker_url: str, name: str) -> Verdict:
    """What a consumer sees whose predecessor ended with ten of fifteen messages in its hands."""
    wanted = topology.of(Recorder(name).service, "openevent")
    in_hand: list[Arrival] = []
    arrived: list[Arrival] = []
    first, second = Link(broker_url), Link(broker_url)
    first.consume(wanted, 10, in_hand.append)
    second.consume(wanted, 20, arrived.append)
    sent = series(name, 15)
    Desk(broker_url).publish(*sent)

    def received(link: Link, got: list[Arrival], count: int) -> bool:
        link.receive(0.05)
        return len(got) >= count

    eventually(lambda: received(first, in_hand, 10), 10, "the prefetch of the first consumer")
    first.drop()
    eventually(lambda: received(second, arrived, 15), 10, "the successor to get everything")
    second.drop()
    by_id = {str(each.id): each for each in sent}
    return judge([entry(each) for each in sent], [entry(by_id[each.identity[1]]) for each in arrived])


# --- capture --------------------------------------------------------------------------------------------------------------


class Mistaken(Writer):
    """A writer whose messages are sent by other means than capture. The ledger knows them by names of its own."""

    def __init__(self, url: str, chance: random.Random) -> None:
        super().__init__(url, chance)
        self._said: list[tuple[UUID, str, Any, str | None]] = []
        #: Name in the ledger → message id.
        self.ids: dict[str, str] = {}

    def send_signal(self, key: str, text: str) -> None:
        self.send(DONE, {"key": key, "text": text}, key)

    def _capture(self, topic: str, data: Any, key: str | None) -> UUID:
        name = uuid4()
        self._said.append((name, topic, data, key))
        return name

    def _send_all(self) -> None:
        said, self._said = self._said, []
        for name, *what in said:
            self.ids[str(name)] = str(super()._capture(*what))

    def _send_all_in_a_transaction_of_its_own(self) -> None:
        with Session(self._engine) as self._session, self._session.begin():
            self._send_all()


class BlindToSavepoints(Mistaken):
    """Keeps what was sent in one list for the whole transaction."""

    def _end(self, *, commit: bool) -> None:
        if commit:
            self._send_all()
        self._said.clear()
        super()._end(commit=commit)


class BlindToRollbacks(Mistaken):
    """Sends what a transaction said, whatever became of it: the handlers of 2017."""

    def _end(self, *, commit: bool) -> None:
        super()._end(commit=commit)
        self._send_all_in_a_transaction_of_its_own()


class AfterTheCommit(Mistaken):
    """Sends when the commit is done; dies before it can in every tenth transaction."""

    transactions = 0

    def _end(self, *, commit: bool) -> None:
        super()._end(commit=commit)
        self.transactions += 1
        if not commit or self.transactions % 10 == 0:
            self._said.clear()
        self._send_all_in_a_transaction_of_its_own()


@pytest.mark.parametrize(
    ("kind", "expected"),
    [(Writer, ""), (BlindToSavepoints, "phantom"), (BlindToRollbacks, "phantom"), (AfterTheCommit, "lost")],
)
def test_a_mistake_of_capture_is_found(
    new_engine: Callable[[], Engine], chance: random.Random, kind: type[Writer], expected: str
) -> None:
    engine = new_engine()
    metadata.create_all(engine)
    writer = kind(str(engine.url), chance)
    for _ in range(40):
        writer.transaction()
    stage = Stage(engine)
    stage.run_dry()

    names: dict[str, str] = getattr(writer, "ids", {})
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        rows = connection.execute(sa.select(ledger)).all()
    committed = [Entry(names.get(row.message_id, row.message_id), row.key, None, row.digest) for row in rows]
    found = judge(committed, [arrival(cloud_event(each)) for each in stage.delivered()]).problems()
    assert expected in found if expected else found == {}


# --- the whole rig --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mistake", "command", "failpoint", "expected"),
    [
        ("settle_before_confirm", ("relay",), "E1=kill", "lost"),
        ("acknowledge_before_commit", ("consumer", "run", NAME), "K3=kill", "effect_missing"),
        ("never_ask_the_inbox", ("consumer", "run", NAME), "K4=kill", "effect_twice"),
    ],
)
def test_a_mistake_in_a_process_that_is_killed_is_found_by_ledger_tap_and_effects(
    small_world: World, chance: random.Random, mistake: str, command: tuple[str, ...], failpoint: str, expected: str
) -> None:
    world = small_world
    writer = Writer(world.env["DATABASE_URL"], chance)
    for _ in range(10):
        writer.transaction()
    if command != ("relay",):
        assert world.relay("--drain").wait() == 0
    # The second one acknowledges (or asks) what the first one left: its mistake must be the same.
    mistaken = ("python", "-m", "tests.faults.mistaken_commands", mistake, *command)
    assert world.start(*mistaken, failpoints=failpoint).wait() == -9
    assert world.start(*mistaken, "--drain").wait() == 0
    world.drain()
    applied, effects = world.ledger(f"topic <> '{REFUSED}'"), world.effects()
    found = judge(applied, effects, effects=[effect.id for effect in effects])
    assert expected in judge(world.ledger(), world.tap()).problems() | found.problems()
