"""Handing in the letters that wait: each on its own, in a background worker of the service."""

from __future__ import annotations

import logging
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING

from consumers.notifications import model
from consumers.notifications.mail import Away, Verdict, hand_in
from consumers.notifications.mime import encoded, message_id
from outbox.database import reading
from outbox.process.logs import say

if TYPE_CHECKING:
    import smtplib
    from collections.abc import Callable

    from sqlalchemy.engine import Engine

    from consumers.notifications.mail import Answer, MailServer
    from consumers.notifications.model import Claim

log = logging.getLogger(__name__)

#: Letters in one connection: a stop need not wait for all that are there.
_AT_ONCE = 50
#: Pauses of a minute, two, four … an hour: three days in all.
_ATTEMPTS = 77
_FIRST_PAUSE, _LONGEST_PAUSE = timedelta(minutes=1), timedelta(hours=1)
#: How soon a mail server that is away is tried again, at the beginning and in the end.
_FIRST_WAIT, _LONGEST_WAIT = timedelta(seconds=1), timedelta(minutes=1)
_FORGET_EVERY = timedelta(hours=1)


def now_utc() -> datetime:
    """Return the present time."""
    return datetime.now(UTC)


class Sender:
    """Hands in what is due. While the mail server is away all letters wait, and the log says so once."""

    def __init__(self, clock: Callable[[], datetime] = now_utc) -> None:
        self._clock = clock
        self._failures = 0
        self._again_at = self._forgot_at = datetime.min.replace(tzinfo=UTC)

    def work(self, engine: Engine, server: MailServer) -> bool:
        """Hand in letters over one connection; return whether there may be more that are due."""
        now = self._clock()
        if now - self._forgot_at > _FORGET_EVERY:
            with engine.begin() as db:
                model.forget(db, now)
            self._forgot_at = now
        if now < self._again_at or not self._is_due(engine, now):
            return False
        try:
            with server.connected() as connection:
                return self._hand_in_some(engine, server, connection)
        except Away as error:
            self._server_is_away(engine, server, str(error))
            return False

    def _is_due(self, engine: Engine, now: datetime) -> bool:
        with reading(engine).connect() as db:
            return model.is_due(db, now)

    def _hand_in_some(self, engine: Engine, server: MailServer, connection: smtplib.SMTP) -> bool:
        for _ in range(_AT_ONCE):
            # A transaction before and one after: none is open while the mail server works.
            with engine.begin() as db:
                claim = model.claim(db, self._clock())
            if claim is None:
                return False
            try:
                answer = hand_in(connection, server.sender[1], claim.address, _content(server, claim))
            except Away:
                with engine.begin() as db:
                    model.release(db, claim, self._clock())
                raise
            self._settle(engine, claim, answer)
            if answer.broken:
                raise Away(answer.words)
            self._server_is_back(server)
        return True

    def _settle(self, engine: Engine, claim: Claim, answer: Answer) -> None:
        now, never = self._clock(), answer.verdict is Verdict.NEVER or claim.attempts >= _ATTEMPTS
        with engine.begin() as db:
            if answer.verdict is Verdict.TAKEN:
                model.sent(db, claim, now)
            elif never:
                model.given_up(db, claim, now, answer.words)
            else:
                model.later(db, claim, now + pause(claim.attempts), answer.words)
        if answer.verdict is not Verdict.TAKEN and never:
            # Neither the address nor the server's words, which may quote it: logs are kept elsewhere, by others.
            sentence = f"letter {claim.id} is given up: code {answer.code}; what was said: python -m consumers.notifications"
            fields = {"letter": claim.id, "message": claim.message_id, "code": answer.code, "attempts": claim.attempts}
            say(log, logging.WARNING, "notifications.given_up", sentence, **fields)

    # --- the server ---------------------------------------------------------------------------------------------------

    def _server_is_away(self, engine: Engine, server: MailServer, words: str) -> None:
        if not self._failures:
            with reading(engine).connect() as db:
                count = model.waiting(db)
            sentence = f"the mail server {server} can't be used: {words}; {count} letter(s) wait, tried again by itself"
            say(log, logging.WARNING, "notifications.server_away", sentence)
        self._again_at = self._clock() + min(_FIRST_WAIT * (1 << min(self._failures, 10)), _LONGEST_WAIT)
        self._failures += 1

    def _server_is_back(self, server: MailServer) -> None:
        if self._failures:
            say(log, logging.INFO, "notifications.server_back", f"the mail server {server} takes letters again")
        self._failures = 0


def pause(attempts: int) -> timedelta:
    """Return how long a letter waits that was put off for the *attempts*th time."""
    return min(_FIRST_PAUSE * (1 << min(attempts - 1, 10)), _LONGEST_PAUSE)


def _content(server: MailServer, claim: Claim) -> bytes:
    return encoded(
        sender=server.sender,
        to=(claim.name, claim.address),
        subject=claim.subject,
        text=claim.text,
        id=message_id(claim.message_id, claim.speaker_id, server.sender[1]),
        said_at=claim.said_at.replace(tzinfo=UTC) if claim.said_at else None,
    )
