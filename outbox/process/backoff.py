"""How long to wait before trying again. Pure: the caller brings the random numbers and the clock."""

from __future__ import annotations

import random
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential growth with full jitter: attempt *n* waits between 0 and min(`maximum`, `base` * 2**(n-1)) seconds.

    Full jitter because many relays and services lose the same server at the same instant; anything narrower brings
    them back in waves.
    """

    base_seconds: float = 1.0
    maximum_seconds: float = 300.0

    def ceiling(self, attempt: int) -> float:
        """Return the longest wait before *attempt* (counted from 1) is repeated."""
        exponent = min(max(attempt, 1) - 1, 60)  # 2**60 is past every maximum; more would only overflow
        return min(self.maximum_seconds, self.base_seconds * 2.0**exponent)

    def wait(self, attempt: int, rng: random.Random) -> float:
        """Return the seconds to wait after *attempt* failed."""
        return rng.uniform(0.0, self.ceiling(attempt))
