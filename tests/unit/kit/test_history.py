"""The checker itself: each kind of fault, planted, is found and named; nothing else is."""

from __future__ import annotations

from tests.kit.history import Entry, judge


def entries(key: str, *sequences: int) -> list[Entry]:
    return [Entry(f"{key}{number}", key, number, "d") for number in sequences]


def test_a_history_without_faults_has_no_problems() -> None:
    ledger = [*entries("a", 1, 2, 3), Entry("free", None, None, "d")]
    verdict = judge(ledger, [ledger[3], *ledger[:3]], [entry.id for entry in ledger])
    assert verdict.problems() == {}
    assert verdict.duplicates == 0


def test_a_missing_delivery_is_lost() -> None:
    assert judge(entries("a", 1, 2), entries("a", 1)).problems() == {"lost": ["a2"]}


def test_a_delivery_that_nobody_committed_is_a_phantom() -> None:
    assert judge(entries("a", 1), entries("a", 1, 2)).problems() == {"phantom": ["a2"]}


def test_a_first_delivery_after_a_later_one_is_reordered_and_a_repeated_one_is_not() -> None:
    ledger = entries("a", 1, 2, 3)
    assert list(judge(ledger, entries("a", 1, 3, 2)).problems()) == ["reordered"]
    repeated = judge(ledger, entries("a", 1, 2, 1, 2, 3))
    assert repeated.problems() == {}
    assert repeated.duplicates == 2


def test_other_bytes_under_the_same_id_are_damaged() -> None:
    assert judge([Entry("a1", "a", 1, "x")], [Entry("a1", "a", 1, "y")]).problems() == {"damaged": ["a1"]}


def test_a_hole_in_the_sequences_of_a_key_is_a_gap() -> None:
    ledger = entries("a", 1, 3)
    assert list(judge(ledger, ledger).problems()) == ["gaps"]


def test_effects_are_counted_once_each() -> None:
    ledger = entries("a", 1, 2)
    assert judge(ledger, ledger, ["a1"]).problems() == {"effect_missing": ["a2"]}
    assert judge(ledger, ledger, ["a1", "a1", "a2"]).problems() == {"effect_twice": ["a1"]}
