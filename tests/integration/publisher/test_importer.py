from __future__ import annotations

import json
import shutil
from collections import Counter
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa

from publisher import database, importer, openevent
from publisher.database import changing
from tests.integration.publisher.conftest import Api, application, data_of
from tests.integration.publisher.test_publisher_messages import ReadModel, told_by
from tests.kit.conferences import FERRY, HARBOUR, INVENTED, LIGHTHOUSE, PYCON, REAL, SAMPLES, Export, one, together

if TYPE_CHECKING:
    from pathlib import Path

    from click.testing import Result

    from outbox import Message

SUMMIT = SAMPLES / "open_event_2018"
KINDS = ("tracks", "microlocations", "speakers", "sessions")


def run(api: Api, folder: Path) -> Result:
    return api.app.test_cli_runner().invoke(args=["import", str(folder), "--json"])


def load(api: Api, folder: Path) -> dict[str, Any]:
    """Import *folder* as a person does; return the summary."""
    result = run(api, folder)
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


def copied(folder: Path, target: Path, **changed: Any) -> Path:
    """Copy an export; *changed*: file → function of its content."""
    shutil.copytree(folder, target)
    for name, change in changed.items():
        path = target / f"{name}.json"
        path.write_text(json.dumps(change(json.loads(path.read_text(encoding="utf-8")))), encoding="utf-8")
    return target


def counts(summary: dict[str, Any], change: str) -> dict[str, int]:
    return {kind: count[change] for kind, count in summary["counts"].items() if count[change]}


def test_an_export_becomes_an_event_and_each_thing_is_told_once(api: Api, sent: list[Message]) -> None:
    summary = load(api, SUMMIT)

    assert counts(summary, "created") == {"event": 1, "tracks": 1, "microlocations": 1, "speakers": 2, "sessions": 2}
    assert Counter(message.topic for message in sent) == {
        "event.modified": 1, "microlocation.modified": 1, "speaker.modified": 2, "session.modified": 2,
    }  # fmt: skip
    assert {data_of(message)["change"] for message in sent} == {"created"}
    known = ReadModel()
    known.hear(sent)
    assert known.events == told_by(api)
    session = api.all(f"/v1/events/{summary['event_id']}/sessions")[0]
    assert (session["external_id"], session["state"], session["starts_at"]) == ("1", "accepted", "2018-03-22T04:00:00Z")
    assert len(session["speaker_ids"]) == 2


def test_a_second_run_in_the_other_spelling_changes_nothing_and_sends_nothing(api: Api, sent: list[Message]) -> None:
    load(api, SAMPLES / "open_event_2018")
    before = told_by(api)
    sent.clear()

    summary = load(api, SAMPLES / "open_event_2017")

    assert sent == []
    assert counts(summary, "unchanged") == {"event": 1, "tracks": 1, "microlocations": 1, "speakers": 2, "sessions": 2}
    assert told_by(api) == before


def test_what_differs_is_told_and_nothing_else(api: Api, sent: list[Message], tmp_path: Path) -> None:
    load(api, SUMMIT)
    known = ReadModel()
    known.hear(sent)
    sent.clear()

    def other_sessions(rows: list[Any]) -> list[Any]:
        first, second = rows
        return [first | {"state": "canceled", "speakers": first["speakers"][1:]}, second | {"title": "Two!"}]

    folder = copied(
        SUMMIT,
        tmp_path / "changed",
        sessions=other_sessions,
        speakers=lambda rows: [rows[0] | {"city": "Delhi"}, rows[1]],
        tracks=lambda rows: [rows[0] | {"color": "#000000"}],
    )
    summary = load(api, folder)
    known.hear(sent)

    assert counts(summary, "updated") == {"tracks": 1, "speakers": 1, "sessions": 2}
    assert [(message.topic, data_of(message)["change"]) for message in sent] == [
        ("event.modified", "updated"),
        ("speaker.modified", "updated"),
        ("session.modified", "canceled"),
        ("session.state_changed", "canceled"),
        ("session.modified", "updated"),
    ]
    assert data_of(sent[3])["previous"] == "accepted"
    assert known.events == told_by(api)


def test_the_export_wins_over_changes_and_leaves_alone_what_it_does_not_name(api: Api) -> None:
    summary = load(api, SUMMIT)
    path = f"/v1/events/{summary['event_id']}"
    (first, _) = api.all(f"{path}/sessions")
    api.change(f"/v1/sessions/{first['id']}", title="Renamed", starts_at=None, ends_at=None)
    added = api.make(f"{path}/sessions", title="Ours")

    summary = load(api, SUMMIT)

    assert counts(summary, "updated") == {"sessions": 1}
    assert api.get(f"/v1/sessions/{first['id']}") == first
    assert api.get(f"/v1/sessions/{added['id']}") == added


def test_conferences_that_use_the_same_ids_do_not_meet(api: Api, tmp_path: Path) -> None:
    other = copied(SUMMIT, tmp_path / "other", event=lambda event: event | {"identifier": "zzz", "name": "Other"})

    first, second = load(api, SUMMIT), load(api, other)

    assert first["event_id"] != second["event_id"]
    for kind in KINDS:
        ours, theirs = (api.all(f"/v1/events/{summary['event_id']}/{kind}") for summary in (first, second))
        assert [thing["external_id"] for thing in ours] == [thing["external_id"] for thing in theirs]
        assert not {thing["id"] for thing in ours} & {thing["id"] for thing in theirs}


def test_an_import_that_fails_leaves_nothing(api: Api, sent: list[Message]) -> None:
    conference = openevent.read(SUMMIT)
    steps = iter(range(importer.rows(conference)))

    def fail_at_the_last() -> None:
        if next(steps) == importer.rows(conference) - 1:
            raise RuntimeError("the plug was pulled")

    with pytest.raises(RuntimeError), api.app.app_context(), changing() as db:
        importer.run(db, conference, fail_at_the_last)

    assert told_by(api) == {}
    assert sent == []
    with database.of(api.app).engine.connect() as connection:
        assert connection.scalar(sa.text("SELECT count(*) FROM outbox_message")) == 0


def test_a_folder_that_can_not_be_imported_is_said_without_a_traceback(sqlite_api: Api, tmp_path: Path) -> None:
    (tmp_path / "event.json").write_text("{", encoding="utf-8")

    result = run(sqlite_api, tmp_path)

    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.startswith(f"Error: {tmp_path / 'event.json'} is no JSON")


def test_the_summary_says_what_was_not_taken_and_why(sqlite_api: Api, tmp_path: Path) -> None:
    folder = copied(
        SUMMIT,
        tmp_path / "rough",
        event=lambda event: event | {"identifier": "rough"},
        sessions=lambda rows: [rows[0] | {"end_time": rows[0]["start_time"]}, rows[1], rows[1], {"id": 9}],
    )

    result = sqlite_api.app.test_cli_runner().invoke(args=["import", str(folder)])

    assert result.exit_code == 0
    assert "sessions              2        0          0        2" in result.stdout
    assert "sessions.json: taken without times: the end is not after the start: 1\n" in result.stdout
    assert "sessions.json: skipped: its id is used twice: 2\n" in result.stdout
    assert "sessions.json: skipped: no title: 9\n" in result.stdout
    assert "Importing" in result.stderr


# --- whole conferences --------------------------------------------------------------------------------------------------


def bring(api: Api, export: Export) -> dict[str, Any]:
    """Import a whole conference as a person does; return the summary."""
    result = api.app.test_cli_runner().invoke(args=["import", *export.arguments])
    assert result.exit_code == 0, result.output
    summary: dict[str, Any] = json.loads(result.stdout)
    return summary


@pytest.mark.parametrize("export", [one(export) for export in (*INVENTED, *REAL)])
def test_a_conference_is_imported_whole_and_once(api: Api, sent: list[Message], export: Export) -> None:
    summary = bring(api, export)
    known = ReadModel()
    known.hear(sent)

    assert counts(summary, "created") == export.created
    assert known.events == told_by(api)
    assert len(sent) == export.messages
    assert max(len(message.body) for message in sent) < 64 * 1024
    sent.clear()

    again = bring(api, export)
    assert counts(again, "created") == counts(again, "updated") == {}
    assert sent == []


@pytest.mark.parametrize("exports", [together("invented", *INVENTED), together("real", *REAL)])
def test_many_conferences_live_in_one_database(sqlite_url: str, exports: tuple[Export, ...]) -> None:
    api = Api(application(sqlite_url))

    ids = [bring(api, export)["event_id"] for export in exports]

    assert len(set(ids)) == len(exports)
    for event_id, export in zip(ids, exports, strict=True):
        assert {kind: len(api.all(f"/v1/events/{event_id}/{kind}")) for kind in KINDS} == {
            kind: export.created.get(kind, 0) for kind in KINDS
        }
    database.of(api.app).engine.dispose()


@pytest.mark.parametrize("export", [one(HARBOUR), one(PYCON)])
def test_nobody_loses_their_talk_where_two_people_share_an_id(sqlite_api: Api, export: Export) -> None:
    event_id = bring(sqlite_api, export)["event_id"]
    speakers = {speaker["id"]: speaker["name"] for speaker in sqlite_api.all(f"/v1/events/{event_id}/speakers")}
    sessions = sqlite_api.all(f"/v1/events/{event_id}/sessions")

    told = {session["external_id"]: [speakers[id] for id in session["speaker_ids"]] for session in sessions}

    (path,) = export.folder.glob("sessions*")
    rows = reversed(json.loads(path.read_text(encoding="utf-8")))  # of two listings of one session the first counts
    listed = {str(row["id"]): [speaker["name"].strip() for speaker in row["speakers"]] for row in rows}
    spelled_right = {id for id, names in listed.items() if set(names) <= set(speakers.values())}
    assert {id: told[id] for id in spelled_right} == {id: listed[id] for id in spelled_right}
    assert len(spelled_right) >= 3


def test_a_person_whose_name_was_cut_short_in_a_session_is_found_by_id(sqlite_api: Api) -> None:
    event_id = bring(sqlite_api, HARBOUR)["event_id"]
    (cut,) = (each for each in sqlite_api.all(f"/v1/events/{event_id}/speakers") if each["name"].startswith("Henrike"))
    (knots,) = (each for each in sqlite_api.all(f"/v1/events/{event_id}/sessions") if each["title"] == "Knots")
    assert cut["id"] in knots["speaker_ids"]


def test_two_conferences_with_one_identifier_are_never_merged(api: Api, sent: list[Message]) -> None:
    bring(api, HARBOUR)
    before = told_by(api)
    sent.clear()

    refused = run(api, FERRY.folder)

    assert refused.exit_code == 1
    assert "the export is of 'Ferry Week'" in refused.stderr
    assert "that of 'HarbourCon 2017' (2017-05-17 to 2017-05-25)" in refused.stderr
    assert (told_by(api), sent) == (before, [])


def test_links_and_texts_arrive_as_they_were_written(sqlite_api: Api) -> None:
    event_id = bring(sqlite_api, LIGHTHOUSE)["event_id"]

    event = sqlite_api.get(f"/v1/events/{event_id}")
    sessions = {session["external_id"]: session for session in sqlite_api.all(f"/v1/events/{event_id}/sessions")}

    more = "?event=4711&region=EU&currency=EUR&copy=2&section=3"
    assert event["ticket_url"] == f"https://tickets.example.org/e/c0a57a1d/{more}"
    assert sessions["9001"]["signup_url"] == f"https://seats.example.org/9001{more}"
    assert sessions["9001"]["starts_at"] == "2018-04-14T04:45:00Z"  # 10:30 in a zone of +05:45
    assert sessions["9002"]["title"] == "霧の中の光 — الضوء في الضباب 🌫️"
    assert [sessions["9003"][name] for name in ("starts_at", "track_id", "microlocation_id", "speaker_ids")] == [None] * 3 + [
        []
    ]


def test_what_a_conference_holds_and_we_do_not_take_is_said(sqlite_api: Api) -> None:
    told = {(note["file"], note["detail"], note["id"]) for note in bring(sqlite_api, FERRY)["notes"]}

    assert told >= {
        ("event.json", "its times are missing or the wrong way round; taken from the sessions", None),
        ("event.json", "longitude left out: it must be from -180 to 180", None),
        ("microlocations.json", "is empty", None),
        ("speakers.json", "skipped: no id", None),
        ("speakers.json", "skipped: no name", "8"),
        ("speakers.json", "skipped: no JSON object", None),
        ("sessions.json", "slides_url left out: it must be a link that begins with http://, https:// or /", "64"),
        ("sessions.json", "names a row that is not in microlocations.json", "64"),
        ("sessions.json", "its state is unknown here; taken as pending", "66"),
        ("sessions.json", "speakers left out: no list", "66"),
    }


# --- what is another's, and what is gone --------------------------------------------------------------------------------


def test_files_may_be_named_as_in_the_zip_of_the_server(api: Api, tmp_path: Path) -> None:
    folder = copied(SUMMIT, tmp_path / "zip")
    for path in list(folder.iterdir()):
        path.rename(path.with_suffix(""))
    assert counts(load(api, folder), "created") == {
        "event": 1, "tracks": 1, "microlocations": 1, "speakers": 2, "sessions": 2,
    }  # fmt: skip


def _other(event: dict[str, Any]) -> dict[str, Any]:
    times = {"starts_at": "2019-01-01T09:00:00+00:00", "ends_at": "2019-01-02T09:00:00+00:00"}
    return {name: value for name, value in event.items() if name not in ("starts-at", "ends-at", "start_time", "end_time")} | {
        "name": "Whale Days",
        **times,
    }


def _other_titles(rows: list[Any]) -> list[Any]:
    return [row | {"title": f"Diving {row['id']}"} for row in rows]


@pytest.mark.parametrize(
    "changed", [{"event": _other}, {"event": lambda e: e | {"name": "Whale Days"}, "sessions": _other_titles}]
)
def test_another_conference_under_a_known_identifier_is_refused_and_can_be_named(
    api: Api, sent: list[Message], tmp_path: Path, changed: dict[str, Any]
) -> None:
    first = load(api, SUMMIT)
    before = told_by(api)
    sent.clear()
    folder = copied(SUMMIT, tmp_path / "other", **changed)

    refused = run(api, folder)

    assert refused.exit_code == 1
    assert "the export is of 'Whale Days'" in refused.stderr
    own_name = "to import it as a conference of its own, name it: --as IDENTIFIER"
    assert f"event {first['event_id']} here; {own_name}" in refused.stderr
    assert (told_by(api), sent) == (before, [])
    own = api.app.test_cli_runner().invoke(args=["import", str(folder), "--json", "--as", "whales"])
    again = api.app.test_cli_runner().invoke(args=["import", str(folder), "--json", "--as", "whales"])
    assert json.loads(own.stdout)["event_id"] == json.loads(again.stdout)["event_id"] != first["event_id"]
    assert counts(json.loads(again.stdout), "updated") == {}


@pytest.mark.parametrize(
    "changed", [{"event": lambda e: e | {"name": "Renamed"}}, {"event": lambda e: _other(e) | {"name": e["name"]}}]
)
def test_a_conference_may_change_its_name_or_its_dates(api: Api, tmp_path: Path, changed: dict[str, Any]) -> None:
    first = load(api, SUMMIT)
    second = load(api, copied(SUMMIT, tmp_path / "changed", **changed))
    assert (second["event_id"], counts(second, "updated")) == (first["event_id"], {"event": 1})


def test_what_is_deleted_there_is_left_out_and_counted(api: Api, tmp_path: Path) -> None:
    gone = {"deleted_at": "2018-01-02T10:00:00+00:00"}
    deleted = {
        "sessions": lambda rows: [rows[0] | {"deleted-at": None}, rows[1] | gone],
        "speakers": lambda rows: [rows[0], rows[1] | gone],
        "microlocations": lambda rows: [row | gone for row in rows],
    }
    summary = load(api, copied(SUMMIT, tmp_path / "deleted", **deleted))
    assert counts(summary, "created") == {"event": 1, "tracks": 1, "speakers": 1, "sessions": 1}
    assert counts(summary, "skipped") == {"microlocations": 1, "speakers": 1, "sessions": 1}
    assert not [note for note in summary["notes"] if "deleted_at" in note["detail"]]

    load(api, copied(SUMMIT, tmp_path / "alive"))  # living again there
    summary = load(api, tmp_path / "deleted")
    kept = [(note["file"], note["detail"].partition(",")[0]) for note in summary["notes"] if "kept here" in note["detail"]]
    assert kept == [
        ("microlocations.json", "deleted there"), ("speakers.json", "deleted there"), ("sessions.json", "deleted there"),
    ]  # fmt: skip
    assert len(api.all(f"/v1/events/{summary['event_id']}/sessions")) == 2


def test_an_export_of_a_deleted_conference_is_refused(api: Api, tmp_path: Path) -> None:
    folder = copied(SUMMIT, tmp_path / "gone", event=lambda event: event | {"deleted_at": "2018-01-02T10:00:00+00:00"})
    assert "says that the conference is deleted" in run(api, folder).stderr


def test_what_was_deleted_here_stays_deleted(api: Api, sent: list[Message]) -> None:
    path = f"/v1/events/{load(api, SUMMIT)['event_id']}"
    for kind in KINDS:
        api.delete(f"/v1/{kind}/{api.all(f'{path}/{kind}')[0]['id']}")
    before = told_by(api)
    sent.clear()

    summary = load(api, SUMMIT)

    assert counts(summary, "skipped") == dict.fromkeys(KINDS, 1)
    assert (told_by(api), sent) == (before, [])
    assert [note["detail"] for note in summary["notes"] if "deleted" in note["detail"]] == ["skipped: deleted here"] * 4


def test_a_conference_that_was_deleted_here_is_refused_and_can_be_named(api: Api) -> None:
    first = load(api, SUMMIT)
    api.delete(f"/v1/events/{first['event_id']}")
    refused = run(api, SUMMIT)
    assert refused.exit_code == 1
    assert "was deleted here, and an import brings nothing back; to import it as a conference of its own" in refused.stderr
    again = api.app.test_cli_runner().invoke(args=["import", str(SUMMIT), "--json", "--as", "again"])
    assert counts(json.loads(again.stdout), "created")["sessions"] == 2
