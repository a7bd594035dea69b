"""Where processes of tests run. Imported before anything that begins a thread."""

import os


def _keep_to_one_core() -> None:
    """Where there are as many processes of tests as cores, let each have a core for itself, and let no thread that is
    woken take it from another at once.

    MLX hands each operation on a CPU to a thread, and tests have small ones: the two threads of a process took turns
    for every operation, up to 100,000 times a second: a fourth of all processor time. What asks for the number
    of cores is told that of the machine.
    """
    number, count = os.environ.get("PYTEST_XDIST_WORKER", "")[2:], os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1")
    if not hasattr(os, "sched_setaffinity") or not number:
        return
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == int(count) > 1:
        os.sched_setaffinity(0, {cores[int(number)]})
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
        os.sched_getaffinity = lambda _: set(cores)


_keep_to_one_core()
