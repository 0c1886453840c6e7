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
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, unquote, urljoin, urlsplit, urlunsplit

from outbox.errors import BrokerError, ConfigurationError, Unavailable
from outbox.process.masking import mask

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.settings import Settings

_TIMEOUT_SECONDS = 10.0


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Makes an error of every redirect."""

    def redirect_request(self, *_: object) -> None:
        """Return nothing: the redirect is not followed."""


#: To the named host and nowhere else: a proxy or whoever redirects us would be given user and password.
_opener = urllib.request.build_opener(urllib.request.ProxyHandler({}), _NoRedirect)


@dataclass(frozen=True, slots=True)
class Queue:
    """A queue that the exchange reaches."""

    name: str
    #: `quorum`, `classic`, `stream`; `embedded` for the embedded broker's.
    type: str
    durable: bool
    messages: int
    #: Active ones and those waiting for their turn; None where nobody can tell.
    consumers: int | None


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
    #: By name; those bound to the exchange, and those that belong to a service on it, bound or not.
    queues: dict[str, Queue]

    def unbound(self) -> list[str]:
        """Return the queues of services that get nothing: they lost all their bindings, or were not bound yet."""
        bound = {binding.destination for binding in self.bindings if binding.is_queue}
        return [name for name in self.queues if name not in bound]

    def patterns(self, queue: str) -> set[str]:
        """Return what *queue* is bound to."""
        return {binding.pattern for binding in self.bindings if binding.is_queue and binding.destination == queue}

    def destinations(self, topic: str) -> list[Binding]:
        """Return the bindings that take *topic*, one for each destination."""
        from outbox.embedded.routing import matches

        return list({item.destination: item for item in self.bindings if matches(item.pattern, topic)}.values())


def service_of(queue: str, exchange: str) -> str | None:
    """Return the service on *exchange* whose queue *queue* is; None: no service's."""
    name = queue.removeprefix(f"{exchange}.")
    # A service's name has no dot; that of the exchange may have.
    return None if name == queue or "." in name or name == "dead" else name


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


def bound(settings: Settings, queue: str) -> set[str] | None:
    """Return the patterns that *queue* is bound to; None where nobody can tell. Raises as `read`, whose cheap half it is."""
    url = str(settings.broker_url)
    if url.startswith("embedded:"):
        return _of_embedded(url, settings.exchange).patterns(queue)
    if settings.broker_management_url is None:
        return None
    from outbox import amqp_url

    where, name = quote(amqp_url.parse(url).vhost, safe=""), quote(queue, safe="")
    found = Management(settings.broker_management_url).get(f"queues/{where}/{name}/bindings?columns=source,routing_key")
    return {item["routing_key"] for item in found or [] if item["source"] == settings.exchange}


def _of_embedded(url: str, exchange: str) -> Topology:
    from outbox.embedded.queues import Queues
    from outbox.embedded.urls import path_of

    path = path_of(url)
    if not path.exists():
        raise ConfigurationError(f"BROKER_URL={url}: there is no file {path}; start a service or the relay, they make it")
    with Queues(path) as broker:
        bindings = broker.bindings(exchange)
        queues = {}
        wanted = {binding.queue for binding in bindings}
        for name in (each for each in broker.queues() if each in wanted or service_of(each, exchange)):
            depth = broker.depth(name)
            queues[name] = Queue(name, "embedded", True, depth.ready + depth.leased, int(depth.consumed))
    found = tuple(Binding(binding.pattern, binding.queue) for binding in bindings)
    # On the embedded broker an exchange is there as soon as somebody names it.
    return Topology(exchange, "topic", True, found, queues)


def _of_rabbitmq(management: Management, vhost: str, exchange: str) -> Topology:
    where = quote(vhost, safe="")
    name = quote(exchange, safe="")
    found = management.get(f"exchanges/{where}/{name}")
    bindings: tuple[Binding, ...] = ()
    if found is not None:
        bindings = tuple(
            Binding(item["routing_key"], item["destination"], item["destination_type"] == "queue")
            for item in management.get(f"exchanges/{where}/{name}/bindings/source") or []
        )
    wanted = {binding.destination for binding in bindings if binding.is_queue}
    queues = {
        queue.name: queue for queue in _queues(management, where) if queue.name in wanted or service_of(queue.name, exchange)
    }
    if found is None:
        return Topology(exchange, None, False, (), queues)
    return Topology(exchange, found["type"], bool(found["durable"]), bindings, queues)


def _queues(management: Management, where: str) -> Iterator[Queue]:
    consumers = _consumers(management, where)
    # Without statistics, which are some seconds old, the number of messages is that of now.
    for item in management.get(f"queues/{where}?disable_stats=true&enable_queue_totals=true") or []:
        name = item["name"]
        type_ = item.get("type") or item.get("arguments", {}).get("x-queue-type", "classic")
        consuming = None if consumers is None else consumers[name]
        yield Queue(name, type_, bool(item.get("durable")), item.get("messages", 0), consuming)


def _consumers(management: Management, where: str) -> Counter[str] | None:
    """Return how many consume each queue; None where the broker keeps no such statistics."""
    try:
        found = management.get(f"consumers/{where}?columns=queue.name")
    except BrokerError:
        return None
    return Counter(item["queue"]["name"] for item in found or [])


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
            with _opener.open(request, timeout=_TIMEOUT_SECONDS) as response:
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
        if location := refusal.headers.get("Location"):
            elsewhere = mask(urljoin(self._base, location))
            return ConfigurationError(
                f"{self._name}: it redirects to {elsewhere}, where user and password are not sent; name the right host"
            )
        return BrokerError(f"{self._name}: GET /api/{path} answered {refusal.code} {refusal.reason}")
