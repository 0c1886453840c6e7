"""Kinds of value: what each accepts, and how OpenAPI says so. The API and the importer check with the same ones."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum
from typing import Any, Protocol
from zoneinfo import ZoneInfo

#: The largest number of a row that every database keeps.
MAX_ID = 2**63 - 1


class Field(Protocol):
    """A kind of value. `parse` raises ValueError with a clause that follows the field's name."""

    @property
    def schema(self) -> dict[str, Any]: ...

    def parse(self, value: object) -> Any: ...


@dataclass(frozen=True, slots=True)
class Text:
    """Unicode text of at most `longest` characters, at least `shortest` that are not blank."""

    longest: int
    shortest: int = 0

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": self.longest} | ({"minLength": self.shortest} if self.shortest else {})

    def parse(self, value: object) -> str:
        if not isinstance(value, str):
            raise ValueError("must be a text")
        if len(value) > self.longest:
            raise ValueError(f"has {len(value)} characters; at most {self.longest} are kept")
        if len(value.strip()) < self.shortest:
            raise ValueError("must not be blank")
        # Neither database nor UTF-8 keeps these: NUL and other controls, lone surrogates.
        if found := re.search(r"[\x00-\x08\x0b\x0c\x0e-\x1f\ud800-\udfff]", value):
            raise ValueError(f"holds the character U+{ord(found[0]):04X}, which no text may hold")
        return value


@dataclass(frozen=True, slots=True)
class Pattern:
    """A text of one shape."""

    pattern: str
    meaning: str
    longest: int = 255
    format: str | None = None

    @property
    def schema(self) -> dict[str, Any]:
        schema = {"type": "string", "maxLength": self.longest, "pattern": f"^{self.pattern}$", "description": self.meaning}
        return schema | ({"format": self.format} if self.format else {})

    def parse(self, value: object) -> str:
        text = Text(self.longest).parse(value)
        if not re.fullmatch(self.pattern, text):
            raise ValueError(f"must be {self.meaning}")
        return text


#: Absolute on the web, or a path beside the conference's site: nothing a browser would run.
LINK = Pattern(r"(https?://|/)[^\s]*", "a link that begins with http://, https:// or /", longest=1_000)
EMAIL = Pattern(r"[^@\s]+@[^@\s]+", "an e-mail address", longest=254)
COLOR = Pattern(r"#[0-9A-Fa-f]{6}", "a colour such as #c62874", longest=7)


@dataclass(frozen=True, slots=True)
class Decimal:
    """A finite number between two others."""

    low: float
    high: float

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "number", "minimum": self.low, "maximum": self.high}

    def parse(self, value: object) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ValueError("must be a number")
        if not self.low <= value <= self.high or not math.isfinite(value):
            raise ValueError(f"must be from {self.low:g} to {self.high:g}")
        return float(value)


@dataclass(frozen=True, slots=True)
class Whole:
    """A whole number between two others."""

    low: int
    high: int

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "integer", "minimum": self.low, "maximum": self.high}

    def parse(self, value: object) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError("must be a whole number")
        if not self.low <= value <= self.high:
            raise ValueError(f"must be from {self.low} to {self.high}")
        return value


#: The number of a row; whether it exists is the database's to say.
REFERENCE = Whole(1, MAX_ID)
LATITUDE = Decimal(-90, 90)
LONGITUDE = Decimal(-180, 180)


@dataclass(frozen=True, slots=True)
class Flag:
    """True or false."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "boolean"}

    def parse(self, value: object) -> bool:
        if not isinstance(value, bool):
            raise ValueError("must be true or false")
        return value


@dataclass(frozen=True, slots=True)
class Moment:
    """An instant: RFC 3339 with an offset; kept and shown in UTC."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "format": "date-time"}

    def parse(self, value: object) -> datetime:
        # fromisoformat takes more than RFC 3339 (week dates, no separators): hold it to the shape first.
        if not isinstance(value, str) or not re.fullmatch(
            r"\d{4}-\d\d-\d\d[Tt ]\d\d:\d\d(:\d\d(\.\d+)?)?([Zz]|[+-]\d\d:\d\d)", value
        ):
            raise ValueError("must be a time with its offset, such as 2018-03-22T09:30:00+08:00")
        try:
            return datetime.fromisoformat(value.upper()).astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise ValueError(f"is no time that exists: {error}") from error


@dataclass(frozen=True, slots=True)
class Zone:
    """The name of a time zone."""

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "maxLength": 100, "examples": ["Europe/Berlin"]}

    def parse(self, value: object) -> str:
        text = Text(100).parse(value)
        try:
            ZoneInfo(text)
        except (KeyError, ValueError, OSError) as error:  # ZoneInfo opens a file of that name
            raise ValueError("must be the name of a time zone such as Europe/Berlin") from error
        return text


@dataclass(frozen=True, slots=True)
class Choice:
    """One of some words."""

    words: tuple[StrEnum, ...]

    @property
    def schema(self) -> dict[str, Any]:
        return {"type": "string", "enum": [word.value for word in self.words]}

    def parse(self, value: object) -> StrEnum:
        for word in self.words:
            if word.value == value:
                return word
        raise ValueError(f"must be one of {', '.join(self.words)}")
