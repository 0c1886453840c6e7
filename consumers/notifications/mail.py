"""The mail server: where it is, how it is trusted, and what its answers mean for a letter.

    smtp://host:25                                  a server beside us, or one that takes mail from here
    smtp://user:password@host:587                   STARTTLS, which must be offered
    smtps://user:password@host:465?cacertfile=/etc/ssl/mail-ca.pem

With TLS the certificate and the host name are always verified; `cacertfile` names the authority where it is none of the
system's, and asks for STARTTLS on `smtp://`, too. Special characters in user and password are percent-encoded.
"""

from __future__ import annotations

import smtplib
import ssl
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from consumers.notifications.mime import parse_sender
from outbox.errors import ConfigurationError
from outbox.process import masking

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping
    from urllib.parse import SplitResult

URL = "NOTIFICATIONS_SMTP_URL"
SENDER = "NOTIFICATIONS_FROM"
DEFAULT_URL = "smtp://127.0.0.1:1025"
DEFAULT_SENDER = "Open Event <noreply@openevent.example>"
_CONNECT_SECONDS = 10.0
#: For each answer: servers that look into letters take their time, and a letter given up on too early is handed in twice.
_ANSWER_SECONDS = 60.0
_FORM = "it must be smtp://host:port or smtps://user:password@host:port"
_ENCODE = "percent-encode what is special in user and password: @ as %40, / as %2F, : as %3A, # as %23, ? as %3F"
#: Answers to a recipient or a letter that are about us: going away, and "log in first".
_ABOUT_US = (421, 530)


class Away(Exception):
    """The mail server can't be reached or does not let us in: no letter's fault, all wait."""


class Verdict(Enum):
    """What the mail server's answer means for a letter."""

    TAKEN = "taken"
    LATER = "later"
    NEVER = "never"


@dataclass(frozen=True, slots=True)
class Answer:
    """What became of one letter; *words* are the server's."""

    verdict: Verdict
    words: str = ""
    code: int = 250
    #: The connection is of no more use.
    broken: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class MailServer:
    """Where letters are handed in, and by whom. `repr()` shows no password."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None
    cacertfile: str | None
    #: Name and address.
    sender: tuple[str, str]

    def __repr__(self) -> str:
        return f"<MailServer {self}>"

    def __str__(self) -> str:
        return f"{'smtps' if self.tls else 'smtp'}://{self.host}:{self.port}"

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> MailServer:
        """Return the server and sender that *environ* names. Raises ConfigurationError with every problem in it."""
        problems = []
        sender, url = ("", ""), environ.get(URL) or DEFAULT_URL
        try:
            sender = parse_sender(environ.get(SENDER) or DEFAULT_SENDER)
        except ValueError as error:
            problems.append(f"{SENDER}={environ[SENDER]}: {error}")
        try:
            server = cls._parsed(url, sender)
            server.tls_context()  # reads the file that it names
        except ValueError as error:
            problems.append(f"{URL}={masking.shown(url)}: {error}")
        if problems:
            raise ConfigurationError("\n".join(problems))
        return server

    @classmethod
    def _parsed(cls, url: str, sender: tuple[str, str]) -> MailServer:
        parts = masking.split(url)
        _check(parts)
        query = dict(parse_qsl(parts.query, keep_blank_values=True))
        if query.keys() - {"cacertfile"}:
            raise ValueError("it takes one parameter, cacertfile")
        tls = parts.scheme == "smtps"
        return cls(
            host=str(parts.hostname),
            port=parts.port or (465 if tls else 25),
            tls=tls,
            user=unquote(parts.username) if parts.username else None,
            password=unquote(parts.password) if parts.password else None,
            cacertfile=query.get("cacertfile"),
            sender=sender,
        )

    def tls_context(self) -> ssl.SSLContext:
        """Return a context that verifies certificate and host name. Raises ValueError for a file that can't be read."""
        try:
            return ssl.create_default_context(cafile=self.cacertfile)
        except OSError as error:  # also ssl.SSLError
            raise ValueError(f"can't read the certificates in {self.cacertfile}: {error}") from error

    @contextmanager
    def connected(self) -> Iterator[smtplib.SMTP]:
        """A connection that may hand in letters. Raises Away."""
        try:
            connection = self._connect()
        except (OSError, smtplib.SMTPException) as error:
            raise Away(self._words(error)) from error
        try:
            yield connection
        finally:
            with suppress(OSError, smtplib.SMTPException):  # what was handed in is handed in
                connection.quit()
            connection.close()

    def _connect(self) -> smtplib.SMTP:
        if self.tls:
            connection: smtplib.SMTP = smtplib.SMTP_SSL(
                self.host, self.port, timeout=_CONNECT_SECONDS, context=self.tls_context()
            )
        else:
            connection = smtplib.SMTP(self.host, self.port, timeout=_CONNECT_SECONDS)
        try:
            if not self.tls and (self.user is not None or self.cacertfile is not None):
                connection.starttls(context=self.tls_context())
            if self.user is not None:
                connection.login(self.user, self.password or "")
            connection.ehlo_or_helo_if_needed()
            if connection.sock is not None:
                connection.sock.settimeout(_ANSWER_SECONDS)
        except BaseException:
            connection.close()
            raise
        return connection

    def _words(self, error: Exception) -> str:
        if isinstance(error, ssl.SSLCertVerificationError):
            return f"its certificate is not trusted: {error.verify_message}; name its authority: {URL}={self}?cacertfile=…"
        if isinstance(error, smtplib.SMTPResponseException):
            return f"{error.smtp_code} {_text(error.smtp_error)}"
        return str(error) or type(error).__name__


def _check(parts: SplitResult) -> None:
    """Raise ValueError for what names no mail server, saying how one is named."""
    if parts.scheme not in ("smtp", "smtps") or not parts.hostname or parts.port == 0 or parts.path not in ("", "/"):
        raise ValueError(f"{_FORM}; {_ENCODE}" if "@" in parts.path else _FORM)
    if bool(parts.username) != bool(parts.password):
        raise ValueError("it names a user or a password without the other")


def hand_in(connection: smtplib.SMTP, sender: str, to: str, content: bytes) -> Answer:
    """Hand in one letter for one address. Raises Away for an answer that is about us, not about the letter."""
    options = () if to.isascii() else ("SMTPUTF8", "BODY=8BITMIME")
    try:
        connection.sendmail(sender, [to], content, options)
    except smtplib.SMTPNotSupportedError:
        return Answer(Verdict.NEVER, "the address is not ASCII, and the mail server does not offer SMTPUTF8", 553)
    except smtplib.SMTPRecipientsRefused as error:
        return _answer(*error.recipients[to])
    except smtplib.SMTPDataError as error:
        return _answer(error.smtp_code, error.smtp_error)
    except (smtplib.SMTPSenderRefused, smtplib.SMTPHeloError) as error:
        raise Away(f"{error.smtp_code} {_text(error.smtp_error)}") from error
    except (OSError, smtplib.SMTPException) as error:  # nobody knows whether it was taken
        return Answer(Verdict.LATER, f"the connection was lost: {error}", 0, broken=True)
    return Answer(Verdict.TAKEN)


def _answer(code: int, words: bytes | str) -> Answer:
    if code in _ABOUT_US:
        raise Away(f"{code} {_text(words)}")
    return Answer(Verdict.NEVER if 500 <= code < 600 else Verdict.LATER, f"{code} {_text(words)}", code)


def _text(words: bytes | str) -> str:
    text = words.decode(errors="replace") if isinstance(words, bytes) else words
    return " ".join(text.split())
