"""Failpoints: silent unless armed, and then exactly at the count that was asked for."""

from __future__ import annotations

import signal
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest

from outbox.errors import ConfigurationError
from outbox.process import failpoints

if TYPE_CHECKING:
    from collections.abc import Iterator


@pytest.fixture(autouse=True)
def _disarmed() -> Iterator[None]:
    yield
    failpoints.arm({})


def test_an_unarmed_failpoint_does_nothing() -> None:
    failpoints.arm({})
    failpoints.reached("R1")


def test_a_failpoint_is_armed_until_it_has_acted() -> None:
    failpoints.arm({"OUTBOX_FAILPOINTS": "R2=raise@2"})
    assert not failpoints.armed("R1")
    failpoints.reached("R2")
    assert failpoints.armed("R2")
    with pytest.raises(failpoints.FailpointReached):
        failpoints.reached("R2")
    assert not failpoints.armed("R2")


def test_an_armed_failpoint_acts_once_at_its_count() -> None:
    failpoints.arm({"OUTBOX_FAILPOINTS": "R3=raise@3,K4=raise"})
    failpoints.reached("R3")
    failpoints.reached("R3")
    with pytest.raises(failpoints.FailpointReached, match="R3"):
        failpoints.reached("R3")
    failpoints.reached("R3")
    with pytest.raises(failpoints.FailpointReached, match="K4"):
        failpoints.reached("K4")


def test_arming_again_forgets_what_was_armed() -> None:
    failpoints.arm({"OUTBOX_FAILPOINTS": "R3=raise"})
    failpoints.arm({})
    failpoints.reached("R3")


@pytest.mark.parametrize("text", ["R3", "R3=", "R3=explode", "R3=kill@0", "R3=kill@x", "=kill", "R3=kill@²"])
def test_a_text_that_is_none_is_refused_with_the_shape(text: str) -> None:
    with pytest.raises(ConfigurationError, match=r"NAME=ACTION\[@COUNT\] with one of kill, stop, raise, block"):
        failpoints.arm({"OUTBOX_FAILPOINTS": text})


def test_kill_ends_the_process_at_once() -> None:
    program = (
        "import os; from outbox.process import failpoints; failpoints.arm(os.environ)\n"
        "try: failpoints.reached('R5')\n"
        "finally: print('cleaned up')"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], env={"OUTBOX_FAILPOINTS": "R5=kill"}, capture_output=True, text=True, timeout=30
    )
    assert done.returncode == -signal.SIGKILL
    assert done.stdout == ""
