"""The process that runs one reward function. It is started as a script and does not import MLX.

The first message is the setup, pickled: `{path, located, kwargs, reading, cases}`. The reply says whether the function
is ready. Then the trainer sends pickled requests, and the worker sends one JSON reply per call, so that the trainer
always knows which call is under way. Messages use a socket; the function's prints go to standard output and error.
"""

import contextlib
import faulthandler
import json
import os
import pickle
import socket
import sys
from typing import Any


def main(descriptor: int) -> None:
    """Serve requests until the trainer closes the socket."""
    channel = socket.socket(fileno=descriptor)
    channel.set_inheritable(False)
    sys.path[:0] = [sys.argv[2]]  # the folder that contains this package
    from grpo.processes.channel import receive, send

    faulthandler.enable()
    setup = pickle.loads(receive(channel))
    sys.path[:] = setup["path"]

    def reply(message: dict[str, Any]) -> None:
        send(channel, json.dumps(message, default=str).encode())

    with contextlib.ExitStack() as stack:
        try:
            reward, hello = _load(setup, stack)
        except BaseException as error:  # the import runs the user's code, which may raise anything
            hello = {"error": _in_short(error)}
        reply(hello)
        if "error" not in hello:
            _serve(channel, reward, reply)


def _serve(channel: socket.socket, reward: Any, reply: Any) -> None:
    from grpo.processes.channel import receive

    while True:
        try:
            request = pickle.loads(receive(channel))
        except ConnectionError:
            return
        if "check" in request:
            reply({"problem": reward.problem(request["check"])})
        else:
            _score(reward, request, reply)
            with contextlib.suppress(Exception):  # the function may have closed or replaced it
                sys.stdout.flush()


def _load(setup: dict[str, Any], stack: contextlib.ExitStack) -> tuple[Any, dict[str, Any]]:
    """The reward, and the first reply's content; without `kwargs`, no reward, and the cases in the reply."""
    from grpo.plugins import Located
    from grpo.scoring.arguments import takes_environments
    from grpo.scoring.casefile import find_cases
    from grpo.scoring.contract import calls_of, is_paid
    from grpo.scoring.loading import load

    located = Located(*setup["located"])
    if setup["kwargs"] is not None:
        reward, file_settings = load(located, setup["kwargs"], **setup["reading"])
        return reward, {**file_settings, "environments": takes_environments(reward.function)}
    function = located.load()
    hello = {"calls": calls_of(function), "paid": is_paid(function), "environments": False}
    cases, case_kwargs = find_cases(function, located, setup["cases"])
    return None, {**hello, "cases": cases, "case_kwargs": stack.enter_context(case_kwargs()) or {}}


def _score(reward: Any, request: dict[str, Any], reply: Any) -> None:
    columns, own = pickle.loads(request["columns"]), os.getpid()
    for begin, end in request["spans"]:
        answer = reward({name: values[begin:end] for name, values in columns.items()}, request["state"])
        if os.getpid() != own:  # the function forked and returned twice: a second reply would count for the next call
            os._exit(0)
        reply({name: getattr(answer, name) for name in answer.__slots__})


def _in_short(error: BaseException) -> str:
    from grpo.errors import UserError

    return str(error) if isinstance(error, UserError | ValueError) else f"{type(error).__name__}: {error}"


if __name__ == "__main__":
    main(int(sys.argv[1]))
