"""Places where a test can make a process die, stop or fail: between any two steps that matter.

`OUTBOX_FAILPOINTS="R3=kill@2,K4=raise"` arms them: the second time R3 is reached the process kills itself, the first time
K4 is reached it raises. Commands arm them at start; unarmed, a failpoint is one look at an empty dictionary.

| action | what happens there |
| --- | --- |
| `kill` | SIGKILL to the own process |
| `stop` | SIGSTOP to the own process, until somebody sends SIGCONT |
| `raise` | `FailpointReached` |
| `block` | waits for as long as the process lives |
"""

from __future__ import annotations

import os
import re
import signal
import threading
from typing import TYPE_CHECKING

from outbox.errors import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Mapping

ACTIONS = ("kill", "stop", "raise", "block")


class FailpointReached(Exception):
    """Raised by an armed failpoint; deliberately no OutboxError, so that no handler of ours mistakes it for one."""


_armed: dict[str, tuple[str, int]] = {}


def arm(environ: Mapping[str, str]) -> None:
    """Read `OUTBOX_FAILPOINTS` from *environ*; without it, disarm all."""
    _armed.clear()
    for item in filter(None, environ.get("OUTBOX_FAILPOINTS", "").split(",")):
        name, _, rest = item.partition("=")
        action, _, count = rest.partition("@")
        if not name.strip() or action not in ACTIONS or not re.fullmatch(r"[1-9][0-9]{0,8}", count or "1"):
            raise ConfigurationError(f"OUTBOX_FAILPOINTS: {item!r} is not NAME=ACTION[@COUNT] with one of {', '.join(ACTIONS)}")
        _armed[name.strip()] = (action, int(count or "1"))


def armed(name: str) -> bool:
    """Say whether something would still happen at *name*: for places that have to be made before they can be reached."""
    return name in _armed


def reached(name: str) -> None:
    """Say that the code is at *name*; does nothing unless that failpoint is armed and its count is used up."""
    if not _armed or name not in _armed:
        return
    action, remaining = _armed[name]
    if remaining > 1:
        _armed[name] = (action, remaining - 1)
        return
    del _armed[name]
    if action == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif action == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
    elif action == "raise":
        raise FailpointReached(name)
    elif action == "block":
        threading.Event().wait()
