"""The process in which environments live. Started as a script; it imports nothing of MLX.

Its first message says where things are, pickled: `{path, name, environment, tools, describes}`; the reply, what they
are. Then come requests, pickled, and replies in JSON, in any order: each has the number of its request. What is printed
goes to standard output and error; the messages have a socket of their own.
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
    """Serve requests until the trainer is gone."""
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    sys.path[:0] = [sys.argv[2]]  # where this package is
    from grpo.processes.channel import receive

    faulthandler.enable()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]  # or prints would come when it ends
    try:
        setup = pickle.loads(receive(channel))
    except ConnectionError:  # the trainer is gone before it began
        os._exit(0)
    sys.path[:] = setup["path"]
    reply = _Replies(channel)
    try:
        chairs, hello = _load(setup, reply)
    except BaseException as error:  # whatever their code does when it is imported
        reply({"error": _in_short(error)})
        return
    reply(hello)
    while True:
        try:
            request = pickle.loads(receive(channel))
        except ConnectionError:
            os._exit(0)  # threads that hang keep nothing alive
        chairs.handle(request)


class _Replies:
    """Sends replies, one at a time, from whatever thread. With nobody left to read them the process ends silently."""

    def __init__(self, channel: socket.socket) -> None:
        self._channel, self._lock, self._own = channel, threading.Lock(), os.getpid()

    def __call__(self, message: dict[str, Any]) -> None:
        from grpo.processes.channel import send

        if os.getpid() != self._own:  # a tool forked and returned twice: a second reply would pass for the next call's
            os._exit(0)
        text = json.dumps(message, default=str).encode()
        with self._lock:
            try:
                send(self._channel, text)
            except ConnectionError:
                os._exit(0)


def _load(setup: dict[str, Any], reply: _Replies) -> tuple[Any, dict[str, Any]]:
    from grpo.environments.streams import install

    install()  # before their files are imported
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
