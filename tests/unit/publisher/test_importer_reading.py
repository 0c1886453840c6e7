from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from publisher import CHECKOUT, openevent
from publisher.conference.changes import MAX_SPEAKERS_OF_A_SESSION, MAX_TRACKS
from publisher.conference.kinds import PARTS
from publisher.conference.states import TalkState
from publisher.openevent import Conference, ExportError
from tests.unit.publisher.test_publisher_fields import ANY_JSON

SAMPLES = CHECKOUT / "tests" / "data"
EVENT = {
    "id": 1,
    "name": "Tiny",
    "timezone": "Asia/Singapore",
    "starts-at": "2018-03-22T09:30:00+08:00",
    "ends-at": "2018-03-23T09:30:00+08:00",
}


def export(folder: Path, **files: Any) -> Path:
    """Write an export: `event`, `sessions`, … as JSON."""
    for name, content in ({"event": EVENT} | files).items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def read(folder: Path, **files: Any) -> Conference:
    return openevent.read(export(folder, **files))


def details(conference: Conference) -> set[tuple[str, str | None]]:
    return {(note.detail, note.id) for note in conference.notes}


def test_both_spellings_of_one_conference_read_the_same() -> None:
    elder, younger = (openevent.read(SAMPLES / f"open_event_{year}") for year in (2017, 2018))

    assert elder.event == younger.event
    assert elder.tracks == younger.tracks
    assert elder.microlocations == younger.microlocations
    assert elder.speakers == younger.speakers
    assert elder.sessions == younger.sessions


def test_an_export_is_read_whole() -> None:
    conference = openevent.read(SAMPLES / "open_event_2018")
    (session, unscheduled) = conference.sessions

    assert conference.event.external_id == "a1b2c3d4"
    assert conference.event.values["name"] == "Tiny Summit"
    assert conference.event.values["starts_at"] == datetime(2018, 3, 22, 1, 30, tzinfo=UTC)
    assert conference.event.values["latitude"] == 1.3196856
    assert (session.state, session.track, session.microlocation) == (TalkState.ACCEPTED, "708", "513")
    assert session.speakers == ["3069", "3068"]
    assert session.values["session_type"] == "Talk"
    assert session.values["long_abstract"] is None
    assert (unscheduled.values["starts_at"], unscheduled.values["ends_at"], unscheduled.track) == (None, None, None)


def test_missing_files_are_said_and_mean_nothing_of_their_kind(tmp_path: Path) -> None:
    conference = read(tmp_path)

    assert conference.sessions == conference.speakers == conference.tracks == conference.microlocations == []
    missing = {note.file for note in conference.notes if note.detail == "is missing"}
    assert missing == {"sessions.json", "speakers.json", "tracks.json", "microlocations.json"}


def test_an_empty_file_is_said_and_means_nothing_of_its_kind(tmp_path: Path) -> None:
    conference = read(tmp_path, sessions="\n")

    assert conference.sessions == []
    assert ("sessions.json", "is empty") in {(note.file, note.detail) for note in conference.notes}


@pytest.mark.parametrize(
    ("files", "said"),
    [
        ({"event": "{"}, "event.json is no JSON: Expecting property name"),
        ({"event": ""}, "event.json is missing or empty"),
        ({"event": []}, "event.json must hold one JSON object"),
        ({"event": {"name": "x"}}, "event.json has neither identifier nor id"),
        ({"event": EVENT | {"name": "  "}}, "event.json has no name"),
        ({"event": EVENT | {"starts-at": None}}, "does not say from when to when"),
        ({"sessions": {"1": {}}}, "sessions.json must hold a JSON list"),
        ({"speakers": "[" * 100_000}, "speakers.json is no JSON"),
    ],
)
def test_what_is_no_export_is_refused_by_name(tmp_path: Path, files: dict[str, Any], said: str) -> None:
    with pytest.raises(ExportError) as refusal:
        read(tmp_path, **files)

    assert said in str(refusal.value)


def test_a_folder_that_is_none_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="nowhere is no folder"):
        openevent.read(tmp_path / "nowhere")


def test_bytes_that_are_no_text_are_refused_by_name(tmp_path: Path) -> None:
    (export(tmp_path) / "tracks.json").write_bytes(b"\xff\xfe[")

    with pytest.raises(ExportError, match=r"tracks.json can't be read"):
        openevent.read(tmp_path)


def test_rows_without_id_or_name_are_skipped_and_counted(tmp_path: Path) -> None:
    conference = read(tmp_path, speakers=[{"name": "Nobody"}, {"id": 2, "name": " "}, 3, {"id": 4, "name": "Ada"}])

    assert [row.external_id for row in conference.speakers] == ["4"]
    assert conference.skipped == {"speakers.json": 3}
    assert details(conference) >= {("skipped: no id", None), ("skipped: no name", "2"), ("skipped: no JSON object", None)}


def test_one_id_for_two_people_keeps_both_and_each_session_its_own(tmp_path: Path) -> None:
    speakers = [{"id": 78, "name": "Jiaqi"}, {"id": "78", "name": "Eleanor"}, {"id": 78, "name": " jiaqi "}]
    sessions = [
        {"id": 64, "title": "A", "speakers": [{"id": 78, "name": "Jiaqi  "}]},
        {"id": 65, "title": "B", "speakers": [{"id": 78, "name": "Eleanor"}]},
        {"id": 66, "title": "C", "speakers": [78]},
        {"id": 66, "title": "C", "speakers": []},
    ]

    conference = read(tmp_path, speakers=speakers, sessions=sessions)

    assert [row.external_id for row in conference.speakers] == ["78", "78:Eleanor"]
    assert [(row.external_id, row.speakers) for row in conference.sessions] == [
        ("64", ["78"]),
        ("65", ["78:Eleanor"]),
        ("66", ["78"]),
    ]
    assert conference.skipped == {"speakers.json": 1, "sessions.json": 1}


def test_an_id_that_another_rows_longer_id_has_taken_is_not_taken_twice(tmp_path: Path) -> None:
    speakers = [
        {"id": 78, "name": "Ada"},
        {"id": "78:Ben", "name": "Ben"},
        {"id": 78, "name": "Ben"},
        {"id": "9" * 256, "name": "C"},
    ]

    conference = read(tmp_path, speakers=speakers)

    assert [row.external_id for row in conference.speakers] == ["78", "78:Ben"]
    assert conference.skipped == {"speakers.json": 2}


def test_a_kind_of_session_is_checked_like_any_text(tmp_path: Path) -> None:
    sessions = [{"id": 1, "title": "A", "session_type": {"name": "Talk "}}, {"id": 2, "title": "B", "session_type": "x" * 201}]

    conference = read(tmp_path, sessions=sessions)

    assert [len(row.values["session_type"]) for row in conference.sessions] == [4, 200]


def test_a_time_that_is_none_is_said_once(tmp_path: Path) -> None:
    sessions = [{"id": 1, "title": "A", "starts_at": "2018-03-22T10:00:00Z", "ends_at": "2018-03-22T11:00:00Z"}]

    conference = read(tmp_path, event=EVENT | {"starts-at": "soon"}, sessions=sessions)

    assert [note.detail for note in conference.notes if "no time" in note.detail] == ["starts_at left out: it is no time"]


def test_references_to_what_is_not_there_are_left_out_and_said(tmp_path: Path) -> None:
    session = {
        "id": 1,
        "title": "A",
        "speakers": [{"id": 9}, "x"],
        "track": {"id": 5},
        "microlocation": 6,
        "session_type": "Talk",
    }

    conference = read(tmp_path, sessions=[session])

    (row,) = conference.sessions
    assert (row.speakers, row.track, row.microlocation, row.values["session_type"]) == ([], None, None, "Talk")
    values = {(note.detail, note.value) for note in conference.notes if note.id == "1"}
    assert values == {
        ("names a row that is not in speakers.json", "9"),
        ("names a row that is not in speakers.json", "x"),
        ("names a row that is not in tracks.json", "5"),
        ("names a row that is not in microlocations.json", "6"),
    }


@pytest.mark.parametrize(
    ("starts", "ends", "reason"),
    [
        ("2018-03-22T10:00:00+08:00", "2018-03-22T10:00:00+08:00", "taken without times: the end is not after the start"),
        ("2018-03-22T10:00:00+08:00", "2018-03-21T10:00:00+08:00", "taken without times: the end is not after the start"),
        ("2018-03-22T10:00:00+08:00", None, "taken without times: one of them is missing"),
        ("soon", "2018-03-22T10:00:00+08:00", "taken without times: one of them is missing"),
    ],
)
def test_a_session_with_impossible_times_is_taken_without(tmp_path: Path, starts: str, ends: str | None, reason: str) -> None:
    conference = read(tmp_path, sessions=[{"id": 1, "title": "A", "start_time": starts, "end_time": ends}])

    assert (conference.sessions[0].values["starts_at"], conference.sessions[0].values["ends_at"]) == (None, None)
    assert (reason, "1") in details(conference)


def test_a_time_without_offset_is_of_the_conferences_zone(tmp_path: Path) -> None:
    times = {"starts-at": "2018-03-22T10:00:00", "ends-at": "2018-03-22 11:00"}

    conference = read(tmp_path, event=EVENT | {"ends-at": "2018-03-23T09:30"}, sessions=[{"id": 1, "title": "A"} | times])

    assert conference.sessions[0].values["starts_at"] == datetime(2018, 3, 22, 2, tzinfo=UTC)
    assert conference.sessions[0].values["ends_at"] == datetime(2018, 3, 22, 3, tzinfo=UTC)
    assert conference.event.values["ends_at"] == datetime(2018, 3, 23, 1, 30, tzinfo=UTC)


def test_times_that_the_event_lacks_are_those_of_its_sessions(tmp_path: Path) -> None:
    sessions = [
        {"id": 1, "title": "A", "starts_at": "2018-03-22T10:00:00Z", "ends_at": "2018-03-22T11:00:00Z"},
        {"id": 2, "title": "B", "starts_at": "2018-03-22T09:00:00Z", "ends_at": "2018-03-22T09:30:00Z"},
    ]

    conference = read(tmp_path, event={"id": 1, "name": "Tiny", "timezone": "Nowhere"}, sessions=sessions)

    assert conference.event.values["starts_at"] == datetime(2018, 3, 22, 9, tzinfo=UTC)
    assert conference.event.values["ends_at"] == datetime(2018, 3, 22, 11, tzinfo=UTC)
    assert conference.event.values["timezone"] == "UTC"
    assert ("timezone left out: it must be the name of a time zone such as Europe/Berlin", None) in details(conference)


def test_values_that_do_not_fit_are_left_out_and_their_row_is_kept(tmp_path: Path) -> None:
    speaker = {
        "id": 1,
        "name": "Ada\x00",
        "website": "www.barcu.ac.bd, x",
        "short_biography": "b" * 10_001,
        "featured": "maybe",
    }

    conference = read(
        tmp_path,
        speakers=[speaker],
        microlocations=[{"id": 1, "name": "R", "floor": "two", "latitude": "12.5", "longitude": 500}],
        sessions=[{"id": 1, "title": 7, "state": "Cancelled "}, {"id": 2, "title": "B", "state": "great"}],
    )

    assert conference.speakers[0].values["name"] == "Ada"
    assert conference.speakers[0].values["website"] is None
    assert len(conference.speakers[0].values["short_biography"]) == 10_000
    assert conference.speakers[0].values["is_featured"] is False
    assert conference.microlocations[0].values | {"name": ""} == {
        "name": "", "floor": None, "room": None, "latitude": 12.5, "longitude": None,
    }  # fmt: skip
    assert [session.state for session in conference.sessions] == [TalkState.CANCELED, TalkState.PENDING]
    assert details(conference) >= {
        ("website left out: it must be a link that begins with http://, https:// or /", "1"),
        ("short_biography cut: it has more than 10000 characters", "1"),
        ("is_featured left out: it must be true or false", "1"),
        ("floor left out: it must be a whole number", "1"),
        ("longitude left out: it must be from -180 to 180", "1"),
        ("its state is unknown here; taken as pending", "2"),
    }


def test_what_has_no_place_here_is_named_once(tmp_path: Path) -> None:
    tracks = [{"id": number, "name": f"T{number}", "shape": "round", "track-image-url": None} for number in range(3)]

    conference = read(tmp_path, event=EVENT | {"copyright": {"year": 2018}, "version": {}}, tracks=tracks, sponsors=[{"id": 1}])

    said = [(note.file, note.detail) for note in conference.notes if "no place" in note.detail or "sponsors" in note.detail]
    assert said == [
        ("event.json", "no place here for copyright"),
        ("tracks.json", "no place here for shape"),
        ("sponsors.json", "not taken: this API keeps no sponsors"),
    ]


def test_more_than_fits_one_message_is_skipped(tmp_path: Path) -> None:
    tracks = [{"id": number, "name": f"T{number}"} for number in range(MAX_TRACKS + 1)]
    speakers = [{"id": number, "name": f"S{number}"} for number in range(MAX_SPEAKERS_OF_A_SESSION + 1)]
    session = {"id": 1, "title": "Everybody", "speakers": speakers, "track": {"id": MAX_TRACKS}}

    conference = read(tmp_path, tracks=tracks, speakers=speakers, sessions=[session])

    assert len(conference.tracks) == MAX_TRACKS
    assert (len(conference.sessions[0].speakers), conference.sessions[0].track) == (MAX_SPEAKERS_OF_A_SESSION, None)


@given(
    event=st.dictionaries(st.sampled_from([*EVENT, "state", "url", "latitude"]), ANY_JSON, max_size=6),
    rows=st.lists(
        st.dictionaries(
            st.sampled_from(
                ["id", "name", "title", "speakers", "track", "microlocation", "starts-at", "state", "floor", "session-type"]
            ),
            ANY_JSON | st.integers(0, 3),
            max_size=8,
        ),
        max_size=4,
    ),
)
def test_any_json_is_read_or_refused_by_name(tmp_path_factory: pytest.TempPathFactory, event: Any, rows: Any) -> None:
    files = {kind.plural: rows for kind in PARTS.values()}

    try:
        conference = read(tmp_path_factory.mktemp("export"), event=EVENT | event, **files)
    except ExportError:
        return

    known = {kind: {row.external_id for row in getattr(conference, kind)} for kind in ("tracks", "microlocations", "speakers")}
    for session in conference.sessions:
        assert {session.track} - {None} <= known["tracks"]
        assert {session.microlocation} - {None} <= known["microlocations"]
        assert set(session.speakers) <= known["speakers"]
