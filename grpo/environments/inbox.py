"""What other threads send to a coroutine that takes its turns with the generator."""

from __future__ import annotations

from collections import deque
from threading import Lock
from typing import Generic, TypeVar

from grpo.environments.scheduler import Outside, Scheduler

Letter = TypeVar("Letter")


class Inbox(Generic[Letter]):
    """One job takes from it, in the order in which things came.

    While the inbox is `patient`, nothing that decodes is held up for what may still come. It is for jobs of which a row
    decodes: whoever sends waits for that row, so there is nothing to be punctual about.
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
        """Send something, from any thread. Returns whether the inbox is still open: otherwise nobody will take it."""
        with self._lock:
            if self._closed:
                return False
            self._items.append(item)
            if self._gate is not None:
                self._jobs.happened(self._gate)
            return True

    async def next(self) -> Letter:
        """The next thing, once it has come."""
        with self._lock:
            if self._items:
                return self._items.popleft()
            gate = self._gate = self._jobs.expect(Outside(self._patient))
        await gate
        with self._lock:
            self._gate = None
            return self._items.popleft()

    def close(self) -> list[Letter]:
        """Take nothing any more. Returns what had come and was not taken."""
        with self._lock:
            self._closed = True
            left = list(self._items)
            self._items.clear()
        return left
