"""Which statements end a transaction, and which plainly write nothing."""

from __future__ import annotations

import pytest

from outbox.capture.beneath import ends, only_reads


@pytest.mark.parametrize(
    ("statement", "command"),
    [
        ("COMMIT", "COMMIT"),
        ("\n commit and chain", "COMMIT"),
        ("END", "END"),
        ("abort", "ABORT"),
        ("Rollback", "ROLLBACK"),
        ("ROLLBACK TO own", "ROLLBACK"),
        ("prepare\n transaction 'x'", "PREPARE TRANSACTION"),
        ("/* ; */ -- ;\nCOMMIT", "COMMIT"),
        ("SELECT ';'; SELECT $a$ ; $a$;COMMIT", "COMMIT"),
    ],
)
def test_a_statement_that_ends_a_transaction_is_known(statement: str, command: str) -> None:
    assert ends(statement) == command


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT CASE WHEN true THEN 1 END",
        "SELECT 'x; COMMIT'",
        r"SELECT E'it\'s; COMMIT; '",
        'SELECT "a;COMMIT" FROM t',
        "SELECT 1 -- ; COMMIT",
        "SELECT $body$ ; ROLLBACK $body$",
        "UPDATE commits SET commit = 1",
        "CREATE TRIGGER t AFTER INSERT ON a BEGIN DELETE FROM b; END",
        "ROLLBACK TO SAVEPOINT sa_savepoint_1",
        "ROLLBACK TRANSACTION TO sa_savepoint_12",
        "SAVEPOINT own",
        "PREPARE plan AS SELECT 1",
    ],
)
def test_any_other_statement_may_say_so_somewhere(statement: str) -> None:
    assert ends(statement) is None


@pytest.mark.parametrize(
    "statement",
    ["SELECT 1", "(select 1)", " /* hint */ -- more\n SELECT 1", "WITH a AS (SELECT 1) SELECT * FROM a", "SET x = 1"],
)
def test_a_statement_that_only_reads_is_known(statement: str) -> None:
    assert only_reads(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "INSERT INTO t VALUES (1)",
        "update t set a = 1",
        "WITH a AS (DELETE FROM t RETURNING 1) SELECT * FROM a",
        "CALL p()",
        "selection",
    ],
)
def test_what_may_write_is_taken_for_a_write(statement: str) -> None:
    assert not only_reads(statement)
