"""A small HTTP server beside a process: is it alive, is it ready, its metrics. Loopback unless told otherwise.

Whoever reaches it can cost the process little: few connections at once, each with a deadline for the whole of its request.
"""

from __future__ import annotations

import io
import json
import logging
import socket
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from socketserver import TCPServer, ThreadingMixIn
from typing import TYPE_CHECKING, Any

from outbox.errors import ConfigurationError, install
from outbox.process import metrics

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)

#: Probes and scrapes come one by one; whoever has more open is refused.
_MOST_CONNECTIONS = 16
#: From the first byte awaited to the last one sent: a client that is slow, or says nothing, must not keep a thread.
_REQUEST_SECONDS = 5.0
#: After a failed accept (no file descriptor is left): trying again at once would only burn a core.
_PAUSE_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class Health:
    """An answer to a probe: fine or not, and what a person should know."""

    ok: bool
    detail: dict[str, Any]


class Server:
    """Serves `/livez`, `/readyz` and `/metrics` from a thread of its own; the probes must answer from memory, without I/O."""

    def __init__(self, address: str, *, live: Callable[[], Health], ready: Callable[[], Health]) -> None:
        host, _, port = address.rpartition(":")
        try:
            self._server = _Listener(host.strip("[]"), int(port), _handler(live, ready))
        except OSError as error:
            said = f"OUTBOX_HTTP_PORT={address}: {error.strerror or error}"
            raise ConfigurationError(f"{said}; choose a free port, on an address of this machine") from error
        self._thread = threading.Thread(target=self._server.serve_forever, name="outbox-http", daemon=True)

    @property
    def port(self) -> int:
        """The port it listens on (useful when 0 was asked for)."""
        return int(self._server.server_address[1])

    def start(self) -> None:
        """Begin to answer."""
        self._thread.start()

    def stop(self) -> None:
        """Stop answering and free the port."""
        if self._thread.is_alive():  # shutdown() waits for a loop that was never begun
            self._server.shutdown()
            self._thread.join()
        self._server.server_close()


class _Listener(ThreadingMixIn, TCPServer):
    daemon_threads = True
    allow_reuse_address = True
    request_queue_size = 4 * _MOST_CONNECTIONS  # refused by us at once, not by the kernel after seconds

    def __init__(self, host: str, port: int, handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._places = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        self._pause = threading.Event()
        super().__init__((host, port), handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        try:
            return super().get_request()
        except OSError:
            self._pause.wait(_PAUSE_SECONDS)
            raise

    def process_request(self, request: Any, client_address: Any) -> None:
        if not self._places.acquire(blocking=False):
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread could be started
            self._places.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        try:
            super().process_request_thread(request, client_address)
        finally:
            self._places.release()

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A client that hung up is nothing to talk about; the standard library would print its traceback."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a probe could not be answered")


class _Timed(io.RawIOBase):
    """What a client sends, until the deadline of its request: a timeout of the socket alone begins anew with each byte."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self._deadline = time.monotonic() + _REQUEST_SECONDS

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise TimeoutError
        self._connection.settimeout(remaining)
        return self._connection.recv_into(buffer)


def _handler(live: Callable[[], Health], ready: Callable[[], Health]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_SECONDS  # of sending the answer, as a whole

        def setup(self) -> None:
            super().setup()
            self.rfile = io.BufferedReader(_Timed(self.connection))

        def version_string(self) -> str:
            return "outbox"  # the versions of Python and ours are nobody's business

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in ("/livez", "/readyz"):
                health = live() if path == "/livez" else ready()
                body = json.dumps({"ok": health.ok, **health.detail}, default=str).encode()
                self._answer(200 if health.ok else 503, body, "application/json")
            elif path == "/metrics":
                rendered = metrics.render()
                if rendered is None:
                    self._answer(501, f"{install('metrics')}\n".encode(), "text/plain")
                else:
                    self._answer(200, *rendered)
            else:
                self._answer(404, b"/livez /readyz /metrics\n", "text/plain")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: probes come every few seconds."""

    return Handler
