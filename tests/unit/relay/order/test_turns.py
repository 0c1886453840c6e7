from __future__ import annotations

from outbox.relay.order.turns import Turns


def everything(_: object) -> bool:
    return True


def turns(*waiting: str) -> Turns[str]:
    """What waits: "s1" is the first of topic s."""
    found: Turns[str] = Turns()
    for each in waiting:
        found.add(each[0], each)
    return found


def taken(found: Turns[str], count: int) -> list[str | None]:
    return [found.next(everything, everything) for _ in range(count)]


def test_what_may_be_written_is_written_in_the_order_it_was_handed_over() -> None:
    found = turns("s1", "h1", "s2", "s3", "h2")
    assert taken(found, 3) == ["s1", "h1", "s2"]
    found.add("a", "a1")
    assert taken(found, 4) == ["s3", "h2", "a1", None]
    assert not found


def test_a_topic_that_was_taken_back_begins_anew() -> None:
    found = turns("s1", "h1", "s2")
    found.remove("s")
    found.add("s", "s3")
    found.add("h", "h2")
    assert taken(found, 4) == ["h1", "s3", "h2", None]


def test_a_topic_that_may_not_is_passed_over_and_keeps_what_waits() -> None:
    found = turns("s1", "h1", "s2", "h2")
    assert [found.next(lambda topic: topic == "h", everything) for _ in range(3)] == ["h1", "h2", None]
    assert taken(found, 2) == ["s1", "s2"]


def test_one_that_may_not_keeps_nobody_behind_it_waiting() -> None:
    found = turns("s1", "s2", "s3")
    assert [found.next(everything, lambda each: each != "s1") for _ in range(3)] == ["s2", "s3", None]
    assert list(found) == ["s1"]


def test_all_that_waits_of_a_topic_can_be_taken_back() -> None:
    found = turns("s1", "h1", "s2")
    assert found.remove("s") == ["s1", "s2"]
    assert found.remove("s") == []
    assert taken(found, 2) == ["h1", None]
