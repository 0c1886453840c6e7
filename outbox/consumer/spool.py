"""A file without a name for bodies that wait and are too much for memory; it is gone with its process.

RabbitMQ bounds what a service has in hand by count alone (`CONSUMER_PREFETCH`), and a message may have megabytes. The
receiving thread puts bodies in, workers read them, and the room of one is free again when nobody refers to it any more.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from typing import IO

from outbox.process.logs import say

log = logging.getLogger(__name__)

#: Bodies in hand take so much memory; those beyond it are put into the file.
MEMORY_BYTES = 64 * 1024 * 1024
#: Bodies of any size find room in blocks that others have left.
_BLOCK_BYTES = 64 * 1024


class Spooled:
    """A body in the file."""

    __slots__ = ("_blocks", "_file", "_freed", "size")

    def __init__(self, file: IO[bytes], blocks: list[int], size: int, freed: deque[list[int]]) -> None:
        self.size = size
        self._file = file
        self._blocks = blocks
        self._freed = freed

    def read(self) -> bytes:
        """Return the body; from any thread."""
        number = self._file.fileno()
        blocks = (os.pread(number, _BLOCK_BYTES, block * _BLOCK_BYTES) for block in self._blocks)
        body = b"".join(blocks)[: self.size]
        if len(body) < self.size:
            raise OSError(f"{len(body)} of {self.size} bytes are left in a temporary file")
        return body

    def __del__(self) -> None:
        self._freed.append(self._blocks)  # in whatever thread: no lock, and an append is one step


class Spool:
    """The file, made when it is needed; for one thread."""

    def __init__(self) -> None:
        self._file: IO[bytes] | None = None
        self._free: list[int] = []
        self._blocks = 0
        self._freed: deque[list[int]] = deque()
        self._complained = False

    def put(self, body: bytes) -> Spooled | None:
        """Return *body* as it can be read again; None where the disk has no room, which is said once."""
        self.tidy()
        blocks = self._room(-(-len(body) // _BLOCK_BYTES))
        try:
            # No `with`: it lives as long as the bodies in it.
            file = self._file = self._file or tempfile.TemporaryFile(prefix="outbox-")  # noqa: SIM115
            for position, block in enumerate(blocks):
                piece = memoryview(body)[position * _BLOCK_BYTES :][:_BLOCK_BYTES]
                if os.pwrite(file.fileno(), piece, block * _BLOCK_BYTES) < len(piece):
                    raise OSError(f"only a part of {len(piece)} bytes was written")
        except OSError as error:
            self._free.extend(blocks)
            self._complain(error)
            return None
        self._complained = False
        return Spooled(file, blocks, len(body), self._freed)

    def _room(self, count: int) -> list[int]:
        missing = count - len(self._free)
        if missing > 0:
            self._free.extend(range(self._blocks, self._blocks + missing))
            self._blocks += missing
        return [self._free.pop() for _ in range(count)]

    def tidy(self) -> None:
        """Use again what was freed; the disk gets its room back when that is all of it."""
        while self._freed:
            self._free.extend(self._freed.popleft())
        if self._file is not None and len(self._free) == self._blocks:
            self._file.close()
            self._file, self._free, self._blocks = None, [], 0

    def _complain(self, error: OSError) -> None:
        if self._complained:
            return
        self._complained = True
        sentence = (
            f"messages in hand are larger than {MEMORY_BYTES >> 20} MiB together, and no more go into a temporary file "
            f"({error}); they stay in memory: make room in TMPDIR, or lower CONSUMER_PREFETCH"
        )
        say(log, logging.WARNING, "consumer.spool_full", sentence)
