from __future__ import annotations

import json
from datetime import UTC, datetime, timedelta, timezone
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from publisher.conference import fields
from publisher.conference.describe import moment_text
from publisher.conference.fields import Choice, Decimal, Field, Flag, Moment, Text, Whole, Zone
from publisher.conference.kinds import KINDS
from publisher.conference.states import EventState

ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)
EVERY_FIELD = list(dict.fromkeys(field for kind in KINDS.values() for field in kind.fields.values()))


@pytest.mark.parametrize(
    ("field", "given_", "kept"),
    [
        (Text(5, shortest=1), "  a ", "  a "),
        (Text(5), "", ""),
        (Text(2), "\n\t", "\n\t"),
        (Text(1), "🎤", "🎤"),
        (fields.LINK, "https://example.org/a?b=c", "https://example.org/a?b=c"),
        (fields.LINK, "/images/speakers/benett.jpg", "/images/speakers/benett.jpg"),
        (fields.EMAIL, "ada@example.org", "ada@example.org"),
        (fields.COLOR, "#C62874", "#C62874"),
        (fields.LATITUDE, 45, 45.0),
        (fields.LONGITUDE, -179.5, -179.5),
        (Whole(-100, 1000), -1, -1),
        (fields.REFERENCE, 2**63 - 1, 2**63 - 1),
        (Flag(), False, False),
        (Moment(), "2018-03-22T09:30:00+08:00", datetime(2018, 3, 22, 1, 30, tzinfo=UTC)),
        (Moment(), "2018-03-22t01:30:00.25z", datetime(2018, 3, 22, 1, 30, 0, 250_000, tzinfo=UTC)),
        (Zone(), "US/Pacific", "US/Pacific"),
        (Choice(tuple(EventState)), "published", EventState.PUBLISHED),
    ],
)
def test_a_field_keeps_what_fits(field: Field, given_: object, kept: object) -> None:
    assert field.parse(given_) == kept


@pytest.mark.parametrize(
    ("field", "given_", "reason"),
    [
        (Text(5), 5, "must be a text"),
        (Text(5), "123456", "has 6 characters; at most 5"),
        (Text(5, shortest=1), " \n ", "must not be blank"),
        (Text(5), "a\x00b", "U+0000"),
        (Text(5), "a\ud800", "U+D800"),
        (fields.LINK, "javascript:alert(1)", "must be a link"),
        (fields.LINK, "https:// www.example.org", "must be a link"),
        (fields.LINK, "http://a\nb", "must be a link"),
        (fields.EMAIL, "ada", "must be an e-mail address"),
        (fields.COLOR, "red", "must be a colour"),
        (fields.LATITUDE, 91, "must be from -90 to 90"),
        (fields.LATITUDE, float("nan"), "must be from -90 to 90"),
        (fields.LATITUDE, "45", "must be a number"),
        (fields.LATITUDE, True, "must be a number"),
        (Whole(0, 9), 1.0, "must be a whole number"),
        (Whole(0, 9), True, "must be a whole number"),
        (fields.REFERENCE, 0, "must be from 1"),
        (fields.REFERENCE, 2**63, "must be from 1"),
        (Flag(), 1, "must be true or false"),
        (Moment(), "2018-03-22T09:30:00", "with its offset"),
        (Moment(), "2018-03-22", "with its offset"),
        (Moment(), 1521682200, "with its offset"),
        (Moment(), "2018-02-30T09:30:00Z", "no time that exists"),
        (Moment(), "0001-01-01T00:00:00+14:00", "no time that exists"),
        (Moment(), "2018-03-22T09:30:00+25:00", "no time that exists"),
        (Zone(), "Mars/Olympus", "name of a time zone"),
        (Zone(), "../../etc/passwd", "name of a time zone"),
        (Zone(), "", "name of a time zone"),
        (Choice(tuple(EventState)), "Published", "must be one of draft, published"),
    ],
)
def test_a_field_refuses_what_does_not_fit_and_says_why(field: Field, given_: object, reason: str) -> None:
    with pytest.raises(ValueError) as refusal:
        field.parse(given_)

    assert reason in str(refusal.value)


@given(st.sampled_from(EVERY_FIELD), ANY_JSON)
def test_a_field_meets_any_json_with_a_value_or_a_reason(field: Field, value: Any) -> None:
    try:
        kept = field.parse(value)
    except ValueError as refusal:
        kept = str(refusal)

    assert kept or kept in (0, False, "")
    assert json.dumps(moment_text(kept) if isinstance(kept, datetime) else kept).encode()


@given(
    st.datetimes(datetime(2, 1, 1), datetime(9998, 12, 31)),  # noqa: DTZ001
    st.integers(-14 * 60, 14 * 60),
)
def test_an_instant_that_was_shown_is_the_instant_that_was_entered(wall: datetime, offset_minutes: int) -> None:
    moment = wall.replace(tzinfo=timezone(timedelta(minutes=offset_minutes)))

    kept = Moment().parse(moment.isoformat())

    assert Moment().parse(moment_text(kept)) == kept == moment
    assert moment_text(kept).endswith("Z")


def test_every_schema_says_a_type() -> None:
    for kind in KINDS.values():
        for field in kind.fields.values():
            assert field.schema["type"]


def test_numbers_are_kept_as_numbers() -> None:
    assert isinstance(Decimal(0, 10).parse(5), float)
