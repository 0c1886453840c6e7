"""How long to wait before trying again."""

from __future__ import annotations

import random

from hypothesis import given
from hypothesis import strategies as st

from outbox.process.backoff import Backoff


def test_the_longest_wait_doubles_up_to_the_maximum() -> None:
    backoff = Backoff(base_seconds=1.0, maximum_seconds=10.0)
    assert [backoff.ceiling(attempt) for attempt in range(1, 7)] == [1.0, 2.0, 4.0, 8.0, 10.0, 10.0]


def test_an_attempt_without_a_number_waits_like_the_first() -> None:
    assert Backoff(1.0, 10.0).ceiling(0) == 1.0


@given(st.integers(1, 10**9), st.integers())
def test_a_wait_is_anywhere_between_nothing_and_the_ceiling(attempt: int, seed: int) -> None:
    backoff = Backoff(0.5, 300.0)
    assert 0.0 <= backoff.wait(attempt, random.Random(seed)) <= backoff.ceiling(attempt) <= 300.0


def test_waits_spread_over_the_whole_range() -> None:
    rng = random.Random(1)
    waits = [Backoff(8.0, 8.0).wait(1, rng) for _ in range(1000)]
    assert min(waits) < 0.5
    assert max(waits) > 7.5
