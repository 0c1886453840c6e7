"""The notifications service, against a real SMTP server."""

from __future__ import annotations

import socket
from contextlib import closing
from datetime import UTC, datetime
from email import message_from_bytes, policy
from typing import TYPE_CHECKING, Any

import pytest
from aiosmtpd.controller import Controller

from consumers.notifications import service
from consumers.notifications.mail import MailServer
from outbox.consumer import Reject, Retry
from outbox.database import create_engine
from outbox.errors import ConfigurationError
from outbox.message import Message, encode, new_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import EmailMessage
    from pathlib import Path
    from uuid import UUID

    from sqlalchemy.engine import Engine


class Catcher:
    """Takes every letter; answers as told to recipients named in `answers`."""

    def __init__(self) -> None:
        self.letters: list[EmailMessage] = []
        self.answers: dict[str, str] = {}
        self.hello = self.data = ""

    async def handle_EHLO(self, _server: Any, session: Any, _envelope: Any, name: str, answers: list[str]) -> list[str]:  # noqa: N802
        session.host_name = name
        return [self.hello] if self.hello else answers

    async def handle_HELO(self, _server: Any, _session: Any, _envelope: Any, _name: str) -> str:  # noqa: N802
        return self.hello

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802
        if address in self.answers:
            return self.answers[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        letter = message_from_bytes(envelope.content, policy=policy.default)
        if self.data and self.data in str(letter["To"]):
            return "554 no such letters here"
        self.letters.append(letter)
        return "250 OK"


@pytest.fixture
def catcher(monkeypatch: pytest.MonkeyPatch) -> Iterator[Catcher]:
    catcher = Catcher()
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    controller = Controller(catcher, hostname="127.0.0.1", port=port, enable_SMTPUTF8=False)
    controller.start()
    monkeypatch.setenv("NOTIFICATIONS_SMTP_URL", f"smtp://127.0.0.1:{port}")
    monkeypatch.setenv("NOTIFICATIONS_FROM", "Team <team@example.org>")
    yield catcher
    controller.stop()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return create_engine(f"sqlite:///{tmp_path}/notifications.db")


def moved(change: str, *emails: str | None, id: UUID | None = None) -> Message:
    speakers = [{"id": n, "name": "Ada\n Lovelace", "email": email} for n, email in enumerate(emails, 1)]
    data = {
        "event_id": 1, "session_id": 7, "change": change, "previous": "pending", "event_name": "Outbox Days",
        "session": {"id": 7, "title": "Tables\r\nBcc: all@example.org", "state": change}, "speakers": speakers,
    }  # fmt: skip
    return Message(
        id=id or new_id(), source="/openevent", topic="session.state_changed",
        body=encode(data, limit=10**6), created_at=datetime(2026, 5, 1, tzinfo=UTC),
    )  # fmt: skip


def test_each_speaker_gets_a_letter_with_a_message_id_that_stays(catcher: Catcher, engine: Engine) -> None:
    message = moved("accepted", "ada@example.org", "grace@example.org")
    service.deliver(message, engine)
    assert [str(letter["To"]) for letter in catcher.letters] == [
        "Ada Lovelace <ada@example.org>",
        "Ada Lovelace <grace@example.org>",
    ]
    assert catcher.letters[0]["Message-ID"] == f"<{message.id}.1@example.org>"
    assert catcher.letters[0]["Bcc"] is None
    assert catcher.letters[0]["Subject"] == "Accepted: Tables Bcc: all@example.org"


def test_the_same_message_again_sends_no_letter(catcher: Catcher, engine: Engine) -> None:
    message = moved("rejected", "ada@example.org")
    service.deliver(message, engine)
    service.deliver(message, engine)
    assert len(catcher.letters) == 1


def test_nobody_is_told_of_a_draft_and_nobody_without_an_address(catcher: Catcher, engine: Engine) -> None:
    service.deliver(moved("withdrawn", "ada@example.org"), engine)
    service.deliver(moved("accepted", None, "", "not an address", "@", "nobody@", "a@b\r\nBcc: c@d"), engine)
    assert catcher.letters == []


def test_a_mail_server_that_is_away_is_not_the_messages_fault(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("NOTIFICATIONS_SMTP_URL", f"smtp://127.0.0.1:{port}")
    with pytest.raises(Retry, match=str(port)):
        service.deliver(moved("accepted", "ada@example.org"), engine)


def test_a_refused_recipient_is_rejected_and_the_others_still_get_theirs(catcher: Catcher, engine: Engine) -> None:
    catcher.answers["ada@example.org"] = "550 no such user"
    with pytest.raises(Reject, match="550 no such user"):
        service.deliver(moved("accepted", "ada@example.org", "grace@example.org"), engine)
    assert [letter["To"].addresses[0].addr_spec for letter in catcher.letters] == ["grace@example.org"]


def test_later_means_later(catcher: Catcher, engine: Engine) -> None:
    catcher.answers["ada@example.org"] = "451 mailbox busy"
    with pytest.raises(Retry, match="451"):
        service.deliver(moved("accepted", "ada@example.org"), engine)


def test_a_letter_that_is_refused_for_what_it_says_is_rejected_and_the_others_still_get_theirs(
    catcher: Catcher, engine: Engine
) -> None:
    catcher.data = "ada@"
    with pytest.raises(Reject, match="554 no such letters here"):
        service.deliver(moved("accepted", "ada@example.org", "grace@example.org"), engine)
    assert [letter["To"].addresses[0].addr_spec for letter in catcher.letters] == ["grace@example.org"]


def test_an_address_that_the_server_can_not_take_is_rejected_and_the_others_still_get_theirs(
    catcher: Catcher, engine: Engine
) -> None:
    with pytest.raises(Reject, match="internationalized email"):
        service.deliver(moved("accepted", "ada@exämple.org", "grace@example.org"), engine)
    assert [letter["To"].addresses[0].addr_spec for letter in catcher.letters] == ["grace@example.org"]


def test_a_server_that_does_not_let_us_in_is_not_the_messages_fault(catcher: Catcher, engine: Engine) -> None:
    catcher.hello = "554 not from there"
    with pytest.raises(Retry, match="554"):
        service.deliver(moved("accepted", "ada@example.org"), engine)


@pytest.mark.parametrize("url", ["localhost:25", "http://x", "smtp://", "smtp://host:port"])
def test_a_url_that_names_no_mail_server_is_refused(url: str) -> None:
    with pytest.raises(ConfigurationError, match="NOTIFICATIONS_SMTP_URL"):
        MailServer.of({"NOTIFICATIONS_SMTP_URL": url})
