"""How seldom a process notifies."""

from __future__ import annotations

from outbox.store.wakeup import Throttle


def test_a_notification_is_due_once_in_the_throttles_time() -> None:
    throttle = Throttle(seconds=5)
    assert [throttle.due(now) for now in (100.0, 100.1, 104.9, 105.0, 109.9, 200.0)] == [True, False, False, True, False, True]
