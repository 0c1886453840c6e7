"""What the broker has: the exchange, the queues, and which topic reaches which queue. Read only.

RabbitMQ tells through its management API (`BROKER_MANAGEMENT_URL`) alone: AMQP can't list bindings. The embedded broker's
are in its file.
"""

from __future__ import annotations

import base64
import http.client
import json
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urlsplit, urlunsplit

from outbox.errors import BrokerError, ConfigurationError, Unavailable

if TYPE_CHECKING:
    from outbox.settings import Settings

_TIMEOUT_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue that the exchange reaches."""

    name: str
    #: `quorum`, `classic`, `stream`; `embedded` for the embedded broker's.
    type: str
    durable: bool
    messages: int
    consumers: int


@dataclass(frozen=True, slots=True)
class Binding:
    """*destination* gets what is published with a topic that *pattern* takes."""

    pattern: str
    destination: str
    #: False where the destination is another exchange: what becomes of the message there is not looked into.
    is_queue: bool = True


@dataclass(frozen=True, slots=True)
class Topology:
    """The exchange and what is bound to it."""

    exchange: str
    #: `topic`, as it should be, or another; None: there is no such exchange.
    exchange_type: str | None
    durable: bool
    bindings: tuple[Binding, ...]
    #: By name; those bound to the exchange.
    queues: dict[str, Queue]

    def destinations(self, topic: str) -> list[Binding]:
        """Return the bindings that take *topic*, one for each destination."""
        from outbox.embedded.routing import matches

        return list({item.destination: item for item in self.bindings if matches(item.pattern, topic)}.values())


def read(settings: Settings) -> Topology | None:
    """Return what the broker has; None where nobody can tell, because RabbitMQ's management API is not known.

    Raises ConfigurationError, BrokerError and Unavailable, naming the URL.
    """
    settings.require("BROKER_URL")
    url = str(settings.broker_url)
    if url.startswith("embedded:"):
        return _of_embedded(url, settings.exchange)
    if settings.broker_management_url is None:
        return None
    from outbox import amqp_url

    return _of_rabbitmq(Management(settings.broker_management_url), amqp_url.parse(url).vhost, settings.exchange)


def _of_embedded(url: str, exchange: str) -> Topology:
    from outbox.embedded.queues import Queues
    from outbox.embedded.urls import path_of

    path = path_of(url)
    if not path.exists():
        raise ConfigurationError(f"BROKER_URL={url}: there is no file {path}; start a service or the relay, they make it")
    with Queues(path) as broker:
        bindings = broker.bindings(exchange)
        queues = {}
        for name in sorted({binding.queue for binding in bindings}):
            depth = broker.depth(name)
            queues[name] = Queue(name, "embedded", True, depth.ready + depth.leased, int(depth.consumed))
    found = tuple(Binding(binding.pattern, binding.queue) for binding in bindings)
    # On the embedded broker an exchange is there as soon as somebody names it.
    return Topology(exchange, "topic", True, found, queues)


def _of_rabbitmq(management: Management, vhost: str, exchange: str) -> Topology:
    where = quote(vhost, safe="")
    name = quote(exchange, safe="")
    found = management.get(f"exchanges/{where}/{name}")
    if found is None:
        return Topology(exchange, None, False, (), {})
    bindings = tuple(
        Binding(item["routing_key"], item["destination"], item["destination_type"] == "queue")
        for item in management.get(f"exchanges/{where}/{name}/bindings/source") or []
    )
    bound = {binding.destination for binding in bindings if binding.is_queue}
    queues = {}
    for item in management.get(f"queues/{where}?disable_stats=true&enable_queue_totals=true") or []:
        if item["name"] in bound:
            type_ = item.get("type") or item.get("arguments", {}).get("x-queue-type", "classic")
            queues[item["name"]] = Queue(
                item["name"], type_, bool(item.get("durable")), item.get("messages", 0), item.get("consumers", 0)
            )
    return Topology(exchange, found["type"], bool(found["durable"]), bindings, queues)


class Management:
    """RabbitMQ's management API at *url*, which carries user and password."""

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        host = f"[{parts.hostname}]" if ":" in (parts.hostname or "") else parts.hostname
        self._base = urlunsplit((parts.scheme, f"{host}:{parts.port or 15672}", parts.path.rstrip("/"), "", ""))
        self._name = f"BROKER_MANAGEMENT_URL={self._base}"
        user, password = unquote(parts.username or "guest"), unquote(parts.password or "guest")
        self._headers = {"Authorization": "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()}
        self._user = user

    def get(self, path: str) -> Any:
        """Return the decoded answer to GET `/api/` + *path*; None for 404."""
        request = urllib.request.Request(f"{self._base}/api/{path}", headers=self._headers)  # noqa: S310 - settings allow http(s) only
        try:
            with urllib.request.urlopen(request, timeout=_TIMEOUT_SECONDS) as response:  # noqa: S310
                return json.load(response)
        except urllib.error.HTTPError as refusal:
            with refusal:
                if refusal.code == http.HTTPStatus.NOT_FOUND:
                    return None
                raise self._refused(refusal, path) from refusal
        except (OSError, http.client.HTTPException) as error:
            reason = getattr(error, "reason", error)
            raise Unavailable(
                f"{self._name}: {getattr(reason, 'strerror', None) or reason}; start RabbitMQ with its management plugin "
                "or correct the URL"
            ) from error
        except ValueError as error:
            raise ConfigurationError(
                f"{self._name}: what answers there is not RabbitMQ's management API; correct the URL"
            ) from error

    def _refused(self, refusal: urllib.error.HTTPError, path: str) -> Exception:
        if refusal.code == http.HTTPStatus.UNAUTHORIZED:
            return BrokerError(
                f"{self._name}: user {self._user!r} or its password is refused, or the user has no tag `monitoring`"
            )
        return BrokerError(f"{self._name}: GET /api/{path} answered {refusal.code} {refusal.reason}")
