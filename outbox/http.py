"""A small HTTP server beside a process: is it alive, is it ready, its metrics. Loopback unless told otherwise."""

from __future__ import annotations

import json
import logging
import sys
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TYPE_CHECKING, Any

from outbox import metrics
from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Callable

log = logging.getLogger(__name__)


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
            self._server = _Listener((host, int(port)), _handler(live, ready))
        except OSError as error:
            said = f"OUTBOX_HTTP_PORT={address}: {error.strerror or error}"
            raise ConfigurationError(f"{said}; choose a free port, on an IPv4 address of this machine") from error
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


class _Listener(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:  # noqa: ARG002
        """A client that hung up is nothing to talk about; the standard library would print its traceback."""
        if not isinstance(sys.exception(), OSError):
            log.exception("a probe could not be answered")


def _handler(live: Callable[[], Health], ready: Callable[[], Health]) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        timeout = 5  # seconds: a client that says nothing must not keep a thread

        def do_GET(self) -> None:
            path = self.path.partition("?")[0]
            if path in ("/livez", "/readyz"):
                health = live() if path == "/livez" else ready()
                body = json.dumps({"ok": health.ok, **health.detail}, default=str).encode()
                self._answer(200 if health.ok else 503, body, "application/json")
            elif path == "/metrics":
                rendered = metrics.render()
                if rendered is None:
                    self._answer(501, b"install outbox[metrics]\n", "text/plain")
                else:
                    self._answer(200, *rendered)
            else:
                self._answer(404, b"/livez /readyz /metrics\n", "text/plain")

        def _answer(self, status: int, body: bytes, content_type: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Say nothing: probes come every few seconds."""

    return Handler
