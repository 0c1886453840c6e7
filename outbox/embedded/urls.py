"""`embedded:///instance/broker.db`: which file is meant."""

from __future__ import annotations

from pathlib import Path

from outbox.errors import ConfigurationError

SCHEME = "embedded"
_PREFIX = f"{SCHEME}:///"


def path_of(url: str) -> Path:
    """Return the absolute path of the file that *url* names; raise ConfigurationError for any other URL.

    Three slashes: relative to the working directory. Four: absolute. What follows is taken as it is, as SQLAlchemy does.
    """
    name = url.removeprefix(_PREFIX)
    if not url.startswith(_PREFIX) or not name.strip("/"):
        raise ConfigurationError(f"BROKER_URL={url}: the embedded broker is a file: embedded:///instance/broker.db")
    return Path(name).absolute()  # now: the process may change its folder before it connects again
