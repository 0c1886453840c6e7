"""Bodies that are too much for memory: a file without a name keeps them while they wait."""

from __future__ import annotations

import errno
import os
import random
import tempfile
import threading
from collections import deque
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import pytest

from outbox.consumer import spool
from outbox.consumer.delivery import again, read, slim, spooled
from outbox.consumer.spool import Spool
from outbox.message import cloud_event
from tests.kit.consuming import Desk, Recorder, message, running, settings_for
from tests.kit.waiting import eventually

if TYPE_CHECKING:
    from outbox.consumer.delivery import Arrival

LARGE = b'{"number":1,"filler":"' + b"x" * 100_000 + b'"}'


def large(body: bytes = LARGE) -> Arrival:
    return slim(read(cloud_event(message(body=body))))


def test_a_body_comes_out_as_it_went_in() -> None:
    before = large()
    after = spooled(before, Spool())
    assert (after.body, after.size, after.identity) == (b"", len(before.body), before.identity)
    assert after.slim
    restored = again(after)
    assert restored.body == before.body
    assert restored.message is not None
    assert restored.message.data["number"] == 1


def test_a_body_that_can_not_be_read_keeps_its_bytes_and_its_identity() -> None:
    before = read(b"\xff" * 100_000)
    after = again(spooled(before, Spool()))
    assert (after.body, after.identity, after.problem) == (before.body, before.identity, before.problem)


def test_a_small_body_stays_in_memory() -> None:
    small = read(cloud_event(message(1)))
    assert spooled(small, Spool()) is small


def test_whatever_comes_and_goes_each_body_is_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool, "_BLOCK_BYTES", 64)
    rng, file = random.Random(1), Spool()
    kept: deque[tuple[bytes, Any]] = deque()
    for _ in range(500):
        body = rng.randbytes(rng.choice([0, 1, 63, 64, 65, 1000]))
        kept.append((body, file.put(body)))
        rng.shuffle(kept)
        while len(kept) > 20:
            kept.pop()
        assert all(handle.read() == body for body, handle in kept)
    assert file._blocks <= 30 * 16  # the room of what is gone is used again


def test_the_disk_has_its_room_back_when_nothing_is_left() -> None:
    file = Spool()
    kept = file.put(LARGE)
    assert kept is not None
    assert file._file is not None
    file.tidy()
    assert kept.read() == LARGE
    del kept
    file.tidy()
    assert file._file is None


def test_the_file_has_no_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    kept = Spool().put(LARGE)
    assert list(tmp_path.iterdir()) == []
    assert kept is not None
    assert kept.read() == LARGE  # also when its spool is gone, with the connection


def test_where_the_disk_is_full_bodies_stay_in_memory_and_it_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> NoReturn:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "pwrite", full)
    before, file = large(), Spool()
    assert [spooled(before, file) for _ in range(3)] == [before] * 3
    (said,) = caplog.messages
    assert "No space left on device" in said
    assert "xxx" not in said


def test_a_service_applies_what_went_through_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broker_url: str, sqlite_url: str
) -> None:
    monkeypatch.setattr(spool, "MEMORY_BYTES", 300_000)
    go_on, in_hand, put = threading.Event(), threading.Event(), Spool.put
    spools = set()

    def count(self: Spool, body: bytes) -> Any:
        spools.add(self)
        return put(self, body)

    def hold(_message: Any, _session: Any) -> None:
        in_hand.set()
        go_on.wait(20)

    monkeypatch.setattr(Spool, "put", count)
    recorder = Recorder(before=hold)
    with running(recorder.service, settings_for(broker_url, sqlite_url)) as service:
        bodies = [LARGE.replace(b"1", str(number).encode(), 1) for number in range(10)]
        Desk(broker_url).publish(*(message(key="a", sequence=number + 1, body=body) for number, body in enumerate(bodies)))
        assert in_hand.wait(20)
        (file,) = eventually(lambda: spools, what="a body to go into the file")
        eventually(lambda: file._blocks == 8 * 2, what="eight of ten to be there")
        go_on.set()
        eventually(lambda: recorder.numbers(service.engine, "a") == list(range(10)), 20, "all to be applied")
        eventually(lambda: file._file is None, what="the file to be gone")
