"""Settings: where they come from, what is refused, and that no secret is shown."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import pytest

from outbox import settings
from outbox.errors import ConfigurationError
from outbox.process.masking import mask
from outbox.settings import Settings, load, override

if TYPE_CHECKING:
    from pathlib import Path


def _refusal(**environ: str) -> str:
    with pytest.raises(ConfigurationError) as refused:
        load(environ=environ)
    return str(refused.value)


# --- where a value comes from -------------------------------------------------------------------------------------------


def test_without_anything_the_documented_defaults_hold() -> None:
    found = load()
    assert found == Settings()
    assert (found.batch_size, found.window, found.key_window) == (500, 2000, 1)
    assert (found.poll_seconds, found.lease_seconds, found.confirm_timeout_seconds) == (0.5, 15.0, 10.0)
    assert (found.max_attempts, found.backoff_base_seconds, found.backoff_max_seconds) == (10, 1.0, 300.0)
    assert (found.max_body_bytes, found.retention_seconds, found.inbox_retention_seconds) == (262144, 604800.0, 1209600.0)
    assert (found.consumer_prefetch, found.consumer_workers, found.consumer_batch) == (200, 4, 50)
    assert (found.http_address, found.shutdown_timeout_seconds, found.log_format) == (None, 25.0, "console")
    assert (found.database_url, found.broker_url, found.consumer_database_url, found.source) == (None, None, None, None)


def test_an_argument_wins_over_the_app_the_environment_the_project_and_the_default(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text('[tool.outbox]\noutbox_exchange = "project"\n')
    sources: dict[str, Any] = {
        "arguments": {"OUTBOX_EXCHANGE": "argument"},
        "config": {"OUTBOX_EXCHANGE": "app"},
        "environ": {"OUTBOX_EXCHANGE": "environment"},
    }
    origins = []
    while True:
        found = load(**sources, folder=tmp_path)
        origins.append((found.exchange, found.origins["OUTBOX_EXCHANGE"]))
        if not sources:
            break
        del sources[next(iter(sources))]
    assert origins == [
        ("argument", "argument"),
        ("app", "app.config"),
        ("environment", "environment"),
        ("project", "pyproject.toml"),
    ]
    assert load().exchange == "outbox"


def test_none_and_an_empty_variable_mean_not_set() -> None:
    found = load({"OUTBOX_WINDOW": None}, {"OUTBOX_WINDOW": None}, {"OUTBOX_WINDOW": "", "DATABASE_URL": " "})
    assert (found.window, found.database_url) == (2000, None)


def test_app_config_may_hold_numbers_and_timedeltas() -> None:
    found = load(config={"OUTBOX_WINDOW": 10, "OUTBOX_LEASE": timedelta(minutes=1), "SECRET_KEY": "not ours"})
    assert (found.window, found.lease_seconds) == (10, 60.0)


def test_a_project_file_that_is_broken_is_named(tmp_path: Path) -> None:
    path = tmp_path / "pyproject.toml"
    for text in ("[tool.outbox\n", "[tool]\noutbox = 3\n"):
        path.write_text(text)
        with pytest.raises(ConfigurationError, match=str(path)):
            load(folder=tmp_path)


def test_a_folder_without_a_project_file_changes_nothing(tmp_path: Path) -> None:
    assert load(folder=tmp_path) == load()


def test_overriding_replaces_named_settings_and_keeps_the_rest() -> None:
    before = load(environ={"OUTBOX_WINDOW": "10", "OUTBOX_HTTP_PORT": "9000"})
    after = override(before, {"OUTBOX_HTTP_PORT": "9101"})
    assert (after.window, after.http_address) == (10, "127.0.0.1:9101")
    assert (after.origins["OUTBOX_WINDOW"], after.origins["OUTBOX_HTTP_PORT"]) == ("environment", "argument")
    assert before.http_address == "127.0.0.1:9000"


def test_overriding_reports_all_problems_together() -> None:
    with pytest.raises(ConfigurationError) as refused:
        override(load(), {"OUTBOX_HTTP_PORT": "x", "OUTBOX_WINDOW": "0", "OUTBOX_WINDO": "1"})
    assert len(str(refused.value).splitlines()) == 3
    with pytest.raises(ConfigurationError, match="ends before OUTBOX_CONFIRM_TIMEOUT"):
        override(load(), {"OUTBOX_LEASE": "5s"})


# --- what a value may be ------------------------------------------------------------------------------------------------


def test_all_problems_are_reported_together_a_line_each() -> None:
    text = _refusal(OUTBOX_WINDOW="0", OUTBOX_LEASE="15", DATABASE_URL="postgres://host/db", OUTBOX_LOG_FORMAT="xml")
    assert text.splitlines() == [
        "DATABASE_URL=postgres://host/db (environment): the scheme is postgresql+psycopg://, not postgres://",
        "OUTBOX_WINDOW=0 (environment): it must be a whole number from 1 to 100000",
        "OUTBOX_LEASE=15 (environment): a duration is a number and a unit: 500ms, 30s, 5m, 2h or 7d",
        "OUTBOX_LOG_FORMAT=xml (environment): it must be one of console, json",
    ]


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("DATABASE_URL", "nonsense", "must be a URL such as postgresql"),
        ("DATABASE_URL", "postgresql+psycopg://host:port/db", "must be a URL such as postgresql"),
        ("DATABASE_URL", "oracle://host/db", "oracle is not supported"),
        ("DATABASE_URL", "sqlite://", "a database in memory is seen by one process only"),
        ("DATABASE_URL", "sqlite:///:memory:", "a database in memory is seen by one process only"),
        ("DATABASE_URL", "postgresql+psycopg://u:p@ss@host/db", "percent-encode what is special"),
        ("BROKER_URL", "amqp://u:p/ss@host/vhost", "percent-encode what is special"),
        ("BROKER_URL", "amqp://u:p#ss@host/vhost", "percent-encode what is special"),
        ("BROKER_URL", "redis://host", "must be amqp://"),
        ("BROKER_URL", "amqp:///vhost", "names no host"),
        ("BROKER_URL", "amqp://host/vhost", "names no user and password"),
        ("BROKER_URL", "embedded://broker.db", "the embedded broker is a file"),
        ("BROKER_MANAGEMENT_URL", "host:15672", "must be http://"),
        ("BROKER_MANAGEMENT_URL", "http://u:p@host:port", "must be http://"),
        ("BROKER_MANAGEMENT_URL", "http://u:p/ss@host:15672", "percent-encode what is special"),
        ("OUTBOX_EXCHANGE", "a b", "exchange 'a b' holds ' '"),
        ("OUTBOX_SOURCE", "x" * 256, "has 256 bytes"),
        ("OUTBOX_BATCH_SIZE", "1e3", "whole number from 1 to 10000"),
        ("OUTBOX_BATCH_SIZE", "-1", "whole number from 1 to 10000"),
        ("OUTBOX_KEY_WINDOW", "2", "whole number from 1 to 1"),
        ("OUTBOX_POLL_INTERVAL", "1ms", "at least 10ms"),
        ("OUTBOX_RETENTION", "30m", "at least 1h"),
        ("OUTBOX_LEASE", "99999999999999d", "at most 3650d"),
        ("OUTBOX_MAX_BODY", "1GiB", "a size from 1B to 15MiB"),
        ("OUTBOX_MAX_BODY", "16MiB", "a size from 1B to 15MiB"),
        ("OUTBOX_HTTP_PORT", "99999", "must be off, a port"),
        ("OUTBOX_HTTP_PORT", "²", "must be off, a port"),
        ("OUTBOX_HTTP_PORT", "localhost", "must be off, a port"),
    ],
)
def test_a_value_that_can_not_be_used_is_refused_with_what_can(name: str, value: str, said: str) -> None:
    text = _refusal(**{name: value})
    assert text.startswith(f"{name}=")
    assert said in text


@pytest.mark.parametrize(
    ("value", "address"), [("off", None), ("9101", "127.0.0.1:9101"), ("0.0.0.0:9101", "0.0.0.0:9101"), ("0", "127.0.0.1:0")]
)
def test_a_port_alone_listens_on_the_loopback_address(value: str, address: str | None) -> None:
    assert load(environ={"OUTBOX_HTTP_PORT": value}).http_address == address


@pytest.mark.parametrize(("value", "size"), [("1", 1), ("256KiB", 262144), ("2 MiB", 2097152), ("10B", 10)])
def test_sizes_are_in_bytes(value: str, size: int) -> None:
    assert load(environ={"OUTBOX_MAX_BODY": value}).max_body_bytes == size


def test_settings_that_contradict_each_other_are_refused_with_the_reason() -> None:
    assert (
        "OUTBOX_LEASE=5s ends before OUTBOX_CONFIRM_TIMEOUT=10s: slow confirms would be sent twice; set it above 10s"
        in _refusal(OUTBOX_LEASE="5s")
    )
    assert "OUTBOX_BACKOFF_BASE is longer" in _refusal(OUTBOX_BACKOFF_BASE="10m")
    assert "forgets ids that the outbox" in _refusal(CONSUMER_INBOX_RETENTION="7d")


# --- names that are none ------------------------------------------------------------------------------------------------


def test_a_near_miss_is_refused_with_the_right_name() -> None:
    assert _refusal(OUTBOX_LAESE="15s") == "OUTBOX_LAESE (environment) is no setting; did you mean OUTBOX_LEASE?"


def test_other_unknown_names_of_the_environment_are_one_warning(caplog: pytest.LogCaptureFixture) -> None:
    injected = {"OUTBOX_SERVICE_HOST": "10.0.0.1", "OUTBOX_PORT": "tcp://10.0.0.1:80", "OUTBOX_PORT_80_TCP_PROTO": "tcp"}
    with caplog.at_level(logging.WARNING, "outbox.settings"):
        load(environ={**injected, "OUTBOX_FAILPOINTS": "", "PATH": "/bin"})
    (record,) = caplog.records
    assert record.getMessage().startswith(f"no settings of this program: {', '.join(sorted(injected))}")


def test_unknown_arguments_app_config_and_project_keys_are_refused(tmp_path: Path) -> None:
    (tmp_path / "pyproject.toml").write_text("[tool.outbox]\nretries = 3\n")
    with pytest.raises(ConfigurationError) as refused:
        load({"OUTBOX_COLOUR": "red"}, {"OUTBOX_TASTE": "sweet", "DEBUG": True}, {}, tmp_path)
    assert str(refused.value).splitlines() == [
        "OUTBOX_COLOUR (argument) is no setting",
        "OUTBOX_TASTE (app.config) is no setting",
        "RETRIES (pyproject.toml) is no setting",
    ]


def test_a_command_refuses_a_misspelled_database_when_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigurationError, match=r"DATABSE_URL .* did you mean DATABASE_URL"):
        load(environ={"DATABSE_URL": "sqlite:///x.db"}, folder=tmp_path)
    assert (
        load(environ={"DATABASE_URLS": "x", "DATABASE_URL": "sqlite:///x.db"}, folder=tmp_path).database_url == "sqlite:///x.db"
    )
    load(environ={"TEST_DATABASE_URL": "x", "CELERY_BROKER_URL": "y", "DATABASE": "z"}, folder=tmp_path)


def test_an_app_may_have_names_of_its_own_for_its_database() -> None:
    assert load(environ={"DATABASE_URI": "sqlite:///x.db"}).database_url is None


def test_an_app_may_use_our_names_for_something_else_until_somebody_requires_them() -> None:
    environ = {"DATABASE_URL": "postgres://ada:secret@host/app", "BROKER_URL": "redis://host", "OUTBOX_LEASE": "15s"}
    settings = load(environ=environ, for_app=True)
    assert (settings.database_url, settings.broker_url) == (None, None)
    with pytest.raises(ConfigurationError) as refusal:
        settings.require("DATABASE_URL", "BROKER_URL")
    first, second = str(refusal.value).splitlines()
    assert first.startswith("DATABASE_URL=postgres://ada:***@host/app (environment): ")
    assert second.startswith("BROKER_URL=redis://host (environment): it must be amqp://")
    with pytest.raises(ConfigurationError, match=r"app\.config"):
        load(config={"DATABASE_URL": "postgres://host/app"}, for_app=True)


def test_what_is_required_and_missing_is_named_with_its_meaning() -> None:
    with pytest.raises(ConfigurationError) as refused:
        load(environ={"DATABASE_URL": "sqlite:///x.db"}).require("DATABASE_URL", "BROKER_URL", "CONSUMER_DATABASE_URL")
    first, second = str(refused.value).splitlines()
    assert first == "BROKER_URL is not set (RabbitMQ, or the embedded broker); set it in the environment"
    assert second.startswith("CONSUMER_DATABASE_URL is not set")


# --- secrets ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("amqp://user:pass@host/vhost", "amqp://user:***@host/vhost"),
        ("amqp://user:p@ss:w/rd@host/vhost", "amqp://user:***@host/vhost"),
        ("postgresql+psycopg://:pass@host/db", "postgresql+psycopg://:***@host/db"),
        (
            "postgresql://host/db?user=u&password=pass&sslmode=require",
            "postgresql://host/db?user=u&password=***&sslmode=require",
        ),
        ("postgresql://host/db?SSLPASSWORD=pass", "postgresql://host/db?SSLPASSWORD=***"),
        ("embedded:///instance/broker.db", "embedded:///instance/broker.db"),
        ("amqp://user@host/vhost", "amqp://user@host/vhost"),
        ("no connection to amqp://u:pass@h: refused", "no connection to amqp://u:***@h: refused"),
    ],
)
def test_a_password_is_masked_wherever_it_stands(text: str, shown: str) -> None:
    assert mask(text) == shown


def test_no_secret_is_in_the_rows_the_repr_or_a_refusal() -> None:
    urls = {
        "DATABASE_URL": "postgresql+psycopg://u:hunter2@host/db",
        "BROKER_URL": "amqp://u:hunter2@host/vhost",
        "BROKER_MANAGEMENT_URL": "http://u:hunter2@host:15672",
        "CONSUMER_DATABASE_URL": "postgresql+psycopg://u:hunter2@host/{service}",
    }
    found = load(environ=urls)
    assert "hunter2" not in repr(found)
    assert "hunter2" not in "".join(row.shown for row in found.rows())
    assert found.database_url == urls["DATABASE_URL"]
    assert "hunter2" not in _refusal(**{name: url.replace("://", "x://", 1) for name, url in urls.items()})


def test_rows_show_every_setting_as_it_could_be_written() -> None:
    rows = {row.name: row for row in load(environ={"OUTBOX_LEASE": "90s"}).rows()}
    assert tuple(rows) == settings.NAMES
    assert (rows["OUTBOX_LEASE"].shown, rows["OUTBOX_LEASE"].origin) == ("90s", "environment")
    assert (rows["OUTBOX_RETENTION"].shown, rows["OUTBOX_RETENTION"].origin) == ("7d", "default")
    assert (rows["OUTBOX_MAX_BODY"].shown, rows["OUTBOX_HTTP_PORT"].shown, rows["DATABASE_URL"].shown) == ("256KiB", "off", "")
    written = {row.name: row.shown for row in rows.values()}
    assert load(environ=written) == load(environ={"OUTBOX_LEASE": "90s"})
