"""The versions of the publisher's tables, and of the outbox's beside them: one command makes both.

Written out, not taken from `publisher.conference.models`: what was released never changes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import sqlalchemy as sa

from outbox import migrations
from publisher.conference.columns import Moment, Number

if TYPE_CHECKING:
    from alembic.operations import Operations
    from sqlalchemy.engine import Engine


def upgrade(bind: Engine) -> int:
    """Bring all tables to this code's version, in one transaction; return how many steps were needed."""
    with bind.begin() as connection:
        return migrations.upgrade(connection) + migrations.upgrade(connection, PUBLISHER)


def check(engine: Engine) -> None:
    """Raise SchemaError, saying what to do, unless all tables are of this code's version. Waits for no writer."""
    with engine.connect().execution_options(outbox_read_only=True) as connection:
        migrations.check(connection, PUBLISHER)
        migrations.check(connection)


def _m0001_initial(op: Operations) -> None:
    op.create_table(
        "events",
        sa.Column("id", Number, primary_key=True),
        sa.Column("external_id", sa.String(255), unique=True),
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text),
        sa.Column("starts_at", Moment, nullable=False),
        sa.Column("ends_at", Moment, nullable=False),
        sa.Column("timezone", sa.Text, nullable=False),
        sa.Column("location_name", sa.Text),
        sa.Column("latitude", sa.Double),
        sa.Column("longitude", sa.Double),
        sa.Column("url", sa.Text),
        sa.Column("ticket_url", sa.Text),
        sa.Column("logo_url", sa.Text),
        sa.Column("image_url", sa.Text),
        sa.Column("organizer_name", sa.Text),
        sa.Column("organizer_description", sa.Text),
        sa.Column("email", sa.Text),
        sa.Column("type", sa.Text),
        sa.Column("topic", sa.Text),
        sa.Column("sub_topic", sa.Text),
        sa.Column("code_of_conduct", sa.Text),
        sa.Column("state", sa.String(20), nullable=False),
        sqlite_autoincrement=True,
    )
    _part(
        op,
        "tracks",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("description", sa.Text),
        sa.Column("color", sa.Text, nullable=False),
        sa.Column("font_color", sa.Text),
    )
    _part(
        op,
        "microlocations",
        sa.Column("name", sa.Text, nullable=False),
        sa.Column("floor", sa.Integer),
        sa.Column("room", sa.Text),
        sa.Column("latitude", sa.Double),
        sa.Column("longitude", sa.Double),
    )
    biography = ("short_biography", "long_biography", "speaking_experience", "organisation", "position", "city", "country")
    links = ("website", "twitter", "facebook", "github", "linkedin", "photo_url")
    _part(
        op,
        "speakers",
        sa.Column("name", sa.Text, nullable=False),
        *(sa.Column(name, sa.Text) for name in ("email", *biography, "gender", *links)),
        sa.Column("is_featured", sa.Boolean, nullable=False),
    )
    _sessions(op)


def _sessions(op: Operations) -> None:
    _part(
        op,
        "sessions",
        sa.Column("title", sa.Text, nullable=False),
        *(
            sa.Column(name, sa.Text)
            for name in ("subtitle", "short_abstract", "long_abstract", "comments", "language", "level")
        ),
        sa.Column("session_type", sa.Text),
        sa.Column("track_id", Number, sa.ForeignKey("tracks.id")),
        sa.Column("microlocation_id", Number, sa.ForeignKey("microlocations.id")),
        sa.Column("starts_at", Moment),
        sa.Column("ends_at", Moment),
        sa.Column("state", sa.String(20), nullable=False),
        *(sa.Column(name, sa.Text) for name in ("slides_url", "video_url", "audio_url", "signup_url")),
        sa.CheckConstraint("(starts_at IS NULL) = (ends_at IS NULL)", name="sessions_times"),
    )
    op.create_index("ix_sessions_track_id", "sessions", ["track_id"])
    op.create_index("ix_sessions_microlocation_id", "sessions", ["microlocation_id"])
    op.create_table(
        "session_speakers",
        sa.Column("session_id", Number, sa.ForeignKey("sessions.id"), primary_key=True),
        sa.Column("speaker_id", Number, sa.ForeignKey("speakers.id"), primary_key=True),
        sa.Column("place", sa.Integer, nullable=False),
    )
    op.create_index("ix_session_speakers_speaker_id", "session_speakers", ["speaker_id"])


def _part(op: Operations, name: str, *columns: sa.Column[Any] | sa.CheckConstraint) -> None:
    op.create_table(
        name,
        sa.Column("id", Number, primary_key=True),
        sa.Column("event_id", Number, sa.ForeignKey("events.id"), nullable=False),
        sa.Column("external_id", sa.String(255)),
        *columns,
        sa.UniqueConstraint("event_id", "external_id", name=f"{name}_external_id"),
        sqlite_autoincrement=True,
    )
    op.create_index(f"{name}_event", name, ["event_id", "id"])


def _m0002_deleted_imports(op: Operations) -> None:
    op.create_table(
        "deleted_imports",
        sa.Column("kind", sa.String(20), primary_key=True),
        sa.Column("event_id", Number, primary_key=True, autoincrement=False),
        sa.Column("external_id", sa.String(255), primary_key=True),
    )


PUBLISHER = migrations.History(
    name="publisher", steps=(_m0001_initial, _m0002_deleted_imports), command="flask --app publisher migrate"
)
