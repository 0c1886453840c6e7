"""Letters as bytes: whatever people wrote, they are 7 bit, in short lines, and have the headers that were meant."""

from __future__ import annotations

from datetime import UTC, datetime
from email import message_from_bytes, policy
from email.header import decode_header, make_header
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from consumers.notifications.letters import Letter, letters
from consumers.notifications.mime import encoded, is_address, message_id, parse_sender

HEADERS = [
    "From", "To", "Subject", "Date", "Message-ID", "Auto-Submitted",
    "MIME-Version", "Content-Type", "Content-Transfer-Encoding",
]  # fmt: skip
_PARTS = (
    "=?utf-8?q?",
    "=0D=0A",
    "Reply-To: eve@example.net",
    "?=",
    "\r\n",
    "Bcc:",
    "\x00",
    "\u202e",
    "é",
    "“漢”",
    " ",
    ".\r\n.",
    "x" * 90,
)
_WORDS = st.lists(st.one_of(st.sampled_from(_PARTS), st.text(max_size=5)), max_size=6).map("".join)


def _letter(title: str, name: str = "Ada", event: str = "Conf") -> Letter:
    (letter,) = letters("accepted", event, title, [{"id": 1, "name": name, "email": "ada@example.org"}])
    return letter


def _bytes(letter: Letter, address: str = "ada@example.org") -> bytes:
    sender = ("Téam, Ltd.", "team@example.org")
    return encoded(
        sender=sender, to=(letter.name, address), subject=letter.subject, text=letter.text,
        id=message_id("a" * 36, 1, sender[1]), said_at=datetime(2026, 5, 1, tzinfo=UTC),
    )  # fmt: skip


@given(title=_WORDS, name=_WORDS, event=_WORDS)
def test_no_title_and_no_name_makes_a_header_of_its_own(title: str, name: str, event: str) -> None:
    letter = _letter(title, name, event)
    content = _bytes(letter)
    assert content.isascii()
    assert max(len(line) for line in content.split(b"\r\n")) <= 78
    assert b"\n" not in content.replace(b"\r\n", b"")
    assert b"\r" not in content.replace(b"\r\n", b"")
    for reading in (policy.compat32, policy.default, policy.SMTP):
        read: Any = message_from_bytes(content, policy=reading)
        assert read.keys() == HEADERS
    assert str(make_header(decode_header(message_from_bytes(content)["Subject"]))) == letter.subject
    assert read.get_content().replace("\r\n", "\n") == letter.text


def test_what_looks_like_an_encoded_word_is_read_as_it_was_written() -> None:
    title = "=?utf-8?q?=0D=0AReply-To:_eve=40example.net?="
    content = _bytes(_letter(title))
    assert b"Reply-To" not in content.split(b"\r\n\r\n")[0]
    assert str(make_header(decode_header(message_from_bytes(content)["Subject"]))) == f"Accepted: {title}"


def test_plain_subjects_and_names_stay_readable_on_the_wire() -> None:
    head = _bytes(_letter("Tables, and more: why?", "Ada Lovelace")).split(b"\r\n\r\n")[0]
    assert b"\r\nSubject: Accepted: Tables, and more: why?\r\n" in head
    assert b"\r\nTo: Ada Lovelace\r\n <ada@example.org>\r\n" in head


def test_an_address_that_is_not_ascii_stands_in_the_letter_as_it_is() -> None:
    assert "\r\n <ada@exämple.org>\r\n".encode() in _bytes(_letter("x"), "ada@exämple.org")


def test_long_texts_end_with_a_sign() -> None:
    letter = _letter("x" * 5000, "y" * 5000)
    assert len(letter.name) == 200
    assert letter.subject.endswith("x…")


@pytest.mark.parametrize(
    ("text", "name", "address"),
    [
        ("a@b.org", "", "a@b.org"),
        ("Open Event <a@b.org>", "Open Event", "a@b.org"),
        ('"Open, Event" <a@b.org> ', "Open, Event", "a@b.org"),
        ("<a@b.org>", "", "a@b.org"),
    ],
)
def test_a_sender_is_a_name_and_an_address_or_an_address(text: str, name: str, address: str) -> None:
    assert parse_sender(text) == (name, address)


@given(st.text())
def test_an_address_holds_nothing_that_ends_it(text: str) -> None:
    assert not is_address(f"a@b.org{text}") or not set(text) & set(' \r\n\t<>,;:"\\()[]@=?\x00')
    assert not is_address(f"{text}\n@b.org")


@pytest.mark.parametrize("id", ["x>\r\nBcc: eve@example.net", "a b", "é", "\ud800", "", "x" * 255])
def test_a_message_id_of_others_never_leaves_its_header(id: str) -> None:
    made = message_id(id, 7, "team@example.org")
    assert made == message_id(id, 7, "team@example.org")
    assert made.isascii()
    assert made.isprintable()
    assert made.endswith(".7@example.org>")
    assert len(made) < 100
