"""The notifications service, against a real SMTP server."""

from __future__ import annotations

import logging
import socket
import ssl
import threading
from contextlib import closing
from datetime import UTC, datetime, timedelta
from email import message_from_bytes, policy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import sqlalchemy as sa
from aiosmtpd.controller import Controller
from aiosmtpd.smtp import SMTP, AuthResult

from consumers.notifications import model, service
from consumers.notifications.__main__ import main
from consumers.notifications.mail import MailServer
from consumers.notifications.sender import Sender, pause
from outbox.consumer import Reject
from outbox.database import create_engine
from outbox.errors import ConfigurationError
from outbox.message import Message, encode, new_id

if TYPE_CHECKING:
    from collections.abc import Iterator
    from email.message import EmailMessage
    from uuid import UUID

    from sqlalchemy.engine import Engine

TLS = Path(__file__).parents[2] / "kit" / "tls"
NOON = datetime(2026, 5, 1, 12, tzinfo=UTC)


class Catcher:
    """Takes every letter; answers as told to recipients named in `answers`."""

    def __init__(self) -> None:
        self.letters: list[EmailMessage] = []
        self.contents: list[bytes] = []
        self.answers: dict[str, str] = {}
        self.hello = self.sender = self.data = ""
        self.connections = 0
        self.logins: list[bytes] = []

    async def handle_EHLO(self, _server: Any, session: Any, _envelope: Any, name: str, answers: list[str]) -> list[str]:  # noqa: N802
        session.host_name = name
        self.connections += 1
        return [self.hello] if self.hello else answers

    async def handle_HELO(self, _server: Any, _session: Any, _envelope: Any, _name: str) -> str:  # noqa: N802
        return self.hello

    async def handle_MAIL(self, _server: Any, _session: Any, envelope: Any, address: str, options: list[str]) -> str:  # noqa: N802
        if self.sender:
            return self.sender
        envelope.mail_from = address
        envelope.mail_options.extend(options)
        return "250 OK"

    async def handle_RCPT(self, _server: Any, _session: Any, envelope: Any, address: str, _options: Any) -> str:  # noqa: N802
        if address in self.answers:
            return self.answers[address]
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, server: Any, _session: Any, envelope: Any) -> str:  # noqa: N802
        letter = message_from_bytes(envelope.content, policy=policy.default)
        if self.data and self.data in str(letter["To"]):
            return "554 no such letters here"
        if "drops@example.org" in envelope.rcpt_tos:
            server.transport.abort()
        self.letters.append(letter)
        self.contents.append(envelope.content)
        return "250 OK"

    @property
    def recipients(self) -> list[str]:
        return [letter["To"].addresses[0].addr_spec for letter in self.letters]


class Post:
    """The service with a database of its own, its sender's clock, and the mail server it hands letters to."""

    def __init__(self, engine: Engine, url: str) -> None:
        self.engine = engine
        self.environ = {"NOTIFICATIONS_SMTP_URL": url, "NOTIFICATIONS_FROM": "Team <team@example.org>"}
        self.now = NOON
        self.sender = Sender(lambda: self.now)

    def hear(self, *messages: Message) -> None:
        for message in messages:
            service.deliver(message, self.engine)
        with self.engine.begin() as connection:  # what comes is due at once, whatever this clock says
            fresh = sa.and_(model.Row.state == model.WAITING, model.Row.attempts == 0)
            connection.execute(sa.update(model.Row).where(fresh).values(due_at=model.naive(self.now)))

    def work(self) -> None:
        while self.sender.work(self.engine, MailServer.of(self.environ)):
            pass

    def rows(self) -> list[sa.Row[Any]]:
        with self.engine.connect() as connection:
            return list(connection.execute(sa.select(model.Row.__table__).order_by(model.Row.id)))

    def states(self) -> list[str]:
        return [row.state for row in self.rows()]


@pytest.fixture
def catcher() -> Catcher:
    return Catcher()


@pytest.fixture
def engine(tmp_path: Path) -> Engine:
    return create_engine(f"sqlite:///{tmp_path}/notifications.db")


@pytest.fixture
def post(catcher: Catcher, engine: Engine) -> Iterator[Post]:
    port = free_port()
    controller = Controller(catcher, hostname="127.0.0.1", port=port, enable_SMTPUTF8=False)
    controller.start()
    yield Post(engine, f"smtp://127.0.0.1:{port}")
    controller.stop()


def free_port() -> int:
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        return int(free.getsockname()[1])


def moved(
    change: str, *emails: str | None, id: UUID | None = None, name: str = "Ada\n Lovelace", title: str = "Tables"
) -> Message:
    speakers = [{"id": n, "name": name, "email": email} for n, email in enumerate(emails, 1)]
    data = {
        "event_id": 1, "session_id": 7, "change": change, "previous": "pending", "event_name": "Outbox Days",
        "session": {"id": 7, "title": title, "state": change}, "speakers": speakers,
    }  # fmt: skip
    return Message(
        id=id or new_id(), source="/openevent", topic="session.state_changed",
        body=encode(data, limit=10**6), created_at=datetime(2026, 5, 1, tzinfo=UTC),
    )  # fmt: skip


def test_each_speaker_gets_a_letter_with_a_message_id_that_stays(catcher: Catcher, post: Post) -> None:
    message = moved("accepted", "ada@example.org", "grace@example.org", title="Tables\r\nBcc: all@example.org")
    post.hear(message)
    post.work()
    assert [str(letter["To"]) for letter in catcher.letters] == [
        "Ada Lovelace <ada@example.org>",
        "Ada Lovelace <grace@example.org>",
    ]
    assert [letter["Message-ID"] for letter in catcher.letters] == [f"<{message.id}.{n}@example.org>" for n in (1, 2)]
    assert catcher.letters[0]["Bcc"] is None
    assert catcher.letters[0]["Subject"] == "Accepted: Tables Bcc: all@example.org"
    assert "good news: your session “Tables Bcc: all@example.org” is accepted" in catcher.letters[0].get_content()
    assert catcher.connections == 1
    assert post.states() == ["sent", "sent"]


def test_the_same_message_again_sends_no_letter(catcher: Catcher, post: Post) -> None:
    message = moved("rejected", "ada@example.org")
    post.hear(message, message)
    with post.engine.begin() as connection:
        connection.execute(sa.text("DELETE FROM consumer_inbox"))  # as when it has forgotten
    post.hear(message)
    post.work()
    assert len(catcher.letters) == 1


def test_nobody_is_told_of_a_draft_and_nobody_without_an_address(catcher: Catcher, post: Post) -> None:
    broken = ("", "not an address", "@", "nobody@", "a@b\r\nBcc: c@d", "a@b@c", "a,b@c", "<a@b>", "=?utf-8?q?x?=@example.org")
    post.hear(moved("withdrawn", "ada@example.org"), moved("accepted", None, *broken))
    post.work()
    assert catcher.letters == []
    assert post.rows() == []


@pytest.mark.parametrize("change", [{"session": None}, {"speakers": {}}, {"speakers": [1]}, {"speakers": [{"id": "1"}]}])
def test_a_message_of_another_shape_is_set_aside(engine: Engine, change: dict[str, Any]) -> None:
    data = {"change": "accepted", "event_name": "x", "session": {"title": "x"}, "speakers": [], **change}
    message = Message(id=new_id(), source="/x", topic="session.state_changed", body=encode(data, limit=10**6), created_at=NOON)
    with pytest.raises(Reject, match="speakers is no list"):
        service.deliver(message, engine)


# --- one letter's trouble is no other's ---------------------------------------------------------------------------------


def test_a_full_mailbox_delays_nobody_else_and_repeats_no_letter(catcher: Catcher, post: Post) -> None:
    catcher.answers["full@example.org"] = "452 4.2.2 mailbox full"
    post.hear(moved("accepted", "full@example.org", "grace@example.org"), moved("accepted", "ada@example.org"))
    for _ in range(10):
        post.work()
        post.now += timedelta(hours=1)
    assert catcher.recipients == ["grace@example.org", "ada@example.org"]
    del catcher.answers["full@example.org"]
    post.work()
    assert catcher.recipients == ["grace@example.org", "ada@example.org", "full@example.org"]


def test_a_letter_that_is_put_off_waits_longer_each_time_and_is_given_up_after_three_days(catcher: Catcher, post: Post) -> None:
    catcher.answers["full@example.org"] = "452 4.2.2 mailbox full"
    post.hear(moved("accepted", "full@example.org"))
    for attempts, minutes in ((0, 1), (1, 2), (2, 4), (75, 60)):
        with post.engine.begin() as connection:
            connection.execute(sa.update(model.Row).values(attempts=attempts, due_at=model.naive(post.now)))
        post.work()
        (row,) = post.rows()
        assert (row.state, row.due_at.replace(tzinfo=UTC) - post.now) == ("waiting", timedelta(minutes=minutes))
    post.now += timedelta(hours=1)
    post.work()
    (row,) = post.rows()
    assert (row.state, row.attempts, row.answer) == ("given up", 77, "452 4.2.2 mailbox full")


def test_pauses_grow_to_an_hour_and_are_three_days_in_all() -> None:
    pauses = [pause(n) for n in range(1, 77)]
    assert [each.total_seconds() / 60 for each in pauses[:8]] == [1, 2, 4, 8, 16, 32, 60, 60]
    assert timedelta(days=2.9) < sum(pauses, timedelta()) < timedelta(days=3.1)


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("gone@example.org", "550 gone@example.org: no such user"),
        ("spam@example.org", "554 no such letters here"),
        ("ada@exämple.org", "the address is not ASCII, and the mail server does not offer SMTPUTF8"),
    ],
)
def test_a_letter_that_is_refused_for_good_is_given_up_with_the_servers_words_and_the_others_are_sent(
    catcher: Catcher, post: Post, caplog: pytest.LogCaptureFixture, address: str, said: str
) -> None:
    catcher.answers["gone@example.org"] = "550 gone@example.org: no such user"
    catcher.data = "spam@"
    post.hear(moved("accepted", address, "grace@example.org"))
    post.work()
    post.now += timedelta(days=1)
    post.work()
    assert catcher.recipients == ["grace@example.org"]
    assert [(row.state, row.answer) for row in post.rows()] == [("given up", said), ("sent", None)]
    (told,) = (record.getMessage() for record in caplog.records if record.levelno == logging.WARNING)
    assert "letter 1 is given up: code 55" in told
    assert "@" not in told


def test_letters_to_one_address_arrive_in_the_order_of_what_happened(catcher: Catcher, post: Post) -> None:
    catcher.answers["ada@example.org"] = "451 try later"
    post.hear(moved("accepted", "ada@example.org"))
    post.work()
    del catcher.answers["ada@example.org"]
    post.hear(moved("canceled", "ada@example.org"), moved("accepted", "grace@example.org"))
    post.work()
    assert catcher.recipients == ["grace@example.org"]
    post.now += timedelta(minutes=1)
    post.work()
    assert [letter["Subject"] for letter in catcher.letters[1:]] == ["Accepted: Tables", "Cancelled: Tables"]


# --- the server's trouble is everybody's --------------------------------------------------------------------------------


def test_while_the_server_is_away_all_letters_wait_and_the_log_says_so_once(
    catcher: Catcher, post: Post, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    there = post.environ["NOTIFICATIONS_SMTP_URL"]
    post.environ["NOTIFICATIONS_SMTP_URL"] = f"smtp://127.0.0.1:{free_port()}"
    post.hear(moved("accepted", "ada@example.org", "grace@example.org"))
    for _ in range(5):
        post.work()
        post.now += timedelta(days=2)
    assert [(row.state, row.attempts) for row in post.rows()] == [("waiting", 0), ("waiting", 0)]
    post.environ["NOTIFICATIONS_SMTP_URL"] = there
    post.work()
    assert len(catcher.letters) == 2
    told = [record.getMessage() for record in caplog.records if "notifications" in record.name]
    assert ["refused; 2 letter(s) wait" in told[0], "takes letters again" in told[1], len(told)] == [True, True, 2]


@pytest.mark.parametrize(
    "trouble",
    [
        {"hello": "554 not from there"},
        {"sender": "550 this sender is not ours"},
        {"answers": dict.fromkeys(("ada@example.org", "grace@example.org"), "421 closing")},
        {"answers": dict.fromkeys(("ada@example.org", "grace@example.org"), "530 log in first")},
    ],
    ids=str,
)
def test_an_answer_that_is_about_us_gives_up_no_letter(catcher: Catcher, post: Post, trouble: dict[str, Any]) -> None:
    vars(catcher).update(trouble)
    post.hear(moved("accepted", "ada@example.org", "grace@example.org"))
    for _ in range(3):
        post.work()
        post.now += timedelta(days=2)
    assert [(row.state, row.attempts) for row in post.rows()] == [("waiting", 0), ("waiting", 0)]


def test_a_server_that_is_away_is_not_asked_all_the_time(catcher: Catcher, post: Post) -> None:
    catcher.hello = "421 closing"
    post.hear(moved("accepted", "ada@example.org"))
    for _ in range(30):
        post.work()
        post.now += timedelta(seconds=1)
    assert catcher.connections == 5  # after 0, 1, 3, 7 and 15 seconds


def test_a_letter_that_breaks_the_connection_each_time_stands_alone(catcher: Catcher, post: Post) -> None:
    post.hear(moved("accepted", "drops@example.org", "grace@example.org"))
    for _ in range(3):
        post.work()
        post.now += timedelta(minutes=10)
    assert "grace@example.org" in catcher.recipients
    broken, fine = post.rows()
    assert (broken.state, fine.state) == ("waiting", "sent")
    assert broken.attempts > 1
    assert broken.answer.startswith("the connection was lost")


# --- several processes, and one that ends -------------------------------------------------------------------------------


def test_a_letter_in_hand_is_nobody_elses_until_the_lease_ends(post: Post) -> None:
    post.hear(moved("accepted", "ada@example.org"))
    with post.engine.begin() as connection:
        first = model.claim(connection, post.now)
        assert model.claim(connection, post.now) is None
        successor = model.claim(connection, post.now + model.LEASE)
    assert first is not None
    assert successor is not None
    with post.engine.begin() as connection:  # the first comes back too late to decide
        model.given_up(connection, first, post.now, "x")
    assert post.states() == ["waiting"]
    with post.engine.begin() as connection:
        model.sent(connection, successor, post.now)
    assert post.states() == ["sent"]


def test_several_processes_send_each_letter_once(catcher: Catcher, post: Post) -> None:
    post.hear(*(moved("accepted", *(f"s{n}-{m}@example.org" for m in range(5))) for n in range(8)))
    senders = [Sender(lambda: post.now) for _ in range(3)]
    server = MailServer.of(post.environ)
    threads = [threading.Thread(target=each.work, args=(post.engine, server)) for each in senders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    post.work()
    assert sorted(catcher.recipients) == sorted(f"s{n}-{m}@example.org" for n in range(8) for m in range(5))


def test_settled_letters_are_forgotten_after_a_month_and_those_that_wait_are_not(catcher: Catcher, post: Post) -> None:
    catcher.answers |= {"gone@example.org": "550 no", "full@example.org": "450 later"}
    post.hear(moved("accepted", "ada@example.org", "gone@example.org", "full@example.org"))
    post.work()
    post.now += timedelta(days=29)
    post.work()
    assert post.states() == ["sent", "given up", "waiting"]
    post.now += timedelta(days=2)
    post.work()
    assert post.states() == ["waiting"]


# --- TLS ----------------------------------------------------------------------------------------------------------------


def _login(_server: Any, _session: Any, _envelope: Any, _mechanism: str, data: Any) -> AuthResult:
    return AuthResult(success=data.password == b"secret")


@pytest.fixture(params=["smtp", "smtps"])
def secure(request: pytest.FixtureRequest, catcher: Catcher, engine: Engine, monkeypatch: pytest.MonkeyPatch) -> Iterator[Post]:
    """A mail server with a certificate for broker.test of an authority that nobody knows; by STARTTLS or from the start."""
    look_up = socket.getaddrinfo
    here = {"broker.test": "127.0.0.1", "other.test": "127.0.0.1"}
    monkeypatch.setattr("socket.getaddrinfo", lambda host, *more, **others: look_up(here.get(host, host), *more, **others))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(TLS / "broker.pem")
    port = free_port()
    how: dict[str, Any] = (
        {"tls_context": context, "require_starttls": True}
        if request.param == "smtp"
        else {"ssl_context": context, "auth_require_tls": False}
    )
    controller = Controller(catcher, hostname="127.0.0.1", port=port, authenticator=_login, **how)
    if request.param == "smtps":  # its own attempt to connect would not trust the certificate
        controller.smtpd = SMTP(catcher)
        monkeypatch.setattr(controller, "_trigger_server", controller._factory_invoked.set)
    controller.start()
    yield Post(engine, f"{request.param}://user:secret@broker.test:{port}")
    controller.stop()


def test_user_and_password_go_to_a_server_that_proves_who_it_is(catcher: Catcher, secure: Post) -> None:
    secure.environ["NOTIFICATIONS_SMTP_URL"] += f"?cacertfile={TLS / 'authority.pem'}"
    secure.hear(moved("accepted", "ada@example.org"))
    secure.work()
    assert catcher.recipients == ["ada@example.org"]


def test_user_and_password_go_to_no_server_that_does_not(
    catcher: Catcher, secure: Post, caplog: pytest.LogCaptureFixture
) -> None:
    secure.hear(moved("accepted", "ada@example.org"))
    secure.work()
    other_name = secure.environ["NOTIFICATIONS_SMTP_URL"].replace("broker", "other")
    secure.environ["NOTIFICATIONS_SMTP_URL"] = f"{other_name}?cacertfile={TLS / 'authority.pem'}"
    secure.now += timedelta(hours=1)
    secure.work()
    assert catcher.letters == []
    assert [row.attempts for row in secure.rows()] == [0]
    assert "its certificate is not trusted" in caplog.text
    assert "?cacertfile=" in caplog.text
    assert "secret" not in caplog.text


def test_a_server_without_tls_gets_no_password(catcher: Catcher, post: Post) -> None:
    post.environ["NOTIFICATIONS_SMTP_URL"] = post.environ["NOTIFICATIONS_SMTP_URL"].replace("//", "//user:secret@")
    post.hear(moved("accepted", "ada@example.org"))
    post.work()
    assert catcher.letters == []


# --- settings -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "url",
    [
        "localhost:25",
        "mail.example.org",
        "user:hunter2@mail.example.org:25",
        "http://user:hunter2@mail.example.org",
        "smtp://",
        "smtp://host:port",
        "smtp://user:hunter2",
        "smtps://user:hunt/hunter2@mail.example.org",
        "smtps://user@mail.example.org",
        "smtps://mail.example.org/path",
        "smtps://user:hunter2@mail.example.org?verify=no",
        "smtps://user:hunter2@mail.example.org?cacertfile=/not/there",
    ],
)
def test_a_url_that_names_no_mail_server_ends_the_service_at_its_start(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFICATIONS_SMTP_URL", url)
    with pytest.raises(ConfigurationError, match="NOTIFICATIONS_SMTP_URL=") as refused:
        service.check()
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("sender", ["Open Event", "a@b, c@d", "x\r\nBcc: a@b", "Team <>", "<a@b> <c@d>", "téam@example.org"])
def test_a_sender_that_is_no_address_ends_the_service_at_its_start(sender: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NOTIFICATIONS_FROM", sender)
    with pytest.raises(ConfigurationError, match=r"NOTIFICATIONS_FROM=(?s:.*): it must be an address"):
        service.check()


def test_the_settings_of_nobody_are_right(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NOTIFICATIONS_SMTP_URL", "NOTIFICATIONS_FROM"):
        monkeypatch.setenv(name, "")
    service.check()
    server = MailServer.of({"NOTIFICATIONS_SMTP_URL": "smtps://us%40er:p%2Fw@mail.example.org"})
    assert (server.user, server.password, server.port) == ("us@er", "p/w", 465)
    assert "p/w" not in repr(server)


# --- the command --------------------------------------------------------------------------------------------------------


def test_the_command_lists_what_was_not_sent_and_lets_it_be_tried_again(
    catcher: Catcher, post: Post, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONSUMER_DATABASE_URL", f"sqlite:///{tmp_path}/notifications.db")
    catcher.answers["gone@example.org"] = "550 n\x1b[31mö such user"
    post.hear(moved("accepted", "gone@example.org", "grace@example.org"))
    post.work()
    assert main([]) == 0
    said = capsys.readouterr().out
    assert said.startswith("letter 1  given up  1 attempt(s)  message ")
    assert said.isascii()
    assert "\x1b" not in said
    catcher.answers.clear()
    assert main(["1", "2"]) == 0
    assert capsys.readouterr().out == "1 of 2 wait again; the service hands them in\n"
    post.now += timedelta(days=400)  # the command has a clock of its own
    post.work()
    assert "gone@example.org" in catcher.recipients


def test_the_command_ends_with_a_text_where_there_are_no_tables(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CONSUMER_DATABASE_URL", f"sqlite:///{tmp_path}/nothing.db")
    assert main([]) == 1
    assert "outbox consumer migrate notifications" in capsys.readouterr().err
