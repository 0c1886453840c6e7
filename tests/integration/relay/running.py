"""A relay that runs by itself, in a thread, and is stopped in order."""

from __future__ import annotations

import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

    from outbox.relay.daemon import Relay


@contextmanager
def running(relay: Relay, timeout: float = 20.0) -> Iterator[list[int]]:
    """Run *relay* while the block lasts, then stop it; its exit code is in the list afterwards."""
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(relay.run()), name="relay")
    thread.start()
    try:
        yield codes
    finally:
        relay.stop()
        thread.join(timeout)
        assert not thread.is_alive(), "the relay did not stop"
