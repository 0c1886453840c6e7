"""Letters as bytes that every mail server takes and every mail program reads alike: 7 bit, short lines.

Headers are written here, not by `email.message`: that parses what it is given, decodes words such as `=?utf-8?q?=0D=0A…?=` in
it, and before Python 3.11.10 and 3.12.5 wrote the line break they hold, which begins another header. Here a value is either
plain characters that mean nothing to a mail program, or all of it is encoded.
"""

from __future__ import annotations

import hashlib
import quopri
import re
from datetime import UTC, datetime
from email.header import Header
from email.utils import format_datetime

#: What may stand in a header as it is: no `=?`, which begins an encoded word, and nothing with a meaning in an address.
_PLAIN = re.compile(r"[A-Za-z0-9 !#$%&'*+/^_`{|}~-]{0,60}")
_PLAIN_SUBJECT = re.compile(r"(?!.*=\?)[ -~]{0,60}")
#: An address as people have them: no quotes, no comments, no routes, no bare IP address.
_ADDRESS = re.compile(r"[^\s@<>()\[\]\\,;:\"]{1,64}@[^\s@<>()\[\]\\,;:\"=?]{1,255}")
_SENDER = re.compile(r"([^<>]*)<([^<>]+)>|([^<>]+)")
_ID = re.compile(r"[A-Za-z0-9._-]{1,200}")


def is_address(text: str) -> bool:
    """Say whether *text* is an address that letters are handed in for."""
    return bool(_ADDRESS.fullmatch(text)) and text.isprintable() and "=?" not in text


def parse_sender(text: str) -> tuple[str, str]:
    """Return name and address of `Name <name@example.org>` or of a bare address. Raises ValueError for anything else."""
    match = _SENDER.fullmatch(text.strip())
    name, address = (match[1] or "", match[2] or match[3]) if match and text.isprintable() else ("", "")
    if not is_address(address) or not address.isascii():
        raise ValueError("it must be an address such as noreply@example.org or Open Event <noreply@example.org>")
    return name.strip().strip('"'), address


def message_id(id: str, speaker_id: int, sender: str) -> str:
    """Return the Message-ID of a letter: the same however often it is handed in, so that receivers recognise a repetition."""
    # Others' message ids may be any text.
    known = id if _ID.fullmatch(id) else hashlib.sha256(id.encode(errors="surrogatepass")).hexdigest()
    return f"<{known}.{speaker_id}@{sender.rpartition('@')[2]}>"


def encoded(
    *, sender: tuple[str, str], to: tuple[str, str], subject: str, text: str, id: str, said_at: datetime | None
) -> bytes:
    """Return a letter. All of it is ASCII but an address that is not."""
    lines = [
        f"From: {_mailbox('From', *sender)}",
        f"To: {_mailbox('To', *to)}",
        f"Subject: {subject if _PLAIN_SUBJECT.fullmatch(subject) else _word('Subject', subject)}",
        f"Date: {format_datetime((said_at or datetime.now(UTC)).astimezone(UTC))}",
        f"Message-ID: {id}",
        "Auto-Submitted: auto-generated",  # no answering machine should write back
        "MIME-Version: 1.0",
        'Content-Type: text/plain; charset="utf-8"',
        "Content-Transfer-Encoding: quoted-printable",
        "",
    ]
    head = "\r\n".join(lines).encode() + b"\r\n"
    return head + quopri.encodestring(text.encode()).replace(b"\n", b"\r\n")


def _mailbox(header: str, name: str, address: str) -> str:
    if not name:
        return address
    return f"{name if _PLAIN.fullmatch(name) else _word(header, name)}\r\n <{address}>"


def _word(header: str, text: str) -> str:
    """Return *text* in encoded words, on lines of 76 characters at most."""
    return Header(text, charset="utf-8", header_name=header).encode(linesep="\r\n")
