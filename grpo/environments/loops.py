"""Event loops in separate threads, with a clean shutdown."""

from __future__ import annotations

import asyncio
import contextlib
import threading

SECONDS = 0.5
"""How long to wait for a loop's canceled tasks to end."""


def run_in_thread(name: str) -> tuple[asyncio.AbstractEventLoop, threading.Thread]:
    """Start a loop that runs until `stop`, in a daemon thread. Returns the loop and the thread."""
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=_run, args=[loop], name=name, daemon=True)
    thread.start()
    return loop, thread


def stop(loop: asyncio.AbstractEventLoop, thread: threading.Thread, seconds: float | None = None) -> None:
    """Stop a loop, and wait for at most `seconds` until its thread has ended. May be called more than once."""
    with contextlib.suppress(RuntimeError):  # the loop is closed
        loop.call_soon_threadsafe(loop.stop)
    if thread is not threading.current_thread():  # a finalizer may run in any thread
        thread.join(seconds)


def _run(loop: asyncio.AbstractEventLoop) -> None:
    loop.run_forever()
    for task in (tasks := asyncio.all_tasks(loop)):
        task.cancel()
    if tasks:
        loop.run_until_complete(asyncio.wait(tasks, timeout=SECONDS))
    loop.close()
