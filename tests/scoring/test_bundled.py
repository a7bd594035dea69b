"""The bundled rewards: each grades its own cases right and survives what nobody would write."""

import json
import random
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from grpo.config import RewardConfig
from grpo.plugins import bundled_names, find_reward, locate_reward
from grpo.scoring.cases import Trial, try_out
from grpo.scoring.contract import Reward
from grpo.scoring.grader import Isolated, ScoringRequest
from grpo.scoring.process import WorkerTerms

NAMES = bundled_names("rewards", ".py")


@pytest.mark.parametrize("name", NAMES)
def test_its_own_cases_and_the_fuzz(name: str) -> None:
    if name == "python_tests" and sys.platform != "linux":
        pytest.skip("there is a sandbox on Linux only")
    report = try_out(locate_reward(name), Trial({}, WorkerTerms(20.0)))
    assert len(report.cases) >= 5
    assert [tried for tried in report.wrong] == []


def math_pairs(count: int) -> list[tuple[str, str, float | None]]:
    """Gold answers, completions and what they must get where that is known by construction; the rest is hostile."""
    draw = random.Random(0)
    hostile = [
        r"\boxed{",
        r"\frac{1}{0}",
        "(" * 500,
        r"\sqrt{" * 100,
        "9" * 5000,
        r"\boxed{\infty-\infty}",
        "\x00",
        "😀" * 99,
    ]
    pairs: list[tuple[str, str, float | None]] = []
    for n in range(count):
        a, b = draw.randint(-999, 999), draw.randint(2, 99)
        forms = [
            (str(a), rf"so \boxed{{{a}}}", 1.0),
            (str(a), f"The answer is {a + 1}.", 0.0),
            (rf"\frac{{{a}}}{{{b}}}", rf"\boxed{{{2 * a}/{2 * b}}}", 1.0),
            (f"#### {abs(a):,}", f"#### {abs(a)}", 1.0),
            (rf"$({a}, {a + b}]$", rf"\boxed{{({a}, {a + b}]}}", 1.0),
            (str(b), hostile[n % len(hostile)], None),
            (
                "".join(draw.choices("0123456789+-*/^(){}\\xy ", k=20)),
                "".join(draw.choices("0123456789^(){}\\fracx$ ", k=40)),
                None,
            ),
        ]
        pairs.append(forms[n % len(forms)])
    return pairs


@pytest.mark.slow
def test_ten_thousand_pairs_of_math_answers() -> None:
    pairs = math_pairs(10_000)
    grader = Isolated(locate_reward("math_answer"), {}, WorkerTerms(20.0))
    grader.wait_ready()
    pid = grader.worker.pid
    columns = {
        "prompts": ["?"] * len(pairs),
        "completions": [completion for _, completion, _ in pairs],
        "completion_ids": [[1]] * len(pairs),
        "answer": [gold for gold, _, _ in pairs],
    }
    answers = grader.score(ScoringRequest(columns, [1] * len(pairs), {}))
    assert grader.worker.pid == pid  # it never died
    grader.close()
    for (gold, completion, expected), (_, answer) in zip(pairs, answers, strict=True):
        assert answer.failures == {}
        assert expected is None or answer.values == [expected], (gold, completion)


class Judge:
    """An endpoint that refuses as it is told to, then answers."""

    def __init__(self, *refusals: int) -> None:
        self.refusals, self.asked, self.at_once, self.most = list(refusals), [], 0, 0
        judge, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    judge.asked.append((self.headers["Authorization"], body))
                    refusal = judge.refusals.pop(0) if judge.refusals else None
                    judge.at_once += 1
                    judge.most = max(judge.most, judge.at_once)
                time.sleep(0.05)
                with lock:
                    judge.at_once -= 1
                self.send_response(refusal or 200)
                if refusal == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()
                self.wfile.write(json.dumps({"choices": [{"message": {"content": "Score: 7"}}]}).encode())

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}/v1"

    def ask(self, *completions: str, **kwargs):
        make = find_reward("llm_judge")[1]
        reward = Reward(make, {"model": "m", "base_url": self.url, "cache": None, **kwargs})
        columns = {
            "prompts": ["What?"] * len(completions),
            "completions": list(completions),
            "completion_ids": [[1]] * len(completions),
        }
        return reward({**columns, "answer": ["42"] * len(completions)}, {})


def test_the_judge_is_asked_side_by_side_with_the_key_and_the_template(monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "s3cret")
    judge = Judge()
    answer = judge.ask(*"abcdefgh", prompt="{prompt} {completion} {answer}", api_key_env="MY_KEY", concurrency=4)
    assert answer.values == [0.7] * 8
    assert judge.most == 4
    assert {key for key, _ in judge.asked} == {"Bearer s3cret"}
    assert sorted(body["messages"][0]["content"] for _, body in judge.asked)[0] == "What? a 42"
    assert answer.extras["llm_judge"] == ["Score: 7"] * 8


def test_the_judge_is_asked_again_when_it_is_busy(monkeypatch) -> None:
    monkeypatch.setattr(time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.05)))
    judge = Judge(429, 503)
    assert judge.ask("a", retries=2).values == [0.7]
    assert len(judge.asked) == 3


@pytest.mark.parametrize("refusal", [401, 302])
def test_a_refusal_is_a_failure_of_its_completion_and_shows_no_key(monkeypatch, refusal: int) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret")
    judge = Judge(refusal)
    answer = judge.ask("a", "b", concurrency=1)
    assert answer.values == [None, 0.7]
    assert f"HTTP {refusal}" in answer.failures[0]
    assert "s3cret" not in str(answer)
    assert len(judge.asked) == 2


def test_a_key_from_a_file_works_and_one_that_no_header_takes_is_not_shown(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "s3cret\n")
    judge = Judge()
    assert judge.ask("a").values == [0.7]
    assert judge.asked[0][0] == "Bearer s3cret"
    for key in ("s3\ncret", "s3cr\u2019t"):
        monkeypatch.setenv("OPENAI_API_KEY", key)
        with pytest.raises(ValueError, match="OPENAI_API_KEY holds no key") as error:
            judge.ask("a")
        assert "s3" not in str(error.value)


@pytest.mark.parametrize(
    ("kwargs", "said"),
    [
        ({"concurrency": 0}, "concurrency must be at least 1"),
        ({"retries": -1}, "retries at least 0"),
        ({"pattern": "("}, "is not a regular expression"),
        ({"pattern": "(a)(b)"}, "has 2 groups"),
        ({"prompt": '{"json": 1} {completion'}, "write {{ and }} for literal braces"),
    ],
)
def test_what_the_judge_cannot_do_is_found_before_the_run(kwargs, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        find_reward("llm_judge")[1]("m", **kwargs)


def test_the_judges_answers_are_kept(tmp_path) -> None:
    judge = Judge()
    for _ in range(2):
        assert judge.ask("a", "b", cache=str(tmp_path)).values == [0.7, 0.7]
    assert len(judge.asked) == 2
    judge.ask("a", cache=str(tmp_path), temperature=0.5)
    assert len(judge.asked) == 3
    assert "s3cret" not in "".join(path.read_text() for path in tmp_path.rglob("*") if path.is_file())


def test_a_setting_that_does_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="timeout does nothing with isolation: inline"):
        RewardConfig(use="length", isolation="inline", timeout=5.0)
    for setting in ({"env": ("MY_KEY",)}, {"memory_gb": 1.0}):
        with pytest.raises(ValueError, match="does nothing with isolation: inline"):
            RewardConfig(use="length", isolation="inline", **setting)
    with pytest.raises(ValueError, match="max_failure_rate does nothing with weight 0"):
        RewardConfig(use="length", weight=0.0, max_failure_rate=0.9)
