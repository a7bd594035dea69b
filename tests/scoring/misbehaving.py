"""Reward functions that each misbehave in a way of their own, and one that does not."""

import ctypes
import json
import os
import signal
import struct
import sys
import threading
import time


def good(completions, **_):
    return [float(len(text)) for text in completions]


def raises(completions, **_):
    return [1 / (text == "nobody says this") for text in completions]


def segfaults(**_):
    ctypes.string_at(0)


def exits(**_):
    os._exit(3)


def killed(**_):
    os.kill(os.getpid(), 40)


class Unprintable(Exception):
    def __str__(self):
        raise ValueError


def complains(**_):
    raise Unprintable


def wrong_length(completions, **_):
    return [1.0] * (len(completions) + 1)


def nan(completions, **_):
    return [float("nan")] * len(completions)


def infinite(completions, **_):
    return [float("inf")] * len(completions)


def strings(completions, **_):
    return ["1.0"] * len(completions)


def prints(completions, **_):
    for _ in range(100):
        sys.stdout.write("x" * 1_000_000)
    return [1.0] * len(completions)


def threads(**_):
    while True:
        threading.Thread(target=time.sleep, args=(60,), daemon=True).start()


def globals_changed(completions, **_):
    import builtins
    import json

    json.dumps = builtins.len = lambda *_: "changed"
    os.chdir("/")
    os.environ.clear()
    sys.path.clear()
    sys.setrecursionlimit(60)
    return [1.0] * builtins.sum(1 for _ in completions)


def hangs(**_):
    time.sleep(60)


def hangs_for_good(**_):
    """Deaf to signals, and holding the interpreter's lock."""
    ctypes.PyDLL(None).sleep(60)


def closes_everything(**_):
    os.closerange(3, 1000)
    time.sleep(60)


def writes_noise(completions, **_):
    for descriptor in range(3, 100):
        try:
            os.write(descriptor, b"noise" * 100)
        except OSError:
            continue
    return [1.0] * len(completions)


def forks(completions, **_):
    """And both processes return."""
    os.fork()
    return [float(len(text)) for text in completions]


def out_of_memory(**_):
    """What the kernel does to the largest process."""
    os.kill(os.getpid(), signal.SIGKILL)


def writes_replies(completions, **_):
    """That look like those of a worker, and cannot be read."""
    reply = {"values": [1.0] * len(completions), "failures": {}, "extras": {}, "metrics": {}, "seconds": 10**400}
    _frame(json.dumps(reply | {"kind": "error"}).encode())


def writes_deep_replies(**_):
    _frame(b"[" * 200_000)


def _frame(message):
    for descriptor in range(3, 100):
        try:
            os.write(descriptor, struct.pack("!Q", len(message)) + message)
        except OSError:
            continue
    time.sleep(60)


def starts_a_process(**_):
    import subprocess

    with open(os.environ["GRPO_TEST_PIDS"], "a") as file:
        child = subprocess.Popen(["sleep", "60"])
        file.write(f"{os.getpid()} {child.pid}\n")
    time.sleep(60)


def sometimes(completions, **_):
    """By completion: a raise, a hang, a death, a good one."""
    acts = {"raise": lambda: 1 / 0, "hang": lambda: time.sleep(60), "die": lambda: os._exit(9), "good": lambda: 1.0}
    return [acts[text]() for text in completions]
