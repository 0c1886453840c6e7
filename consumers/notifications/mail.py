"""Handing letters to a mail server. What it answers decides what becomes of the message."""

from __future__ import annotations

import smtplib
from contextlib import closing, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from outbox.consumer import Reject, Retry
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping
    from email.message import EmailMessage

URL = "NOTIFICATIONS_SMTP_URL"
SENDER = "NOTIFICATIONS_FROM"
DEFAULT_URL = "smtp://127.0.0.1:1025"
DEFAULT_SENDER = "Open Event <noreply@openevent.example>"
TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class MailServer:
    """Where to hand in: `smtp://` (STARTTLS where a user is given) or `smtps://`."""

    host: str
    port: int
    tls: bool
    user: str | None
    password: str | None

    @classmethod
    def of(cls, environ: Mapping[str, str]) -> MailServer:
        """Return the server that *environ* names; raise ConfigurationError for a URL that names none."""
        url = environ.get(URL, DEFAULT_URL)
        parts = urlsplit(url)
        try:
            port = parts.port
        except ValueError:
            port = -1
        if parts.scheme not in ("smtp", "smtps") or not parts.hostname or port == -1:
            raise ConfigurationError(
                f"{URL}={parts.scheme}://…: it must be smtp://host:port or smtps://user:password@host:port"
            )
        tls = parts.scheme == "smtps"
        user = unquote(parts.username) if parts.username else None
        password = unquote(parts.password) if parts.password else None
        return cls(parts.hostname, port or (465 if tls else 25), tls, user, password)

    def send(self, letters: Iterable[EmailMessage]) -> int:
        """Hand in *letters* over one connection and return how many; none: no connection.

        Raises Retry when the server can't be reached, does not let us in or says "later" (4xx): not the message's fault.
        Raises Reject when it refuses a letter for good (5xx).
        """
        waiting = list(letters)
        if not waiting:
            return 0
        refusals: list[tuple[int, bytes]] = []
        try:
            with closing(self._connect()) as connection:
                for letter in waiting:
                    try:  # the others must not miss their letter for this one
                        connection.send_message(letter)
                    except smtplib.SMTPRecipientsRefused as error:
                        refusals += error.recipients.values()
                    except smtplib.SMTPResponseException as error:
                        refusals.append((error.smtp_code, _bytes(error.smtp_error)))
                    except smtplib.SMTPNotSupportedError as error:  # an address that needs SMTPUTF8; 553 as in RFC 6531
                        refusals.append((553, _bytes(str(error))))
                with suppress(OSError, smtplib.SMTPException):  # what was handed in is handed in
                    connection.quit()
        except (OSError, smtplib.SMTPException) as error:
            raise Retry(reason=f"mail server {self.host}:{self.port}: {error}") from error
        if refusals:
            raise _refused(*min(refusals))  # "later" (4xx) before "never" (5xx): a retry may still reach somebody
        return len(waiting)

    def _connect(self) -> smtplib.SMTP:
        kind = smtplib.SMTP_SSL if self.tls else smtplib.SMTP
        connection = kind(self.host, self.port, timeout=TIMEOUT_SECONDS)
        try:
            if self.user is not None:
                if not self.tls:
                    connection.starttls()
                connection.login(self.user, self.password or "")
            connection.ehlo_or_helo_if_needed()
        except BaseException:
            connection.close()
            raise
        return connection


def _bytes(text: bytes | str) -> bytes:
    return text.encode() if isinstance(text, str) else text


def _refused(code: int, text: bytes) -> Exception:
    words = f"the mail server answered {code} {text.decode(errors='replace')}"
    return Reject(words) if 500 <= code < 600 else Retry(reason=words)
