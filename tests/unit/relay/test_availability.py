"""Whether the database answers, as a relay's probes see it."""

from __future__ import annotations

import sqlalchemy as sa

from outbox.relay.availability import Availability


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now


def test_a_call_that_hangs_is_complained_of_while_it_hangs() -> None:
    clock = Clock()
    database = Availability(clock)
    with database.attempt():
        clock.now += 9.0
        assert (database.in_use, database.complaint()) == (True, "")
        clock.now += 14.0
        assert (database.in_use, database.complaint()) == (True, "no answer for 23 s")
    assert (database.in_use, database.complaint()) == (False, "")


def test_a_failure_is_complained_of_until_a_call_works() -> None:
    database = Availability(Clock())
    with database.attempt():
        raise sa.exc.OperationalError("SELECT 1", {}, Exception("the server is gone"))
    assert database.complaint() == "the server is gone"
    with database.attempt():
        assert database.complaint() == "the server is gone"
    assert database.complaint() == ""
