"""The lab's verdict on a database that went back in time: what it forgot is no loss, and whatever it kept must be right."""

from __future__ import annotations

from tests.kit.history import Entry
from tests.lab import judgement
from tests.lab.tap import Arrival


def _entry(id_: str, sequence: int | None = None) -> Entry:
    return Entry(id=id_, key="k", sequence=sequence, digest="")


def _judge(branches: list[list[str]], arrivals: list[tuple[str, int]], effects: list[str] | None = None) -> judgement.Judgement:
    ledgers = [[_entry(id_) for id_ in branch] for branch in branches]
    arrived = [Arrival(_entry(id_, sequence), "work.done") for id_, sequence in arrivals]
    done = ledgers[-1] if effects is None else [_entry(id_) for id_ in effects]
    return judgement.of(ledgers, arrived, done, ledgers[-1])


def test_a_run_whose_database_never_went_back_is_clean_when_everything_arrived_in_order() -> None:
    found = _judge([["a", "b"]], [("a", 1), ("b", 2)])
    assert found.problems == {}
    assert (found.messages, found.deliveries, found.forgotten) == (2, 2, 0)


def test_what_a_replaced_history_had_committed_may_have_arrived_or_not() -> None:
    found = _judge([["a", "gone", "never"], ["a", "b"]], [("a", 1), ("gone", 2), ("b", 2)])
    assert found.problems == {}
    assert found.forgotten == 1


def test_what_the_last_history_holds_must_have_arrived() -> None:
    assert _judge([["a", "gone"], ["a", "b"]], [("a", 1), ("gone", 2)]).problems == {"lost": ["b"]}


def test_what_no_history_holds_is_a_phantom() -> None:
    assert _judge([["a"], ["a"]], [("a", 1), ("x", 2)]).problems == {"phantom": ["x"]}


def test_each_history_must_have_arrived_in_order_by_itself() -> None:
    assert "reordered" in _judge([["a", "b", "c"]], [("a", 1), ("c", 3), ("b", 2)]).problems
    assert "reordered" in _judge([["a", "b", "c"], ["a"]], [("a", 1), ("c", 3), ("b", 2)]).problems
    assert "reordered" not in _judge([["a", "x"], ["a", "b"]], [("a", 1), ("b", 2), ("x", 2)]).problems


def test_duplicates_are_counted_by_topic_and_effects_may_happen_once_only() -> None:
    assert _judge([["a"]], [("a", 1), ("a", 1)]).duplicates == {"work.done": 1}
    assert _judge([["a"]], [("a", 1)], effects=["a", "a"]).problems == {"effect_twice": ["a"]}
    assert _judge([["a"]], [("a", 1)], effects=[]).problems == {"effect_missing": ["a"]}
