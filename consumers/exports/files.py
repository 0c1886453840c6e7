"""The files on disk: all formats of an event, each replaced whole or not at all."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy.exc import SQLAlchemyError

from consumers.exports import model
from consumers.exports.icalendar_files import ical, xcal
from consumers.exports.pentabarf import pentabarf
from outbox.consumer.failures import place as place_of
from outbox.errors import ConfigurationError
from outbox.process.logs import say

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping

    from sqlalchemy.engine import Engine

    from consumers.exports.model import Conference

FOLDER = "EXPORTS_FOLDER"
DEFAULT_FOLDER = "instance/exports"
OPEN_EVENT = "open-event.json"
#: How long an event whose files can't be made waits for the next attempt, where nothing new is told of it.
_REST_SECONDS = 60.0

log = logging.getLogger(__name__)


def folder_of(environ: Mapping[str, str]) -> Path:
    """Return the folder that *environ* names, made if it is missing. Raises ConfigurationError where it can't be written."""
    folder = Path(environ.get(FOLDER) or DEFAULT_FOLDER)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ConfigurationError(f"{FOLDER}={folder}: {reason}; name a folder that this process may write") from error


class Writer:
    """Brings files up to date, an event at a time; remembers the events whose files can't be made."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        #: Event → what was known of it when its files could not be made, and when that is tried again.
        self._failed: dict[int, tuple[int, float]] = {}

    def write_one(self, engine: Engine, folder: Path, now: datetime | None = None) -> bool:
        """Bring the files of one event up to date; return False when none was behind that can be.

        Killed anywhere, the files are whole and the next call writes them again: `written` moves only after them. An event
        whose files can't be made delays no other: it is logged, and tried again a minute later, or when more is told of it.
        Raises OSError where the folder can't be written: that concerns them all.
        """
        with _one_writer(folder):
            with engine.connect() as connection:
                behind = model.behind(connection)
            for event_id, changed in behind:
                if not self._rests(event_id, changed) and self._write(engine, folder, event_id, changed, now):
                    return True
        return False

    def _rests(self, event_id: int, changed: int) -> bool:
        known, again_at = self._failed.get(event_id, (0, 0.0))
        return known == changed and self._clock() < again_at

    def _write(self, engine: Engine, folder: Path, event_id: int, changed: int, now: datetime | None) -> bool:
        try:
            place = _place(folder, event_id)
            with engine.connect() as connection:
                conference = model.load(connection, event_id)
            contents = render(conference, now or datetime.now(UTC)) if conference else None
        except SQLAlchemyError:
            raise
        except Exception as error:  # noqa: BLE001 - what others sent may be anything
            self._note_failure(event_id, changed, error)
            return False
        _put(place, contents)
        with engine.begin() as connection:
            model.written(connection, event_id, changed)
        self._failed.pop(event_id, None)
        return True

    def _note_failure(self, event_id: int, changed: int, error: Exception) -> None:
        if self._failed.get(event_id, (0, 0.0))[0] != changed:
            sentence = f"the files of event {event_id!r} can't be made: {place_of(error)}; the others are written"
            say(log, logging.ERROR, "exports.event_failed", sentence)
            log.debug("the files of an event can't be made", exc_info=error)
        self._failed[event_id] = (changed, self._clock() + _REST_SECONDS)


@contextmanager
def _one_writer(folder: Path) -> Iterator[None]:
    """Wait for other processes that write into *folder*: one that read earlier must not write later, and call it up to date."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # released by the kernel, however the process ends
        yield


def _place(folder: Path, event_id: int) -> Path:
    """Return the folder of an event. Raises ValueError for one outside *folder*, whatever the id or a link may say."""
    place = folder / f"event-{event_id}"
    if not model.is_id(event_id) or place.resolve().parent != folder.resolve():
        raise ValueError(f"event {event_id!r} has no folder in {folder}")
    return place


def _put(place: Path, contents: dict[str, bytes] | None) -> None:
    """Let *place* hold these files; None: let it be gone."""
    if contents is None:
        if place.exists():
            shutil.rmtree(place)
        return
    place.mkdir(parents=True, exist_ok=True)
    for name, content in contents.items():
        replace(place / name, content, private=name == OPEN_EVENT)


def render(conference: Conference, now: datetime) -> dict[str, bytes]:
    """Return name and content of every file of a conference."""
    return {
        "schedule.ics": ical(conference, now),
        "schedule.xcal.xml": xcal(conference, now),
        "pentabarf.xml": pentabarf(conference),
        OPEN_EVENT: open_event(conference),
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


def replace(path: Path, content: bytes, *, private: bool = False) -> None:
    """Write *content* beside *path* and rename it: a reader sees the old file or the new one, and two writers never mix.

    Whom the umask lets read may read it; what is *private* (it holds addresses) the group at most.
    (The task of 2017 wrote every event's `pentabarf.xml` through one shared file name.)
    """
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(handle)  # or a power failure after the rename leaves an empty file, which is noted as written
        os.chmod(temporary, (0o640 if private else 0o644) & ~_umask())  # mkstemp's are for nobody else
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


@cache
def _umask() -> int:
    """The umask of this process. It can only be read by setting it, so that is done once."""
    mask = os.umask(0o077)
    os.umask(mask)
    return mask
