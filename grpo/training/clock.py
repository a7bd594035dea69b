"""Measures the durations of a step's phases."""

from __future__ import annotations

import time


class Clock:
    """Adds up the seconds between calls of `lap`, by name of the phase, in `laps`."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self.laps: dict[str, float] = {}

    def lap(self, name: str) -> None:
        now = time.perf_counter()
        self.laps[name] = self.laps.get(name, 0.0) + now - self._last
        self._last = now
