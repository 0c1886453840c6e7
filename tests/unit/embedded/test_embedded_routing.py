from __future__ import annotations

import time

import pytest

from outbox.embedded.routing import matches


@pytest.mark.parametrize(
    ("pattern", "topic", "expected"),
    [
        ("session.modified", "session.modified", True),
        ("session.modified", "session.modified.twice", False),
        ("session.*", "session.modified", True),
        ("session.*", "session", False),
        ("session.*", "session.a.b", False),
        ("*", "session", True),
        ("#", "session.modified", True),
        ("session.#", "session", True),
        ("session.#", "session.a.b", True),
        ("session.#", "speaker.a", False),
        ("#.modified", "modified", True),
        ("#.modified", "a.b.modified", True),
        ("a.#.z", "a.z", True),
        ("a.#.z", "a.b.c.z", True),
        ("a.#.z", "a.b.c", False),
        ("#.#", "", True),
        ("#.a.#.b.#", "a.b", True),
        ("#.a.#.b.#", "c.a.c.b.c", True),
        ("#.a.#.b.#", "b.a", False),
        ("session.mod*", "session.modified", False),
        ("Session.modified", "session.modified", False),
        ("session_modified", "sessionXmodified", False),
    ],
)
def test_a_pattern_takes_the_words_it_names(pattern: str, topic: str, expected: bool) -> None:
    assert matches(pattern, topic) is expected


def test_a_pattern_of_many_hashes_costs_no_search() -> None:
    began = time.process_time()
    assert not matches(".".join(["#", "a"] * 60), ".".join(["a"] * 59 + ["b"] * 60))
    assert time.process_time() - began < 1.0
