"""Builds the sandbox and runs a command in it. A script that uses only the standard library.

There are three processes: this one waits outside; process 1 of the new namespace builds the root and reaps children;
its child drops privileges and becomes the command. When process 1 dies, everything in the namespace dies, and process 1
dies with this process.
"""

import json
import os
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parent)]
import kernel  # type: ignore[import-not-found]  # noqa: E402  the script runs without the package


def main() -> None:
    settings = json.loads(sys.argv[1])
    if settings["unsafe"]:
        if sys.platform == "linux":
            kernel.die_with_parent()
        _limit(settings, processes=None)  # without a namespace the limit would count the user's other processes
        _become(settings)
    try:
        root = kernel.is_root()
        kernel.isolate(root)
        kernel.die_with_parent()
    except OSError as error:
        _give_up(settings, error)
    child = os.fork()
    if child == 0:
        _process_one(settings, settings["user"] if root else None)
    os._exit(_code(os.waitpid(child, 0)[1]))


def _process_one(settings: dict, user: int | None) -> None:  # type: ignore[type-arg]
    try:
        kernel.die_with_parent()
        kernel.enter_root(Path(settings["root"]), settings["readable"], settings["home"], settings["disk"])
    except OSError as error:
        _give_up(settings, error)
    child = os.fork()
    if child == 0:
        try:
            _limit(settings, settings["processes"])
            kernel.drop_privileges(user)
        except OSError as error:
            _give_up(settings, error)
        _become(settings)
    while True:
        done, status = os.wait()
        if done == child:
            os._exit(_code(status))


def _limit(settings: dict, processes: int | None) -> None:  # type: ignore[type-arg]
    kernel.limit(settings["cpu_seconds"], settings["memory"], settings["disk"], settings["files"], processes)


def _become(settings: dict) -> None:  # type: ignore[type-arg]
    os.execv(settings["command"][0], settings["command"])


def _give_up(settings: dict, error: OSError) -> None:  # type: ignore[type-arg]
    os.write(2, f"{error.strerror or error}\n".encode())
    os._exit(settings["unbuilt"])


def _code(status: int) -> int:
    code = os.waitstatus_to_exitcode(status)
    return code if code >= 0 else 128 - code


if __name__ == "__main__":
    main()
