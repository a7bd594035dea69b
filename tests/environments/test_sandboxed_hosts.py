"""Environments in the sandbox: the same as outside, but for what they must not do."""

import contextlib
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import games
import pytest

from grpo.config.environment import EnvironmentConfig, ToolConfig
from grpo.environments.making import make_host
from grpo.environments.seats import HostedReward
from grpo.errors import UserError
from grpo.plugins import Located
from grpo.processes import tree
from grpo.processes.sandbox import worker

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="there is a sandbox on Linux only")
HOSTILE = '''
import os, socket
from pathlib import Path

class Outlaw:
    def __init__(self):
        self.beside = (Path(__file__).parent / "beside.txt").read_text()

    def reset(self, **_):
        self.kept = "reset"

    def read(self, path: str) -> str:
        """Read.

        Args:
            path: Which.
        """
        return Path(path).read_text()

    def write(self, path: str) -> str:
        """Write.

        Args:
            path: Where.
        """
        return Path(path).write_text("x")

    def dial(self) -> str:
        """Dial."""
        return socket.create_connection(("127.0.0.1", 80), 1)

    def see(self, pid: int) -> str:
        """See.

        Args:
            pid: Whom.
        """
        return os.kill(pid, 0)

    def bomb(self) -> str:
        """Fork."""
        while True:
            if os.fork() == 0:
                import time
                time.sleep(60)

    def look(self) -> str:
        """Look."""
        return f"{self.beside} {self.kept} {os.getcwd()}"
'''

Made = Callable[..., Any]


@pytest.fixture
def host() -> Iterator[Made]:
    made = []

    def make(use: str | None, tools: tuple[str, ...] = (), rewards: Sequence[Path] = (), **settings: Any) -> Any:
        config = EnvironmentConfig(use=use, **settings)
        made.append(make_host(config, [ToolConfig(use=tool) for tool in tools], rewards=rewards))
        return made[-1]

    yield make
    for one in made:
        one.close()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """With the hostile environment; nobody may read it, too."""
    tmp_path.chmod(0o755)
    (tmp_path / "outlaw.py").write_text(HOSTILE)
    (tmp_path / "beside.txt").write_text("beside")
    return tmp_path


def test_a_good_one_is_the_same_as_outside(host: Made) -> None:
    said = []
    for sandbox in (False, True):
        walk = host(f"{games.__file__}:Walk", ("calculator",), sandbox=sandbox)
        (seat,) = walk.seats(0, 1)
        said.append(
            [
                walk.description,
                seat.reset({"start": 1, "prompt": "?"}, 7).result(),
                seat.call("move", {"by": 2}).result(),
                seat.call("move", {"by": 90}).result(),
                seat.call("calculator", {"expression": "6 * 7"}).result(),
                seat.reward().result(),
            ]
        )
    assert said[0] == said[1]
    assert said[1][4].value == "42"


def test_a_hostile_one_gets_nowhere_and_the_others_go_on(
    host: Made, folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory
) -> None:
    monkeypatch.setattr(worker, "PROCESSES", 64)
    secret = tmp_path_factory.mktemp("other") / "secret"
    secret.write_text("s3cret")
    secret.parent.chmod(0o755)
    home = Path.home() / f"written-{os.getpid()}"
    hostile = host(f"{folder}/outlaw.py:Outlaw", sandbox=True, timeout=20)
    seat, other = hostile.seats(0, 2)
    assert [one.reset({}, 0).result().kind for one in (seat, other)] == ["ok", "ok"]
    for tool, arguments, error in [
        ("read", {"path": "/etc/passwd"}, "No such file"),
        ("read", {"path": str(secret)}, "No such file"),
        ("write", {"path": str(home)}, "[Errno"),
        ("write", {"path": str(folder / "written")}, "Read-only file system"),
        ("dial", {}, "Operation not permitted"),
        ("see", {"pid": os.getpid()}, "No such process"),
        ("bomb", {}, "Resource temporarily unavailable"),
    ]:
        reply = seat.call(tool, arguments).result()
        assert (reply.kind, error in reply.error) == ("error", True), (tool, reply)
        assert other.call("look", {}).result().value == "beside reset /sandbox"
    assert not home.exists()
    assert seat.call("write", {"path": "/sandbox/mine"}).result().kind == "ok"
    below = tree.descendants(os.getpid())
    hostile.close()
    assert not any(alive(pid) for pid in below)


def test_a_file_is_found_from_the_working_directory(host: Made, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "path", [*sys.path, ""])
    for use in ("outlaw.py:Outlaw", "outlaw:Outlaw"):
        assert host(use, sandbox=True).description.name == "Outlaw"


def test_a_reward_that_takes_environments_is_loaded_into_it(
    host: Made, tmp_path_factory: pytest.TempPathFactory
) -> None:
    file = tmp_path_factory.mktemp("rewards") / "mine.py"
    file.parent.chmod(0o755)
    file.write_text("def reward(completions, environments, **_):\n    return [one.place for one in environments]\n")
    reward = HostedReward(Located("mine", f"{file}:reward", "reward"), {})
    walk = host(f"{games.__file__}:Walk", sandbox=True)
    with pytest.raises(UserError, match=f"there is no file {file}"):
        walk.load_reward(reward)
    walk = host(f"{games.__file__}:Walk", rewards=[file], sandbox=True)
    walk.load_reward(reward)
    (seat,) = walk.seats(0, 1)
    seat.reset({"start": 4, "prompt": "?"}, 0).result()
    answer = walk.score("mine", [seat], pickle.dumps({"completions": ["x"]}), {}).result()
    assert list(answer["values"]) == [4.0]


def test_the_tool_python_ends_with_the_conversation(host: Made) -> None:
    tools = host(None, ("python",))
    assert [tool["function"]["name"] for tool in tools.description.tools] == ["python"]
    seat, other = tools.seats(0, 2)
    alone = tree.descendants(os.getpid())
    draw = {"code": "import random; random.random()"}
    drawn = []
    for one in (seat, other):
        one.reset({"question": "?"}, 3).result()
        drawn.append(one.call("python", draw).result().value)
    assert drawn[0] == drawn[1], "by the seed of the conversation"
    assert len(tree.descendants(os.getpid())) == len(alone) + 6
    seat.release()
    deadline = time.monotonic() + 5
    while len(tree.descendants(os.getpid())) > len(alone) + 3 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(tree.descendants(os.getpid())) == len(alone) + 3
    assert other.call("python", {"code": "random.random()"}).result().kind == "ok"


def test_python_inside_of_a_sandbox_says_what_to_do(host: Made) -> None:
    with pytest.raises(UserError, match=r"already runs in a sandbox, .*unsafe: true"):
        _ = host(None, ("python",), sandbox=True).description


def test_objects_from_python_cannot_be_in_it() -> None:
    with pytest.raises(UserError, match=r"environment 'Walk': objects passed from Python live in this process"):
        make_host(EnvironmentConfig(use="__main__:Walk", name="Walk", sandbox=True), given=games.Walk)


def test_where_there_is_no_sandbox_it_refuses(host: Made, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker, "missing", lambda: "grpo isolates code only on Linux, not yet on darwin")
    with pytest.raises(
        UserError, match=r"^environment '.*': sandbox: not available here: .* not yet on darwin.*sandbox: false"
    ):
        host(f"{games.__file__}:Walk", sandbox=True)


def alive(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    return False
