"""Secrets of the environment are in nothing that a run writes, logs or says."""

import logging
from pathlib import Path

import pytest

from grpo.backend.secrets import masked
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.resume import find_start

SECRETS = {
    "WANDB_API_KEY": "0123456789abcdef" * 2 + "01234567",
    "HF_TOKEN": "hf_WxYzWxYzWxYz",
    "JUDGE_API_KEY": "sk-judge-1234",
}
LEAKY = """
import json
calls = []
def reward(completions, log_extra, **_):
    secret, calls_made = json.load(open("secret.json")), calls.append(1)
    log_extra("sent", [f"Authorization: Bearer {secret}" for _ in completions])
    return [ValueError(f"401 for key {secret} at https://me:word@judge.example") if i == 0 else i / 8
            for i, _ in enumerate(completions)]
"""


@pytest.fixture(autouse=True)
def environment(monkeypatch) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)


def written(folder: Path) -> bytes:
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_what_a_reward_quotes_is_masked_wherever_it_goes(recipe, run_cli, caplog) -> None:
    Path("secret.json").write_text(f'"{SECRETS["JUDGE_API_KEY"]}"')
    Path("digits.py").write_text(LEAKY)
    allowed = "rewards.0.max_failure_rate=1"
    ran = run_cli("train", recipe, allowed, "log.wandb={mode: offline}")
    assert ran.code == 0, ran.err
    logged = "\n".join(map(logging.lastResort.format, caplog.records))  # as on the terminal, which pytest stands before
    assert "401 for key [JUDGE_API_KEY] at https://judge.example" in logged
    (group, *_) = read_completions(stored_steps(Path("runs/toy/completions"))[0])[1]
    assert "[JUDGE_API_KEY]" in str(group.rollouts[0].failures["digits"])
    assert group.rollouts[0].extras["sent"] == "Authorization: Bearer [JUDGE_API_KEY]"
    broken = run_cli("train", recipe, "rewards.0.max_failure_rate=0", "output_dir=broken")
    assert (broken.code, "[JUDGE_API_KEY]" in broken.err) == (1, True)
    for secret in (*SECRETS.values(), "word@"):
        for text in (ran.out, ran.err, broken.out, broken.err, logged):
            assert secret not in text
        assert secret.encode() not in written(Path("runs")) + written(Path("broken"))


def test_an_error_that_nobody_expected_is_masked_too(recipe, run_cli, monkeypatch) -> None:
    def fails(*_args) -> None:
        raise LookupError(f"token {SECRETS['HF_TOKEN']}")

    monkeypatch.setattr("grpo.runs.prepare.load", fails)
    ran = run_cli("train", recipe)
    assert (ran.code, SECRETS["HF_TOKEN"] in ran.err) == (1, False)
    assert ran.err.startswith("Traceback")
    assert ran.err.endswith("LookupError: token [HF_TOKEN]\n")


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.0.kwargs.auth=Bearer sk-judge-1234", "rewards.0.kwargs.auth contains the value of JUDGE_API_KEY"),
        ("log.wandb.notes=key sk-judge-1234", "log.wandb.notes contains the value of JUDGE_API_KEY"),
        ("rewards.0.kwargs.api_key=abc", "rewards.0.kwargs.api_key looks like a secret"),
        ("rewards.0.kwargs.openai_api_key=abc", "rewards.0.kwargs.openai_api_key looks like a secret"),
        ("rewards.0.kwargs.stop_token=</answer>", None),
        ("rewards.0.kwargs.api_key_env=JUDGE_API_KEY", None),
        ("rewards.0.kwargs.api_key=''", None),
    ],
)
def test_a_recipe_with_a_secret_is_refused(recipe, override: str, said: str | None) -> None:
    cfg = load_recipe(recipe, [override])
    if said is None:
        find_start(cfg)
        return
    with pytest.raises(UserError) as refused:
        find_start(cfg)
    assert str(refused.value).startswith(said)
    assert "sk-judge" not in str(refused.value)
    assert not Path("runs").exists()


def test_a_secret_within_another_is_masked_whole(monkeypatch) -> None:
    monkeypatch.setenv("A_KEY", "abcdefgh")
    monkeypatch.setenv("LONG_KEY", "abcdefgh-ijkl\n")
    assert masked("a\nabcdefgh-ijkl abcdefgh") == "a\n[LONG_KEY] [A_KEY]"
    monkeypatch.setenv("SHORT_KEY", "a")
    assert masked("a cat") == "a cat"


def test_a_path_under_a_secrets_name_is_none(monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PASSWORD_STORE_DIR", str(tmp_path))
    monkeypatch.setenv("A_TOKEN", f"{tmp_path}/is/not/there")
    assert masked(f"in {tmp_path}/runs") == f"in {tmp_path}/runs"
    assert masked(f"{tmp_path}/is/not/there") == "[A_TOKEN]"
    monkeypatch.setenv("A_TOKEN", "another-one")  # what was looked up before is not kept
    assert masked("another-one") == "[A_TOKEN]"
