"""The state of a row as plain data: the same object in an answer of the API and in a message."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from publisher.conference.kinds import KINDS

if TYPE_CHECKING:
    from publisher.conference.models import Event, Part


def describe(row: Event | Part) -> dict[str, Any]:
    """Return everything that is shown of *row*: JSON values only."""
    return {name: _plain(getattr(row, name)) for name in KINDS[type(row)].shown}


def moment_text(moment: datetime) -> str:
    """Return an instant as RFC 3339 in UTC."""
    return moment.astimezone(UTC).isoformat().replace("+00:00", "Z")


def _plain(value: Any) -> Any:
    return moment_text(value) if isinstance(value, datetime) else value
