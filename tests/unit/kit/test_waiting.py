from __future__ import annotations

import pytest

from tests.kit.waiting import eventually


def test_the_first_truthy_answer_is_returned() -> None:
    answers = iter([None, 0, "here", "later"])
    assert eventually(lambda: next(answers), interval=0) == "here"


def test_running_out_of_time_says_what_was_awaited_and_the_last_answer() -> None:
    with pytest.raises(AssertionError, match=r"waited 0\.05 s for three rows; last answer: 0"):
        eventually(lambda: 0, timeout=0.05, what="three rows")


def test_a_failed_assertion_counts_as_not_yet() -> None:
    attempts = iter([False, False, True])

    def check() -> bool:
        assert next(attempts), "still empty"
        return True

    assert eventually(check, interval=0)
    with pytest.raises(AssertionError, match="it said: never"):
        eventually(_refuse, timeout=0.01)


def _refuse() -> bool:
    raise AssertionError("never")


def test_any_other_exception_passes_through_at_once() -> None:
    attempts = []

    def broken() -> bool:
        attempts.append(1)
        raise KeyError("missing")

    with pytest.raises(KeyError):
        eventually(broken)
    assert len(attempts) == 1
