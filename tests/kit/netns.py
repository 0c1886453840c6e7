"""A second machine for half-open connections: a network namespace at the other end of a cable that can be pulled.

    with Machine() as machine:
        subprocess.Popen([*machine.inside, "psql", "-h", machine.outer_address, …])
        machine.pull()          # packets are lost both ways, and neither end is told: what a power cut looks like

A TCP proxy can't show this: its kernel answers keepalives whatever becomes of the real other end. Linux, root and `ip`
(iproute2) are needed; the addresses are reachable from this machine alone.
"""

from __future__ import annotations

import os
import random
import shutil
import subprocess
from typing import TYPE_CHECKING

from tests.kit.guardian import guardian
from tests.kit.server_process import ServerMissingError

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self

#: Nobody has it: what is sent there is thrown away by whoever receives it.
_NOBODY = "02:00:00:00:00:01"
# Not the shared generator, which tests seed: two runs on one machine would draw the same network.
_draw = random.SystemRandom()


class Machine:
    """A network namespace and a cable to it."""

    def __init__(self) -> None:
        number = _draw.randrange(1 << 14)
        self.name = f"outbox{os.getpid()}-{number}"
        third, fourth = divmod(number, 64)
        #: The four addresses of the cable.
        self.network = f"10.213.{third}.{fourth * 4}/30"
        #: This machine, seen from inside; and the other one.
        self.outer_address, self.inner_address = (f"10.213.{third}.{fourth * 4 + last}" for last in (1, 2))
        #: What a command that is to run inside begins with.
        self.inside = ("ip", "netns", "exec", self.name)
        self._outer, self._inner = f"ob{number}o", f"ob{number}i"

    def __enter__(self) -> Self:
        """Make it. Raises ServerMissingError where this machine can't."""
        programs()
        if os.geteuid() != 0:
            raise ServerMissingError("network namespaces need root: run the tests as root, in a container for example")
        try:
            _ip("netns", "add", self.name)
        except subprocess.CalledProcessError as error:
            raise ServerMissingError(f"network namespaces can't be made here: {error.stderr.strip()}") from error
        guardian().remove_namespace(self.name)
        _ip("link", "add", self._outer, "type", "veth", "peer", "name", self._inner, "netns", self.name)
        _ip("addr", "add", f"{self.outer_address}/30", "dev", self._outer)
        _ip("link", "set", self._outer, "up")
        self._ip_inside("addr", "add", f"{self.inner_address}/30", "dev", self._inner)
        self._ip_inside("link", "set", self._inner, "up")
        self._ip_inside("link", "set", "lo", "up")
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        _ip("netns", "del", self.name)

    def pull(self) -> None:
        """Lose every packet, both ways, silently; connections stay half-open."""
        # A link that is down would be noticed: its route goes, and senders are told.
        _ip("neigh", "replace", self.inner_address, "lladdr", _NOBODY, "dev", self._outer, "nud", "permanent")
        self._ip_inside("neigh", "replace", self.outer_address, "lladdr", _NOBODY, "dev", self._inner, "nud", "permanent")

    def plug(self) -> None:
        """Let packets pass again."""
        _ip("neigh", "del", self.inner_address, "dev", self._outer)
        self._ip_inside("neigh", "del", self.outer_address, "dev", self._inner)

    def _ip_inside(self, *arguments: str) -> None:
        _ip("-n", self.name, *arguments)


def programs() -> None:
    """Raise ServerMissingError where `ip` is missing."""
    if not shutil.which("ip"):
        raise ServerMissingError("no `ip` on this machine: install it (Debian: apt-get install iproute2)")


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, capture_output=True, text=True, timeout=30)
