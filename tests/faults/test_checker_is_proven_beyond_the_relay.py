"""The checker again: mistakes of services and of capture, and mistakes in whole processes, each with its verdict."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any
from uuid import UUID, uuid4

import pytest
import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.consumer import batch, inbox, topology
from outbox.consumer.acks import Acks
from outbox.consumer.link import Link
from outbox.consumer.outcomes import Outcome as Applied
from outbox.message import cloud_event
from tests.faults.verdicts import entry
from tests.integration.relay.stage import Stage
from tests.kit.consuming import Desk, Recorder, series
from tests.kit.consuming import arrival as in_hand
from tests.kit.history import Entry, Verdict, judge
from tests.kit.recorder import DONE, NAME, REFUSED
from tests.kit.waiting import eventually
from tests.kit.world import arrival
from tests.kit.writers import Writer, ledger, metadata

if TYPE_CHECKING:
    import random
    from collections.abc import Callable, Iterable, Sequence

    from sqlalchemy.engine import Engine

    from outbox.consumer.delivery import Arrival
    from outbox.message import Message
    from tests.kit.world import World

pytestmark = pytest.mark.faults

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
    take = batch._Batch._take

    def by_sequence(self: Any, arrival: Arrival, aside: Any) -> Any:
        sequence = arrival.message.sequence if arrival.message else None
        if arrival.key is not None and sequence is not None and sequence <= self._marks[arrival.key].sequence:
            return self._duplicate(arrival)
        return take(self, arrival, aside)

    monkeypatch.setattr(batch._Batch, "_take", by_sequence)
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
    asked = inbox.take

    def not_listened_to(connection: Any, service: str, identities: Any, *rest: Any) -> set[Any]:
        asked(connection, service, identities, *rest)
        return set(identities)

    monkeypatch.setattr(inbox, "take", not_listened_to)
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
        for tag, each in enumerate(self._sent):
            self._acks.delivered(tag, in_hand(each))
        for tag in settled:
            assert self._recorder.service.deliver(self._sent[tag], self._engine) is Applied.APPLIED
            self._acks.settled(tag)
        if acknowledged_early:
            for tag, _ in enumerate(self._sent):
                self._acks.settled(tag)
        together, singly = self._acks.ready(all_of_them=True)
        gone = {*range(together[-1] + 1 if together else 0), *singly}
        for tag, each in enumerate(self._sent):
            if tag not in gone:
                self._recorder.service.deliver(each, self._engine)
        entries = [entry(each) for each in self._sent]
        return judge(entries, entries, effects=_effects(self._recorder, self._engine))


def test_an_acknowledgement_past_another_threads_work_misses_effects(new_engine: Callable[[], Engine]) -> None:
    class UpToTheLast(Acks):
        def ready(self, **_: bool) -> tuple[list[Any], list[Any]]:
            return list(range(max(self._settled) + 1)), []

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
