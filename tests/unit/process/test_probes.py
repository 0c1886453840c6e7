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

from outbox.errors import ConfigurationError
from outbox.process import metrics
from outbox.process.probes import Health, Server
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
        assert _get(port, "/metrics")[::2] == (501, b"pip install 'flask-outbox[metrics]'\n")


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


# --- whoever can reach it ------------------------------------------------------------------------------------------------


def _connected(port: int, count: int) -> list[socket.socket]:
    return [socket.create_connection(("127.0.0.1", port), timeout=10) for _ in range(count)]


def test_of_many_clients_that_say_nothing_few_are_kept_and_the_others_refused_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.process.probes._REQUEST_SECONDS", 60.0)
    with _serving() as port:
        clients = _connected(port, 40)
        assert clients[-1].recv(1) == b""
        assert sum("process_request" in thread.name for thread in threading.enumerate()) == 16
        for client in clients:
            client.close()
        eventually(lambda: _get_or_none(port) == 200, what="a place to be free again")


def _get_or_none(port: int) -> int | None:
    try:
        return _get(port, "/livez")[0]
    except OSError:
        return None


def test_a_client_that_sends_a_byte_now_and_then_has_one_deadline_for_all_of_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("outbox.process.probes._REQUEST_SECONDS", 0.5)
    with _serving() as port:
        (client,) = _connected(port, 1)

        def send_a_byte() -> bool:
            try:
                client.sendall(b"G")
            except OSError:
                return True
            return False

        with client:
            eventually(send_a_byte, what="the connection to be closed", interval=0.1)


def test_after_a_failed_accept_there_is_a_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    attempts = []

    def fail(_: object) -> None:
        attempts.append(1)
        raise OSError(24, "Too many open files")

    with _serving() as port:
        monkeypatch.setattr("socketserver.TCPServer.get_request", fail)
        (client,) = _connected(port, 1)  # it stands in the queue: the listener is readable all the time
        with client:
            eventually(lambda: len(attempts) >= 3, what="three attempts")
        assert len(attempts) < 20  # it would be thousands
        monkeypatch.undo()
        assert _get(port, "/livez")[0] == 200
        client.close()


def test_head_answers_as_get_without_a_body_and_no_version_is_told() -> None:
    with _serving() as port:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        connection.request("HEAD", "/livez")
        response = connection.getresponse()
        assert (response.status, response.read(), response.headers["Server"]) == (200, b"", "outbox")
        assert int(response.headers["Content-Length"]) > 0
        connection.close()


def test_an_address_may_be_one_of_ipv6() -> None:
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6")
    server = Server("[::1]:0", live=_fine, ready=_fine)
    server.start()
    with socket.create_connection(("::1", server.port), timeout=10) as client:
        client.sendall(b"GET /livez HTTP/1.0\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.0 200")
    server.stop()
