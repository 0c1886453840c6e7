"""Answers at hand: company, locked rows, and what stays."""

from __future__ import annotations

from outbox.message import new_id
from outbox.relay.order.answers import Answers
from outbox.store.settling import Change, Confirmed
from outbox.tables import State


def confirmed(id_: int) -> Confirmed:
    return Confirmed(id_, id_, new_id(), 0.0, 0.0)


def change(id_: int) -> Change:
    return Change(id_, new_id(), 0, 1, ("pending", 0), State.RETRYING, 1, 1.0, "refused")


def test_an_answer_waits_a_little_for_company_and_enough_of_them_do_not() -> None:
    answers = Answers(enough=3)
    assert answers.due_at is None
    answers.add(confirmed(1), 100.0)
    answers.add(change(2), 100.04)
    assert answers.due_at == 100.05
    answers.add(confirmed(3), 100.04)
    assert answers.due_at == 100.0


def test_a_settled_answer_is_done_with_and_one_that_came_later_is_not() -> None:
    answers = Answers(enough=9)
    answers.add(confirmed(1), 100.0)
    assert answers.settled([1], [], 100.1) == [1]
    assert (len(answers), answers.due_at) == (0, None)


def test_an_answer_whose_row_is_locked_is_tried_again_with_growing_pauses_and_keeps_nobody_waiting() -> None:
    answers = Answers(enough=9)
    answers.add(confirmed(1), 100.0)
    answers.add(confirmed(2), 100.0)
    assert answers.settled([1, 2], [1], 101.0) == [2]
    assert answers.due_at == 101.1
    answers.add(change(3), 101.0)
    assert [each.id for each in answers.due(101.05)[1]] == [3]
    assert answers.due(101.05)[0] == []
    assert answers.settled([3], [], 101.05) == [3]
    assert answers.due_at == 101.1
    assert [each.id for each in answers.due(101.1)[0]] == [1]
    assert answers.settled([1], [1], 101.1) == []
    assert answers.due_at == 101.3
    assert (answers.locked(103.9), answers.locked(104.0)) == ([], [1])
    assert answers.settled([1], [], 101.3) == [1]
    assert answers.due_at is None
