from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from outbox.message import encode
from publisher.conference.changes import MAX_SPEAKERS_OF_A_SESSION
from publisher.conference.describe import describe
from publisher.conference.errors import Fault, Invalid
from publisher.conference.fields import MAX_ID, Choice, Decimal, Field, Flag, Moment, Pattern, Text, Whole, Zone
from publisher.conference.kinds import EVENT, KINDS, MICROLOCATION, PARTS, SESSION, SPEAKER, Kind
from publisher.conference.models import Event, Part, Talk, TalkSpeaker
from publisher.conference.states import TalkState
from tests.unit.publisher.test_publisher_fields import ANY_JSON

TIMES = {"starts_at": "2027-05-23T09:00:00+02:00", "ends_at": "2027-05-23T18:00:00+02:00"}


def faults_of(kind: Kind, data: dict[str, Any], *, partial: bool = False) -> dict[str, str]:
    with pytest.raises(Invalid) as refusal:
        kind.check(data, partial=partial)
    return {fault.pointer: fault.detail for fault in refusal.value.faults}


def test_all_faults_are_found_at_once() -> None:
    faults = faults_of(EVENT, {"name": " ", "starts_at": "soon", "latitude": 100, "nmae": "x", "a/b~c": 1, "id": 4})

    assert faults.keys() == {"/name", "/starts_at", "/ends_at", "/latitude", "/nmae", "/a~1b~0c", "/id"}
    assert faults["/ends_at"] == "is required"
    assert faults["/id"] == "is read-only: it is given by the publisher"


def test_what_is_left_out_gets_its_default() -> None:
    values = EVENT.check({"name": "Blinker Day", **TIMES})

    assert (values["timezone"], values["state"]) == ("UTC", "draft")
    assert SESSION.check({"title": "Signals that arrive"})["state"] is TalkState.PENDING


def test_a_change_needs_nothing_and_adds_nothing() -> None:
    assert EVENT.check({}, partial=True) == {}
    assert EVENT.check({"description": None}, partial=True) == {"description": None}


@pytest.mark.parametrize("name", ["name", "starts_at", "timezone", "state"])
def test_what_always_has_a_value_is_never_null(name: str) -> None:
    assert faults_of(EVENT, {name: None}, partial=True) == {f"/{name}": "must not be null"}


def test_a_session_is_made_in_a_first_state_and_moved_to_all_others() -> None:
    assert SESSION.check({"title": "One", "state": "draft"})["state"] is TalkState.DRAFT
    assert faults_of(SESSION, {"title": "One", "state": "accepted"}) == {"/state": "must be one of pending, draft"}
    assert faults_of(SESSION, {"state": "pending"}, partial=True)["/state"].startswith("is changed by a move")
    assert faults_of(SESSION, {"speaker_ids": [1]}, partial=True)["/speaker_ids"].startswith("is read-only")


@given(st.sampled_from(list(KINDS.values())), st.dictionaries(st.text(max_size=8), ANY_JSON, max_size=4), st.booleans())
def test_any_object_is_accepted_or_refused_with_reasons(kind: Kind, data: dict[str, Any], partial: bool) -> None:
    faults: tuple[Fault, ...] = ()
    try:
        kind.check(data, partial=partial)
    except Invalid as refusal:
        faults = refusal.faults

    assert all(fault.pointer.startswith("/") and fault.detail for fault in faults)


def longest(field: Field) -> Any:
    """Return the value of *field* that takes most room: four bytes a character where it may."""
    if isinstance(field, Text):
        return "🎤" * field.longest
    if isinstance(field, Pattern):
        if field.format or "@" in field.pattern:
            return "🎤" * (field.longest - 2) + "@🎤"
        return "#c62874" if field.pattern.startswith("#") else "/" + "🎤" * (field.longest - 1)
    if isinstance(field, Zone):
        return "America/Argentina/ComodRivadavia"
    if isinstance(field, Moment):
        return Moment().parse("2027-05-23T09:00:00.123456+02:00")
    if isinstance(field, Choice):
        return max(field.words, key=len)
    if isinstance(field, Flag):
        return False
    assert isinstance(field, (Whole, Decimal))
    return field.high if isinstance(field, Whole) else field.low + 0.12345678901234


@pytest.mark.parametrize("row", [Event, *PARTS], ids=lambda row: row.__name__)
def test_the_longest_thing_fits_into_a_message(row: type[Event | Part]) -> None:
    kind = KINDS[row]
    thing = row(id=MAX_ID, external_id="🎤" * 255, **{name: longest(field) for name, field in kind.fields.items()})
    if isinstance(thing, Talk):
        thing.state = TalkState.WITHDRAWN
        thing.links = [TalkSpeaker(speaker_id=MAX_ID - place) for place in range(MAX_SPEAKERS_OF_A_SESSION)]

    encode({"event_id": MAX_ID, "change": "unpublished", kind.name: describe(thing)}, limit=256 * 1024 - 256)


def test_the_shown_names_are_those_of_the_documented_objects(documented: dict[str, dict[str, Any]]) -> None:
    assert set(EVENT.shown) == documented["event.modified"]["event"].keys()
    assert set(KINDS[next(iter(PARTS))].shown) == documented["event.modified"]["tracks"][0].keys()
    assert set(SESSION.shown) == documented["session.modified"]["session"].keys()
    assert set(SPEAKER.shown) == documented["speaker.modified"]["speaker"].keys()
    assert set(MICROLOCATION.shown) == documented["microlocation.modified"]["microlocation"].keys()


def test_each_kind_says_of_each_name_either_what_it_takes_or_why_not() -> None:
    for kind in KINDS.values():
        assert len(kind.shown) == len(set(kind.shown))
        assert all(re.fullmatch("[a-z_]+", name) for name in kind.shown)
