"""Indexes by which a read, and a look for earlier messages of a key, cost what may go and not what waits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Order the messages of a key by topic, without those that were discarded; give holds an index of their own."""
    op.drop_index("outbox_pending_key", "outbox_pending")
    _partial(op, "outbox_pending_key", ["key", "topic", "sequence"], "key IS NOT NULL AND state <> 'discarded'")
    _partial(op, "outbox_pending_holds", ["key", "sequence"], "state IN ('retrying', 'unroutable', 'dead')")


def _partial(op: Operations, name: str, columns: list[str], where: str) -> None:
    op.create_index(name, "outbox_pending", columns, postgresql_where=sa.text(where), sqlite_where=sa.text(where))
