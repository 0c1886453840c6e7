"""Databases: engines as this project needs them (`engines`, `dialects`), and what an error of one means (`errors`)."""

from outbox.database.engines import (
    Role,
    autocommits,
    autocommitting,
    begin_now,
    begins_early,
    create_engine,
    in_transaction,
    is_prepared,
    prepare,
    reading,
    synchronous,
)
from outbox.database.errors import Meaning, first_line, meaning
from outbox.database.forks import is_foreign

__all__ = [
    "Meaning",
    "Role",
    "autocommits",
    "autocommitting",
    "begin_now",
    "begins_early",
    "create_engine",
    "first_line",
    "in_transaction",
    "is_foreign",
    "is_prepared",
    "meaning",
    "prepare",
    "reading",
    "synchronous",
]
