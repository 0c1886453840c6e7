"""What hinders a relay, in its heartbeat."""

from __future__ import annotations

from typing import TYPE_CHECKING

import sqlalchemy as sa

if TYPE_CHECKING:
    from alembic.operations import Operations


def upgrade(op: Operations) -> None:
    """Add the column; a relay that says nothing is not hindered."""
    op.add_column("outbox_relay", sa.Column("trouble", sa.Text))
