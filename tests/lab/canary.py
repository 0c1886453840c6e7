"""The canary: messages of a topic and keys of their own, whose time from commit to arrival says who is disturbed by a fault.

Beside them the messages for the queues in trouble are written, on keys that nobody else has.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import count

from sqlalchemy.exc import DBAPIError
from sqlalchemy.orm import Session

from outbox import Outbox
from outbox.database import create_engine
from tests.kit.history import fingerprint
from tests.kit.writers import ledger
from tests.lab.background import Background
from tests.lab.topics import CANARY

_PACE_SECONDS = 0.1
_KEYS = 10
#: 100 a second: enough to fill a window within the time that a fault is held.
_TROUBLE_PER_ROUND = 10


@dataclass(frozen=True, slots=True)
class Sent:
    """A committed canary."""

    id: str
    #: time.monotonic() when its commit returned.
    at: float


class Canary(Background):
    """A thread that commits a few small messages ten times a second."""

    def __init__(self, url: str) -> None:
        super().__init__()
        self._url = url
        self.sent: list[Sent] = []
        #: Topics to write for as well, some messages each a round, while a fault needs them.
        self.trouble: set[str] = set()

    def work(self) -> None:
        engine = create_engine(self._url)
        outbox = Outbox(engine=engine, source="/tests")
        for number in count():
            if self.stopping.wait(_PACE_SECONDS):
                break
            try:
                with Session(engine) as session:
                    id_ = self._send(outbox, session, CANARY, f"canary:{number % _KEYS}", number)
                    session.commit()
                    self.sent.append(Sent(id_, time.monotonic()))
                for topic in sorted(self.trouble):
                    with Session(engine) as session:
                        for each in range(_TROUBLE_PER_ROUND):
                            # Half of them without a key: only those fill a window when none of them is answered.
                            key = f"{topic}:{(number + each) % 50}" if each % 2 else None
                            self._send(outbox, session, topic, key, number)
                        session.commit()
            except DBAPIError:
                continue
        engine.dispose()

    @staticmethod
    def _send(outbox: Outbox, session: Session, topic: str, key: str | None, number: int) -> str:
        data = {"number": number}
        session.connection()
        id_ = str(outbox.send(topic, data, key=key, session=session))
        session.execute(ledger.insert().values(message_id=id_, topic=topic, key=key, digest=fingerprint(data)))
        return id_
