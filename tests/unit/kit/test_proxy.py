from __future__ import annotations

import contextlib
import socket
import socketserver
import threading
import time
from typing import TYPE_CHECKING

import pytest

from tests.kit.ports import accepts
from tests.kit.proxy import TO_CLIENT, TO_SERVER, Proxy
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from collections.abc import Iterator


class _Echo(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        try:
            while data := self.request.recv(65_536):
                self.request.sendall(data)
        except ConnectionError:
            pass


@pytest.fixture
def proxy() -> Iterator[Proxy]:
    """A proxy before a server that sends back what it gets."""
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), _Echo) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            with Proxy(server.server_address[1]) as proxy:
                yield proxy
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture
def client(proxy: Proxy) -> Iterator[socket.socket]:
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        client.sendall(b"hello")
        assert client.recv(100) == b"hello"
        yield client


def _silent(client: socket.socket, seconds: float = 0.1) -> bool:
    client.settimeout(seconds)
    try:
        client.recv(1, socket.MSG_PEEK)
    except TimeoutError:
        return True
    finally:
        client.settimeout(5)
    return False


def test_bytes_pass_both_ways_and_are_counted(proxy: Proxy, client: socket.socket) -> None:
    body = b"x" * 1_000_000
    threading.Thread(target=client.sendall, args=(body,)).start()
    received = 0
    while received < len(body):
        received += len(client.recv(65_536))
    assert proxy.passed(TO_SERVER) == proxy.passed(TO_CLIENT) == len(body) + 5


def test_an_end_of_file_passes(proxy: Proxy, client: socket.socket) -> None:
    client.shutdown(socket.SHUT_WR)
    assert client.recv(1) == b""
    eventually(lambda: proxy.connections == 0, what="the proxy to let go of the connection")


def test_a_delay_holds_each_direction(proxy: Proxy, client: socket.socket) -> None:
    proxy.delay(0.1)
    started = time.monotonic()
    client.sendall(b"slow")
    assert client.recv(10) == b"slow"
    assert time.monotonic() - started >= 0.2


def test_a_stall_to_the_client_lets_the_server_hear_and_nothing_is_lost(proxy: Proxy, client: socket.socket) -> None:
    proxy.stall(TO_CLIENT)
    client.sendall(b"held")
    eventually(lambda: proxy.passed(TO_SERVER) == 9, what="the server to get it")
    assert _silent(client)
    proxy.restore()
    assert client.recv(10) == b"held"


def test_a_stall_to_the_server_keeps_bytes_from_it(proxy: Proxy, client: socket.socket) -> None:
    proxy.stall(TO_SERVER)
    client.sendall(b"held")
    assert _silent(client)
    assert proxy.passed(TO_SERVER) == 5
    proxy.restore()
    assert client.recv(10) == b"held"


def test_a_black_hole_takes_new_connections_and_answers_nobody(proxy: Proxy, client: socket.socket) -> None:
    proxy.blackhole()
    client.sendall(b"lost")
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as late:
        late.sendall(b"also")
        assert _silent(client)
        assert _silent(late)
        proxy.restore()
        assert late.recv(10) == b"also"


def test_a_black_hole_can_be_reset(proxy: Proxy) -> None:
    proxy.blackhole()
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as late:
        eventually(lambda: proxy.connections == 1, what="the connection to be taken")
        proxy.reset()
        with pytest.raises(ConnectionResetError):
            late.recv(1)
    eventually(lambda: proxy.connections == 0, what="the proxy to let go of the connection")


def test_a_reset_is_seen_as_one_and_new_connections_are_served(proxy: Proxy, client: socket.socket) -> None:
    proxy.reset()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        again.sendall(b"again")
        assert again.recv(10) == b"again"


@pytest.mark.parametrize("direction", [TO_SERVER, TO_CLIENT])
def test_a_cut_lets_exactly_that_many_bytes_pass(proxy: Proxy, client: socket.socket, direction: object) -> None:
    way = TO_SERVER if direction is TO_SERVER else TO_CLIENT
    before = proxy.passed(way)
    proxy.cut_after(3, way)
    client.sendall(b"abcdef")
    received = b""
    while chunk := _received(client):
        received += chunk
    # Cut on the way to the server, the echo of the first bytes may or may not make it back before the end.
    assert received == b"abc" if way is TO_CLIENT else b"abc".startswith(received)
    assert proxy.passed(way) == before + 3
    with socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as again:
        again.sendall(b"uncut")
        assert again.recv(10) == b"uncut"


def _received(client: socket.socket) -> bytes:
    try:
        return client.recv(10)
    except ConnectionError:
        return b""


def test_a_cut_counts_over_several_chunks(proxy: Proxy, client: socket.socket) -> None:
    proxy.cut_after(6, TO_CLIENT)
    for part in (b"ab", b"cd"):
        client.sendall(part)
        assert client.recv(10) == part
    client.sendall(b"efg")
    assert client.recv(10) == b"ef"
    assert _received(client) == b""


def test_refusing_is_as_if_nothing_listened_until_it_is_restored(proxy: Proxy, client: socket.socket) -> None:
    proxy.refuse()
    with pytest.raises(ConnectionResetError):
        client.recv(1)
    assert not accepts(proxy.port)
    proxy.restore()
    assert accepts(proxy.port)


def test_a_dead_server_resets_the_client() -> None:
    # Whichever reaches the client first: the reset, which may come before connect() has returned, or the end after it.
    reset = contextlib.suppress(ConnectionResetError)
    with Proxy(_closed_port()) as proxy, reset, socket.create_connection(("127.0.0.1", proxy.port), timeout=5) as client:
        assert _received(client) == b""


def _closed_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
