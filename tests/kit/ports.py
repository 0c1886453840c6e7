"""TCP ports for private servers, which keep theirs over a restart."""

from __future__ import annotations

import random
import socket

# Below the range from which systems take the ports of outgoing connections (Linux: 32768, macOS: 49152): otherwise any
# client on this machine may take the port of a server while a test has it stopped.
_FIRST, _LAST = 15_000, 31_999
_given: set[int] = set()
# Not the shared generator: Hypothesis and tests seed that one, and two runs on one machine would draw the same ports.
_draw = random.SystemRandom()


def free_port() -> int:
    """A loopback port nobody listens on, never given twice in one run."""
    for _ in range(1000):
        port = _draw.randint(_FIRST, _LAST)
        if port not in _given and not _taken(port):
            _given.add(port)
            return port
    raise AssertionError(f"no free TCP port between {_FIRST} and {_LAST} on 127.0.0.1")


def _taken(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return True
    return False


def accepts(port: int) -> bool:
    """Whether something takes connections on *port* of 127.0.0.1."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=1):
            return True
    except OSError:
        return False
