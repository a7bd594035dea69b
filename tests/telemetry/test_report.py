"""The report: one file, every section, and no error in a real browser."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from grpo.recipes import load_recipe
from grpo.telemetry import report
from grpo.telemetry.plots import curves
from grpo.telemetry.recorded import RecordedRun, read_run
from grpo.types import Group, Rollout, StepMetrics, Task, Trajectory

SECTIONS = ["setup", "reward", "kl", "length", "entropy", "clip", "evaluation", "time", "memory", "failures"]
SECTIONS += ["completions"]
BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def two(recipe, run_cli) -> list[Path]:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 2, prompts: 2, samples: 2}\n")
    for name in ("one", "two"):
        ran = run_cli(
            "train", recipe, f"output_dir={name}", "optim.steps=4", "loss.beta=0.1", "data.prompt=<b>{question}"
        )
        assert ran.code == 0, ran.err
    return [Path("one"), Path("two")]


def test_a_page_with_everything(two, run_cli) -> None:
    ran = run_cli("report", *two)
    assert (ran.code, ran.out) == (0, "one/report.html\n")
    page = Path("one/report.html").read_text()
    assert [name for name in SECTIONS if f'<section id="{name}">' in page] == SECTIONS
    assert "Nothing of this is on record" not in page
    assert page.count("<svg") == 9  # seven curves, and where the time goes of each run
    assert not re.search(r"(src|href)=\"?(https?:|//)", page)  # nothing from elsewhere
    assert "<b>What is" not in page  # texts are texts
    assert "&lt;b&gt;What is" in page
    evaluation = json.loads(Path("one/eval.jsonl").read_text().splitlines()[-1])
    assert f"{evaluation['avg@2']:.3f} (" in page
    assert "most changed" in page
    assert len(page) < 3e6


def test_time_goes_to_phases_and_not_to_what_is_inside_them(recipe, run_cli) -> None:
    """By hand: 7.9 of 10 seconds are the reward's; how long its calls take is no phase beside it."""
    assert run_cli("train", recipe, "optim.steps=1").code == 0
    line = json.loads(Path("runs/toy/metrics.jsonl").read_text())
    assert "time/rewards/digits/p95" in line
    line |= {"time/reward": 7.9, "time/rollout": 0.7, "time/update": 1.4, "time/logprobs": 0.0}
    line |= {"time/rewards/digits/p50": 6.0, "time/rewards/digits/p95": 7.0}
    line |= {"rewards/Game/crash_rate": 0.125, "rewards/Game/memory_rate": 0.0}
    Path("runs/toy/metrics.jsonl").write_text(json.dumps(line) + "\n")
    assert run_cli("report", "runs/toy").code == 0
    page = Path("runs/toy/report.html").read_text()
    assert "<p>logprobs 0%, reward 79%, rollout 7%, update 14%</p>" in page
    assert "digits/p95" not in page
    assert "<th>crashes</th><th>too much memory</th>" in page
    assert "<td>12.5%</td><td>0.0%</td>" in page


def test_a_run_with_nothing_on_record_says_so(recipe, run_cli) -> None:
    assert run_cli("train", recipe, "log.completions=null", "optim.steps=1").code == 0
    assert run_cli("report", "runs/toy", "--to", "page.html").code == 0
    assert Path("page.html").read_text().count("Nothing of this is on record") == 3  # kl, evaluation, completions
    assert curves([read_run(Path("runs/toy"))], ["absent"]) is None
    assert run_cli("report", ".").code == 2
    assert "cannot write absent/x.html" in run_cli("report", "runs/toy", "--to", "absent/x.html").err


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_it_opens_in_a_browser_without_errors(two, run_cli, tmp_path) -> None:
    assert run_cli("report", *two).code == 0
    page = Path("one/report.html")
    whole = page.read_text()
    # What the script does, seen from inside; a broken script is caught by the handler before it.
    probe = (
        "<script>window.errors = []; window.onerror = message => errors.push(message);</script>",
        "<script>const all = [...document.querySelectorAll('#completions .entry')];"
        "const field = document.getElementById('filter'); field.value = 'no such text';"
        "field.dispatchEvent(new Event('input'));"
        "document.body.dataset.seen = JSON.stringify({errors, entries: all.length,"
        " left: all.filter(e => !e.hidden).length,"
        " drawn: [...document.querySelectorAll('svg')].every(s => s.getBoundingClientRect().width > 100)})</script>",
    )
    page.write_text(whole.replace("<head>", f"<head>{probe[0]}").replace("</body>", f"{probe[1]}</body>"))
    dom, log = browse(page, tmp_path)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom).group(1)))
    assert seen["errors"] == []
    assert seen["entries"] > 8
    assert (seen["left"], seen["drawn"]) == (0, True)
    assert [name for name in SECTIONS if f'<section id="{name}">' in dom] == SECTIONS
    assert "CONSOLE" not in log


def browse(page: Path, tmp_path: Path) -> tuple[str, str]:
    """The page's DOM after its scripts, and what the browser had to say."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"
    command = [
        BROWSER,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        page.resolve().as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr


def test_what_changed_is_a_task_and_not_a_prompt() -> None:
    """Two rows ask the same and have other answers: what one got at step 1 says nothing of the other at step 2."""

    def group(index: int, reward: float) -> list[Group]:
        rollout = Rollout(Trajectory.sampled((1,), None, "4", "stop"), reward=reward)
        return [Group(Task(index, "2+2?", (), {}), (rollout,))]

    assert "most changed, +1.000: 2+2?" in report._changed([(1, group(0, 0.0)), (2, group(0, 1.0))])
    assert "most changed" not in report._changed([(1, group(0, 0.0)), (2, group(1, 1.0))])


def test_an_environment_that_never_gave_a_reward_is_not_listed_as_one(recipe: Path, tmp_path: Path) -> None:
    cfg = load_recipe(recipe, ["environment={use: 'room.py:Room'}"])
    cases = (
        ({}, True),  # no step is on record
        ({"rewards/Room/failures": 0.0}, False),
        ({"rewards/Room/failures": 1.0, "rewards/Room/error_rate": 0.1}, False),
        ({"rewards/Room/failures": 0.0, "rewards/Room/mean": 0.5}, True),
        ({"rewards/Made/failures": 0.0, "rewards/Made/mean": 0.5}, True),  # by a function that makes objects
    )
    for values, rewards in cases:
        steps = [StepMetrics(1, {"time/rollout": 1.0, **values}, ())] if values else []
        page = report.report([RecordedRun(tmp_path, cfg, steps, [])])
        assert ("Room × 1" in page, "Room</td>" in page) == (rewards, True)
