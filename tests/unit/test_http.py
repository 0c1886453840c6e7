"""The probes beside a process."""

from __future__ import annotations

import http.client
import json
import socket
import struct
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

import pytest

from outbox import metrics
from outbox.errors import ConfigurationError
from outbox.http import Health, Server
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator


def _fine() -> Health:
    return Health(True, {"turned_seconds_ago": 0.1})


@contextmanager
def _serving(live: Callable[[], Health] = _fine, ready: Callable[[], Health] = _fine) -> Iterator[int]:
    server = Server("127.0.0.1:0", live=live, ready=ready)
    server.start()
    try:
        yield server.port
    finally:
        server.stop()


def _get(port: int, path: str) -> tuple[int, str, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        return response.status, response.headers["Content-Type"], response.read()
    finally:
        connection.close()


def test_a_probe_answers_200_or_503_with_what_a_person_should_know() -> None:
    with _serving(ready=lambda: Health(False, {"broker": "not connected"})) as port:
        status, kind, body = _get(port, "/livez")
        assert (status, kind, json.loads(body)) == (200, "application/json", {"ok": True, "turned_seconds_ago": 0.1})
        status, _, body = _get(port, "/readyz?verbose=1")
        assert (status, json.loads(body)) == (503, {"ok": False, "broker": "not connected"})


def test_metrics_are_in_the_exposition_format() -> None:
    metrics.counter("outbox_test_http_total", "Counted by a test.", ["topic"]).labels("session.modified").inc(3)
    with _serving() as port:
        status, kind, body = _get(port, "/metrics")
    assert status == 200
    assert kind.startswith("text/plain")
    assert b'outbox_test_http_total{topic="session.modified"} 3.0' in body


def test_without_prometheus_client_metrics_say_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(metrics, "_prometheus", None)
    with _serving() as port:
        assert _get(port, "/metrics")[::2] == (501, b"install outbox[metrics]\n")


def test_any_other_path_lists_the_three() -> None:
    with _serving() as port:
        assert _get(port, "/")[::2] == (404, b"/livez /readyz /metrics\n")


def test_a_port_in_use_is_named() -> None:
    with (
        _serving() as port,
        pytest.raises(ConfigurationError, match=f"OUTBOX_HTTP_PORT=127.0.0.1:{port}: .*; choose a free port"),
    ):
        Server(f"127.0.0.1:{port}", live=_fine, ready=_fine)


def test_a_server_that_was_never_started_stops_and_frees_its_port() -> None:
    server = Server("127.0.0.1:0", live=_fine, ready=_fine)
    port = server.port
    server.stop()
    again = Server(f"127.0.0.1:{port}", live=_fine, ready=_fine)
    again.stop()


def test_a_client_that_hangs_up_is_nothing_to_talk_about(capfd: pytest.CaptureFixture[str]) -> None:
    gone = threading.Event()

    def live() -> Health:
        gone.wait(10)
        return _fine()

    with _serving(live) as port:
        client = socket.create_connection(("127.0.0.1", port))
        client.sendall(b"GET /livez HTTP/1.1\r\n\r\n")
        eventually(_answering, what="the request to be taken")
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))  # RST
        client.close()
        gone.set()
        eventually(lambda: not _answering(), what="the answer to fail")
    assert capfd.readouterr() == ("", "")


def _answering() -> bool:
    return any("process_request" in thread.name for thread in threading.enumerate())
