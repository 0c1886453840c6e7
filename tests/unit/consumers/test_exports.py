"""The exports service: what it keeps, what it writes, and that files are whole."""

from __future__ import annotations

import json
import threading
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

import icalendar
import pytest
import sqlalchemy as sa
from lxml import etree

from consumers.exports import files, model, service
from consumers.exports.files import Writer, replace
from consumers.exports.icalendar_files import XCAL
from consumers.exports.pentabarf import _zone
from consumers.exports.programme import plain
from outbox.consumer import Reject
from outbox.database import create_engine
from outbox.errors import ConfigurationError
from outbox.message import Message, encode, new_id

if TYPE_CHECKING:
    from pathlib import Path

    from sqlalchemy.engine import Engine

NOON = datetime(2026, 5, 1, 12, 0, tzinfo=UTC)
EVENT: dict[str, Any] = {
    "id": 1,
    "name": "Outbox Days",
    "timezone": "Asia/Singapore",
    "starts_at": "2026-06-01T01:00:00Z",
    "ends_at": "2026-06-02T10:00:00Z",
    "location_name": "Hall & Garden",
    "url": "https://example.org",
}
TRACKS = [{"id": 5, "event_id": 1, "name": "Databases", "color": "#ff0000"}]


def session(id: int, **changes: Any) -> dict[str, Any]:
    return {
        "id": id,
        "event_id": 1,
        "title": f"Talk {id}",
        "short_abstract": "<p>One &amp; two</p><p>three\x0b</p>",
        "state": "accepted",
        "starts_at": "2026-06-01T02:00:00Z",
        "ends_at": "2026-06-01T02:45:00Z",
        "track_id": 5,
        "microlocation_id": 3,
        "speaker_ids": [9, 8],
        **changes,
    }


class World:
    """The service with a database of its own, fed with messages."""

    def __init__(self, folder: Path) -> None:
        self.engine: Engine = create_engine(f"sqlite:///{folder}/exports.db")
        self.folder = folder / "files"
        self.sequence = 0
        self.clock = 0.0
        self.writer = Writer(lambda: self.clock)

    def say(self, topic: str, at: datetime = NOON, sequence: int | None = None, **data: Any) -> None:
        self.sequence += 1
        message = Message(
            id=new_id(), source="/openevent", topic=topic, key="event:1", sequence=sequence or self.sequence,
            body=encode({"event_id": 1, "change": "updated", **data}, limit=10**6), created_at=at,
        )  # fmt: skip
        service.deliver(message, self.engine)

    def say_session(
        self, id: int, at: datetime = NOON, change: str = "updated", sequence: int | None = None, **changes: Any
    ) -> None:
        self.say("session.modified", at, sequence, session_id=id, change=change, session=session(id, **changes))

    def write_one(self) -> bool:
        return self.writer.write_one(self.engine, self.folder, NOON)

    def write(self) -> None:
        while self.write_one():
            pass

    def file(self, name: str) -> bytes:
        return (self.folder / "event-1" / name).read_bytes()


@pytest.fixture
def world(tmp_path: Path) -> World:
    world = World(tmp_path)
    world.say("event.modified", event=EVENT, tracks=TRACKS)
    world.say("microlocation.modified", microlocation_id=3, microlocation={"id": 3, "event_id": 1, "name": "Aula "})
    for id, name in ((8, "Ada"), (9, "Grace Hopper")):
        world.say("speaker.modified", speaker_id=id, speaker={"id": id, "event_id": 1, "name": name})
    return world


def test_the_calendar_holds_each_accepted_session_with_a_time_once(world: World) -> None:
    world.say_session(1)
    world.say_session(2, state="rejected")
    world.say_session(3, starts_at=None, ends_at=None)
    world.say_session(4, state="confirmed")
    world.write()
    calendar = icalendar.Calendar.from_ical(world.file("schedule.ics"))
    events: list[Any] = list(calendar.walk("VEVENT"))
    assert [str(event["SUMMARY"]) for event in events] == ["Talk 1", "Talk 4"]
    assert events[0]["DTSTART"].dt == datetime(2026, 6, 1, 2, 0, tzinfo=UTC)
    assert str(events[0]["LOCATION"]) == "Aula"
    assert "Grace Hopper, Ada" in str(events[0]["DESCRIPTION"])


def test_xcal_says_the_same_as_ical(world: World) -> None:
    world.say_session(1)
    world.write()
    root = etree.fromstring(world.file("schedule.xcal.xml"))
    names = {"x": XCAL}
    assert root.xpath("//x:vevent/x:properties/x:summary/x:text/text()", namespaces=names) == ["Talk 1"]
    assert root.xpath("//x:vevent/x:properties/x:dtstart/x:date-time/text()", namespaces=names) == ["2026-06-01T02:00:00Z"]


def test_pentabarf_lists_days_and_rooms_in_the_time_of_the_venue(world: World) -> None:
    world.say_session(1, starts_at="2026-06-01T17:30:00Z", ends_at="2026-06-01T19:00:00Z")
    world.say_session(2, microlocation_id=None)
    world.write()
    root = etree.fromstring(world.file("pentabarf.xml"))
    assert root.xpath("conference/venue/text()") == ["Hall & Garden"]
    assert root.xpath("day/@date") == ["2026-06-01", "2026-06-02"]  # 17:30 UTC is 01:30 of the next day in Singapore
    event = root.xpath("day[2]/room[@name='Aula']/event")[0]
    assert (event.findtext("start"), event.findtext("duration")) == ("01:30", "01:30")
    assert event.xpath("persons/person/text()") == ["Grace Hopper", "Ada"]
    assert root.xpath("day[1]/room/@name") == ["Room to be announced"]


def test_a_name_on_two_lines_is_one_property_of_the_calendar(world: World) -> None:
    world.say("event.modified", event={**EVENT, "name": "Outbox; Days,\nX-WR-RELCALID:1"}, tracks=TRACKS)
    world.write()
    assert b"\r\nX-WR-CALNAME:Outbox\\; Days\\,\\nX-WR-RELCALID:1\r\n" in world.file("schedule.ics")


@pytest.mark.parametrize(("day", "zone"), [("9999-12-31", "Asia/Singapore"), ("0001-01-01", "America/New_York")])
def test_the_ends_of_the_calendar_are_shown_in_utc_where_the_venue_has_no_such_day(world: World, day: str, zone: str) -> None:
    starts, ends = f"{day}T00:30:00Z", f"{day}T23:30:00Z"
    world.say("event.modified", event={**EVENT, "starts_at": starts, "ends_at": ends, "timezone": zone}, tracks=TRACKS)
    world.say_session(1, starts_at=starts, ends_at=ends)
    world.say_session(2, starts_at=ends, ends_at=ends)
    world.write()
    root = etree.fromstring(world.file("pentabarf.xml"))
    assert len(root.xpath("//event")) == 2


def test_open_event_json_is_what_the_messages_said(world: World) -> None:
    world.say_session(1)
    world.write()
    document = json.loads(world.file("open-event.json"))
    assert document["event"] == EVENT
    assert document["tracks"] == TRACKS
    assert document["sessions"] == [session(1)]
    assert [speaker["name"] for speaker in document["speakers"]] == ["Ada", "Grace Hopper"]


def test_what_comes_late_and_was_said_earlier_never_replaces_what_was_said_later(world: World) -> None:
    earlier, later = NOON + timedelta(minutes=1), NOON + timedelta(minutes=2)
    world.say_session(1, at=later, title="new")
    world.say_session(1, at=earlier, sequence=1, title="late and old")
    world.say_session(2, at=later, change="deleted")
    world.say_session(2, at=earlier, sequence=1, title="back from the dead")
    world.say_session(3, at=earlier, title="old")
    world.say_session(3, at=later, sequence=1, title="late but newer")
    world.write()
    assert [s["title"] for s in json.loads(world.file("open-event.json"))["sessions"]] == ["new", "late but newer"]


def test_in_order_the_later_message_wins_also_where_its_clock_is_behind(world: World) -> None:
    world.say_session(1, at=NOON, title="Draft")
    world.say_session(1, at=NOON - timedelta(seconds=1), title="Final title")
    world.write()
    assert [s["title"] for s in json.loads(world.file("open-event.json"))["sessions"]] == ["Final title"]


@pytest.mark.parametrize("wrong", ["../../victim", "1", True, 1.0, 0, -1, 2**63, None, [1], {"a": 1}])
def test_an_id_that_is_no_whole_number_is_refused_and_touches_no_file(world: World, tmp_path: Path, wrong: Any) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    for change in ("updated", "deleted"):
        with pytest.raises(Reject, match="event_id is no whole number"):
            world.say("event.modified", event_id=wrong, event=EVENT, tracks=[], change=change)
    with pytest.raises(Reject, match="session_id is no whole number"):
        world.say("session.modified", session_id=wrong, session=session(1))
    world.write()
    assert victim.exists()
    assert sorted(path.name for path in world.folder.iterdir()) == [".lock", "event-1"]


@pytest.mark.parametrize("deleted", [False, True])
def test_a_row_with_another_id_or_a_link_leads_to_no_file_outside_the_folder(
    world: World, tmp_path: Path, deleted: bool
) -> None:
    victim = tmp_path / "victim"
    victim.mkdir()
    world.folder.mkdir()
    (world.folder / "event-2").symlink_to(victim)
    document = None if deleted else json.dumps({"event": EVENT, "tracks": []})
    with world.engine.begin() as connection:  # the types of SQLite's columns are advice
        for id in ("../../victim", "/../../victim", 2):
            part = {"id": id, "document": document}
            connection.execute(sa.text("INSERT INTO exports_part VALUES ('event', :id, :id, '2026-05-01', :document)"), part)
            connection.execute(sa.text("INSERT INTO exports_files VALUES (:id, 1, 0)"), part)
    world.write()
    assert list(victim.iterdir()) == []
    assert (world.folder / "event-1" / "schedule.ics").exists()


@pytest.mark.parametrize("folder", ["a-file", "a-file/below", "no\0name", "/proc/nobody/may"])
def test_a_folder_that_can_not_be_written_ends_the_service_at_its_start(
    folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a-file").touch()
    monkeypatch.setattr("os.environ", {"EXPORTS_FOLDER": folder})
    with pytest.raises(ConfigurationError, match=r"EXPORTS_FOLDER=.*; name a folder that this process may write"):
        service.check()
    monkeypatch.setattr("os.environ", {"EXPORTS_FOLDER": "made/at/start"})
    service.check()
    assert list((tmp_path / "made/at/start").iterdir()) == []


def test_files_are_for_whom_the_umask_lets_read_and_addresses_for_the_group_at_most(world: World) -> None:
    world.write()
    modes = {path.name: path.stat().st_mode & 0o777 for path in (world.folder / "event-1").iterdir()}
    readable = 0o644 & ~files._umask()
    assert modes.pop("open-event.json") == readable & 0o640
    assert set(modes.values()) == {readable}


@pytest.mark.parametrize("zone", ["Europe", "Nowhere/At_All", "../../etc/passwd", "a\0b", "", "x" * 5000, None, 7, ["UTC"]])
def test_a_zone_that_is_none_is_taken_for_utc(zone: Any) -> None:
    assert _zone(zone).key == "UTC"


def test_a_deleted_event_takes_its_files_and_its_parts_with_it(world: World) -> None:
    world.say_session(1)
    world.write()
    world.say("event.modified", change="deleted", event=EVENT, tracks=TRACKS)
    world.write()
    assert not (world.folder / "event-1").exists()
    with world.engine.connect() as connection:
        assert connection.scalar(sa.select(sa.func.count()).select_from(model.Part)) == 1


def test_a_burst_of_messages_costs_one_writing(world: World) -> None:
    for id in range(1, 20):
        world.say_session(id)
    assert world.write_one()
    assert not world.write_one()


def test_a_message_during_the_writing_is_written_by_the_next(world: World) -> None:
    with world.engine.begin() as connection:
        (behind,) = model.behind(connection)
    world.say_session(1)
    with world.engine.begin() as connection:
        model.written(connection, *behind)
    assert world.write_one()
    assert b"Talk 1" in world.file("schedule.ics")


def test_an_event_whose_files_can_not_be_made_delays_no_other_and_is_told_once(
    world: World, caplog: pytest.LogCaptureFixture
) -> None:
    world.say_session(1, starts_at="soon", ends_at="later")
    world.say("event.modified", event_id=2, event={**EVENT, "id": 2}, tracks=[])
    world.write()
    assert (world.folder / "event-2" / "schedule.ics").exists()
    world.clock += 61
    assert not world.write_one()
    (told,) = (record.getMessage() for record in caplog.records if record.name == files.__name__)
    assert "event 1 can't be made: ValueError" in told
    assert "soon" not in told
    world.say_session(1)
    assert world.write_one()
    assert b"Talk 1" in world.file("schedule.ics")


def test_an_event_whose_files_could_not_be_made_is_tried_again_after_a_while(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    attempts = []

    def fail(*_: object) -> None:
        attempts.append("failed")
        raise ValueError

    monkeypatch.setattr(files, "render", fail)
    assert not world.write_one()
    assert not world.write_one()
    world.clock += 61
    assert not world.write_one()
    assert len(attempts) == 2


def test_a_folder_that_can_not_be_written_is_nobodys_fault_and_is_raised(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr("os.replace", full)
        with pytest.raises(OSError, match="disk full"):
            world.write_one()
    assert world.write_one()


def test_of_two_writers_the_one_that_read_earlier_does_not_write_last(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    began, goes_on, noting = threading.Event(), threading.Event(), threading.Event()
    rendering, noted = files.render, model.written
    slow = threading.Thread(target=world.write)

    def render(*arguments: Any) -> Any:
        if threading.current_thread() is slow and not began.is_set():
            began.set()
            goes_on.wait(10)
        return rendering(*arguments)

    def written(*arguments: Any) -> None:
        if threading.current_thread() is not slow:
            noting.set()
            goes_on.wait(10)
            slow.join(10)
        noted(*arguments)

    monkeypatch.setattr(files, "render", render)
    monkeypatch.setattr(model, "written", written)
    slow.start()
    assert began.wait(10)
    world.say_session(1)
    quick = threading.Thread(target=world.write)
    quick.start()
    noting.wait(0.5)  # without the lock it would be there now, with its newer files written
    goes_on.set()
    slow.join(10)
    quick.join(10)
    assert b"Talk 1" in world.file("schedule.ics")


def test_a_failed_replacement_leaves_the_old_file_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "a.txt"
    replace(target, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(OSError, match="disk"):
        replace(target, b"new")
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_bytes() == b"old"


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (None, ""),
        ("  plain \r\n", "plain"),
        ("a <b>bold</b> move<br>next", "a bold move\nnext"),
        ("5 < 6 & 7", "5 < 6 & 7"),
        ("&lt;tag&gt;\x00\x1f", "<tag>"),
        ("\ufeffx\u200b", "\ufeffx\u200b"),
    ],
)
def test_texts_lose_their_markup_and_what_xml_cannot_hold(given: str | None, expected: str) -> None:
    assert plain(given) == expected
