from __future__ import annotations

from random import Random

import pytest

from outbox.relay.order.suspects import Caution


class Stage:
    """A broker that closes the connection whenever a poison message is in flight, and the relay's way of asking Caution."""

    def __init__(
        self, waiting: set[int], poison: set[int], *, window: int = 64, chance: float = 0.0, blamed: bool = False
    ) -> None:
        self.caution = Caution()
        self.waiting = set(waiting)
        self.poison = poison
        self.window = window
        self.blamed = blamed
        self.random = Random(7)
        self.chance = chance
        self.passed: list[int] = []
        self.blame: list[int] = []
        self.losses = 0

    def turn(self) -> None:
        batch = self.batch()
        if batch & self.poison or self.random.random() < self.chance:
            self.losses += 1
            found = self.caution.lost(sorted(batch), were_flying=len(batch), blamed=self.blamed)
            self.blame += found
            self.waiting -= set(found)  # they back off in the database
            return
        for id_ in batch:
            self.caution.passed(id_)
        self.passed += sorted(batch)
        self.waiting -= batch

    def batch(self) -> set[int]:
        if self.caution.alone:
            first = self.caution.next_alone(self.waiting)
            return set() if first is None else {first}
        suspects = sorted(self.caution.suspects & self.waiting)
        if suspects:
            return set(suspects[: self.caution.group])
        return set(sorted(self.waiting)[: self.window])

    def run(self, turns: int) -> None:
        for _ in range(turns):
            if self.waiting:
                self.turn()


def test_the_first_message_of_all_and_after_a_loss_goes_alone() -> None:
    caution = Caution()
    assert caution.alone
    caution.passed(1)
    assert not caution.alone
    caution.lost([2, 3], were_flying=2)
    assert caution.alone


def test_a_broker_that_is_down_makes_nobody_a_suspect() -> None:
    caution = Caution()
    for _ in range(50):
        assert caution.lost([1, 2, 3], were_flying=3) == []
    assert not caution.suspects


def test_messages_that_never_left_are_no_losses() -> None:
    caution = Caution()
    caution.passed(9)
    for _ in range(5):
        caution.lost([], were_flying=3)
        caution.passed(9)
    assert not caution.suspects


def test_a_connection_that_we_dropped_ourselves_is_no_evidence_against_anybody() -> None:
    caution = Caution()
    for _ in range(20):
        caution.passed(9)
        caution.dropped([1])
        assert caution.alone
        assert caution.lost([], were_flying=1) == []
    assert not caution.suspects


def test_whoever_was_in_flight_when_nobody_answered_goes_after_the_others() -> None:
    caution = Caution()
    caution.dropped([1, 2])
    assert caution.next_alone([1, 2, 3]) == 3
    caution.dropped([3])
    assert caution.next_alone([1, 2, 3]) == 1


@pytest.mark.parametrize("culprit", [1, 2, 100, 199, 200])
def test_one_message_that_kills_connections_is_isolated_and_it_alone_is_blamed(culprit: int) -> None:
    stage = Stage(set(range(1, 201)), {culprit})
    stage.run(200)
    assert stage.blame == [culprit]
    assert sorted(stage.passed) == [n for n in range(1, 201) if n != culprit]
    assert stage.losses <= 15


def test_two_messages_that_kill_connections_are_both_found() -> None:
    stage = Stage(set(range(1, 101)), {10, 11})
    stage.run(300)
    assert sorted(stage.blame) == [10, 11]
    assert len(stage.passed) == 98


def test_a_message_alone_in_the_outbox_is_not_blamed_before_another_has_passed() -> None:
    stage = Stage({1}, {1})
    stage.run(30)
    assert stage.blame == []
    stage.waiting.add(2)
    stage.run(2)
    assert stage.passed == [2]
    for other in range(3, 9):
        stage.waiting.add(other)
        stage.run(3)
    assert stage.blame == [1]


def test_connections_that_die_by_chance_blame_nobody() -> None:
    stage = Stage(set(range(1, 2001)), set(), chance=0.3)
    stage.run(500)
    assert stage.blame == []
    assert len(stage.passed) == 2000


def test_when_the_broker_says_that_one_of_them_was_to_blame_they_are_suspects_at_once() -> None:
    stage = Stage(set(range(1, 65)), {40}, blamed=True)
    stage.run(100)
    assert stage.blame == [40]
    assert stage.losses <= 9


def test_a_culprit_that_comes_again_flies_alone_from_the_start() -> None:
    stage = Stage(set(range(1, 65)), {40})
    stage.run(100)
    before = stage.losses
    stage.waiting = set(range(100, 150)) | {40}
    stage.run(20)
    assert stage.blame == [40, 40]
    assert stage.losses == before + 1


def test_what_is_remembered_of_messages_that_left_can_be_forgotten() -> None:
    caution = Caution()
    caution.passed(9)
    caution.lost([1, 2], were_flying=2)
    caution.forget({2})
    assert caution.next_alone([1, 2]) == 1


def test_a_culprit_that_is_given_up_is_suspected_no_more() -> None:
    stage = Stage(set(range(1, 65)), {40})
    stage.run(100)
    assert stage.caution.suspects == {40}
    stage.caution.given_up(40)
    assert not stage.caution.suspects
