from __future__ import annotations

import pytest

from outbox import Message
from publisher.conference.changes import MAX_SPEAKERS_OF_A_SESSION, MAX_TRACKS, set_speakers
from publisher.conference.models import Speaker, Talk, Track
from publisher.conference.states import MOVES, TalkState
from publisher.database import changing
from tests.integration.publisher.conftest import Api, data_of


def session_in(api: Api, state: str) -> int:
    """Return the id of a session that is in *state*, however it got there."""
    session_id: int = api.make(f"/v1/events/{api.event()['id']}/sessions", title="One")["id"]
    with api.app.app_context(), changing() as db:
        db.get_one(Talk, session_id).state = TalkState(state)
    return session_id


@pytest.mark.parametrize("state", list(TalkState))
def test_a_session_goes_where_its_state_allows_and_nowhere_else(sqlite_api: Api, state: TalkState) -> None:
    session_id = session_in(sqlite_api, state)

    for wanted in set(TalkState) - set(MOVES[state]):
        problem = sqlite_api.refused("POST", f"/v1/sessions/{session_id}/state", {"state": wanted})
        assert (problem["status"], problem["type"]) == (409, "/docs#illegal-move")
        assert (problem["state"], problem["allowed"]) == (state, list(MOVES[state]))
        assert sqlite_api.get(f"/v1/sessions/{session_id}")["state"] == state
    for wanted in MOVES[state]:
        assert sqlite_api.move(session_in(sqlite_api, state), wanted)["state"] == wanted


def test_a_move_is_told_as_a_change_and_as_a_move(api: Api, sent: list[Message]) -> None:
    event = api.event()
    speakers = [api.make(f"/v1/events/{event['id']}/speakers", name=name, email=mail) for name, mail in
                (("Ben", None), ("Ada", "ada@example.org"))]  # fmt: skip
    session = api.make(f"/v1/events/{event['id']}/sessions", title="One")
    for speaker in reversed(speakers):
        api.put(f"/v1/sessions/{session['id']}/speakers/{speaker['id']}")
    sent.clear()

    moved = api.move(session["id"], "accepted")

    change, move = sent
    ids = {"event_id": event["id"], "session_id": session["id"], "change": "accepted"}
    assert (change.topic, move.topic) == ("session.modified", "session.state_changed")
    assert data_of(change) == ids | {"session": moved}
    assert data_of(move) == ids | {
        "previous": "pending",
        "event_name": event["name"],
        "session": moved,
        "speakers": [
            {"id": speaker["id"], "name": speaker["name"], "email": speaker["email"]} for speaker in reversed(speakers)
        ],
    }


def test_an_illegal_move_is_told_to_nobody(api: Api, sent: list[Message]) -> None:
    session_id = session_in(api, "rejected")
    sent.clear()

    api.refused("POST", f"/v1/sessions/{session_id}/state", {"state": "confirmed"})

    assert sent == []


@pytest.mark.parametrize(
    ("body", "fault"),
    [
        ({"state": "great"}, {"pointer": "/state", "detail": f"must be one of {', '.join(TalkState)}"}),
        ({}, {"pointer": "/state", "detail": "is required"}),
        ({"state": None}, {"pointer": "/state", "detail": "must not be null"}),
    ],
)
def test_an_order_to_move_is_checked(sqlite_api: Api, body: dict[str, object], fault: dict[str, str]) -> None:
    session_id = session_in(sqlite_api, "draft")

    assert sqlite_api.refused("POST", f"/v1/sessions/{session_id}/state", body)["errors"] == [fault]


def test_speakers_keep_the_order_in_which_they_were_added(api: Api, sent: list[Message]) -> None:
    event_id = api.event()["id"]
    ids = [api.make(f"/v1/events/{event_id}/speakers", name=f"Speaker {number}")["id"] for number in range(3)]
    path = f"/v1/sessions/{api.make(f'/v1/events/{event_id}/sessions', title='One')['id']}"
    sent.clear()

    for speaker_id in (ids[2], ids[0], ids[1]):
        api.put(f"{path}/speakers/{speaker_id}")
    api.delete(f"{path}/speakers/{ids[0]}")
    api.put(f"{path}/speakers/{ids[0]}")

    assert api.get(path)["speaker_ids"] == [ids[2], ids[1], ids[0]]
    assert [data_of(message)["session"]["speaker_ids"] for message in sent] == [
        [ids[2]],
        [ids[2], ids[0]],
        [ids[2], ids[0], ids[1]],
        [ids[2], ids[1]],
        [ids[2], ids[1], ids[0]],
    ]


def test_a_speaker_added_again_changes_nothing_and_nobody_hears_of_it(api: Api, sent: list[Message]) -> None:
    event_id = api.event()["id"]
    speaker = api.make(f"/v1/events/{event_id}/speakers", name="Ada")["id"]
    path = f"/v1/sessions/{api.make(f'/v1/events/{event_id}/sessions', title='One')['id']}/speakers/{speaker}"
    api.put(path)
    sent.clear()

    api.put(path)

    assert sent == []


def test_speakers_that_can_not_be_added_or_removed_are_said(sqlite_api: Api) -> None:
    event_id, other = sqlite_api.event()["id"], sqlite_api.event()["id"]
    theirs = sqlite_api.make(f"/v1/events/{other}/speakers", name="Theirs")["id"]
    session_id = sqlite_api.make(f"/v1/events/{event_id}/sessions", title="One")["id"]
    path = f"/v1/sessions/{session_id}/speakers"

    foreign = sqlite_api.refused("PUT", f"{path}/{theirs}")
    assert foreign["status"] == 422
    assert f"speaker {theirs} belongs to event {other}" in foreign["errors"][0]["detail"]
    assert sqlite_api.refused("PUT", f"{path}/{10**9}")["detail"] == f"there is no speaker {10**9}"
    assert sqlite_api.refused("PUT", f"/v1/sessions/{10**9}/speakers/{theirs}")["detail"] == f"there is no session {10**9}"
    assert sqlite_api.refused("DELETE", f"{path}/{theirs}")["detail"] == f"session {session_id} has no speaker {theirs}"


def test_what_every_message_must_carry_is_limited_in_number(sqlite_api: Api) -> None:
    event_id = sqlite_api.event()["id"]
    session_id = sqlite_api.make(f"/v1/events/{event_id}/sessions", title="One")["id"]
    with sqlite_api.app.app_context(), changing() as db:
        db.add_all(Track(event_id=event_id, name=f"Track {number}", color="#000000") for number in range(MAX_TRACKS))
        speakers = [Speaker(event_id=event_id, name="Ada", is_featured=False) for _ in range(MAX_SPEAKERS_OF_A_SESSION)]
        db.add_all(speakers)
        db.flush()
        set_speakers(db.get_one(Talk, session_id), [speaker.id for speaker in speakers])
    last = sqlite_api.make(f"/v1/events/{event_id}/speakers", name="One too many")["id"]

    track = sqlite_api.refused("POST", f"/v1/events/{event_id}/tracks", {"name": "One too many"})
    speaker = sqlite_api.refused("PUT", f"/v1/sessions/{session_id}/speakers/{last}")

    assert track["errors"] == [{"pointer": "", "detail": "an event has at most 100 tracks"}]
    assert speaker["errors"] == [{"pointer": "", "detail": "a session has at most 50 speakers"}]
