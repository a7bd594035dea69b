"""A queue through which other threads send items to a coroutine of the scheduler."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import Generic, TypeVar

from grpo.environments.scheduler import Outside, Scheduler

Letter = TypeVar("Letter")


class Inbox(Generic[Letter]):
    """A first-in, first-out queue with one reader, which is a job of the scheduler.

    While the inbox is `patient`, decoding does not pause for items that may still come. Set it while a row of the job
    decodes: the sender waits for that row, so no item can be due.
    """

    def __init__(self, jobs: Scheduler) -> None:
        self._jobs, self._lock = jobs, Lock()
        self._items: deque[Letter] = deque()
        self._gate: Outside | None = None
        self._patient = self._closed = False

    @property
    def patient(self) -> bool:
        return self._patient

    @patient.setter
    def patient(self, patient: bool) -> None:
        self._patient = patient
        if self._gate is not None:
            self._gate.patient = patient

    def put(self, item: Letter) -> bool:
        """Add an item, from any thread. Returns False, and drops the item, if the inbox is closed."""
        with self._lock:
            if self._closed:
                return False
            self._items.append(item)
            if self._gate is not None:
                self._jobs.happened(self._gate)
            return True

    async def next(self) -> Letter:
        """Wait for the next item and return it."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            gate = self._gate = self._jobs.expect(Outside(self._patient))
        await gate
        with self._lock:
            self._gate = None
            return self._items.popleft()

    def close(self) -> list[Letter]:
        """Close the inbox. Returns the items that were not read."""
        with self._lock:
            self._closed = True
            left = list(self._items)
            self._items.clear()
        return left
