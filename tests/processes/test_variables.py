"""What a worker process sees of the environment: everything but secrets that its recipe does not name."""

import pytest

from grpo.backend.secrets import is_secret
from grpo.config import RewardConfig
from grpo.errors import UserError
from grpo.plugins import locate_reward
from grpo.processes.variables import environment, named_variables, with_hint
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout, Task, Trajectory

SECRETS = [
    "WANDB_API_KEY",
    "HF_TOKEN",
    "HUGGING_FACE_HUB_TOKEN",
    "OPENAI_API_KEY",
    "AWS_ACCESS_KEY_ID",
    "AWS_SESSION_TOKEN",
    "AZURE_CLIENT_ID",
    "GOOGLE_APPLICATION_CREDENTIALS",
    "DJANGO_SECRET",
    "CLIENT_SECRET_ID",
    "PGPASSWORD",
    "my_api_key",
]
PLAIN = ["PATH", "HOME", "HF_HOME", "TOKENIZERS_PARALLELISM", "KEYBOARD", "OMP_NUM_THREADS", "SSH_AUTH_SOCK", "MONKEY"]


def test_what_looks_like_a_secret() -> None:
    assert [name for name in SECRETS if not is_secret(name)] == []
    assert [name for name in PLAIN if is_secret(name)] == []


def test_the_others_are_inherited_and_named_ones_too(monkeypatch) -> None:
    for name in (*SECRETS, *PLAIN):
        monkeypatch.setenv(name, "x")
    seen = environment({"HF_TOKEN"})
    assert set(SECRETS) & set(seen) == {"HF_TOKEN"}
    assert set(PLAIN) <= set(seen)


def test_the_variables_that_arguments_name(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("A_KEY", "x")
    judge = locate_reward("llm_judge").where
    assert named_variables((), judge, {"model": "m"}) == {"OPENAI_API_KEY"}
    assert named_variables(("A_KEY",), judge, {"api_key_env": "MY_KEY"}) == {"A_KEY", "MY_KEY"}
    (tmp_path / "mine.py").write_text(
        "def other(key_env='OTHER_KEY'): ...\n"
        "def mine(completions, a='B_KEY', b_env='C_KEY', *, c_env='D_KEY', d_env=None, e='E_KEY', **_): ...\n"
    )
    assert named_variables((), f"{tmp_path}/mine.py:mine", {}) == {"C_KEY", "D_KEY"}
    assert named_variables((), "package.module:function", {"key_env": "F_KEY", "n_env": 3}) == {"F_KEY"}


def test_a_named_variable_that_is_not_set_is_the_users_mistake() -> None:
    with pytest.raises(UserError, match="reward 'length': env: the environment has no variable ABSENT_KEY"):
        Scorer.of([RewardConfig(use="length", kwargs={"tokens": 3}, env=("ABSENT_KEY",))])


def test_in_a_worker_and_in_its_replacement(tmp_path, monkeypatch) -> None:
    """Neither `os.environ` nor what the kernel keeps of it has a secret that was not named."""
    monkeypatch.setenv("HF_TOKEN", "s3cret-hub")
    monkeypatch.setenv("MY_KEY", "s3cret-mine")
    (tmp_path / "mine.py").write_text(
        "import os\nCALLS = 'completion'\ndef mine(completions, **_):\n"
        "    if completions == ['die']:\n        os._exit(1)\n"
        "    whole = open('/proc/self/environ').read() if os.path.exists('/proc') else str(os.environ)\n"
        "    whole += str(os.environ)\n"
        "    return [('s3cret-mine' in whole) + 2 * ('s3cret-hub' in whole)]\n"
    )
    scorer = Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:mine", env=("MY_KEY",))])
    rollouts = tuple(Rollout(Trajectory.sampled((1,), None, text, "stop")) for text in ("a", "die", "b"))
    try:
        (scored,) = scorer.score([Group(Task(0, "?", (7,), {}), rollouts)])
    finally:
        scorer.close()
    assert [rollout.scores["mine"] for rollout in scored.rollouts] == [1.0, None, 1.0]


@pytest.mark.parametrize("where", ["call", "import"])
def test_who_asks_for_a_variable_that_is_kept_from_it_is_told(tmp_path, monkeypatch, where: str) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret-mine")
    asks = "import os\n{0}os.environ['MY_KEY']\n{0}"
    if where == "import":
        (tmp_path / "mine.py").write_text(asks.format("") + "def mine(completions, **_): return [1.0]\n")
        with pytest.raises(UserError, match=r"KeyError: 'MY_KEY' .*MY_KEY is set, but .*: env: \[MY_KEY\]\)"):
            Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:mine")])
        return
    (tmp_path / "mine.py").write_text("def mine(completions, **_):\n    " + asks.format("    ") + "return [1.0]\n")
    scorer = Scorer.of([RewardConfig(use=f"{tmp_path}/mine.py:mine", weight=0.0)])
    group = Group(Task(0, "?", (7,), {}), (Rollout(Trajectory.sampled((1,), None, "a", "stop")),))
    try:
        (scored,) = scorer.score([group])
    finally:
        scorer.close()
    first, *frames = scored.rollouts[0].failures["mine"].error.splitlines()
    assert first.startswith("KeyError: 'MY_KEY' (MY_KEY is set, but")
    assert frames
    assert with_hint("KeyError: 'OTHER'", {}) == "KeyError: 'OTHER'"
