"""The programme: what is on, when, where and by whom. What all calendar formats are made from."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from html.parser import HTMLParser
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consumers.exports.model import Conference

#: The states of a session that will take place.
ON_THE_PROGRAMME = ("accepted", "confirmed")
#: What XML 1.0 can't hold; iCalendar can't either. Real exports have them, pasted from slides.
_ILLEGAL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffe\uffff\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class Entry:
    """A session that takes place, with the names behind its ids. Texts are plain, times aware."""

    id: int
    uid: str
    title: str
    subtitle: str
    abstract: str
    description: str
    starts_at: datetime
    ends_at: datetime
    room: str
    track: str
    type: str
    language: str
    url: str
    speakers: tuple[tuple[int, str], ...]

    @property
    def duration(self) -> timedelta:
        """How long it takes."""
        return self.ends_at - self.starts_at


def entries(conference: Conference) -> list[Entry]:
    """Return the accepted sessions that have a time, in order of time."""
    rooms = {room["id"]: plain(room["name"]) for room in conference.microlocations}
    tracks = {track["id"]: plain(track["name"]) for track in conference.tracks}
    people = {speaker["id"]: plain(speaker["name"]) for speaker in conference.speakers}
    found = [
        Entry(
            id=session["id"],
            uid=f"session-{session['id']}.event-{session['event_id']}@openevent",
            title=plain(session["title"]),
            subtitle=plain(session.get("subtitle")),
            abstract=plain(session.get("short_abstract")),
            description=plain(session.get("long_abstract")),
            starts_at=moment(session["starts_at"]),
            ends_at=moment(session["ends_at"]),
            room=rooms.get(session.get("microlocation_id"), ""),
            track=tracks.get(session.get("track_id"), ""),
            type=plain(session.get("session_type")),
            language=plain(session.get("language")),
            url=link(session.get("signup_url")),
            speakers=tuple((id, people[id]) for id in session.get("speaker_ids", ()) if id in people),
        )
        for session in conference.sessions
        if session["state"] in ON_THE_PROGRAMME and session["starts_at"] and session["ends_at"]
    ]
    return sorted(found, key=lambda entry: (entry.starts_at, entry.room, entry.id))


def moment(text: str) -> datetime:
    """Return the instant that an RFC 3339 text names."""
    return datetime.fromisoformat(text)


def link(value: Any) -> str:
    """Return *value* if it is a link that other programs can follow."""
    text = plain(value)
    return text if text.startswith(("http://", "https://")) else ""


def plain(value: Any) -> str:
    """Return a text without markup and without characters that no XML can hold; nothing becomes an empty text."""
    if value is None:
        return ""
    text = str(value)
    if "<" in text or "&" in text:
        parser = _Text()
        parser.feed(text)
        parser.close()
        text = "".join(parser.parts)
    text = _ILLEGAL.sub("", text).replace("\xa0", " ").replace("\r\n", "\n").replace("\r", "\n")
    return re.sub(r"\n{3,}", "\n\n", text).strip()


class _Text(HTMLParser):
    """Collects the text of HTML; paragraphs and line breaks become new lines."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []

    def handle_data(self, data: str) -> None:
        self.parts.append(data)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:  # noqa: ARG002
        if tag in ("br", "p", "div", "li", "tr") and self.parts:
            self.parts.append("\n")
