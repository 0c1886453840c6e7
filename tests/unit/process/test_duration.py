"""Durations as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.process import duration


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("500ms", 0.5), ("30s", 30.0), ("5m", 300.0), ("2h", 7200.0), ("7d", 604800.0), (" 1.5s ", 1.5), ("0s", 0.0)],
)
def test_a_number_and_a_unit_are_seconds(text: str, seconds: float) -> None:
    assert duration.parse(text) == pytest.approx(seconds)


@pytest.mark.parametrize("text", ["", "30", "s", "30 s", "-1s", "1e3s", "30sec", "1m30s", "∞"])
def test_anything_else_is_refused_with_the_shape(text: str) -> None:
    with pytest.raises(ValueError, match="a number and a unit: 500ms, 30s"):
        duration.parse(text)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.25, "250ms"), (1.0, "1s"), (90.0, "90s"), (120.0, "2m"), (3600.0, "1h"), (1209600.0, "14d"), (1.5, "1.5s")],
)
def test_the_largest_exact_unit_is_shown(seconds: float, text: str) -> None:
    assert duration.format(seconds) == text


@given(st.integers(0, 10**12))
def test_what_is_shown_means_the_same_when_read(milliseconds: int) -> None:
    seconds = milliseconds / 1000
    assert duration.parse(duration.format(seconds)) == pytest.approx(seconds, rel=1e-9)
