"""What the letters say. Pure: from the fields of a message to e-mails."""

from __future__ import annotations

from email.errors import MessageError
from email.headerregistry import Address
from email.message import EmailMessage
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator
    from datetime import datetime

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


def letters(
    message_id: str,
    said_at: datetime | None,
    sender: str,
    *,
    change: str,
    event_name: str,
    title: str,
    speakers: list[dict[str, Any]],
) -> Iterator[EmailMessage]:
    """Yield a letter for each speaker with a usable address; none for a change that nobody is told of."""
    if change not in TEXTS:
        return
    subject, text = TEXTS[change]
    for speaker in speakers:
        address = _address(speaker)
        if address is None:
            continue
        values = {"title": _line(title), "name": _line(speaker["name"]), "event": _line(event_name)}
        letter = EmailMessage()
        letter["From"] = sender
        letter["To"] = address
        letter["Subject"] = subject.format(**values)
        if said_at is not None:
            letter["Date"] = said_at
        # The same for the same message and speaker, however often it is sent: receivers recognise a repetition by it.
        letter["Message-ID"] = f"<{message_id}.{speaker['id']}@{sender.rpartition('@')[2].rstrip('>')}>"
        letter.set_content(text.format(**values))
        yield letter


def _address(speaker: dict[str, Any]) -> Address | None:
    """Real exports hold empty and broken addresses: nobody to write to is no error."""
    name, email = _line(speaker["name"]), (speaker.get("email") or "").strip()
    try:
        address = Address(display_name=name, addr_spec=email)
    except (ValueError, IndexError, MessageError):  # which one, and where, changes with Python's version
        return None
    return address if address.username and address.domain else None


def _line(text: str) -> str:
    """A header is one line; what people enter is not always."""
    return " ".join(str(text).split())
