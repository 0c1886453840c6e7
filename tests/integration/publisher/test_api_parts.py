from __future__ import annotations

from typing import Any

import pytest

from outbox import Message
from tests.integration.publisher.conftest import Api, data_of

PARTS = [
    ("tracks", {"name": "Web"}, {"color": "#c62874", "description": "All of it"}),
    ("microlocations", {"name": "Hall", "floor": 2}, {"latitude": 52.5, "longitude": 13.4, "room": "2-1"}),
    ("speakers", {"name": "Ada", "email": "ada@example.org"}, {"is_featured": True, "website": "https://ada.example.org"}),
    (
        "sessions",
        {"title": "One"},
        {"starts_at": "2027-05-23T10:00:00+02:00", "ends_at": "2027-05-23T10:25:00+02:00", "level": "beginner"},
    ),
]
#: The id of nothing.
NOBODY = 10**9
NAMES = {"tracks": "track", "microlocations": "microlocation", "speakers": "speaker", "sessions": "session"}


@pytest.mark.parametrize(("kind", "first", "then"), PARTS)
def test_a_part_of_an_event_is_made_shown_listed_changed_and_deleted(
    api: Api, kind: str, first: dict[str, Any], then: dict[str, Any]
) -> None:
    event_id = api.event()["id"]

    made, headers = api.post(f"/v1/events/{event_id}/{kind}", first)
    path = headers["Location"]
    assert path == f"/v1/{kind}/{made['id']}"
    assert made.items() >= (first | {"event_id": event_id, "external_id": None}).items()
    assert api.get(path) == made
    assert api.all(f"/v1/events/{event_id}/{kind}") == [made]

    changed = api.change(path, **then)
    assert {name for name in changed if changed[name] != made[name]} == then.keys()
    assert api.get(path) == changed

    api.delete(path)
    assert api.refused("GET", path)["detail"] == f"there is no {NAMES[kind]} {made['id']}"
    assert api.all(f"/v1/events/{event_id}/{kind}") == []


@pytest.mark.parametrize("kind", NAMES)
def test_what_is_not_there_is_not_found(sqlite_api: Api, kind: str) -> None:
    name = NAMES[kind]
    field: dict[str, str] = {"title": "x"} if kind == "sessions" else {"name": "x"}

    for method in ("GET", "PATCH", "DELETE"):
        body: dict[str, str] | None = {} if method == "PATCH" else None
        assert sqlite_api.refused(method, f"/v1/{kind}/{NOBODY}", body)["detail"] == f"there is no {name} {NOBODY}"
    for method in ("GET", "POST"):
        body = field if method == "POST" else None
        assert sqlite_api.refused(method, f"/v1/events/{NOBODY}/{kind}", body)["detail"] == f"there is no event {NOBODY}"


def test_only_parts_of_the_event_are_listed_and_page_by_page(api: Api) -> None:
    event_id, other = api.event()["id"], api.event()["id"]
    ids = []
    for number in range(5):
        ids.append(api.make(f"/v1/events/{event_id}/speakers", name=f"Speaker {number}")["id"])
        api.make(f"/v1/events/{other}/speakers", name="Other")

    page = api.get(f"/v1/events/{event_id}/speakers?limit=3")
    rest = api.get(page["next"])

    assert [speaker["id"] for part in (page, rest) for speaker in part["items"]] == ids
    assert rest["next"] is None


def test_sessions_are_listed_by_state(api: Api) -> None:
    path = f"/v1/events/{api.event()['id']}/sessions"
    ids = [api.make(path, title=f"Talk {number}")["id"] for number in range(4)]
    for session_id in ids[1:]:
        api.move(session_id, "accepted")

    page = api.get(f"{path}?state=accepted&limit=2")

    assert [session["id"] for session in page["items"]] == ids[1:3]
    assert "state=accepted" in page["next"]
    assert [session["id"] for session in api.get(page["next"])["items"]] == ids[3:]
    assert "must be one of draft, pending" in api.refused("GET", f"{path}?state=great")["detail"]
    assert api.refused("GET", path.replace("sessions", "speakers") + "?state=accepted")["status"] == 400


def test_a_session_refers_to_its_own_event_only(api: Api, sent: list[Message]) -> None:
    event_id, other = api.event()["id"], api.event()["id"]
    track = api.make(f"/v1/events/{other}/tracks", name="Theirs")["id"]
    room = api.make(f"/v1/events/{other}/microlocations", name="Theirs")["id"]
    sent.clear()

    problem = api.refused(
        "POST", f"/v1/events/{event_id}/sessions", {"title": "One", "track_id": track, "microlocation_id": room}
    )

    assert problem["status"] == 422
    assert problem["errors"] == [
        {"pointer": "/track_id", "detail": f"event {event_id} has no track {track}"},
        {"pointer": "/microlocation_id", "detail": f"event {event_id} has no microlocation {room}"},
    ]
    assert api.all(f"/v1/events/{event_id}/sessions") == sent == []


@pytest.mark.parametrize(
    ("starts", "ends", "fault"),
    [
        ("2027-05-23T10:00:00Z", None, {"pointer": "/ends_at", "detail": "both times must be set, or neither"}),
        (None, "2027-05-23T10:00:00Z", {"pointer": "/starts_at", "detail": "both times must be set, or neither"}),
        ("2027-05-23T10:00:00Z", "2027-05-23T12:00:00+02:00", {"pointer": "/ends_at", "detail": "must be after starts_at"}),
    ],
)
def test_a_session_has_both_times_in_order_or_none(sqlite_api: Api, starts: Any, ends: Any, fault: dict[str, str]) -> None:
    path = f"/v1/events/{sqlite_api.event()['id']}/sessions"

    assert sqlite_api.refused("POST", path, {"title": "One", "starts_at": starts, "ends_at": ends})["errors"] == [fault]


def test_a_change_is_held_against_what_is_there_already(sqlite_api: Api) -> None:
    path = f"/v1/events/{sqlite_api.event()['id']}/sessions"
    times = {"starts_at": "2027-05-23T10:00:00Z", "ends_at": "2027-05-23T11:00:00Z"}
    session = sqlite_api.make(path, title="One", **times)

    problem = sqlite_api.refused("PATCH", f"/v1/sessions/{session['id']}", {"starts_at": "2027-05-23T11:00:00Z"})

    assert problem["errors"][0]["pointer"] == "/ends_at"
    assert sqlite_api.change(f"/v1/sessions/{session['id']}", starts_at=None, ends_at=None)["ends_at"] is None


@pytest.mark.parametrize(("kind", "field"), [("tracks", "track_id"), ("microlocations", "microlocation_id")])
def test_what_a_session_named_is_deleted_after_the_session_stopped_naming_it(
    api: Api, sent: list[Message], kind: str, field: str
) -> None:
    event_id = api.event()["id"]
    part = api.make(f"/v1/events/{event_id}/{kind}", name="Gone")
    sessions = [api.make(f"/v1/events/{event_id}/sessions", title=f"Talk {n}", **{field: part["id"]}) for n in range(2)]
    sent.clear()

    api.delete(f"/v1/{kind}/{part['id']}")

    *changed, deleted = (data_of(message) for message in sent)
    assert [message["session"] for message in changed] == [session | {field: None} for session in sessions]
    assert [message["change"] for message in changed] == ["updated", "updated"]
    if kind == "tracks":
        assert (deleted["change"], deleted["tracks"]) == ("updated", [])
    else:
        assert (deleted["change"], deleted["microlocation"]) == ("deleted", part)
    assert api.get(f"/v1/sessions/{sessions[0]['id']}")[field] is None


def test_a_speaker_goes_after_the_sessions_stopped_naming_them(api: Api, sent: list[Message]) -> None:
    event_id = api.event()["id"]
    ada, ben = (api.make(f"/v1/events/{event_id}/speakers", name=name) for name in ("Ada", "Ben"))
    session = api.make(f"/v1/events/{event_id}/sessions", title="One")["id"]
    for speaker in (ada, ben):
        api.put(f"/v1/sessions/{session}/speakers/{speaker['id']}")
    sent.clear()

    api.delete(f"/v1/speakers/{ada['id']}")

    changed, deleted = (data_of(message) for message in sent)
    assert changed["session"]["speaker_ids"] == [ben["id"]]
    assert deleted == {"event_id": event_id, "speaker_id": ada["id"], "change": "deleted", "speaker": ada}
    assert api.get(f"/v1/sessions/{session}")["speaker_ids"] == [ben["id"]]
