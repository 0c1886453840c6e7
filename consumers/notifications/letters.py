"""What the letters say. Pure: from the fields of a message to texts for each recipient."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from consumers.notifications.mime import is_address

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

#: State → subject and text; other states are nobody's news.
TEXTS = {
    "accepted": (
        "Accepted: {title}",
        "Hello {name},\n\ngood news: your session “{title}” is accepted for {event}.\nWe look forward to seeing you.\n",
    ),
    "rejected": (
        "Your proposal: {title}",
        "Hello {name},\n\nthank you for proposing “{title}” for {event}.\nWe are sorry that we can't offer you a place.\n",
    ),
    "canceled": ("Cancelled: {title}", "Hello {name},\n\nyour session “{title}” at {event} is cancelled.\n"),
}
#: A longer name or title says no more in a letter.
_LONGEST = 200


@dataclass(frozen=True, slots=True)
class Letter:
    """What one recipient is told."""

    speaker_id: int
    name: str
    address: str
    subject: str
    text: str


def letters(change: str, event_name: Any, title: Any, speakers: list[Mapping[str, Any]]) -> Iterator[Letter]:
    """Yield a letter for each speaker with a usable address; none for a change that nobody is told of.

    Real exports hold empty and broken addresses: nobody to write to is no error.
    """
    if change not in TEXTS:
        return
    subject, text = TEXTS[change]
    for speaker in speakers:
        address = str(speaker.get("email") or "").strip()
        if not is_address(address):
            continue
        values = {"title": _line(title), "name": _line(speaker.get("name")), "event": _line(event_name)}
        yield Letter(speaker["id"], values["name"], address, subject.format(**values), text.format(**values))


def _line(text: Any) -> str:
    """Return *text* on one line, without what drives terminals and mail programs; what people enter is not always."""
    printable = "".join(character if character.isprintable() else " " for character in str(text or ""))
    line = " ".join(printable.split())
    return line if len(line) <= _LONGEST else line[: _LONGEST - 1] + "…"
