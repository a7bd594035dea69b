"""Event loops in threads of their own, which end without a complaint."""

from __future__ import annotations

import asyncio
import contextlib
import threading

SECONDS = 0.5
"""For what still waits on a loop to end, once it is cancelled."""


def run_in_thread(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """A loop that runs until `stop`, and its thread. The thread does not keep Python from ending."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=[loop], name=name, daemon=True)
    thread.start()
    return loop, thread


def stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, seconds: float | None = None) -> None:
    """Stop a loop, and wait until its thread has ended, for at most `seconds`. Stopping again does nothing."""
    with contextlib.suppress(RuntimeError):  # it is closed
        loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # a finalizer runs in any thread
        thread.join(seconds)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    for task in (tasks := asyncio.all_tasks(loop)):
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=SECONDS))
    loop.close()
