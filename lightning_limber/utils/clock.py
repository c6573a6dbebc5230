"""Where the time of a probe goes."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """Adds up seconds by name, without those of another name inside.

    On CUDA they are the host's: work is queued, not waited for.
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._inside = 0.0

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start, before, self._inside = time.perf_counter(), self._inside, 0.0
        yield
        spent = time.perf_counter() - start
        self.seconds[name] += spent - self._inside
        self._inside = before + spent

    def take(self) -> dict[str, float]:
        """The seconds by name since the last call."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken
