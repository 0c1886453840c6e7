"""A service whose effects are rows: one for each message it applied, with a digest of the data that it was given.

`outbox consumer run tests.kit.recorder:service`. A message of the topic REFUSED is rejected, so it is parked.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox.consumer import Reject, Service
from tests.kit.history import fingerprint

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from outbox.message import Received

DONE, NOTED, REFUSED = "work.done", "work.noted", "work.refused"
NAME = "tests.kit.recorder:service"

metadata = sa.MetaData()
effects = sa.Table(
    "effects",
    metadata,
    sa.Column("id", sa.Integer, primary_key=True),
    sa.Column("message_id", sa.String(64), nullable=False),  # not unique: a second effect must be seen
    sa.Column("key", sa.String(255)),
    sa.Column("sequence", sa.BigInteger),
    sa.Column("digest", sa.String(16), nullable=False),
    sa.Column("late", sa.Boolean, nullable=False),
)

service = Service("recorder", tables=metadata)


@service.on(DONE, NOTED)
def record(message: Received, db_session: Session, /, **extra: Any) -> None:
    """Write down what came."""
    db_session.execute(
        effects.insert().values(
            message_id=message.id,
            key=message.key,
            sequence=message.sequence,
            digest=fingerprint(message.data),
            late=message.late,
        )
    )


@service.on(REFUSED)
def refuse(message: Received, db_session: Session, /, **extra: Any) -> None:
    """Never apply it."""
    raise Reject("the test wants it parked")
