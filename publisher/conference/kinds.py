"""The five kinds of thing: what may be entered of each, and what is shown.

Lengths are chosen so that the longest thing still fits into one message (256 KiB, up to four bytes a character).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from publisher.conference import fields
from publisher.conference.errors import Fault, Invalid
from publisher.conference.fields import Choice, Field, Flag, Moment, Text, Whole, Zone
from publisher.conference.models import Base, Event, Microlocation, Part, Speaker, Talk, Track
from publisher.conference.states import FIRST_STATES, EventState, TalkState

_IDS = {"id": "is given by the publisher", "external_id": "is given by the import"}
_PART = _IDS | {"event_id": "never changes"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Kind:
    """One kind of thing. Null is accepted for every field that is neither required nor has a default."""

    #: In messages and in prose, and its plural in paths.
    name: str
    plural: str
    fields: Mapping[str, Field]
    required: frozenset[str]
    #: What a field has that was left out when the thing was made; such a field is never null.
    defaults: Mapping[str, Any] = field(default_factory=dict)
    #: Fields that are taken when the thing is made, and refused afterwards with this reason.
    first: Mapping[str, tuple[Field, str]] = field(default_factory=dict)
    #: What is shown and never taken, with the reason.
    read_only: Mapping[str, str]

    @property
    def shown(self) -> tuple[str, ...]:
        """The names of everything that is shown."""
        return (*self.read_only, *self.fields, *self.first)

    @property
    def always(self) -> frozenset[str]:
        """The names of what is never null."""
        return self.required | self.defaults.keys()

    def check(self, data: Mapping[str, Any], *, partial: bool = False) -> dict[str, Any]:
        """Return the parsed values of *data*; raise Invalid with every fault. *partial*: for a change of what exists."""
        faults: list[Fault] = []
        values: dict[str, Any] = {} if partial else dict(self.defaults)
        known = dict(self.fields)
        if not partial:
            known |= {name: kind for name, (kind, _) in self.first.items()}
        for name, value in data.items():
            if name not in known:
                faults.append(Fault(pointer(name), self._refusal(name)))
            elif value is None:
                if name in self.always:
                    faults.append(Fault(pointer(name), "must not be null"))
                values[name] = None
            else:
                try:
                    values[name] = known[name].parse(value)
                except ValueError as error:
                    faults.append(Fault(pointer(name), str(error)))
        if not partial:
            faults += [Fault(pointer(name), "is required") for name in sorted(self.required - data.keys())]
        if faults:
            raise Invalid(faults)
        return values

    def _refusal(self, name: str) -> str:
        if name in self.read_only:
            return f"is read-only: it {self.read_only[name]}"
        if name in self.first:
            return self.first[name][1]
        return "is unknown here"


def pointer(name: str) -> str:
    """Return the JSON pointer (RFC 6901) to the member *name* of an object."""
    return "/" + name.replace("~", "~0").replace("/", "~1")


EVENT = Kind(
    name="event",
    plural="events",
    fields={
        "name": Text(300, shortest=1),
        "description": Text(20_000),
        "starts_at": Moment(),
        "ends_at": Moment(),
        "timezone": Zone(),
        "location_name": Text(500),
        "latitude": fields.LATITUDE,
        "longitude": fields.LONGITUDE,
        "url": fields.LINK,
        "ticket_url": fields.LINK,
        "logo_url": fields.LINK,
        "image_url": fields.LINK,
        "organizer_name": Text(300),
        "organizer_description": Text(8_000),
        "email": fields.EMAIL,
        "type": Text(200),
        "topic": Text(200),
        "sub_topic": Text(200),
        "code_of_conduct": Text(8_000),
        "state": Choice(tuple(EventState)),
    },
    required=frozenset({"name", "starts_at", "ends_at"}),
    defaults={"timezone": "UTC", "state": EventState.DRAFT},
    read_only=_IDS,
)

TRACK = Kind(
    name="track",
    plural="tracks",
    fields={
        "name": Text(200, shortest=1),
        "description": Text(1_000),
        "color": fields.COLOR,
        "font_color": fields.COLOR,
    },
    required=frozenset({"name"}),
    defaults={"color": "#607d8b"},
    read_only=_PART,
)

MICROLOCATION = Kind(
    name="microlocation",
    plural="microlocations",
    fields={
        "name": Text(300, shortest=1),
        "floor": Whole(-100, 1_000),
        "room": Text(300),
        "latitude": fields.LATITUDE,
        "longitude": fields.LONGITUDE,
    },
    required=frozenset({"name"}),
    read_only=_PART,
)

SPEAKER = Kind(
    name="speaker",
    plural="speakers",
    fields={
        "name": Text(200, shortest=1),
        "email": fields.EMAIL,
        "short_biography": Text(10_000),
        "long_biography": Text(20_000),
        "speaking_experience": Text(15_000),
        "organisation": Text(300),
        "position": Text(300),
        "city": Text(200),
        "country": Text(200),
        "gender": Text(100),
        "website": fields.LINK,
        "twitter": fields.LINK,
        "facebook": fields.LINK,
        "github": fields.LINK,
        "linkedin": fields.LINK,
        "photo_url": fields.LINK,
        "is_featured": Flag(),
    },
    required=frozenset({"name"}),
    defaults={"is_featured": False},
    read_only=_PART,
)

SESSION = Kind(
    name="session",
    plural="sessions",
    fields={
        "title": Text(500, shortest=1),
        "subtitle": Text(500),
        "short_abstract": Text(15_000),
        "long_abstract": Text(20_000),
        "comments": Text(15_000),
        "language": Text(100),
        "level": Text(100),
        "session_type": Text(200),
        "track_id": fields.REFERENCE,
        "microlocation_id": fields.REFERENCE,
        "starts_at": Moment(),
        "ends_at": Moment(),
        "slides_url": fields.LINK,
        "video_url": fields.LINK,
        "audio_url": fields.LINK,
        "signup_url": fields.LINK,
    },
    required=frozenset({"title"}),
    defaults={"state": TalkState.PENDING},
    first={"state": (Choice(FIRST_STATES), "is changed by a move of its own, so that the move is announced")},
    read_only=_PART | {"speaker_ids": "is changed by adding and removing speakers, one at a time"},
)

#: The order to move a session to another state.
MOVE = Kind(
    name="move", plural="moves", fields={"state": Choice(tuple(TalkState))}, required=frozenset({"state"}), read_only={}
)

#: What belongs to an event, in the order in which one may refer to another.
PARTS: Mapping[type[Part], Kind] = MappingProxyType(
    {Track: TRACK, Microlocation: MICROLOCATION, Speaker: SPEAKER, Talk: SESSION}
)
KINDS: Mapping[type[Base], Kind] = MappingProxyType({Event: EVENT} | dict(PARTS.items()))
