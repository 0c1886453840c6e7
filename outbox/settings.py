"""Every setting: its name, what it may hold, its default. Read once at start; all problems are reported together.

Argument → `app.config` → environment → `[tool.outbox]` in the working directory's pyproject.toml → default.
"""

from __future__ import annotations

import dataclasses
import difflib
import logging
import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from outbox import amqp_url
from outbox.database import dialects
from outbox.errors import ConfigurationError, InvalidMessage
from outbox.message import check_name
from outbox.process import duration, masking
from outbox.process.logs import say

log = logging.getLogger(__name__)

#: Names of ours that no process takes as a setting: they are read by commands before settings exist.
OTHER_NAMES = frozenset({"OUTBOX_FAILPOINTS", "OUTBOX_DEBUG"})
_PREFIXES = ("OUTBOX_", "CONSUMER_")
#: Ten years: clocks and calendars can count with it.
_LONGEST_SECONDS = duration.parse("3650d")
_UNITS = {"": 1, "B": 1, "KiB": 1024, "MiB": 1024**2}


# --- what a value may be ------------------------------------------------------------------------------------------------


def _duration(at_least: str = "1ms") -> Callable[[object], float]:
    minimum = duration.parse(at_least)

    def parse(value: object) -> float:
        seconds = value.total_seconds() if isinstance(value, timedelta) else duration.parse(str(value))
        if seconds < minimum:
            raise ValueError(f"it must be at least {at_least}")
        if seconds > _LONGEST_SECONDS:
            raise ValueError(f"it must be at most {duration.format(_LONGEST_SECONDS)}")
        return seconds

    return parse


def _count(low: int, high: int) -> Callable[[object], int]:
    def parse(value: object) -> int:
        text = str(value).strip()
        if isinstance(value, bool) or not re.fullmatch(r"[0-9]{1,12}", text) or not low <= int(text) <= high:
            raise ValueError(f"it must be a whole number from {low} to {high}")
        return int(text)

    return parse


def _size(value: object) -> int:
    match = re.fullmatch(r"(\d{1,9})\s*(B|KiB|MiB)?", str(value).strip())
    size = int(match[1]) * _UNITS[match[2] or ""] if match else 0
    if not 1 <= size <= 15 * 1024**2:  # RabbitMQ 4 takes messages up to 16 MiB, envelope included
        raise ValueError("it must be a size from 1B to 15MiB, such as 256KiB")
    return size


def _port(value: object) -> str | None:
    """`off`, a port (of the loopback address) or `host:port`."""
    text = str(value).strip()
    if text.lower() in ("off", "", "none"):
        return None
    host, _, port = text.rpartition(":")
    if not (port.isascii() and port.isdigit()) or not 0 <= int(port) <= 65535:
        raise ValueError("it must be off, a port such as 9101 (loopback only), or host:port such as 0.0.0.0:9101")
    return f"{host or '127.0.0.1'}:{int(port)}"


def _choice(*names: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        if value not in names:
            raise ValueError(f"it must be one of {', '.join(names)}")
        return str(value)

    return parse


def _name(what: str) -> Callable[[object], str]:
    def parse(value: object) -> str:
        try:
            check_name(what, str(value), blanks=False)
        except InvalidMessage as error:
            raise ValueError(str(error)) from error
        return str(value)

    return parse


def _database_url(value: object) -> str:
    text = str(value)
    try:
        url = make_url(text.replace("{service}", "service"))
    except (ArgumentError, ValueError):
        raise ValueError(
            "it must be a URL such as postgresql+psycopg://user:password@host/name or sqlite:///file.db"
        ) from None  # what SQLAlchemy says quotes the URL
    if "@" in (url.host or ""):  # a part of the password would be taken for the host, and be in every error about it
        raise ValueError(masking.ENCODE)
    if url.drivername.startswith("postgres:") or url.drivername == "postgres":
        raise ValueError("the scheme is postgresql+psycopg://, not postgres://")
    family = url.get_backend_name()
    if family in ("mysql", "mariadb"):
        raise ValueError("MySQL and MariaDB are not supported yet; use postgresql+psycopg:// or sqlite:///")
    if family not in ("postgresql", "sqlite"):
        raise ValueError(f"{family} is not supported; use postgresql+psycopg:// or sqlite:///")
    try:
        dialects.of_url(url)
    except ConfigurationError as error:
        raise ValueError(str(error)) from error
    if family == "sqlite" and url.host:
        raise ValueError("a SQLite file has no host: sqlite:///instance/name.db, or sqlite:////srv/name.db from the root")
    if family == "sqlite" and url.database in (None, "", ":memory:"):
        raise ValueError("a database in memory is seen by one process only; name a file: sqlite:///instance/name.db")
    return text


def _broker_url(value: object) -> str:
    text = str(value)
    scheme, _, rest = text.partition(":")
    if scheme == "embedded":
        file = rest.partition("?")[0]
        if not file.strip("/") or (file.startswith("//") and not file.startswith("///")):
            raise ValueError("the embedded broker is a file: embedded:///instance/broker.db")
    elif scheme in ("amqp", "amqps"):
        amqp_url.read(text)
    else:
        raise ValueError("it must be amqp://user:password@host:5672/vhost, amqps://… or embedded:///file.db")
    return text


def _management_url(value: object) -> str:
    text, form = str(value), "it must be http://user:password@host:15672"
    try:
        parts = masking.split(text)
    except ValueError as error:
        raise ValueError(f"{form}; {error}") from None
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.port == 0:
        raise ValueError(form)
    return text


# --- the settings -------------------------------------------------------------------------------------------------------


def _setting(name: str, default: Any, parse: Callable[[Any], Any], text: str, *, secret: bool = False) -> Any:
    value = None if default is None else parse(default)
    return field(default=value, metadata={"name": name, "default": default, "parse": parse, "text": text, "secret": secret})


@dataclass(frozen=True, kw_only=True, slots=True)
class Settings:
    """All settings, parsed: durations in seconds, sizes in bytes. Build with `load`; the bare constructor gives defaults."""

    database_url: str | None = _setting("DATABASE_URL", None, _database_url, "the database of the outbox", secret=True)
    broker_url: str | None = _setting("BROKER_URL", None, _broker_url, "RabbitMQ, or the embedded broker", secret=True)
    broker_management_url: str | None = _setting(
        "BROKER_MANAGEMENT_URL",
        None,
        _management_url,
        "RabbitMQ's management API, for `outbox topology check`",
        secret=True,
    )
    consumer_database_url: str | None = _setting(
        "CONSUMER_DATABASE_URL",
        None,
        _database_url,
        "the service's own database; {service} becomes its name",
        secret=True,
    )
    exchange: str = _setting("OUTBOX_EXCHANGE", "outbox", _name("exchange"), "the durable topic exchange")
    source: str | None = _setting("OUTBOX_SOURCE", None, _name("source"), "stamped at capture; /<app name> where not set")
    batch_size: int = _setting("OUTBOX_BATCH_SIZE", 500, _count(1, 10_000), "rows the relay reads at once")
    window: int = _setting("OUTBOX_WINDOW", 2000, _count(1, 100_000), "unconfirmed messages at once")
    key_window: int = _setting("OUTBOX_KEY_WINDOW", 1, _count(1, 1), "unconfirmed messages per key; only 1, more could reorder")
    poll_seconds: float = _setting("OUTBOX_POLL_INTERVAL", "500ms", _duration("10ms"), "how often an idle relay looks")
    lease_seconds: float = _setting("OUTBOX_LEASE", "15s", _duration("1s"), "how long a silent relay keeps its shards")
    confirm_timeout_seconds: float = _setting(
        "OUTBOX_CONFIRM_TIMEOUT",
        "10s",
        _duration("100ms"),
        "silence of the broker after which the connection is dropped",
    )
    max_attempts: int = _setting("OUTBOX_MAX_ATTEMPTS", 10, _count(1, 1_000), "then a message is dead and waits for a person")
    backoff_base_seconds: float = _setting("OUTBOX_BACKOFF_BASE", "1s", _duration(), "longest first wait before a retry")
    backoff_max_seconds: float = _setting("OUTBOX_BACKOFF_MAX", "5m", _duration(), "longest wait before any retry")
    max_body_bytes: int = _setting("OUTBOX_MAX_BODY", "256KiB", _size, "a larger message is refused at send()")
    retention_seconds: float = _setting(
        "OUTBOX_RETENTION", "7d", _duration("1h"), "no effect yet: nothing is purged; CONSUMER_INBOX_RETENTION must be longer"
    )
    http_address: str | None = _setting("OUTBOX_HTTP_PORT", "off", _port, "/livez, /readyz and /metrics of relay and services")
    shutdown_timeout_seconds: float = _setting(
        "OUTBOX_SHUTDOWN_TIMEOUT", "25s", _duration("100ms"), "how long SIGTERM waits for work in hand"
    )
    log_format: str = _setting("OUTBOX_LOG_FORMAT", "console", _choice("console", "json"), "log lines for people or machines")
    consumer_prefetch: int = _setting("CONSUMER_PREFETCH", 200, _count(1, 10_000), "unacknowledged deliveries of a service")
    consumer_workers: int = _setting(
        "CONSUMER_WORKERS", 4, _count(1, 64), "threads of a service (on SQLite one); a key is on one at a time"
    )
    consumer_batch: int = _setting("CONSUMER_BATCH", 50, _count(1, 1_000), "waiting messages that share one transaction")
    handler_limit_seconds: float = _setting(
        "CONSUMER_HANDLER_LIMIT", "10m", _duration("1s"), "a message longer in its handler makes /livez fail: a restart helps"
    )
    consumer_max_attempts: int = _setting("CONSUMER_MAX_ATTEMPTS", 5, _count(1, 1_000), "then a delivery is parked")
    inbox_retention_seconds: float = _setting(
        "CONSUMER_INBOX_RETENTION", "14d", _duration("1h"), "how long a service remembers applied ids"
    )
    #: Name of each setting → where its value came from.
    origins: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)
    #: Name of each URL that an application found in its environment and that is none of ours → why. `require` says it.
    foreign: Mapping[str, str] = field(default_factory=lambda: MappingProxyType({}), compare=False, repr=False)

    def __repr__(self) -> str:
        return f"Settings({', '.join(f'{row.name}={row.shown}' for row in self.rows())})"

    def rows(self) -> list[Row]:
        """Return all settings for display, secrets masked."""
        return [
            Row(
                name=item.metadata["name"],
                shown=_shown(item, getattr(self, item.name)),
                origin=self.origins.get(item.metadata["name"], "default"),
                default=str(item.metadata["default"] if item.metadata["default"] is not None else ""),
                text=item.metadata["text"],
            )
            for item in _FIELDS.values()
        ]

    def require(self, *names: str) -> None:
        """Raise ConfigurationError unless each of *names* (`DATABASE_URL`, …) has a value."""
        missing = [name for name in names if getattr(self, _FIELDS[name].name) is None]
        if missing:
            unset = "{name} is not set ({text}); set it in the environment"
            said = (self.foreign.get(name) or unset.format(name=name, text=_FIELDS[name].metadata["text"]) for name in missing)
            raise ConfigurationError("\n".join(said))


@dataclass(frozen=True, slots=True)
class Row:
    """A line of `outbox config`."""

    name: str
    shown: str
    origin: str
    default: str
    text: str


_FIELDS = {item.metadata["name"]: item for item in dataclasses.fields(Settings) if item.metadata}
NAMES = tuple(_FIELDS)


def load(
    arguments: Mapping[str, object] = MappingProxyType({}),
    config: Mapping[str, Any] = MappingProxyType({}),
    environ: Mapping[str, str] = MappingProxyType({}),
    folder: Path | None = None,
    *,
    for_app: bool = False,
) -> Settings:
    """Return the settings from *arguments*, a Flask *config*, an *environ* and the pyproject.toml of *folder*.

    Raises ConfigurationError with every problem in it, a line each. Names of *arguments* are those of the settings.
    An application (*for_app*) may use `DATABASE_URL` and `BROKER_URL` for something else: such a value in its environment is
    a problem only for who requires it.
    """
    problems: list[str] = []
    project = _project_table(folder, problems)
    _refuse_unknown(arguments, "argument", problems)
    _refuse_unknown({name for name in config if name.startswith(_PREFIXES)}, "app.config", problems)
    _refuse_unknown(project, "pyproject.toml", problems)
    _look_at_environment(environ, problems)
    if folder is not None:  # a command; an app may have names of its own for its database
        _refuse_misspelled(environ, {*arguments, *environ}, problems)
    values: dict[str, Any] = {}
    origins: dict[str, str] = {}
    foreign: dict[str, str] = {}
    # An empty variable is how compose files and shells write "not set".
    filled = {name: value for name, value in environ.items() if value.strip()}
    sources = (("argument", arguments), ("app.config", config), ("environment", filled), ("pyproject.toml", project))
    for name, item in _FIELDS.items():
        origin, raw = next(((where, given[name]) for where, given in sources if given.get(name) is not None), ("default", None))
        if raw is None:
            continue
        try:
            values[item.name] = item.metadata["parse"](raw)
            origins[name] = origin
        except ValueError as error:
            problem = f"{name}={_refused(item, raw)} ({origin}): {error}"
            if for_app and origin == "environment" and name.endswith("_URL"):
                foreign[name] = problem
            else:
                problems.append(problem)
    if not problems:
        settings = Settings(**values, origins=MappingProxyType(origins), foreign=MappingProxyType(foreign))
        problems += _contradictions(settings)
        if not problems:
            return settings
    raise ConfigurationError("\n".join(problems))


def override(settings: Settings, arguments: Mapping[str, object]) -> Settings:
    """Return *settings* with *arguments* (`{"OUTBOX_HTTP_PORT": "9101"}`) in place of what they say.

    Raises ConfigurationError with every problem in it, a line each.
    """
    problems: list[str] = []
    values = _parsed(arguments, problems)
    origins = MappingProxyType({**settings.origins, **dict.fromkeys(arguments, "argument")})
    changed = dataclasses.replace(settings, **values, origins=origins)
    problems = problems or _contradictions(changed)
    if problems:
        raise ConfigurationError("\n".join(problems))
    return changed


def check(arguments: Mapping[str, object]) -> None:
    """Raise ConfigurationError for *arguments* that are no settings or can't have these values, whatever else is set."""
    problems: list[str] = []
    _parsed(arguments, problems)
    if problems:
        raise ConfigurationError("\n".join(problems))


def _parsed(arguments: Mapping[str, object], problems: list[str]) -> dict[str, Any]:
    _refuse_unknown(arguments, "argument", problems)
    values: dict[str, Any] = {}
    for name, raw in arguments.items():
        if name in _FIELDS and raw is not None:
            try:
                values[_FIELDS[name].name] = _FIELDS[name].metadata["parse"](raw)
            except ValueError as error:
                problems.append(f"{name}={_refused(_FIELDS[name], raw)} (argument): {error}")
    return values


def _project_table(folder: Path | None, problems: list[str]) -> dict[str, Any]:
    path = folder / "pyproject.toml" if folder else None
    if path is None or not path.is_file():
        return {}
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8")).get("tool", {}).get("outbox", {})
        if not isinstance(table, dict):
            problems.append(f"{path}: [tool.outbox] must be a table")
            return {}
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        problems.append(f"{path}: {error}")
        return {}
    return {name.upper(): value for name, value in table.items()}


def _refuse_unknown(names: Mapping[str, object] | set[str], origin: str, problems: list[str]) -> None:
    problems += [f"{name} ({origin}) is no setting{_meant(name)}" for name in sorted(names) if name not in _FIELDS]


def _look_at_environment(environ: Mapping[str, str], problems: list[str]) -> None:
    unknown = [n for n in environ if n.startswith(_PREFIXES) and n not in _FIELDS and n not in OTHER_NAMES]
    near = [name for name in unknown if _meant(name)]
    problems += [f"{name} (environment) is no setting{_meant(name)}" for name in sorted(near)]
    others = sorted(set(unknown) - set(near))
    if others:  # orchestrators inject names such as OUTBOX_SERVICE_HOST
        say(
            log,
            logging.WARNING,
            "settings.unknown",
            f"no settings of this program: {', '.join(others)}; `outbox config` lists them",
        )


def _refuse_misspelled(environ: Mapping[str, str], given: set[str], problems: list[str]) -> None:
    """DATABSE_URL, while nothing says DATABASE_URL: the process would work on another database than was meant."""
    for right in (name for name in _FIELDS if not name.startswith(_PREFIXES) and name not in given):
        close = difflib.get_close_matches(right, environ, n=1, cutoff=0.9)
        problems += [f"{name} (environment) is no setting; did you mean {right}?" for name in close]


def _meant(name: str) -> str:
    close = difflib.get_close_matches(name, [*_FIELDS, *OTHER_NAMES], n=1, cutoff=0.85)
    return f"; did you mean {close[0]}?" if close else ""


def _contradictions(settings: Settings) -> list[str]:
    found = []
    lease, confirm = settings.lease_seconds, settings.confirm_timeout_seconds
    if confirm >= lease:
        found.append(
            f"OUTBOX_LEASE={duration.format(lease)} ends before OUTBOX_CONFIRM_TIMEOUT={duration.format(confirm)}: "
            f"slow confirms would be sent twice; set it above {duration.format(confirm)}"
        )
    if settings.backoff_base_seconds > settings.backoff_max_seconds:
        found.append("OUTBOX_BACKOFF_BASE is longer than OUTBOX_BACKOFF_MAX; set it below")
    if settings.inbox_retention_seconds <= settings.retention_seconds:
        found.append(
            f"CONSUMER_INBOX_RETENTION={duration.format(settings.inbox_retention_seconds)} forgets ids that the outbox "
            f"(OUTBOX_RETENTION={duration.format(settings.retention_seconds)}) can still send again; set it above"
        )
    return found


# --- showing ------------------------------------------------------------------------------------------------------------


def _refused(item: dataclasses.Field[Any], raw: object) -> str:
    """Return a value that was refused, as it may be shown: also what holds no secret may have been given a URL."""
    return masking.shown(str(raw)) if item.metadata["secret"] else masking.mask(str(raw))


def _shown(item: dataclasses.Field[Any], value: object) -> str:
    if value is None:
        return "off" if item.metadata["default"] == "off" else ""
    if isinstance(value, float):
        return duration.format(value)
    if item.metadata["parse"] is _size and isinstance(value, int):
        unit = next((unit for unit in ("MiB", "KiB") if value % _UNITS[unit] == 0), "B")
        return f"{value // _UNITS[unit]}{unit}"
    return masking.shown(str(value)) if item.metadata["secret"] else str(value)
