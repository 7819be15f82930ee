"""How often something may happen: so many times at once after a pause, and at a rate in the long run."""

import time
from collections.abc import Callable


class Bucket:
    """Full at first."""

    def __init__(self, size: int, per_second: float, now: Callable[[], float] = time.monotonic):
        self.size, self.per_second, self.now = size, per_second, now
        self.left, self.since = float(size), now()

    def take(self) -> float:
        """0 if one was there, which is taken; else the seconds until there is one."""
        now = self.now()
        self.left, self.since = min(self.size, self.left + (now - self.since) * self.per_second), now
        if self.left < 1:
            return (1 - self.left) / self.per_second
        self.left -= 1
        return 0.0
