"""A service one of whose messages kills its process; run as `outbox consumer run tests.faults.crashing:service`."""

from __future__ import annotations

import os
import signal
from typing import Any

from tests.kit.consuming import Recorder

KILLER = 13


def _die(received: Any, _session: Any) -> None:
    if received.data["number"] == KILLER and "KILLER_IS_HARMLESS" not in os.environ:
        os.kill(os.getpid(), signal.SIGKILL)


recorder = Recorder(name="crashing", before=_die)
service = recorder.service
