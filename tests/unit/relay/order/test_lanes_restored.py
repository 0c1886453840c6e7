"""Lanes on a database that goes back in time: what is there afterwards is delivered, in order, whatever was known before."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from outbox.relay.order.lanes import Lanes
from tests.unit.relay.order.test_lanes_model import LanesModel, Stored, walk

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping

    from outbox.relay.order.item import Item
    from outbox.store.relaying import Ahead, Row


@dataclass(slots=True)
class _Backup:
    stored: dict[int, Stored]
    sequences: dict[str, int]
    next_id: int


class RestoredModel(LanesModel):
    """The database is put back to a copy of it; ids and sequences are drawn again from there.

    A message is known by its `message_row` here, which stands for its message id: it is never drawn again.
    """

    settles_by_identity = True
    believes_in_nothing_afterwards = True

    def __init__(self) -> None:
        super().__init__()
        self.messages = 0
        self.kept = self._copy()
        self.another_server = False
        self.answers: list[tuple[Row, str | None]] = []
        self.returned: list[Row] = []

    def write(self, key: str | None, topic: str, late: bool = False, wake: bool = False) -> None:
        before = self.next_id
        super().write(key, topic, late)
        if self.next_id > before:
            self.messages += 1
            self.stored[before].row = self.stored[before].row._replace(message_row=self.messages)
        if wake:
            self.read_ahead()

    def _copy(self) -> _Backup:
        committed = {id_: each for id_, each in self.stored.items() if each.committed}
        return deepcopy(_Backup(committed, dict(self.sequences), self.next_id))

    def back_up(self) -> None:
        """Keep a copy of what is committed; sequences of open transactions are not in it."""
        self.kept = self._copy()
        for each in self.stored.values():
            if not each.committed and each.row.key is not None:
                self.kept.sequences[each.row.key] = (each.row.sequence or 0) - 1

    def restore(self) -> None:
        """Put the copy back; the relay hears of it with its next read, or when it settles."""
        kept = deepcopy(self.kept)
        self.stored, self.next_id = kept.stored, kept.next_id
        self.sequences.clear()
        self.sequences.update(kept.sequences)
        self.another_server = True

    def begin_read(self, after: int, limit: int) -> None:
        if self.another_server:
            self.settle()  # it was due long ago
            self.another_server = False
            if self.believes_in_nothing_afterwards:
                self.lanes.abandon()
                self.cursor = after = 0
        super().begin_read(after, limit)

    def predecessors(self, asked: Collection[int]) -> Mapping[int, Ahead]:
        return super().predecessors([id_ for id_ in asked if id_ in self.stored])

    # --- the broker ---

    def send(self) -> list[Item]:
        batch = self.lanes.take(lambda _: True)
        for item in batch:
            if self.is_present(item.row):
                assert not any(other.holds(item.row) for other in self.undelivered()), "it was sent past a hold"
        return batch

    def undelivered(self) -> list[Stored]:
        """What is there and never arrived: what arrived before the restore may be overtaken by what did, too."""
        arrived = {row.message_row for row in self.delivered}
        return [each for each in self.stored.values() if each.row.message_row not in arrived]

    def is_present(self, row: Row) -> bool:
        stored = self.stored.get(row.id)
        return stored is not None and stored.row.message_row == row.message_row

    def answered(self, item: Item, outcome: str) -> None:
        if outcome == "lost" and item.stale:
            self.lanes.forget(item)
            return
        if outcome == "unroutable":
            self.returned.append(item.row)
        before = len(self.unsettled)
        super().answered(item, outcome)
        self.answers += [(item.row, state) for _, state in self.unsettled[before:]]

    def was_unheard(self, row: Row) -> bool:
        """Whether nobody listens to its topic, or did so when its key was tried: the copy may not know of that."""
        tried = [each for each in self.returned if self.is_present(each) and (each.key, each.topic) == (row.key, row.topic)]
        return self.unheard(row) or any((each.sequence or 0) <= (row.sequence or 0) for each in tried)

    def deliver(self, row: Row) -> None:
        first = all(row.message_row != other.message_row for other in self.delivered)
        if first and self.is_present(row):
            for other in self.undelivered():
                if other.row.key == row.key is not None and (other.row.sequence or 0) < (row.sequence or 0):
                    assert self.was_unheard(other.row) or (row.id, other.row.id) in self.overtaking, (
                        "it was delivered before an earlier one"
                    )
                    assert other.row.topic != row.topic, "it was delivered before an earlier one of its topic"
        self.delivered.append(row)

    def settle(self) -> None:
        strangers, gone = False, False
        for row, state in self.answers:
            if not self.is_present(row) and (self.settles_by_identity or row.id not in self.stored):
                strangers |= row.id in self.stored
                gone |= row.id not in self.stored
            elif state is None:
                assert self.is_present(row), "the row of another message was deleted"
                del self.stored[row.id]
            else:
                self.stored[row.id].state = state
        self.lanes.settled([row.id for row, _ in self.answers])
        self.answers, self.unsettled = [], []
        if strangers:
            self.lanes, self.cursor, self.read = Lanes(window=4, window_bytes=6, rows_per_key=3), 0, None
        elif gone:
            self.lanes.abandon()

    def finish_read(self, far_ahead: bool = False) -> None:
        if self.read is not None:
            super().finish_read(far_ahead)


class SettledById(RestoredModel):
    """A planted bug: rows are known by their number."""

    settles_by_identity = False


class OldMarks(RestoredModel):
    """A planted bug: what was delivered before says what is next."""

    believes_in_nothing_afterwards = False


def travel(model: RestoredModel, random: Random) -> None:
    """Walk, keep a copy, walk on, go back to it, and walk on."""
    walk(model, random, 40)
    model.back_up()
    walk(model, random, 30)
    model.restore()
    walk(model, random, 60)
    model.finish()


@given(seed=st.integers(0, 2**32))
@settings(max_examples=80, deadline=None)
def test_whatever_happens_around_a_restore_what_is_there_afterwards_is_delivered_in_order(seed: int) -> None:
    travel(RestoredModel(), Random(seed))


@pytest.mark.parametrize(
    ("mistaken", "complaint"),
    [(SettledById, "row of another message was deleted"), (OldMarks, "before an earlier one|past a hold")],
)
def test_the_model_finds_what_a_restore_does_to_a_relay_that_believes_in_numbers(
    mistaken: type[RestoredModel], complaint: str
) -> None:
    def travel_often() -> None:
        for seed in range(740, 4000):  # one of the first few, and no matter which
            travel(mistaken(), Random(seed))

    with pytest.raises(AssertionError, match=complaint):
        travel_often()
