"""The broker's file: opened and checked, its tables, and the one way to write to it.

Everything that SQLite raises leaves this module as one of two errors: `BrokerFileError` when waiting would not help, and
`BrokerFileUnavailable` when it may.
"""

from __future__ import annotations

import sqlite3
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from outbox.errors import BrokerError, Unavailable

if TYPE_CHECKING:
    import os
    from collections.abc import Iterator

#: How long a statement waits for another process's transaction. Shorter than `OUTBOX_LEASE`: a relay that waits here
#: renews nothing.
BUSY_SECONDS = 5.0
#: Stands in the file's header (PRAGMA application_id): this is a broker, and no database of something else. "obxB".
APPLICATION_ID = 0x6F627842
SCHEMA_VERSION = 1

_SCHEMA = (
    # `epoch` counts owners, so that one whose queue was taken over can't settle anything. `handed_out` is the highest
    # message the present owner was given: one small row to write for each batch, however large the messages are.
    "CREATE TABLE queue (id INTEGER PRIMARY KEY AUTOINCREMENT, name TEXT NOT NULL UNIQUE, "
    "epoch INTEGER NOT NULL DEFAULT 0, handed_out INTEGER NOT NULL DEFAULT 0)",
    "CREATE TABLE binding (exchange TEXT NOT NULL, pattern TEXT NOT NULL, queue INTEGER NOT NULL, "
    "PRIMARY KEY (exchange, pattern, queue)) WITHOUT ROWID",
    # A row for each queue that gets the message. `id` is the order; AUTOINCREMENT, because a number that was used again
    # would put a new message among those already handed out. `returns` counts the deliveries that came to nothing.
    "CREATE TABLE message (id INTEGER PRIMARY KEY AUTOINCREMENT, queue INTEGER NOT NULL, returns INTEGER NOT NULL DEFAULT 0, "
    "exchange TEXT NOT NULL, topic TEXT NOT NULL, properties TEXT NOT NULL, body BLOB NOT NULL)",
    "CREATE INDEX message_queue ON message (queue, id)",
)

_PERMANENT = frozenset(
    {
        sqlite3.SQLITE_NOTADB,
        sqlite3.SQLITE_CORRUPT,
        sqlite3.SQLITE_CANTOPEN,
        sqlite3.SQLITE_PERM,
        sqlite3.SQLITE_READONLY,
        sqlite3.SQLITE_AUTH,
    }
)


class BrokerFileError(BrokerError):
    """The embedded broker's file can't be used: no SQLite database, another program's, newer than this code, no permission."""


class BrokerFileUnavailable(Unavailable):
    """The embedded broker's file can't be used now: locked for too long, disk full, an I/O error, moved away."""


class BrokerFile:
    """One connection to the broker's file. Used by one thread at a time; never carried over a fork."""

    def __init__(self, path: Path) -> None:
        """Open *path*, creating folder, file and tables where they are missing. Raises the two errors of this module."""
        self.path = path.resolve()  # two spellings of one file must find the same locks, also after a chdir
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise BrokerFileError(f"the folder of the embedded broker {self.path} can't be made: {error.strerror}") from error
        with self._named():
            self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None, check_same_thread=False)
        try:
            with self._named():
                self._prepare()
            self._identity = _identity(self.path.stat())
        except BaseException:
            self._connection.close()
            raise

    def _prepare(self) -> None:
        version = self._version()
        # Rollback journal: before 3.51.3 two processes that checkpoint a WAL at once can lose a commit. TRUNCATE, because
        # DELETE does not sync the folder after it removed the journal: after a power failure the journal may be back and
        # undo a commit that was already reported.
        journal = "WAL" if sqlite3.sqlite_version_info >= (3, 51, 3) else "TRUNCATE"
        self._connection.execute(f"PRAGMA journal_mode={journal}")
        self._connection.execute("PRAGMA synchronous=FULL")
        if version is None:
            self._create()

    def _version(self) -> int | None:
        """Return the version of the tables, None for an empty file; raise BrokerFileError for what we can't read."""
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (version,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application == 0 and version == 0 and tables == 0:
            return None
        if application != APPLICATION_ID:
            raise BrokerFileError(
                f"{self.path} is a database of something else; give the embedded broker a file of its own in BROKER_URL"
            )
        if version > SCHEMA_VERSION:
            raise BrokerFileError(
                f"{self.path} is of version {version}, newer than this code ({SCHEMA_VERSION}); upgrade the package"
            )
        return int(version)

    def _create(self) -> None:
        self._connection.execute("BEGIN IMMEDIATE")
        if self._version() is None:  # another process may have been first
            for statement in _SCHEMA:
                self._connection.execute(statement)
            self._connection.execute(f"PRAGMA application_id={APPLICATION_ID}")
            self._connection.execute(f"PRAGMA user_version={SCHEMA_VERSION}")
        self._connection.execute("COMMIT")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A writing transaction: committed, durable, when the block has ended; rolled back when it raises."""
        self._check_still_there()
        with self._named():
            # A deferred transaction that reads and then writes fails at once, whatever the timeout.
            self._connection.execute("BEGIN IMMEDIATE")
            try:
                yield self._connection
                self._connection.execute("COMMIT")
            except BaseException:
                if self._connection.in_transaction:  # after a full disk SQLite has rolled back by itself
                    self._connection.execute("ROLLBACK")
                raise

    @contextmanager
    def reading(self) -> Iterator[sqlite3.Connection]:
        """Single reading statements."""
        with self._named():
            yield self._connection

    def data_version(self) -> int:
        """Return a number that is another one after any other connection has committed; costs microseconds."""
        self._check_still_there()
        with self._named():
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
        return int(version)

    def close(self) -> None:
        """Close; doing so again changes nothing."""
        self._connection.close()

    def _check_still_there(self) -> None:
        # SQLite goes on writing to a file that was removed, and everything it confirms is gone.
        try:
            present = _identity(self.path.stat()) == self._identity
        except FileNotFoundError:
            present = False
        if not present:
            raise BrokerFileUnavailable(f"{self.path} was removed or replaced while it was open")

    @contextmanager
    def _named(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            # Extended codes carry the plain one in their lowest byte.
            code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR) & 0xFF
            said = f"the embedded broker {self.path}: {error}"
            if code in _PERMANENT:
                raise BrokerFileError(f"{said}; correct BROKER_URL, or what stands there") from error
            raise BrokerFileUnavailable(said) from error


def _identity(status: os.stat_result) -> tuple[int, int]:
    return status.st_dev, status.st_ino
