"""The files on disk: all formats of an event, each replaced whole or not at all."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import tempfile
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from consumers.exports import model
from consumers.exports.icalendar_files import ical, xcal
from consumers.exports.pentabarf import pentabarf

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sqlalchemy.engine import Engine

    from consumers.exports.model import Conference

FOLDER = "EXPORTS_FOLDER"
DEFAULT_FOLDER = "instance/exports"


def write_one(engine: Engine, folder: Path, now: datetime | None = None) -> bool:
    """Bring the files of one event up to date; return False when none was behind.

    Killed anywhere, the files are whole and the next call writes them again: `written` moves only after them. An event whose
    files can't be written keeps no other waiting: what it raised is raised when no other is behind.
    """
    failed: dict[int, Exception] = {}
    with _one_writer(folder):
        while True:
            with engine.connect() as connection:
                behind = model.next_behind(connection, failed)
                conference = model.load(connection, behind[0]) if behind else None
            if behind is None:
                break
            try:
                _write(folder / f"event-{behind[0]}", conference, now or datetime.now(UTC))
            except Exception as error:  # noqa: BLE001 - the first is raised below
                failed[behind[0]] = error
                continue
            with engine.begin() as connection:
                model.written(connection, *behind)
            return True
    if failed:
        raise next(iter(failed.values()))
    return False


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Wait for other processes that write into *folder*: one that read earlier must not write later, and call it up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however the process ends
        yield


def _write(place: Path, conference: Conference | None, now: datetime) -> None:
    if conference is None:
        shutil.rmtree(place, ignore_errors=True)
        return
    place.mkdir(parents=True, exist_ok=True)
    for name, content in render(conference, now).items():
        replace(place / name, content)


def render(conference: Conference, now: datetime) -> dict[str, bytes]:
    """Return name and content of every file of a conference."""
    return {
        "schedule.ics": ical(conference, now),
        "schedule.xcal.xml": xcal(conference, now),
        "pentabarf.xml": pentabarf(conference),
        "open-event.json": open_event(conference),
    }


def open_event(conference: Conference) -> bytes:
    """Return everything that is known, in the field names of the publisher's API."""
    document = {
        "event": conference.event,
        "tracks": conference.tracks,
        "microlocations": conference.microlocations,
        "speakers": conference.speakers,
        "sessions": conference.sessions,
    }
    return json.dumps(document, ensure_ascii=False, indent=1).encode()


def replace(path: Path, content: bytes) -> None:
    """Write *content* beside *path* and rename it: a reader sees the old file or the new one, and two writers never mix.

    (The task of 2017 wrote every event's `pentabarf.xml` through one shared file name.)
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.chmod(temporary, 0o644)  # mkstemp makes it private; these are for other programs to read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
