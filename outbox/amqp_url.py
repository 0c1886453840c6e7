"""What an `amqp://` or `amqps://` URL says, read in one way by everything that connects to RabbitMQ. No client library here.

    amqps://user:password@host:5671/vhost?cacertfile=/etc/ssl/broker-ca.pem

User and password must be there (clients would fall back to guest/guest), special characters percent-encoded. Without a
path the virtual host is `/`. With `amqps` the certificate and the host name are always verified.

| query parameter | |
| --- | --- |
| `cacertfile` | PEM file with the authority that signed the broker's certificate; default: the system's authorities |
| `certfile`, `keyfile` | PEM files of a client certificate |
| `server_name_indication` | the name in the broker's certificate, where it is not the host of the URL |
| `heartbeat` | seconds; default: 10 for a relay, 30 for a service |
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qsl, unquote

from outbox.errors import ConfigurationError
from outbox.process import masking

if TYPE_CHECKING:
    import ssl
    from urllib.parse import SplitResult

_PORTS = {"amqp": 5672, "amqps": 5671}
_TLS_PARAMETERS = ("cacertfile", "certfile", "keyfile", "server_name_indication")
PARAMETERS = (*_TLS_PARAMETERS, "heartbeat")
_FORM = "amqp://user:password@host:5672/vhost or amqps://…"


@dataclass(frozen=True, slots=True, kw_only=True)
class AmqpUrl:
    """One broker, one virtual host, one user. `repr()` and `str()` show no password."""

    host: str
    port: int
    user: str
    password: str
    vhost: str
    tls: bool
    server_name: str
    cacertfile: str | None
    certfile: str | None
    keyfile: str | None
    #: Seconds; None: what the process thinks fit.
    heartbeat: int | None

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'amqps' if self.tls else 'amqp'}://{self.user}:***@{host}:{self.port}/{self.vhost.removeprefix('/')}"

    def __repr__(self) -> str:
        return f"<AmqpUrl {self}>"

    def tls_context(self) -> ssl.SSLContext | None:
        """Return the context for a connection that verifies certificate and host name; None for `amqp://`.

        Raises ConfigurationError for files that can't be read.
        """
        import ssl  # the web process reads URLs too, and need not load it for that

        if not self.tls:
            return None
        try:
            context = ssl.create_default_context(cafile=self.cacertfile)
            if self.certfile is not None:
                context.load_cert_chain(self.certfile, self.keyfile)
        except (OSError, ssl.SSLError) as error:
            files = ", ".join(filter(None, (self.cacertfile, self.certfile, self.keyfile)))
            raise ConfigurationError(f"{self}: can't read the certificates ({files}): {error}") from error
        return context


def parse(url: str) -> AmqpUrl:
    """Return what *url* says. Raises ConfigurationError, without the password in its text."""
    try:
        return read(url)
    except ValueError as error:
        raise ConfigurationError(f"{masking.shown(url)}: {error}") from None


def read(url: str) -> AmqpUrl:
    """Return what *url* says. Raises ValueError with what is wrong with it, and nothing of the URL."""
    parts = masking.split(url)
    if problem := _problem(url, parts):
        raise ValueError(problem)
    host, user, password = str(parts.hostname), str(parts.username), str(parts.password)
    tls = parts.scheme == "amqps"
    query = _query(parts.query, tls=tls)
    return AmqpUrl(
        host=host,
        port=parts.port or _PORTS[parts.scheme],
        user=unquote(user),
        password=unquote(password),
        # An empty path and `//` (as Celery writes it) mean the virtual host everybody has.
        vhost=unquote(parts.path[1:]) if parts.path not in ("", "/", "//") else "/",
        tls=tls,
        server_name=query.get("server_name_indication", host),
        cacertfile=query.get("cacertfile"),
        certfile=query.get("certfile"),
        keyfile=query.get("keyfile"),
        heartbeat=int(query["heartbeat"]) if "heartbeat" in query else None,
    )


def _problem(url: str, parts: SplitResult) -> str | None:
    """Return why *url* names no broker."""
    userinfo, _, place = parts.netloc.rpartition("@")
    if url.count("://") > 1 or re.search(r"[;,]", place + parts.path) or re.search(r"@[^@]*[;,]", userinfo):
        return "one broker, no list; where several nodes serve, name their load balancer"
    if parts.scheme not in _PORTS or not parts.hostname:
        return f"not {_FORM}" + (": it names no host" if parts.scheme in _PORTS else "")
    if not parts.username or not parts.password:
        return "it names no user and password; clients would silently use guest/guest"
    if re.search(r"[\s\x00-\x1f]", url):
        return "it holds a blank or a line break; percent-encode it"
    return None


def _query(text: str, *, tls: bool) -> dict[str, str]:
    query = dict(parse_qsl(text, keep_blank_values=True))
    if masking.has_secret(text):
        raise ValueError(f"a secret is no parameter of it (known: {', '.join(PARAMETERS)}); put it before the host")
    problems = [f"{name} is no parameter (known: {', '.join(PARAMETERS)})" for name in query if name not in PARAMETERS]
    problems += [f"{name} needs amqps://" for name in query if name in _TLS_PARAMETERS and not tls]
    problems += [f"{name} is empty" for name, value in query.items() if not value]
    heartbeat = query.get("heartbeat", "0")
    if not (heartbeat.isascii() and heartbeat.isdigit() and int(heartbeat) <= 65535):
        problems.append("heartbeat must be a number of seconds from 0 to 65535")
    if "keyfile" in query and "certfile" not in query:
        problems.append("keyfile needs certfile")
    if problems:
        raise ValueError("; ".join(problems))
    return query
