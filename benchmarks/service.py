"""The service that is measured: it notes when each message reached its handler."""

from __future__ import annotations

import time
from typing import Any

import sqlalchemy as sa
from sqlalchemy.orm import Session

from outbox.consumer import Service
from outbox.message import Received

metadata = sa.MetaData()
arrival = sa.Table(
    "bench_arrival",
    metadata,
    sa.Column("message_id", sa.Text, primary_key=True),
    sa.Column("at", sa.Float, nullable=False),  # time.time() in the handler
)
service = Service("bench", tables=metadata)


@service.on("bench.said")
def note(message: Received, db_session: Session, /, **extra: Any) -> None:  # noqa: ARG001
    """Write one row: the least an effect can be."""
    db_session.execute(sa.insert(arrival).values(message_id=message.id, at=time.time()))
