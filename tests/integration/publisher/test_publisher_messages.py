"""What the messages promise: enough to answer what the API answers, also when writers meet, and nothing uncommitted."""

from __future__ import annotations

import random
import threading
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from publisher import database
from publisher.conference import changes
from publisher.conference.models import Talk
from publisher.conference.states import MOVES, TalkState
from publisher.database import changing
from publisher.topics import KEY, TOPICS
from tests.integration.publisher.conftest import Api, application, data_of
from tests.kit.documented import payloads
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from outbox import Message

KINDS = {"session.modified": "session", "speaker.modified": "speaker", "microlocation.modified": "microlocation"}
PLURALS = {"session": "sessions", "speaker": "speakers", "microlocation": "microlocations"}


class ReadModel:
    """What a service that only listens can know, kept as docs/messages.md says."""

    def __init__(self) -> None:
        self.events: dict[int, dict[str, Any]] = {}

    def hear(self, messages: Iterable[Message]) -> None:
        for message in messages:
            data = data_of(message)
            assert message.key == KEY.format(**data)
            if message.topic == "event.modified":
                self._hear_event(data)
            elif message.topic in KINDS:
                self._hear_part(KINDS[message.topic], data)

    def _hear_event(self, data: dict[str, Any]) -> None:
        if data["change"] == "deleted":
            del self.events[data["event_id"]]
            return
        known = self.events.setdefault(data["event_id"], {"sessions": {}, "speakers": {}, "microlocations": {}})
        known |= {"event": data["event"], "tracks": {track["id"]: track for track in data["tracks"]}}

    def _hear_part(self, kind: str, data: dict[str, Any]) -> None:
        event, thing = self.events[data["event_id"]], data[kind]
        if kind == "session" and data["change"] != "deleted":  # what it names was heard of before
            assert thing["track_id"] in {None, *event["tracks"]}
            assert thing["microlocation_id"] in {None, *event["microlocations"]}
            assert set(thing["speaker_ids"]) <= event["speakers"].keys()
        if data["change"] == "deleted":
            assert event[PLURALS[kind]].pop(thing["id"]) == thing
        else:
            assert (data["change"] == "created") == (thing["id"] not in event[PLURALS[kind]])
            event[PLURALS[kind]][thing["id"]] = thing


def told_by(api: Api) -> dict[int, dict[str, Any]]:
    """Return what the API tells, in the form of the read model."""
    events = {}
    for event in api.all("/v1/events"):
        parts = ("sessions", "speakers", "microlocations", "tracks")
        events[event["id"]] = {"event": event} | {
            part: {thing["id"]: thing for thing in api.all(f"/v1/events/{event['id']}/{part}")} for part in parts
        }
    return events


class Organizer:
    """Does to a conference, by chance, everything that the API offers."""

    def __init__(self, api: Api, seed: int) -> None:
        self.api = api
        self.chance = random.Random(seed)
        self.known = ReadModel()

    def act(self) -> None:
        acts: list[Callable[[], object]] = [self.make_event, self.change_event, self.change_part, self.unlink]
        acts += [self.make_part, self.make_session, self.change_session, self.move, self.delete_part] * 2 + [self.link] * 3
        if self.chance.random() < 0.03:
            acts = [self.delete_event]
        self.chance.choice(acts)()

    def any(self, kind: str, event: int | None = None) -> Any:
        events = [self.known.events[event]] if event else list(self.known.events.values())
        things = [thing for known in events for thing in known[kind].values()]
        return self.chance.choice(things) if things else None

    def make_event(self) -> None:
        self.api.event(name=f"Event {self.chance.random()}")

    def change_event(self) -> None:
        for event in list(self.known.events)[:1]:
            self.api.change(f"/v1/events/{event}", state=self.chance.choice(["draft", "published"]), email=None)

    def delete_event(self) -> None:
        for event in list(self.known.events)[:1]:
            self.api.delete(f"/v1/events/{event}")

    def make_part(self) -> None:
        for event in self.chance.choices(list(self.known.events))[:1] if self.known.events else ():
            self.api.make(
                f"/v1/events/{event}/{self.chance.choice(['tracks', 'microlocations', 'speakers'])}", name="Ünïcödé 🎤"
            )

    def make_session(self) -> None:
        track = self.any("tracks")
        if track:
            self.api.make(f"/v1/events/{track['event_id']}/sessions", title="One", track_id=track["id"])

    def change_session(self) -> None:
        session = self.any("sessions")
        if session:
            room = self.any("microlocations", session["event_id"])
            times = {"starts_at": "2027-05-23T10:00:00.5+02:00", "ends_at": "2027-05-23T10:25:00+02:00"}
            changes_: list[dict[str, Any]] = [times, dict.fromkeys(times), {"language": "de"}]
            changes_.append({"microlocation_id": room and room["id"]})
            self.api.change(f"/v1/sessions/{session['id']}", **self.chance.choice(changes_))

    def change_part(self) -> None:
        kind = self.chance.choice(["tracks", "microlocations", "speakers"])
        part = self.any(kind)
        if part:
            self.api.change(f"/v1/{kind}/{part['id']}", name=f"Name {self.chance.randrange(3)}")

    def delete_part(self) -> None:
        kind = self.chance.choice(["tracks", "microlocations", "speakers", "sessions"])
        part = self.any(kind)
        if part:
            self.api.delete(f"/v1/{kind}/{part['id']}")

    def move(self) -> None:
        session = self.any("sessions")
        if session:
            self.api.move(session["id"], self.chance.choice(MOVES[TalkState(session["state"])]))

    def link(self) -> None:
        session = self.any("sessions")
        speaker = session and self.any("speakers", session["event_id"])
        if speaker:
            self.api.put(f"/v1/sessions/{session['id']}/speakers/{speaker['id']}")

    def unlink(self) -> None:
        session = self.any("sessions")
        if session and session["speaker_ids"]:
            self.api.delete(f"/v1/sessions/{session['id']}/speakers/{self.chance.choice(session['speaker_ids'])}")


@pytest.mark.parametrize("seed", [1, 2])
def test_a_service_that_only_listens_can_answer_what_the_api_answers(api: Api, sent: list[Message], seed: int) -> None:
    organizer = Organizer(api, seed)
    for act in [organizer.make_event] * 2 + [organizer.make_part] * 12 + [organizer.make_session] * 6 + [organizer.link] * 8:
        act()
        organizer.known.hear(sent)
        sent.clear()
    for number in range(150):
        organizer.act()
        organizer.known.hear(sent)
        sent.clear()
        if number % 50 == 49:
            assert organizer.known.events == told_by(api)

    assert organizer.known.events


def test_every_payload_has_the_members_that_are_documented(sqlite_api: Api, sent: list[Message]) -> None:
    event_id = sqlite_api.event()["id"]
    path = f"/v1/events/{event_id}"
    room = sqlite_api.make(f"{path}/microlocations", name="Hall")
    speaker = sqlite_api.make(f"{path}/speakers", name="Ada")
    session = sqlite_api.make(f"{path}/sessions", title="One", microlocation_id=room["id"])
    sqlite_api.put(f"/v1/sessions/{session['id']}/speakers/{speaker['id']}")
    sqlite_api.move(session["id"], "accepted")
    sqlite_api.make(f"{path}/tracks", name="Web")
    last = {message.topic: data_of(message) for message in sent}

    documented = payloads()
    documented["session.state_changed"]["session"] = documented["session.modified"]["session"]  # shown shortened
    assert {topic: members(payload) for topic, payload in last.items()} == {
        topic: members(payload) for topic, payload in documented.items()
    }


def members(value: Any) -> Any:
    """Return the names in *value*, all the way down."""
    if isinstance(value, list) and value and isinstance(value[0], dict):
        return [members(value[0])]
    return {name: members(inner) for name, inner in value.items()} if isinstance(value, dict) else None


def test_messages_of_an_event_are_numbered_without_gaps_and_lie_in_the_outbox(api: Api) -> None:
    event_id = api.event()["id"]
    for number in range(3):
        api.make(f"/v1/events/{event_id}/speakers", name=f"Speaker {number}")
    api.refused("POST", f"/v1/events/{event_id}/speakers", {"name": ""})
    api.change(f"/v1/events/{event_id}", name="Other")

    with database.of(api.app).engine.connect() as connection:
        rows = connection.execute(sa.text("SELECT key, sequence, topic, source FROM outbox_message ORDER BY id")).all()

    assert [(row.key, row.sequence) for row in rows] == [(f"event:{event_id}", number) for number in range(1, 6)]
    assert [row.topic for row in rows] == ["event.modified", *["speaker.modified"] * 3, "event.modified"]
    assert {row.source for row in rows} == {"/openevent"}


def test_an_answer_leads_to_what_became_of_its_messages(api: Api, sent: list[Message]) -> None:
    _, headers = api.post("/v1/events", {"name": "Day", "starts_at": "2027-05-23T09:00:00Z", "ends_at": "2027-05-23T18:00:00Z"})

    (message,) = sent
    assert headers["Link"] == f'</v1/messages/{message.id}>; rel="status"'
    assert api.get(f"/v1/messages/{message.id}").items() >= {
        "id": str(message.id),
        "topic": "event.modified",
        "sequence": 1,
        "state": "pending",
        "attempts": 0,
        "last_error": None,
        "published_at": None,
        "held_by": None,
    }.items()  # fmt: skip


def test_a_refused_change_leads_to_no_message(api: Api) -> None:
    answer = api.request("PATCH", f"/v1/events/{api.event()['id']}", {"ends_at": "2000-01-01T00:00:00Z"})

    assert answer.status_code == 422
    assert "Link" not in answer.headers


def test_nothing_is_said_where_nothing_changed(api: Api, sent: list[Message]) -> None:
    event = api.event()
    session = api.make(
        f"/v1/events/{event['id']}/sessions", title="One", starts_at="2027-05-23T10:00:00Z", ends_at="2027-05-23T11:00:00Z"
    )
    sent.clear()

    api.change(f"/v1/events/{event['id']}", name=event["name"], starts_at="2027-05-23T07:00:00Z")
    api.change(f"/v1/sessions/{session['id']}", starts_at="2027-05-23T12:00:00+02:00")
    api.change(f"/v1/sessions/{session['id']}")

    assert sent == []


def test_all_topics_are_known_to_the_outbox(api: Api) -> None:
    assert set(api.app.extensions["outbox"].topics) == TOPICS.keys()


def test_two_writers_of_one_session_announce_a_state_that_holds_both_changes(
    empty_postgres_url: str, sent: list[Message]
) -> None:
    api = Api(application(empty_postgres_url))
    engine = database.of(api.app).engine
    session = api.make(f"/v1/events/{api.event()['id']}/sessions", title="One")["id"]
    sent.clear()
    later = threading.Thread(target=lambda: api.change(f"/v1/sessions/{session}", subtitle="second"))

    with api.app.app_context(), changing() as db:
        found = changes.lock_part(db, Talk, session)
        assert found
        changes.update(db, *found, {"title": "first"})
        later.start()
        eventually(lambda: waiting(engine), what="the second writer to wait for the first")
    later.join(timeout=10)

    first, second = (data_of(message)["session"] for message in sent)
    assert (first["title"], first["subtitle"]) == ("first", None)
    assert (second["title"], second["subtitle"]) == ("first", "second")
    assert second == api.get(f"/v1/sessions/{session}")
    engine.dispose()


def test_a_lock_gives_what_the_writer_before_left(empty_postgres_url: str) -> None:
    api = Api(application(empty_postgres_url))
    session = api.make(f"/v1/events/{api.event()['id']}/sessions", title="One")["id"]

    with api.app.app_context(), changing() as db:
        seen_before = db.get_one(Talk, session)
        with api.app.app_context():
            api.change(f"/v1/sessions/{session}", title="Two")
        found = changes.lock_part(db, Talk, session)
        assert found
        assert found[1] is seen_before
        assert seen_before.title == "Two"
    database.of(api.app).engine.dispose()


def waiting(engine: sa.Engine) -> bool:
    """Say whether anybody waits for a lock in this database."""
    query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"
    with engine.connect() as connection:
        return bool(connection.scalar(sa.text(query)))
