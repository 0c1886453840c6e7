"""Pentabarf XML: the schedule format that conference apps (Giggity, Infobeamer) read. Times are those of the venue."""

from __future__ import annotations

from datetime import date, datetime, timedelta
from itertools import groupby
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from consumers.exports.programme import Entry, entries, moment, plain

if TYPE_CHECKING:
    from consumers.exports.model import Conference

#: Where a session that has a time but no room is listed: the format has no other place for it.
NO_ROOM = "Room to be announced"


def pentabarf(conference: Conference) -> bytes:
    """Return the schedule: days, rooms, sessions."""
    zone = _zone(conference.event["timezone"])
    programme = entries(conference)
    days = sorted({_day(entry, zone) for entry in programme})
    root = ElementTree.Element("schedule")
    _conference(root, conference, zone, len(days))
    for index, day in enumerate(days, 1):
        element = ElementTree.SubElement(root, "day", date=day.isoformat(), index=str(index))
        of_day = sorted((e for e in programme if _day(e, zone) == day), key=lambda e: (e.room or NO_ROOM, e.starts_at, e.id))
        for room, in_room in groupby(of_day, key=lambda e: e.room or NO_ROOM):
            parent = ElementTree.SubElement(element, "room", name=room)
            for entry in in_room:
                _event(parent, entry, zone)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _zone(name: Any) -> ZoneInfo:
    """Return the zone of that name, UTC where there is none: *name* becomes the path of a file, which may be anything."""
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):
        return ZoneInfo("UTC")


def _there(instant: datetime, zone: ZoneInfo) -> datetime:
    """Return the time of the venue; that of UTC on the first and last days of the calendar, which other zones lack."""
    try:
        return instant.astimezone(zone)
    except OverflowError:
        return instant


def _day(entry: Entry, zone: ZoneInfo) -> date:
    return _there(entry.starts_at, zone).date()


def _conference(root: ElementTree.Element, conference: Conference, zone: ZoneInfo, days: int) -> None:
    event = conference.event
    parent = ElementTree.SubElement(root, "conference")
    texts = {
        "title": plain(event["name"]),
        "venue": plain(event.get("location_name")),
        "start": _there(moment(event["starts_at"]), zone).date().isoformat(),
        "end": _there(moment(event["ends_at"]), zone).date().isoformat(),
        "days": str(days),
        "day_change": "00:00:00",
        "timeslot_duration": "00:05:00",
    }
    for name, text in texts.items():
        ElementTree.SubElement(parent, name).text = text


def _event(parent: ElementTree.Element, entry: Entry, zone: ZoneInfo) -> None:
    element = ElementTree.SubElement(parent, "event", id=str(entry.id), guid=entry.uid)
    starts = _there(entry.starts_at, zone)
    texts = {
        "date": starts.isoformat(),
        "start": starts.strftime("%H:%M"),
        "duration": _hours(entry.duration),
        "room": entry.room or NO_ROOM,
        "title": entry.title,
        "subtitle": entry.subtitle,
        "track": entry.track,
        "type": entry.type,
        "language": entry.language,
        "abstract": entry.abstract,
        "description": entry.description,
    }
    for name, text in texts.items():
        ElementTree.SubElement(element, name).text = text
    persons = ElementTree.SubElement(element, "persons")
    for id, name in entry.speakers:
        ElementTree.SubElement(persons, "person", id=str(id)).text = name


def _hours(duration: timedelta) -> str:
    minutes = int(duration.total_seconds() // 60)
    return f"{minutes // 60:02d}:{minutes % 60:02d}"
