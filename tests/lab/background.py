"""A part of the lab that goes on beside the faults, in a thread of its own."""

from __future__ import annotations

import threading
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from types import TracebackType
    from typing import Self


class Background:
    """Runs `work` from the beginning of its block until `stop`; a subclass says what that is."""

    def __init__(self) -> None:
        self.stopping = threading.Event()
        self._thread = threading.Thread(target=self.work, name=type(self).__name__, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.stop()

    def stop(self) -> None:
        """End it; returns when it has ended."""
        self.stopping.set()
        self._thread.join(30)

    def work(self) -> None:
        """Go on until `stopping` is set."""
        raise NotImplementedError
