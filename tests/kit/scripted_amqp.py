"""An AMQP 0-9-1 server that does to each publish what a test tells it: the answers a real broker gives once in a year.

    with ScriptedAmqp() as server:                  # takes everything and says nothing
        broker = RabbitBroker(server.url, exchange="events")
        ...
        session = server.session(1)                 # the first connection
        session.wait_for(3)                         # three publishes
        session.ack(3, multiple=True)

`ScriptedAmqp(script)` calls `script(session, publish)` for each publish instead. It speaks pika's frame codec, in threads.
"""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from pika import frame, spec

from tests.kit.ports import free_port
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable
    from types import TracebackType
    from typing import Self

_CHANNEL = 1
_FRAME_MAX = 4096  # the least AMQP allows: bodies come in parts


@dataclass(frozen=True, slots=True)
class Publish:
    """One message as the server read it."""

    tag: int
    method: Any
    properties: Any
    body: bytes

    @property
    def id(self) -> str:
        """The message id."""
        return str(self.properties.message_id)


class Session:
    """One connection. The methods may be called from any thread."""

    def __init__(self, server: ScriptedAmqp, client: socket.socket) -> None:
        self._server = server
        self._socket = client
        self._buffer = b""
        self._lock = threading.Lock()
        self._over = False
        #: Set while everything that was read has been dealt with.
        self._idle = threading.Event()
        #: What was published, in order; the n-th has delivery tag n.
        self.publishes: list[Publish] = []
        #: The types of the methods the client sent.
        self.methods: list[type] = []
        #: While true, the server reads and never answers by itself.
        self.deaf = False
        #: Set when the client is gone.
        self.ended = threading.Event()

    # --- what a test lets the broker do -----------------------------------------------------------------------------------

    def ack(self, tag: int, *, multiple: bool = False) -> None:
        self._say(spec.Basic.Ack(tag, multiple))

    def nack(self, tag: int, *, multiple: bool = False) -> None:
        self._say(spec.Basic.Nack(tag, multiple))

    def give_back(self, publish: Publish) -> None:
        """Send `basic.return`; the ack that must follow is the script's to send."""
        method = spec.Basic.Return(312, "NO_ROUTE", publish.method.exchange, publish.method.routing_key)
        self.send(
            frame.Method(_CHANNEL, method).marshal(),
            frame.Header(_CHANNEL, len(publish.body), publish.properties).marshal(),
            *(
                frame.Body(_CHANNEL, publish.body[start : start + _FRAME_MAX - 8]).marshal()
                for start in range(0, len(publish.body), _FRAME_MAX - 8)
            ),
        )

    def close_channel(self, code: int, words: str) -> None:
        self._say(spec.Channel.Close(code, words, 60, 40))

    def close_connection(self, code: int, words: str) -> None:
        self._say(spec.Connection.Close(code, words, 0, 0), channel=0)

    def block(self, reason: str) -> None:
        self._say(spec.Connection.Blocked(reason), channel=0)

    def unblock(self) -> None:
        self._say(spec.Connection.Unblocked(), channel=0)

    def deliver(self) -> None:
        """Send a method no publisher ever asked for."""
        self._say(spec.Basic.Deliver("nobody", 1, False, "", ""))

    def reset(self) -> None:
        """Close with RST instead of FIN."""
        with contextlib.suppress(OSError):
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.hang_up()

    def hang_up(self) -> None:
        """Close the TCP connection without a word."""
        self._over = True
        with contextlib.suppress(OSError):
            self._socket.shutdown(socket.SHUT_RD)  # wakes our own reader, which closes

    def send(self, *frames: bytes) -> None:
        """Send bytes as they are; a client that is gone hears nothing."""
        with self._lock, contextlib.suppress(OSError):
            if not self._over:
                self._socket.sendall(b"".join(frames))

    def wait_for_method(self, method: type) -> None:
        """Return when the client has sent *method*."""
        eventually(lambda: method in self.methods, what=method.__name__, interval=0.002)

    def wait_for(self, count: int) -> list[Publish]:
        """Return the publishes when there are *count* of them."""
        eventually(lambda: len(self.publishes) >= count, what=f"{count} publishes", interval=0.002)
        return self.publishes

    def read_everything(self) -> None:
        """Return when nothing that the client wrote so far is unread."""

        def nothing_left() -> bool:  # in this order: what is no longer readable ended the idleness before it was taken
            return not select.select([self._socket], [], [], 0)[0] and self._idle.is_set()

        eventually(nothing_left, what="the server to read everything", interval=0.002)

    # --- the server's side of the protocol --------------------------------------------------------------------------------

    def serve(self) -> None:
        """Talk until one of the two hangs up."""
        with contextlib.suppress(OSError):
            if self._server.tls is not None:
                self._socket = self._server.tls.wrap_socket(self._socket, server_side=True)
            self._talk()
        with self._lock:
            self._socket.close()
        self.ended.set()

    def _talk(self) -> None:
        refusals = self._server.refusals
        if self._socket.recv(8) != b"AMQP\x00\x00\x09\x01":
            return
        capabilities = {"publisher_confirms": True, "basic.nack": True, "connection.blocked": True}
        self._say(spec.Connection.Start(0, 9, {"capabilities": capabilities}, b"PLAIN", b"en_US"), channel=0)
        while True:
            received = self._next()
            method = getattr(received, "method", None)
            self.methods.append(type(method))
            if self.deaf or type(method) in self._server.unanswered:
                continue
            if type(method) in refusals:
                code, words = refusals[type(method)]
                (self.close_connection if received.channel_number == 0 else self.close_channel)(code, words)
            elif type(method) in _REPLIES:
                if self._server.blocks_from_the_start and isinstance(method, spec.Channel.Open):
                    self.block("low on memory")
                self._say(_REPLIES[type(method)](), channel=received.channel_number)
            elif isinstance(method, spec.Basic.Publish):
                self._published(method)
            elif isinstance(method, spec.Connection.CloseOk):
                return

    def _published(self, method: Any) -> None:
        header = self._next()
        body = b""
        while len(body) < header.body_size:
            body += self._next().fragment
        publish = Publish(len(self.publishes) + 1, method, header.properties, body)
        self.publishes.append(publish)
        self._server.script(self, publish)

    def _next(self) -> Any:
        while not self._over:
            used, received = frame.decode_frame(self._buffer)
            if received is not None:
                self._buffer = self._buffer[used:]
                return received
            if self._server.tls is None:
                self._idle.set()
                select.select([self._socket], [], [])
                self._idle.clear()
            more = self._socket.recv(65536)
            if not more:
                break
            self._buffer += more
        raise ConnectionError

    def _say(self, method: Any, channel: int = _CHANNEL) -> None:
        self.send(frame.Method(channel, method).marshal())


_REPLIES: dict[type, Callable[[], Any]] = {
    spec.Connection.StartOk: lambda: spec.Connection.Tune(1, _FRAME_MAX, 0),
    spec.Connection.Open: spec.Connection.OpenOk,
    spec.Connection.Close: spec.Connection.CloseOk,
    spec.Channel.Open: spec.Channel.OpenOk,
    spec.Channel.Close: spec.Channel.CloseOk,
    spec.Exchange.Declare: spec.Exchange.DeclareOk,
    spec.Confirm.Select: spec.Confirm.SelectOk,
}


def silence(_session: Session, _publish: Publish) -> None:
    """Take everything and say nothing."""


def acknowledge(session: Session, publish: Publish) -> None:
    """Confirm each publish at once."""
    session.ack(publish.tag)


class SilentQueue:
    """A script: confirms each publish at once, save those of *topics*, as a quorum queue without a majority does.

    When 32 of them are unanswered it takes 200 more of any topic and then says nothing on that connection: RabbitMQ's flow
    control, `quorum_commands_soft_limit` and `credit_flow_default_credit`.
    """

    def __init__(self, *topics: str) -> None:
        self.topics = set(topics)
        self._withheld: list[tuple[Session, Publish]] = []
        self._stops_at: dict[Session, int] = {}
        self._lock = threading.Lock()

    def __call__(self, session: Session, publish: Publish) -> None:
        with self._lock:
            silent = publish.method.routing_key in self.topics
            if silent and sum(each is session for each, _ in self._withheld) == 31:
                self._stops_at[session] = publish.tag + 200
            if silent or publish.tag > self._stops_at.get(session, publish.tag):
                self._withheld.append((session, publish))
            else:
                session.ack(publish.tag)

    def heal(self) -> None:
        """Have the majority back: everything that was withheld is confirmed."""
        with self._lock:
            self.topics.clear()
            for session, publish in self._withheld:
                session.ack(publish.tag)
            self._withheld.clear()
            self._stops_at.clear()


class ScriptedAmqp:
    """Listens on `127.0.0.1:port` from `start` to `stop`; as a context manager, inside it."""

    def __init__(self, script: Callable[[Session, Publish], None] = silence, *, tls: ssl.SSLContext | None = None) -> None:
        """With *tls*, only the script may answer: a TLS connection is no matter for two threads."""
        self.port = free_port()
        self.url = f"amqp{'s' if tls else ''}://user:secret@127.0.0.1:{self.port}/%2F"
        self.script = script
        self.tls = tls
        #: Method of the client → code and words with which the server closes instead of answering it.
        self.refusals: dict[type, tuple[int, str]] = {}
        #: Methods of the client that get no reply.
        self.unanswered: set[type] = set()
        self.blocks_from_the_start = False
        self._sessions: list[Session] = []
        self._threads: list[threading.Thread] = []
        self._listener: socket.socket | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def start(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", self.port))
        self._run(self._accept, self._listener)

    def stop(self) -> None:
        """Reset every connection and refuse new ones."""
        if self._listener is not None:
            self._listener.shutdown(socket.SHUT_RDWR)
            self._listener.close()
            self._listener = None
        for session in self._sessions:
            session.reset()
        for thread in self._threads:
            thread.join(5)

    @property
    def connections(self) -> int:
        """How many connections were taken so far."""
        return len(self._sessions)

    def session(self, number: int, timeout: float = 5.0) -> Session:
        """Return the *number*-th connection, counted from 1, when it is there."""
        eventually(lambda: len(self._sessions) >= number, timeout, what=f"connection {number}", interval=0.002)
        return self._sessions[number - 1]

    def _accept(self, listener: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = listener.accept()
                client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                session = Session(self, client)
                self._sessions.append(session)
                self._run(session.serve)

    def _run(self, target: Callable[..., None], *arguments: Any) -> None:
        thread = threading.Thread(target=target, args=arguments, name=f"scripted-amqp-{self.port}", daemon=True)
        self._threads.append(thread)
        thread.start()
