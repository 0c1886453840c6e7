"""A TCP proxy between a client and a server, through which a test delays, stalls or cuts what passes.

    with Proxy(urlsplit(url).port) as proxy:
        client = connect(f"amqp://guest:guest@127.0.0.1:{proxy.port}/")
        proxy.cut_after(0, TO_CLIENT)       # whatever the server says next is lost, with the connection

Every order holds for open and new connections, and is in force when the call returns. Nothing that passed is taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import socket
import struct
import threading
from typing import TYPE_CHECKING, TypeVar

from tests.kit.ports import free_port

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

T = TypeVar("T")
_CHUNK_BYTES = 65_536
# Closing with this option and a timeout of zero sends RST instead of FIN.
_NO_LINGER = struct.pack("ii", 1, 0)


class Direction(enum.Enum):
    """Which way bytes flow."""

    TO_SERVER = "to the server"
    TO_CLIENT = "to the client"


class _Cut(Exception):
    """The byte came that cut_after() lets pass no more."""


TO_SERVER = Direction.TO_SERVER
TO_CLIENT = Direction.TO_CLIENT
BOTH = (TO_SERVER, TO_CLIENT)


class Proxy:
    """Listens on `127.0.0.1:port` and forwards to *upstream_port*, in a thread of its own."""

    def __init__(self, upstream_port: int, upstream_host: str = "127.0.0.1") -> None:
        self.port = free_port()
        self._upstream = (upstream_host, upstream_port)
        self._passed = dict.fromkeys(Direction, 0)
        self._open = {direction: asyncio.Event() for direction in Direction}
        self._delay_seconds = 0.0
        self._budgets: dict[Direction, int] = {}
        self._writers: set[asyncio.StreamWriter] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"proxy-{self.port}", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        self.restore()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        asyncio.run_coroutine_threadsafe(self._shut(), self._loop).result(10)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(10)
        self._loop.close()

    @property
    def connections(self) -> int:
        """How many clients are connected."""
        return self._now(lambda: len(self._tasks))

    def passed(self, direction: Direction) -> int:
        """Bytes forwarded so far."""
        return self._now(lambda: self._passed[direction])

    def restore(self) -> None:
        """Forward everything again, also what was stalled, as a network does that comes back."""

        async def heal() -> None:
            self._delay_seconds = 0.0
            self._budgets.clear()
            for direction in BOTH:
                self._open[direction].set()
            if self._server is None:
                self._server = await asyncio.start_server(self._accepted, "127.0.0.1", self.port)

        asyncio.run_coroutine_threadsafe(heal(), self._loop).result(10)

    def delay(self, seconds: float) -> None:
        """Hold each chunk that long, in both directions, before it passes."""

        def slow() -> None:
            self._delay_seconds = seconds

        self._now(slow)

    def stall(self, direction: Direction) -> None:
        """Let nothing pass in *direction*; the other one goes on. Nobody is told."""
        self._now(self._open[direction].clear)

    def blackhole(self) -> None:
        """Let nothing pass in either direction; new connections are taken and hang."""
        for direction in BOTH:
            self.stall(direction)

    def cut_after(self, count: int, direction: Direction) -> None:
        """Let *count* more bytes pass in *direction*, exactly, and close the connection that brings one more; once.

        Closed, not reset: a reset may overtake the last of those bytes.
        """

        def limit() -> None:
            self._budgets[direction] = count

        self._now(limit)

    def reset(self) -> None:
        """Reset (RST) every open connection, on both sides; new ones are served."""
        self._now(self._abort_all)

    def refuse(self) -> None:
        """Reset every connection and refuse new ones, as if nothing listened; until restore()."""

        self._now(self._stop_listening)

    def _now(self, change: Callable[[], T]) -> T:
        """Run *change* in the proxy's thread, between two chunks, and wait until it is done."""

        async def changed() -> T:
            return change()

        return asyncio.run_coroutine_threadsafe(changed(), self._loop).result(10)

    def _accepted(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None:  # the last one before it stopped listening
            _abort(writer)
            return
        task = self._loop.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, client_reader: asyncio.StreamReader, client_writer: asyncio.StreamWriter) -> None:
        pair = [client_writer]
        self._writers.add(client_writer)
        try:
            await self._open[TO_SERVER].wait()
            server_reader, server_writer = await asyncio.open_connection(*self._upstream)
            pair.append(server_writer)
            self._writers.add(server_writer)
            async with asyncio.TaskGroup() as pumps:
                pumps.create_task(self._pump(client_reader, server_writer, TO_SERVER))
                pumps.create_task(self._pump(server_reader, client_writer, TO_CLIENT))
        except* OSError:  # one side is gone: the other learns it by a reset, as it would without a proxy
            for writer in pair:
                _abort(writer)
        except* _Cut:
            pass
        finally:
            for writer in pair:
                self._writers.discard(writer)
                writer.close()

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, direction: Direction) -> None:
        while chunk := await reader.read(_CHUNK_BYTES):
            if self._delay_seconds:
                await asyncio.sleep(self._delay_seconds)
            await self._open[direction].wait()
            allowed = self._within_budget(chunk, direction)
            self._passed[direction] += len(allowed)
            writer.write(allowed)
            await writer.drain()
            if len(allowed) < len(chunk):
                raise _Cut
        await self._open[direction].wait()
        with contextlib.suppress(OSError):
            writer.write_eof()

    def _within_budget(self, chunk: bytes, direction: Direction) -> bytes:
        """What of *chunk* may pass before the cut; all of it where none is ordered."""
        budget = self._budgets.pop(direction, None)
        if budget is None:
            return chunk
        if len(chunk) <= budget:
            self._budgets[direction] = budget - len(chunk)
        return chunk[:budget]

    def _stop_listening(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.close()
        self._abort_all()

    def _abort_all(self) -> None:
        for writer in self._writers:
            _abort(writer)
        for task in self._tasks:
            task.cancel()

    async def _shut(self) -> None:
        self._stop_listening()
        # Not only our own tasks: asyncio has one for a connection that is just being taken.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)


def _abort(writer: asyncio.StreamWriter) -> None:
    raw = writer.get_extra_info("socket")
    if raw is not None and raw.fileno() != -1:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _NO_LINGER)
    writer.transport.abort()
