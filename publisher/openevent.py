"""An Open Event export, read with patience: five JSON files in either spelling of their names become rows that fit our tables.

Exports of two generations write `start_time` and `starts-at`, `photo` and `photo-url`; ids come as numbers or texts, texts with
blanks around them, absent things as null, "" or {}. Nothing is read from the database here and nothing is written.
What could not be taken as it was is a `Note`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any
from zoneinfo import ZoneInfo

from publisher.conference import fields
from publisher.conference.changes import MAX_SPEAKERS_OF_A_SESSION, MAX_TRACKS
from publisher.conference.kinds import EVENT, MICROLOCATION, SESSION, SPEAKER, TRACK, Kind
from publisher.conference.states import TalkState

if TYPE_CHECKING:
    from pathlib import Path

#: Our name → the other names that exports give the same thing.
OTHER_NAMES: Mapping[str, tuple[str, ...]] = {
    "starts_at": ("start_time",),
    "ends_at": ("end_time",),
    "url": ("external_event_url", "event_url"),
    "logo_url": ("logo",),
    "image_url": ("original_image_url", "background_image"),
    "photo_url": ("photo",),
    "is_featured": ("featured",),
    "slides_url": ("slides",),
    "video_url": ("video",),
    "audio_url": ("audio",),
    "signup_url": ("signup",),
}
#: Names whose content is taken from elsewhere: lists that repeat the sessions' own references, sizes of one picture.
_REPEATED = {"id", "identifier", "deleted_at", "sessions", "speakers", "track", "microlocation", "thumbnail", "icon"} | {
    *("small", "large"),
    *(f"{size}_image_url" for size in ("thumbnail", "icon", "small", "large")),
}
#: What the column of external ids keeps.
MAX_EXTERNAL_ID = 255
_CONTROLS = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]")


class ExportError(Exception):
    """The folder holds no export that can be imported; the text names the file and what is wrong."""


@dataclass(frozen=True, slots=True)
class Note:
    """Something that was left out or changed on the way in."""

    file: str
    #: What was done and why; the same words for every row it happened to.
    detail: str
    #: Which row it was, by its id in the export; None: the file as a whole.
    id: str | None = None
    value: str | None = None


@dataclass(slots=True)
class Row:
    """One thing of the export: its id there, its values here."""

    external_id: str
    values: dict[str, Any]


@dataclass(slots=True)
class Session(Row):
    """A session; tracks, rooms and speakers by their external ids."""

    state: TalkState
    track: str | None
    microlocation: str | None
    speakers: list[str]


@dataclass(slots=True)
class Conference:
    """All of an export."""

    event: Row
    tracks: list[Row]
    microlocations: list[Row]
    speakers: list[Row]
    sessions: list[Session]
    notes: list[Note] = field(default_factory=list)
    #: File → rows of it that could not be taken.
    skipped: dict[str, int] = field(default_factory=dict)
    #: File → ids of the rows that were deleted where the export was made.
    deleted: dict[str, set[str]] = field(default_factory=dict)


def read(folder: Path, identifier: str | None = None) -> Conference:
    """Return what *folder* holds, under an *identifier* of its own where one is given.

    Raises ExportError; a file other than event.json may be missing.
    """
    return _Reader(folder, identifier).read()


class _Reader:
    """Reads one folder; keeps the notes and what its rows are called."""

    def __init__(self, folder: Path, identifier: str | None) -> None:
        self.folder = folder
        self.identifier = identifier
        self.notes: list[Note] = []
        self.skipped: dict[str, int] = {}
        #: Of times that say no offset.
        self.zone = ZoneInfo("UTC")
        #: file → id there → (name, external id) of the rows that have it: real exports use an id twice.
        self.known: dict[str, dict[str, list[tuple[str, str]]]] = {}
        #: file → ids of the rows that the server keeps as deleted.
        self.deleted: dict[str, set[str]] = {}
        #: file → names that had content and have no place here.
        self.unplaced: dict[str, set[str]] = {}

    def read(self) -> Conference:
        raw = self._event()
        if not _is_empty(raw.get("deleted_at")):
            raise ExportError(f"{self.folder / 'event.json'} says that the conference is deleted (deleted_at)")
        event = Row(_id(self.identifier) or _id(raw.get("identifier")) or _id(raw.get("id")) or "", {})
        if not event.external_id:
            raise ExportError(
                f"{self.folder / 'event.json'} has neither identifier nor id: importing it again could not find it"
            )
        if len(event.external_id) > MAX_EXTERNAL_ID:
            raise ExportError(f"{self.folder / 'event.json'}: its identifier has more than {MAX_EXTERNAL_ID} characters")
        self.zone = _zone(raw.get("timezone"))
        event.values = self._values(EVENT, "event.json", None, raw)
        if not event.values["name"]:
            raise ExportError(f"{self.folder / 'event.json'} has no name")
        tracks = self._rows(TRACK, most=MAX_TRACKS)
        rooms, speakers = self._rows(MICROLOCATION), self._rows(SPEAKER)
        sessions = [self._session(row, raw) for row, raw in self._identified(SESSION)]
        self._settle_times(event, sessions)
        for file, names in self.unplaced.items():
            self._note(file, f"no place here for {', '.join(sorted(names))}")
        if _length(self._load("sponsors.json", missing_is_fine=True)):
            self._note("sponsors.json", "not taken: this API keeps no sponsors")
        return Conference(event, tracks, rooms, speakers, sessions, self.notes, self.skipped, self.deleted)

    # --- files

    def _event(self) -> dict[str, Any]:
        if not self.folder.is_dir():
            raise ExportError(f"{self.folder} is no folder; give the one that holds event.json, sessions.json, …")
        loaded = self._load("event.json")
        if isinstance(loaded, list) and len(loaded) == 1:
            loaded = loaded[0]
        if loaded is None:
            raise ExportError(f"{self.folder / 'event.json'} is missing or empty: this folder is no Open Event export")
        if not isinstance(loaded, dict):
            raise ExportError(f"{self.folder / 'event.json'} must hold one JSON object")
        return _snake(loaded)

    def _load(self, file: str, *, missing_is_fine: bool = False) -> Any:
        """Return the JSON of *file*, None where it is missing or empty."""
        path = self._path(file)
        try:
            text = path.read_text(encoding="utf-8-sig")
        except FileNotFoundError:
            if file != "event.json" and not missing_is_fine:
                self._note(file, "is missing")
            return None
        except (OSError, UnicodeDecodeError) as error:
            raise ExportError(f"{path} can't be read: {error}") from error
        try:
            if not text.strip():
                if not missing_is_fine:
                    self._note(file, "is empty")
                return None
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            raise ExportError(f"{path} is no JSON: {error}") from error

    def _path(self, file: str) -> Path:
        """Return `NAME.json`, or `NAME` where there is only that: so the files are called in the zip of Open Event's server."""
        path = self.folder / file
        plain = path.with_suffix("")
        return plain if plain.is_file() and not path.exists() else path

    def _objects(self, file: str) -> Iterator[dict[str, Any]]:
        loaded = self._load(file)
        if loaded is None:
            return
        if not isinstance(loaded, list):
            raise ExportError(f"{self.folder / file} must hold a JSON list")
        for raw in loaded:
            if isinstance(raw, dict):
                yield _snake(raw)
            else:
                self._skip(file, "skipped: no JSON object", [None])

    # --- rows

    def _rows(self, kind: Kind, most: int | None = None) -> list[Row]:
        return [row for row, _ in self._identified(kind, most)]

    def _identified(self, kind: Kind, most: int | None = None) -> Iterator[tuple[Row, dict[str, Any]]]:
        """Yield the rows of *kind* (*most*: so many), each with an id of its own, and what the file says of it."""
        file = f"{kind.plural}.json"
        label = "title" if kind is SESSION else "name"
        known = self.known.setdefault(file, {})
        used: set[str] = set()
        for raw in self._objects(file):
            given, name = _id(raw.get("id")), _text(raw.get(label))
            if not _is_empty(raw.get("deleted_at")):
                self._skip(file, "skipped: deleted there", [given])
                self.deleted.setdefault(file, set()).add(given or "")
                continue
            if not given or not name:
                self._skip(file, f"skipped: no {label if given else 'id'}", [given])
                continue
            if most is not None and sum(map(len, known.values())) >= most:
                self._skip(file, f"skipped: an event has at most {most} {kind.plural}", [given])
                continue
            namesakes = known.setdefault(given, [])
            external_id = given if not namesakes else f"{given}:{name}"
            if _same(name) in [other for other, _ in namesakes] or external_id in used:
                self._skip(file, "skipped: its id is used twice", [given])
                continue
            if len(external_id) > MAX_EXTERNAL_ID:
                self._skip(file, "skipped: its id is too long", [given])
                continue
            used.add(external_id)
            if namesakes:
                self._note(file, "its id belongs to another row; kept under a longer one", given, external_id)
            namesakes.append((_same(name), external_id))
            yield Row(external_id, self._values(kind, file, external_id, raw)), raw
        self.deleted.get(file, set()).difference_update(used)  # one id for two rows: the other one lives

    def _session(self, row: Row, raw: Mapping[str, Any]) -> Session:
        file, times = "sessions.json", ("starts_at", "ends_at")
        starts, ends = (row.values[name] for name in times)
        if (starts is None) != (ends is None) or (starts and ends and ends <= starts):
            reason = "one of them is missing" if not starts or not ends else "the end is not after the start"
            self._note(file, f"taken without times: {reason}", row.external_id)
            row.values |= dict.fromkeys(times)
        return Session(
            row.external_id,
            row.values | {"track_id": None, "microlocation_id": None},
            state=self._state(row.external_id, raw.get("state")),
            track=self._reference("tracks.json", row.external_id, raw.get("track", raw.get("track_id"))),
            microlocation=self._reference(
                "microlocations.json", row.external_id, raw.get("microlocation", raw.get("microlocation_id"))
            ),
            speakers=self._speakers(row.external_id, raw.get("speakers", raw.get("speaker_ids"))),
        )

    def _state(self, session: str, value: Any) -> TalkState:
        word = {"cancelled": "canceled"}.get(_same(_text(value) or ""), _same(_text(value) or ""))
        try:
            return TalkState(word or TalkState.PENDING)
        except ValueError:
            self._note("sessions.json", "its state is unknown here; taken as pending", session, word)
            return TalkState.PENDING

    def _speakers(self, session: str, value: Any) -> list[str]:
        if not isinstance(value, list):
            if not _is_empty(value):
                self._note("sessions.json", "speakers left out: no list", session)
            return []
        found = [self._reference("speakers.json", session, reference) for reference in value]
        ids = list(dict.fromkeys(external_id for external_id in found if external_id))
        if len(ids) > MAX_SPEAKERS_OF_A_SESSION:
            self._note("sessions.json", f"more than {MAX_SPEAKERS_OF_A_SESSION} speakers: the others left out", session)
        return ids[:MAX_SPEAKERS_OF_A_SESSION]

    def _reference(self, file: str, session: str, value: Any) -> str | None:
        """Return the external id of the row of *file* that a session means by *value*: an object with id and name, or an id."""
        given, name = (_id(value.get("id")), _text(value.get("name"))) if isinstance(value, dict) else (_id(value), None)
        if not given:
            return None
        rows = self.known[file].get(given, [])
        if not rows:
            reason = "is deleted in" if given in self.deleted.get(file, ()) else "is not in"
            self._note("sessions.json", f"names a row that {reason} {file}", session, given)
            return None
        by_name = [external_id for other, external_id in rows if name and other == _same(name)]
        return (by_name or [rows[0][1]])[0]

    def _settle_times(self, event: Row, sessions: list[Session]) -> None:
        """A conference has a first and a last moment; where the export has none, its sessions tell."""
        starts, ends = event.values["starts_at"], event.values["ends_at"]
        if starts and ends and starts <= ends:
            return
        first = [row.values["starts_at"] for row in sessions if row.values["starts_at"]]
        last = [row.values["ends_at"] for row in sessions if row.values["ends_at"]]
        if not first:
            raise ExportError(f"{self.folder / 'event.json'} does not say from when to when, and no session has a time")
        event.values |= {"starts_at": min(first), "ends_at": max(last)}
        self._note("event.json", "its times are missing or the wrong way round; taken from the sessions")

    # --- values

    def _values(self, kind: Kind, file: str, row: str | None, raw: Mapping[str, Any]) -> dict[str, Any]:
        """Return a value for every field of *kind*: the export's where it has one that fits, else the default or None."""
        values: dict[str, Any] = {}
        for name, kind_of in kind.fields.items():
            value = _found(raw, name)
            if isinstance(kind_of, fields.Moment):
                values[name] = self._moment(file, row, name, value)
                continue
            values[name] = kind.defaults.get(name)
            if value is None or kind_of is fields.REFERENCE:
                continue
            try:
                values[name] = kind_of.parse(self._prepared(kind_of, file, row, name, value))
            except ValueError as error:
                self._note(file, f"{name} left out: it {error}", row)
        taken = {*kind.fields, *kind.read_only, *kind.first, *_REPEATED}
        taken |= {other for name in kind.fields for other in OTHER_NAMES.get(name, ())}
        if names := {name for name, value in raw.items() if name not in taken and not _is_empty(value)}:
            self.unplaced.setdefault(file, set()).update(names)
        return values

    def _prepared(self, kind_of: fields.Field, file: str, row: str | None, name: str, value: Any) -> Any:
        """Return *value* in the type that *kind_of* takes, where that is what it means."""
        if isinstance(kind_of, (fields.Decimal, fields.Whole)):
            return _number(value)
        if isinstance(kind_of, fields.Flag):
            return {"true": True, "1": True, "false": False, "0": False}.get(str(value).lower(), value)
        if isinstance(kind_of, fields.Choice):
            return _same(str(value))
        text = _text(value)
        if isinstance(kind_of, fields.Text) and text and len(text) > kind_of.longest:
            self._note(file, f"{name} cut: it has more than {kind_of.longest} characters", row)
            return text[: kind_of.longest]
        return value if text is None else text

    def _moment(self, file: str, row: str | None, name: str, value: Any) -> datetime | None:
        if value is None:
            return None
        try:
            moment = datetime.fromisoformat(str(value))
            aware = moment if moment.tzinfo else moment.replace(tzinfo=self.zone)
            return fields.Moment().parse(aware.isoformat())
        except (ValueError, OverflowError):
            self._note(file, f"{name} left out: it is no time", row)
            return None

    # --- notes

    def _note(self, file: str, detail: str, row: str | None = None, value: str | None = None) -> None:
        self.notes.append(Note(file, detail, row, value))

    def _skip(self, file: str, detail: str, ids: Iterable[str | None]) -> None:
        for external_id in ids:
            self._note(file, detail, external_id)
            self.skipped[file] = self.skipped.get(file, 0) + 1


# --- what real exports hold ---------------------------------------------------------------------------------------------


def _snake(raw: Mapping[str, Any]) -> dict[str, Any]:
    """`Starts-At ` → `starts_at`; of two spellings of one name the one with content stays."""
    result: dict[str, Any] = {}
    for name, value in raw.items():
        ours = name.strip().lower().replace("-", "_")
        if _is_empty(result.get(ours)):
            result[ours] = value
    kind_of = result.get("session_type")
    if isinstance(kind_of, dict):  # an object of id, name and length; its name is what we keep
        result["session_type"] = kind_of.get("name")
    return result


def _found(raw: Mapping[str, Any], name: str) -> Any:
    """Return what *raw* has under *name* or another name for it; None for nothing."""
    for spelling in (name, *OTHER_NAMES.get(name, ())):
        value = raw.get(spelling)
        if not _is_empty(value):
            return value.strip() if isinstance(value, str) else value
    return None


def _is_empty(value: Any) -> bool:
    return value is None or value in ({}, []) or (isinstance(value, str) and not value.strip())


def _text(value: Any) -> str | None:
    """Return *value* as a text without blanks around it and without control characters; None for nothing or no text."""
    if isinstance(value, bool) or not isinstance(value, (str, int, float)):
        return None
    return _CONTROLS.sub("", str(value)).strip() or None


def _number(value: Any) -> Any:
    """Return what a text says as a number, whole where it is; anything else as it is."""
    try:
        number = float(value) if isinstance(value, str) else value
    except ValueError:
        return value
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _id(value: Any) -> str | None:
    return _text(_number(value) if isinstance(value, float) else value)


def _same(text: str) -> str:
    """Return what two spellings of one name have in common."""
    return " ".join(text.split()).casefold()


def _zone(value: Any) -> ZoneInfo:
    """Return the zone of that name, UTC where there is none."""
    try:
        return ZoneInfo(fields.Zone().parse(_text(value)))
    except ValueError:
        return ZoneInfo("UTC")


def _length(value: Any) -> int:
    return len(value) if isinstance(value, list) else 0
