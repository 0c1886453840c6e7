"""Lanes against a model of the database: transactions that commit late, reads from anywhere, holds, losses, overlaps."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from outbox.relay.order.item import Item
from outbox.relay.order.lanes import Lanes, Reading
from outbox.store.relaying import Ahead, Row

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

_KEYS = ("a", "b", None)
_TOPICS = ("x", "y")
_OUTCOMES = ("confirmed", "confirmed", "retrying", "unroutable", "lost")


@dataclass(slots=True)
class Stored:
    """A row as the model's database has it."""

    row: Row
    committed: bool = False
    state: str = "pending"

    def holds(self, later: Row) -> bool:
        earlier = self.row
        return (
            self.committed
            and earlier.key is not None
            and earlier.key == later.key
            and (earlier.sequence or 0) < (later.sequence or 0)
            and (self.state == "retrying" or (self.state == "unroutable" and earlier.topic == later.topic))
        )


@dataclass(frozen=True, slots=True)
class OpenRead:
    """A read whose snapshot was taken and which has not returned."""

    reading: Reading
    rows: list[Row]
    end: int | None


class LanesModel:
    """Whatever happens in whatever order: a key in order and one at a time, nothing twice, nothing lost."""

    query_by_key = True
    neighbours = False

    def __init__(self) -> None:
        self.lanes = Lanes(window=4, window_bytes=6, rows_per_key=3, rows=6, neighbours=self.neighbours)
        self.stored: dict[int, Stored] = {}
        self.sequences: dict[str, int] = defaultdict(int)
        self.next_id = 1
        self.cursor = 0
        self.read: OpenRead | None = None
        self.unsettled: list[tuple[int, str | None]] = []
        self.delivered: list[Row] = []
        #: Who was about to go past whom when that was requeued.
        self.overtaking: set[tuple[int, int]] = set()

    # --- writers ---

    def write(self, key: str | None, topic: str, late: bool = False, wake: bool = False) -> None:
        """Write a row, and commit at once or *late* (a key is locked until then); perhaps *wake* the relay."""
        if key is not None and any(not each.committed for each in self.stored.values() if each.row.key == key):
            return
        sequence = None
        if key is not None:
            self.sequences[key] += 1
            sequence = self.sequences[key]
        row = Row(self.next_id, self.next_id, 0, topic, key, sequence, 0, "pending", "hold")
        self.stored[self.next_id] = Stored(row, committed=not late)
        self.next_id += 1
        if wake:
            self.read_ahead()

    def commit(self, latest: bool) -> None:
        """Commit an open transaction, whichever began first."""
        waiting = [each for each in self.stored.values() if not each.committed]
        if waiting:
            waiting[-1 if latest else 0].committed = True

    def requeue(self) -> None:
        """Let a person requeue all that nobody listens to, and is not in the relay's hands."""
        about_to_go = self.about_to_go()
        for each in [each for each in self.stored.values() if each.state == "unroutable" and each.row.id not in self.lanes]:
            passed = [other.row.id for other in self.stored.values() if other.state == "pending" and self.unheard(other.row)]
            each.state = "pending"
            self.overtaking |= {(later, earlier) for later in about_to_go for earlier in (*passed, each.row.id)}

    def about_to_go(self) -> list[int]:
        """What flies, or was asked about already."""
        asked = self.lanes.ready_ids()
        return [*asked, *(item.row.id for item in self.lanes.flights())]

    # --- reads ---

    def read_ahead(self) -> None:
        self.begin_read(self.cursor, 6)
        self.finish_read()

    def read_from_start(self, settle: bool) -> None:
        """Read from the start; perhaps settle while the read is under way."""
        self.begin_read(0, 6)
        if settle:
            self.settle()
        self.finish_read()

    def read_from_somewhere(self, back: int, limit: int, settle: bool) -> None:
        """Read a little from somewhere at or below the cursor."""
        self.begin_read(max(0, self.cursor - back), limit)
        if settle:
            self.settle()
        self.finish_read()

    def begin_read(self, after: int, limit: int) -> None:
        reading = self.lanes.read_began(after)
        found = [
            each.row._replace(state=each.state)
            for id_, each in sorted(self.stored.items())
            if id_ > after
            and each.committed
            and id_ not in reading.ids
            and each.row.key not in reading.keys.left_out
            and each.row.topic not in reading.topics.left_out
            and not any(other.holds(each.row) for other in self.stored.values())
        ][:limit]
        self.read = OpenRead(reading, found, found[-1].id if len(found) == limit else None)

    def finish_read(self, far_ahead: bool = False) -> None:
        """Take in what the snapshot showed, then ask about keys."""
        assert self.read is not None
        self.lanes.read_returned(self.read.reading)
        self.lanes.load([Item(row, None, 2, epoch=1) for row in self.lanes.choose(self.read.rows)])
        if not far_ahead:
            if self.read.rows:
                self.cursor = max(self.cursor, self.read.rows[-1].id)
            end = self.read.end
            self.lanes.read_ended(self.read.reading, end if end is not None and end < self.cursor else None)
        self.read = None
        asked = self.lanes.unproven()
        self.lanes.prove(asked, self.predecessors(asked))

    def predecessors(self, asked: Collection[int]) -> Mapping[int, Ahead]:
        if not self.query_by_key:
            return dict.fromkeys(asked, Ahead.NOTHING)
        return {id_: self.ahead(self.stored[id_].row) for id_ in asked}

    def ahead(self, row: Row) -> Ahead:
        earlier = [each.row for each in self.stored.values() if each.committed and each.row.key == row.key]
        earlier = [each for each in earlier if (each.sequence or 0) < (row.sequence or 0)]
        if any(each.topic == row.topic or not self.unheard(each) for each in earlier):
            return Ahead.WAITS
        return Ahead.PASSABLE if earlier else Ahead.NOTHING

    def unheard(self, row: Row) -> bool:
        """Whether nobody listens to the topic of *row*: it, or an earlier one of its key and topic, was returned."""
        return any(
            (other.state == "unroutable" or (other.row.id, "unroutable") in self.unsettled)
            and (other.row.key, other.row.topic) == (row.key, row.topic)
            and (other.row.sequence or 0) <= (row.sequence or 0)
            for other in self.stored.values()
        )

    # --- the broker ---

    def send(self) -> list[Item]:
        """Send what may go."""
        batch = self.lanes.take(lambda _: True)
        for item in batch:
            assert item.row.id in self.stored, "it was sent although its row is gone"
            assert not any(other.holds(item.row) for other in self.stored.values()), "it was sent past a hold"
        return batch

    def answer(self, which: int, outcome: str) -> None:
        """Answer one message in flight."""
        self.send()
        flying = self.flying()
        if not flying:
            return
        item = flying[which % len(flying)]
        self.answered(item, outcome)
        self.send()

    def answered(self, item: Item, outcome: str) -> None:
        if outcome == "lost":
            self.lanes.again(item)
        elif outcome == "confirmed":
            self.deliver(item.row)
            self.lanes.done(item)
            self.unsettled.append((item.row.id, None))
        else:
            self.lanes.hold(item)
            self.unsettled.append((item.row.id, outcome))

    def deliver_all(self) -> None:
        """Have the broker take all that may go."""
        self.send()
        for item in self.flying():
            self.answered(item, "confirmed")

    def deliver(self, row: Row) -> None:
        assert all(row.id != other.id for other in self.delivered), "it was delivered twice"
        if row.key is not None:
            passed = [other for other in self.stored.values() if other.row.key == row.key and other.row not in self.delivered]
            for other in passed:
                if (other.row.sequence or 0) < (row.sequence or 0):
                    # Only a message nobody listens to may be overtaken, by one of another topic; or nobody did when that was
                    # about to go, before a person requeued it.
                    by_right = self.unheard(other.row) or (row.id, other.row.id) in self.overtaking
                    assert by_right, "it was delivered before an earlier one"
                    assert other.row.topic != row.topic, "it was delivered before an earlier one of its topic"
        self.delivered.append(self.stored[row.id].row)

    def settle(self) -> None:
        """Commit what was answered; a read may be under way."""
        for id_, state in self.unsettled:
            if state is None:
                del self.stored[id_]
            else:
                self.stored[id_].state = state
        self.lanes.settled([id_ for id_, _ in self.unsettled])
        self.unsettled = []

    def flying(self) -> list[Item]:
        return self.lanes.flights()

    # --- what always holds ---

    def check(self) -> None:
        """See that one of a key is in flight, and the window kept."""
        keys = [item.row.key for item in self.flying() if item.row.key is not None]
        assert len(keys) == len(set(keys))
        assert len(self.flying()) == self.lanes.flying <= 4
        assert sum(item.size for item in self.flying()) <= 6

    def finish(self) -> None:
        """See that everything committed is delivered once the trouble is over."""
        for each in self.stored.values():
            each.committed = True
        for _ in range(6 * len(self.stored) + 10):
            self.read_from_start(settle=False)
            self.deliver_all()
            self.settle()
        assert not self.stored, f"never delivered: {sorted(self.stored)}"
        assert self.lanes.idle
        assert self.lanes.loaded_bytes == 0


class Scouts(LanesModel):
    """Reads above where reads have come, which remember nothing of what they pass over."""

    def read_from_somewhere(self, back: int, limit: int, settle: bool) -> None:
        """Read a little from somewhere, every other time far ahead."""
        if limit % 2:
            super().read_from_somewhere(back, limit, settle)
            return
        self.begin_read(self.cursor + back, limit)
        if settle:
            self.settle()
        self.finish_read(far_ahead=True)


class WholeBatches(LanesModel):
    """A broker that takes a batch whole or not at all, and answers at once: several of one key may be in it."""

    neighbours = True
    #: Whether what follows a refused message of its key is left out of the batch.
    is_whole = True

    def answer(self, which: int, outcome: str) -> None:
        """Send one batch: all of it is lost, one message is refused, one topic has no queue, or nothing happens."""
        batch = self.send()
        refused: set[str | None] = set()
        for number, item in enumerate(batch):
            row = item.row
            if outcome == "lost" or (row.key is not None and row.key in refused and self.is_whole):
                self.answered(item, "lost")
            elif outcome == "retrying" and number == which % len(batch):
                refused.add(row.key)
                self.answered(item, outcome)
            elif outcome == "unroutable" and row.topic == _TOPICS[which % len(_TOPICS)]:
                self.answered(item, outcome)
            else:
                self.answered(item, "confirmed")

    def deliver_all(self) -> None:
        """Have the broker take all that may go, in the order of the batch."""
        for item in self.send():
            self.answered(item, "confirmed")

    def check(self) -> None:
        """See that nothing is in flight between two batches."""
        assert not self.flying()
        assert not self.lanes.flying


class PartialBatches(WholeBatches):
    """A planted bug: a broker that says that its batches are whole, and refuses one message of a key without the next."""

    is_whole = False


class WithoutQueryByKey(LanesModel):
    """A planted bug: whatever a read shows first of a key is taken for the next."""

    query_by_key = False


def test_without_the_query_by_key_the_model_finds_messages_out_of_order() -> None:
    def run(model: LanesModel) -> list[int]:
        model.write("a", "x", late=True)  # id 1, in a transaction that takes its time
        model.write(None, "x")
        model.read_ahead()
        model.stored[1].committed = True
        model.write("a", "x")
        model.read_ahead()  # shows the second of the key, and not the first
        model.deliver_all()
        model.read_from_start(settle=False)
        model.deliver_all()
        model.deliver_all()
        return [row.id for row in model.delivered]

    assert run(LanesModel()) == [2, 1, 3]
    with pytest.raises(AssertionError, match="delivered before an earlier one"):
        run(WithoutQueryByKey())


def test_the_model_finds_a_broker_whose_batches_are_not_whole() -> None:
    def run(model: LanesModel) -> list[int]:
        for _ in range(3):
            model.write("a", "x")
        model.read_from_start(settle=False)
        model.answer(0, "retrying")
        model.finish()
        return [row.id for row in model.delivered]

    assert run(WholeBatches()) == [1, 2, 3]
    with pytest.raises(AssertionError, match="delivered before an earlier one"):
        run(PartialBatches())


def walk(model: LanesModel, random: Random, steps: int) -> None:
    """Do *steps* things, whichever."""
    for _ in range(steps):
        step = random.randrange(8)
        if step == 0:
            model.write(random.choice(_KEYS), random.choice(_TOPICS), late=random.random() < 0.5, wake=random.random() < 0.5)
        elif step == 1:
            model.commit(latest=random.random() < 0.5)
        elif step == 2:
            model.read_from_start(settle=random.random() < 0.5)
        elif step == 3:
            model.read_from_somewhere(random.randint(0, 4), random.randint(1, 6), settle=random.random() < 0.5)
        elif step == 4:
            model.answer(random.randint(0, 3), random.choice(_OUTCOMES))
        elif step == 5:
            model.deliver_all()
        elif step == 6:
            model.requeue()
        else:
            model.settle()
        model.check()


# A walk of even steps: Hypothesis's own choice of rules keeps to few of them, and met the planted bug a hundred times less.
@pytest.mark.parametrize("kind", [LanesModel, Scouts, WholeBatches])
@given(seed=st.integers(0, 2**32))
@example(seed=1766)  # of two neighbours the first was returned and the second delivered: that one was taken for the key's last
@settings(max_examples=80, deadline=None)
def test_whatever_happens_a_key_stays_in_order_and_nothing_is_lost_or_sent_twice(kind: type[LanesModel], seed: int) -> None:
    model = kind()
    walk(model, Random(seed), 150)
    model.finish()
