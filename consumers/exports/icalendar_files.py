"""iCalendar (RFC 5545) and xCal (RFC 6321), the same calendar twice."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING
from xml.etree import ElementTree

from icalendar import Calendar, vText
from icalendar import Event as Component

from consumers.exports.programme import Entry, entries, link, plain

if TYPE_CHECKING:
    from consumers.exports.model import Conference

PRODUCT = "-//openevent//exports//EN"
XCAL = "urn:ietf:params:xml:ns:icalendar-2.0"


def ical(conference: Conference, now: datetime) -> bytes:
    """Return a VCALENDAR with one VEVENT per entry of the programme; *now* is its DTSTAMP."""
    calendar = Calendar()
    calendar.add("prodid", PRODUCT)
    calendar.add("version", "2.0")
    # As text: what the library does not know it does not escape, and refuses where it holds a line break.
    calendar.add("x-wr-calname", vText(plain(conference.event["name"])))
    calendar.add("x-wr-timezone", vText(conference.event["timezone"]))
    for entry in entries(conference):
        component = Component()
        component.add("dtstamp", now)
        component.add("dtstart", entry.starts_at.astimezone(UTC))
        component.add("dtend", entry.ends_at.astimezone(UTC))
        for name, value in _texts(entry):
            component.add(name, [value] if name == "categories" else value)
        calendar.add_component(component)
    return bytes(calendar.to_ical())


def _texts(entry: Entry) -> list[tuple[str, str]]:
    by = ", ".join(name for _, name in entry.speakers)
    description = "\n\n".join(filter(None, (entry.subtitle, by, entry.abstract, entry.description)))
    values = {
        "uid": entry.uid,
        "summary": entry.title,
        "description": description,
        "location": entry.room,
        "categories": entry.track,
        "url": entry.url,
    }
    return [(name, value) for name, value in values.items() if value]


def xcal(conference: Conference, now: datetime) -> bytes:
    """Return the same calendar in XML."""
    ElementTree.register_namespace("", XCAL)
    root = _element(None, "icalendar")
    calendar = _element(root, "vcalendar")
    properties = _element(calendar, "properties")
    _property(properties, "prodid", "text", PRODUCT)
    _property(properties, "version", "text", "2.0")
    _property(properties, "x-wr-calname", "unknown", plain(conference.event["name"]))
    page = link(conference.event.get("url"))
    if page:
        _property(properties, "x-wr-url", "unknown", page)
    components = _element(calendar, "components")
    for entry in entries(conference):
        event = _element(_element(components, "vevent"), "properties")
        _property(event, "dtstamp", "date-time", _instant(now))
        _property(event, "dtstart", "date-time", _instant(entry.starts_at))
        _property(event, "dtend", "date-time", _instant(entry.ends_at))
        for name, value in _texts(entry):
            _property(event, name, "uri" if name == "url" else "text", value)
    return bytes(ElementTree.tostring(root, encoding="utf-8", xml_declaration=True))


def _instant(value: datetime) -> str:
    return value.astimezone(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def _element(parent: ElementTree.Element | None, name: str) -> ElementTree.Element:
    tag = f"{{{XCAL}}}{name}"
    return ElementTree.Element(tag) if parent is None else ElementTree.SubElement(parent, tag)


def _property(parent: ElementTree.Element, name: str, type: str, value: str) -> None:
    _element(_element(parent, name), type).text = value
