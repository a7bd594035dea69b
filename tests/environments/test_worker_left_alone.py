"""The process of environments whose trainer has gone."""

import pickle
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from grpo.environments.process import SCRIPT
from grpo.plugins import Located
from grpo.processes.channel import send

GAMES = Path(__file__).with_name("games.py")


@pytest.mark.parametrize("begun", [False, True], ids=["before the setup", "before the answer"])
def test_it_ends_silently(begun: bool) -> None:
    environment = Located("Walk", f"{GAMES}:Walk", "environment"), {}
    setup = {"path": sys.path, "name": None, "environment": environment, "tools": [], "describes": True}
    ours, theirs = socket.socketpair()
    if begun:
        send(ours, pickle.dumps(setup))
    ours.close()
    command = [sys.executable, "-P", SCRIPT, str(theirs.fileno()), str(SCRIPT.parents[2])]
    with theirs:
        ran = subprocess.run(command, pass_fds=[theirs.fileno()], capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "", "")
