"""Why a connection to RabbitMQ ended, in the broker's words and with the next step. Pure.

Reply codes: 403 access refused, 404 not found, 406 precondition failed (the message), 530 not allowed (the virtual host).
"""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import TYPE_CHECKING

from outbox.relay.broker import Cause

if TYPE_CHECKING:
    from outbox.amqp_url import AmqpUrl


@dataclass(frozen=True, slots=True)
class Ending:
    """Why a connection ended."""

    #: For people, with the next step where there is one.
    detail: str
    #: The broker is there and refuses us as configured: password, virtual host, exchange, permission, certificate.
    refused: bool = False
    cause: Cause = Cause.CLOSED
    #: We wanted it.
    expected: bool = False


def closed_by_broker(url: AmqpUrl, code: int, words: str, *, was_open: bool) -> Ending:
    """Return what `connection.close` means. While connecting it is a verdict on user or virtual host, or all are taken."""
    if code == 403 and not was_open:
        step = f"correct the user and password in BROKER_URL, or on the broker: rabbitmqctl change_password {url.user} …"
        return Ending(f"{url} refused the login: {code} {words}; {step}", refused=True)
    if code == 530 and "connection limit" in words:
        step = f"close some, or allow more: rabbitmqctl set_vhost_limits -p {url.vhost} … or set_user_limits {url.user} …"
        return Ending(f"{url} takes no more connections: {code} {words}; {step}")
    if code == 530 and not was_open:
        step = f"correct BROKER_URL, or: rabbitmqctl add_vhost {url.vhost}; {_permit(url)}"
        return Ending(f"{url} refused the virtual host: {code} {words}; {step}", refused=True)
    return Ending(f"{url} closed the connection: {code} {words}")


def channel_closed(url: AmqpUrl, code: int, words: str) -> Ending:
    """Return what `channel.close` means: an exchange that is not there, a permission, or a message."""
    if code == 404:
        return Ending(f"{code} {words}; create the exchange: outbox topology apply", refused=True)
    if code == 403:
        return Ending(f"{code} {words}; allow it: {_permit(url)}", refused=True)
    return Ending(f"{code} {words}", cause=Cause.MESSAGE if code == 406 else Cause.CLOSED)


def failed(url: AmqpUrl, error: BaseException, *, was_open: bool) -> Ending:
    """Return what an error of the network, of TLS or of the client library means."""
    root = _root(error)
    if isinstance(root, ssl.SSLCertVerificationError):
        step = "name its authority with ?cacertfile=…, or the name it was made out to with ?server_name_indication=…"
        return Ending(f"{url}: the certificate was not accepted: {root.verify_message}; {step}", refused=True)
    what = "the connection to {} was lost" if was_open else "no connection to {}"
    return Ending(f"{what.format(url)}: {str(root) or repr(root)}")


def _permit(url: AmqpUrl) -> str:
    return f"rabbitmqctl set_permissions -p {url.vhost} {url.user} …"


def _root(error: BaseException) -> BaseException:
    """Return what happened; pika wraps it up to four times, in three ways."""
    while True:
        wrapped = [getattr(error, "exception", None), *(getattr(error, "exceptions", None) or ()), *error.args]
        causes = [cause for cause in wrapped if isinstance(cause, BaseException)]
        if not causes:
            return error
        error = causes[-1]
