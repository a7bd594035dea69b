"""`grpo rewards test`: whose cases they are, where they come from, and in what form completions arrive."""

import json
import re
from pathlib import Path

import pytest

TWO = """
def short(completions, limit=3, **_):
    return [float(len(text) <= limit) for text in completions]
def shout(completions, **_):
    return [float(text.isupper()) for text in completions]
"""
SHORT = [{"completion": "ab", "score": 1.0}, {"completion": "abcd", "score": 0.0}]
SHOUT = [{"completion": "AB", "score": 1.0}, {"completion": "ab", "score": 0.0}, {"completion": "", "score": 0.0}]
BOTH = {"short": SHORT, "shout": SHOUT}
NAMED = [case | {"reward": name} for name, cases in (("short", SHORT), ("shout", SHOUT)) for case in cases]


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    ("cases", "file"), [(BOTH, None), (NAMED, None), (BOTH, "cases.py"), (NAMED, "cases.json")], ids=[*"abcd"]
)
def test_two_rewards_in_one_file_have_cases_of_their_own(run_cli, here, cases, file) -> None:
    Path("mine.py").write_text(TWO + (f"CASES = {cases!r}" if file is None else ""))
    if file is not None:
        Path(file).write_text(json.dumps(cases) if file.endswith("json") else f"CASES = {cases!r}")
    option = [] if file is None else ["--cases", file]
    for name, count in (("short", 2), ("shout", 3)):
        ran = run_cli("rewards", "test", f"mine.py:{name}", "--no-fuzz", *option)
        assert (ran.code, ran.out) == (0, f"cases  {count} of {count} right\n"), ran.err


def test_cases_by_line_and_what_goes_wrong_in_one(run_cli, here) -> None:
    Path("mine.py").write_text(TWO)
    Path("cases.jsonl").write_text(
        "".join(json.dumps(case) + "\n" for case in [*SHORT, {"completion": "", "score": 0}])
    )
    ran = run_cli("rewards", "test", "mine.py:short", "--cases", "cases.jsonl", "--no-fuzz")
    assert ran.code == 1
    assert ran.out == "case 3 (''): expected 0, got 1.0\ncases  2 of 3 right\n"
    assert ran.err == "grpo: reward 'mine.py:short': 1 completion failed\n"


def test_cases_of_a_reward_that_goes_by_its_file(run_cli, here) -> None:
    Path("mine.py").write_text(TWO.replace("short", "reward") + f"CASES = {{'reward': {SHORT}, 'shout': {SHOUT}}}")
    assert "cases  2 of 2 right" in run_cli("rewards", "test", "mine.py", "--no-fuzz").out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["mine.py:short", "--cases", "absent.json"], "cases absent.json: cannot be read"),
        (["mine.py:short", "--cases", "broken.json"], "cases broken.json: cannot be read: Expecting"),
        (["mine.py:short", "--cases", "none.py"], "cases none.py: the file defines no CASES"),
        (
            ["mine.py:short", "--no-fuzz"],
            "reward 'short' has no cases, so without the fuzz there is nothing to test",
        ),
        (["mine.py:short", "--column", "answer"], "--column answer: expected NAME=VALUE"),
        (["typo.py:short"], "CASES has cases for 'shrot', but the file has no function of that name"),
    ],
)
def test_what_cannot_be_tried_is_the_users_mistake(run_cli, here, arguments: list[str], said: str) -> None:
    Path("mine.py").write_text(TWO)
    Path("broken.json").write_text("[")
    Path("none.py").write_text("")
    Path("typo.py").write_text(TWO + f"CASES = {{'shrot': {SHORT}}}")
    ran = run_cli("rewards", "test", *arguments)
    assert (ran.code, said in ran.err) == (2, True), ran.err


def test_a_column_for_cases_and_fuzz_that_have_none(run_cli, here) -> None:
    Path("mine.py").write_text(
        "def mine(completions, answer, **_):\n    return [float(c == a) for c, a in zip(completions, answer)]\n"
        "CASES = [{'completion': '7', 'score': 1.0}, {'completion': '7', 'answer': '8', 'score': 0.0}]\n"
    )
    ran = run_cli("rewards", "test", "mine.py:mine", "--column", 'answer="7"')
    assert (ran.code, "cases  2 of 2 right" in ran.out) == (0, True), ran.out + ran.err
    assert "45 completions, 0 failures" in ran.out


def test_chat_gives_messages_in_cases_and_fuzz(run_cli, here) -> None:
    Path("mine.py").write_text(
        "def mine(prompts, completions, **_):\n"
        "    assert all(p[-1]['role'] == 'user' for p in prompts)\n"
        "    return [float(len(c[0]['content'])) for c in completions]\n"
        "CASES = [{'completion': 'ab', 'score': 2.0}]\n"
    )
    ran = run_cli("rewards", "test", "mine.py:mine", "--chat")
    assert (ran.code, "cases  1 of 1 right" in ran.out) == (0, True), ran.out + ran.err
    assert "45 completions, 0 failures" in ran.out
    Path("text.py").write_text("def mine(completions, **_):\n    return [float(len(c.split())) for c in completions]\n")
    ran = run_cli("rewards", "test", "text.py:mine", "--chat")
    assert (ran.code, "45 completions, 45 failures" in ran.out) == (1, True)
    assert "AttributeError: 'list' object has no attribute 'split'" in ran.out


def test_a_secret_reaches_the_reward_that_it_is_given_to(run_cli, here, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    Path("mine.py").write_text(
        "import os\ndef mine(completions, **_):\n    return [float('MY_KEY' in os.environ)] * len(completions)\n"
        "CASES = [{'completion': '', 'score': 1.0}]\n"
    )
    assert run_cli("rewards", "test", "mine.py:mine", "--no-fuzz", "--env", "MY_KEY").code == 0
    assert "expected 1.0, got 0.0" in run_cli("rewards", "test", "mine.py:mine", "--no-fuzz").out


LIKE_TRLS = r"""
import re
def accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str], log_extra=None, **kwargs):
    contents = [completion[0]["content"] for completion in completions]
    if log_extra is not None:
        log_extra("solution", list(solution))
    return [None if not gold else float(gold in text) for text, gold in zip(contents, solution, strict=True)]
def reasoning_accuracy_reward(completions: list[list[dict[str, str]]], solution: list[str],
                              reasoning_delimiters: list[str] | None = None, log_extra=None, **kwargs):
    ends = [completion[0]["content"].rpartition("</think>")[1:] for completion in completions]
    return [float(bool(end) and gold in answer) for (end, answer), gold in zip(ends, solution, strict=True)]
def think_format_reward(completions: list[list[dict[str, str]]], **kwargs) -> list[float]:
    pattern = r"^<think>(?!.*<think>)(.*?)</think>.*$"
    contents = [completion[0]["content"] for completion in completions]
    return [1.0 if re.match(pattern, content, re.DOTALL | re.MULTILINE) else 0.0 for content in contents]
class _Cosine:
    def __init__(self, max_len):
        self.max_len = max_len
    def __call__(self, completions: list[list[dict[str, str]]], solution: list[str],
                 completion_ids: list[list[int]], **kwargs):
        right = accuracy_reward(completions, solution)
        return [r and r * min(len(ids) / self.max_len, 1.0) for r, ids in zip(right, completion_ids, strict=True)]
def get_cosine_scaled_reward(max_len: int):
    return _Cosine(max_len)
def get_soft_overlong_punishment(max_completion_len: int, soft_punish_cache: int):
    def soft_overlong_punishment_reward(completion_ids: list[list[int]], **kwargs) -> list[float]:
        return [float(-(len(ids) > max_completion_len)) for ids in completion_ids]
    return soft_overlong_punishment_reward
"""
TRLS = {
    "accuracy_reward": ["--column", r"solution=\frac{1}{3}"],
    "reasoning_accuracy_reward": ["--column", r"solution=\frac{1}{3}"],
    "think_format_reward": [],
    "get_cosine_scaled_reward": ["--column", r"solution=\frac{1}{3}", "--kwarg", "max_len=100"],
    "get_soft_overlong_punishment": ["--kwarg", "max_completion_len=100", "--kwarg", "soft_punish_cache=20"],
}


@pytest.mark.parametrize("name", TRLS)
def test_rewards_with_the_signatures_of_trls_pass(run_cli, here, name: str) -> None:
    Path("mine.py").write_text(LIKE_TRLS)
    ran = run_cli("rewards", "test", f"mine.py:{name}", *TRLS[name])
    assert (ran.code, "45 completions, 0 failures" in ran.out) == (0, True), ran.out + ran.err


@pytest.mark.parametrize("name", TRLS)
def test_and_so_do_trls_own(run_cli, here, name: str) -> None:
    pytest.importorskip("trl.rewards")
    ran = run_cli("rewards", "test", f"trl.rewards:{name}", "--timeout", "60", *TRLS[name])
    assert ran.code == 0, ran.out + ran.err
    assert re.search("45 completions, 0 failures", ran.out)
