from __future__ import annotations

import sqlite3
from typing import TYPE_CHECKING

import pytest

from outbox.embedded.file import BrokerFile, BrokerFileError, BrokerFileUnavailable
from outbox.errors import BrokerError, Unavailable

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "broker.db"


def _queue_names(path: Path) -> list[str]:
    file = BrokerFile(path)
    with file.reading() as connection:
        names = [name for (name,) in connection.execute("SELECT name FROM queue ORDER BY id")]
    file.close()
    return names


def test_the_folder_and_the_file_are_created(tmp_path: Path) -> None:
    assert _queue_names(tmp_path / "instance" / "deep" / "broker.db") == []


@pytest.mark.parametrize(("version", "journal"), [((3, 40, 1), "truncate"), ((3, 51, 2), "truncate"), ((3, 51, 3), "wal")])
def test_commits_are_synced_and_no_left_over_journal_can_undo_them(
    path: Path, monkeypatch: pytest.MonkeyPatch, version: tuple[int, int, int], journal: str
) -> None:
    monkeypatch.setattr("sqlite3.sqlite_version_info", version)
    file = BrokerFile(path)
    with file.reading() as connection:
        assert connection.execute("PRAGMA synchronous").fetchone() == (2,)  # FULL
        assert connection.execute("PRAGMA journal_mode").fetchone() == (journal,)


def test_a_transaction_that_raises_leaves_nothing_behind(path: Path) -> None:
    file = BrokerFile(path)

    def fail_half_way() -> None:
        with file.transaction() as connection:
            connection.execute("INSERT INTO queue (name) VALUES ('half')")
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_half_way()
    with file.transaction() as connection:
        connection.execute("INSERT INTO queue (name) VALUES ('whole')")
    assert _queue_names(path) == ["whole"]


def test_a_file_that_is_no_database_is_refused_and_left_alone(path: Path) -> None:
    path.write_bytes(b"a letter to my mother" * 100)
    with pytest.raises(BrokerFileError, match=r"broker\.db: file is not a database"):
        BrokerFile(path)
    assert path.read_bytes() == b"a letter to my mother" * 100


def test_a_database_of_something_else_is_refused_and_left_alone(path: Path) -> None:
    with sqlite3.connect(path) as other:
        other.execute("CREATE TABLE outbox_message (id INTEGER)")
    other.close()
    before = path.read_bytes()
    with pytest.raises(BrokerFileError, match="is a database of something else; give the embedded broker a file of its own"):
        BrokerFile(path)
    assert path.read_bytes() == before


def test_a_newer_version_of_the_tables_is_refused(path: Path) -> None:
    BrokerFile(path).close()
    with sqlite3.connect(path) as newer:
        newer.execute("PRAGMA user_version=99")
    newer.close()
    with pytest.raises(BrokerFileError, match=r"is of version 99, newer than this code \(1\); upgrade the package"):
        BrokerFile(path)


def test_a_folder_in_place_of_the_file_is_refused(path: Path) -> None:
    path.mkdir()
    with pytest.raises(BrokerFileError, match="unable to open database file"):
        BrokerFile(path)


def test_a_folder_that_cannot_be_made_is_refused(path: Path) -> None:
    path.write_text("in the way")
    with pytest.raises(BrokerFileError, match="can't be made"):
        BrokerFile(path / "broker.db")


def test_what_can_not_work_is_a_broker_error_and_what_may_work_later_is_not() -> None:
    assert issubclass(BrokerFileError, BrokerError)
    assert issubclass(BrokerFileUnavailable, Unavailable)
    assert not issubclass(BrokerFileUnavailable, BrokerError)


def test_a_file_that_is_locked_for_too_long_is_unavailable(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.embedded.file.BUSY_SECONDS", 0.05)
    holder, waiter = BrokerFile(path), BrokerFile(path)
    with (
        holder.transaction() as connection,
        pytest.raises(BrokerFileUnavailable, match="database is locked"),
        waiter.transaction(),
    ):
        pytest.fail("two transactions at once")
    with waiter.transaction() as connection:
        connection.execute("INSERT INTO queue (name) VALUES ('afterwards')")
    assert _queue_names(path) == ["afterwards"]


@pytest.mark.parametrize("replaced", [False, True])
def test_a_file_that_was_removed_takes_no_more_commits(path: Path, replaced: bool) -> None:
    file = BrokerFile(path)
    path.rename(path.with_name("moved.db"))
    if replaced:
        BrokerFile(path).close()
    with pytest.raises(BrokerFileUnavailable, match="was removed or replaced"), file.transaction():
        pytest.fail("a transaction on a file that nobody will find")
    with pytest.raises(BrokerFileUnavailable, match="was removed or replaced"):
        file.data_version()


def test_the_data_version_changes_with_every_commit_of_another_connection(path: Path) -> None:
    watcher, writer = BrokerFile(path), BrokerFile(path)
    versions = [watcher.data_version()]
    for number in range(3):
        with writer.transaction() as connection:
            connection.execute("INSERT INTO queue (name) VALUES (?)", (str(number),))
        versions.append(watcher.data_version())
        assert watcher.data_version() == versions[-1]
    assert len(set(versions)) == 4


def test_a_closed_file_is_unavailable(path: Path) -> None:
    file = BrokerFile(path)
    file.close()
    file.close()
    with pytest.raises(BrokerFileUnavailable):
        file.data_version()
