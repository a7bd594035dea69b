"""The process in which environments live. It is started as a script and does not import MLX.

The first message, pickled, says what to load: `{path, name, environment, tools, describes}`. The reply describes what
was loaded. After that, requests are pickled and replies are JSON. Replies come in any order; each carries the number of
its request. Messages use a separate socket, so environments may print to standard output and error.
"""

import faulthandler
import json
import os
import pickle
import socket
import sys
import threading
from typing import Any


def main(descriptor: int) -> None:
    """Serve requests until the trainer exits."""
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    sys.path[:0] = [sys.argv[2]]  # the folder of this package
    from grpo.processes.channel import receive

    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or prints would only appear at exit
    try:
        setup = pickle.loads(receive(channel))
    except ConnectionError:  # the trainer exited before sending anything
        os._exit(0)
    sys.path[:] = setup["path"]
    reply = _Replies(channel)
    try:
        chairs, hello = _load(setup, reply)
    except BaseException as error:  # importing user code may raise anything
        reply({"error": _in_short(error)})
        return
    reply(hello)
    while True:
        try:
            request = pickle.loads(receive(channel))
        except ConnectionError:
            os._exit(0)  # do not wait for threads that hang
        chairs.handle(request)


class _Replies:
    """Sends replies, one at a time, from any thread. If the trainer is gone, the process exits silently."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._lock, self._own = channel, threading.Lock(), os.getpid()

    def __call__(self, message: dict[str, Any]) -> None:
        from grpo.processes.channel import send

        if os.getpid() != self._own:  # a tool forked and returned twice: the second reply would answer the next call
            os._exit(0)
        text = json.dumps(message, default=str).encode()
        with self._lock:
            try:
                send(self._channel, text)
            except ConnectionError:
                os._exit(0)


def _load(setup: dict[str, Any], reply: _Replies) -> tuple[Any, dict[str, Any]]:
    from grpo.environments.streams import install

    install()  # before user files are imported
    from grpo.environments.chairs import Chairs
    from grpo.environments.toolbox import Maker, Makers

    environment, tools = setup["environment"], setup["tools"]
    made = environment and Maker(environment[0].load(), environment[1])
    makers = [(located.load(), kwargs) for located, kwargs in tools]
    named = [Maker(function, kwargs, getattr(function, "__name__", "tool")) for function, kwargs in makers]
    chairs = Chairs(Makers(made, named), reply)
    return chairs, chairs.hello(setup["name"]) if setup["describes"] else {}


def _in_short(error: BaseException) -> str:
    from grpo.errors import UserError

    return str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
