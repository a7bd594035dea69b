"""The report: one file that needs nothing else, with everything that the runs' folders hold."""

from __future__ import annotations

import hashlib
import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
from telemetry.pages import data_in, plots_in, rows_in

from grpo.recipes import load_recipe
from grpo.telemetry.page.data import page_data
from grpo.telemetry.page.layout import layout
from grpo.telemetry.recorded import RecordedRun, read_run
from grpo.telemetry.report import ASSETS, PLOTTING, page, report
from grpo.types import EvalMetrics, StepMetrics

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
SETTINGS = ("loss.beta=0.1", "data.prompt=<b>{question}", "optim.steps=4")
PUBLISHED = {
    "uPlot.iife.min.js": "19c8d4c6ad88929a79f4ae49d6f7161566dfd0ba3d15cc495e974f787eb78f1f",
    "uPlot.min.css": "df630c6a8d6f8eeaff264b50f73ce5b114f646ffd9a0bb74f049b0a00135fa04",
    "LICENSE": "8f989229699b4fe2f1a0432d0e9edc338a8a911e250e2d1b01ecd770a5f5b1bd",
}
"""The SHA-256 of the plotting library's files, as its npm package of this version has them."""


@pytest.fixture
def two(recipe, run_cli) -> list[Path]:
    recipe.write_text(recipe.read_text() + "eval: {split: train, every: 2, prompts: 2, samples: 2}\n")
    for name in ("one", "two"):
        ran = run_cli("train", recipe, f"output_dir={name}", *SETTINGS)
        assert ran.code == 0, ran.err
    return [Path("one"), Path("two")]


def test_equal_groups_of_turns_may_teach() -> None:
    steps = [StepMetrics(1, {"frac_reward_zero_std": 1.0})]
    for turns, ending in (
        ("completion", "the policy learns nothing from them"),
        ("turn", "their turns may differ, and teach"),
    ):
        run = SimpleNamespace(
            folder=Path(),
            steps=steps,
            evaluations=[],
            recipe=SimpleNamespace(advantage=SimpleNamespace(turns=turns), eval=None, data=SimpleNamespace(parts={})),
        )
        (plot,) = layout([run])
        assert plot["about"].endswith(ending)


def test_a_page_with_everything(two, run_cli) -> None:
    ran = run_cli("report", *two)
    assert (ran.code, ran.out) == (0, "one/report.html\n")
    text = Path("one/report.html").read_text()
    assert len(text.encode()) < 1e6
    data = data_in(text)
    assert [run["name"] for run in data["runs"]] == ["one", "two"]
    run = data["runs"][0]
    lines = [json.loads(line) for line in Path("one/metrics.jsonl").read_text().splitlines()]
    assert run["x"] == [1, 2, 3, 4]
    assert run["metrics"]["reward"] == pytest.approx([line["reward"] for line in lines], rel=1e-4)
    assert set(run["metrics"]) == {name for line in lines for name in line} - {"step", "alarms"}
    alarms = [
        list(map(alarm.get, ("step", "kind", "what", "advice"))) for line in lines for alarm in line.get("alarms", ())
    ]
    assert run["alarms"] == alarms
    assert (run["state"], run["step"], run["steps"]) == ("finished", 4, 4)
    titles = {title for _, title in plots_in(data)}
    wanted = "Reward,KL to the reference,Completion length,Entropy,Clipped fractions,Where the time goes,Peak memory"
    assert set(wanted.split(",")) <= titles
    assert "KL to the teacher" not in titles
    evaluation = json.loads(Path("one/eval.jsonl").read_text().splitlines()[-1])
    told = run["evaluations"]
    assert (told["x"], told["n"], told["grader"]) == ([0, 2, 4], 2, evaluation["grader"])
    last = [told["values"]["avg@2"][name][-1] for name in ("value", "low", "high")]
    assert last == pytest.approx([evaluation["avg@2"], *evaluation["avg@2_interval"]], rel=1e-4)
    settings = dict(run["settings"])
    assert settings["steps"] == "4 of 4, finished"
    assert "beta 0.1" in settings["loss"]
    assert sum(seconds for _, seconds in run["phases"]) == pytest.approx(run["cards"]["seconds"], rel=1e-3)
    rows = rows_in(data)
    assert [row["step"] for row in rows] == sorted(row["step"] for row in rows)
    assert {row["step"] for row in rows} == {1, 2, 3, 4}
    assert rows[0]["prompt"][-1][-1].startswith("<b>What is")
    assert "<b>What is" not in text  # texts are texts


def test_the_page_loads_nothing(recipe: Path, tmp_path: Path) -> None:
    text = report([RecordedRun(tmp_path, load_recipe(recipe), [StepMetrics(1, {"reward": 1.0})], [])])
    assert re.findall(r"<(?:link|img|iframe|script[^>]* src|object|embed|base)\b", text) == []
    assert re.findall(r"url\(|@import|\bimport\(", text) == []
    assert "default-src 'none'" in text
    assert "{{" not in text
    own = "".join((ASSETS / name).read_text() for name in ("logic.js", "plots.js", "completions.js", "main.js"))
    assert re.findall(r"https?:|innerHTML|outerHTML|insertAdjacent|document\.write|\beval\(|new Function", own) == []
    assert own.count("fetch(") == 1  # of the page that is live


def test_the_plotting_library_is_as_its_authors_published_it() -> None:
    files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (ASSETS / PLOTTING).iterdir()}
    assert files == PUBLISHED
    assert "The MIT License" in report([])


HOSTILE = ['</script><script>alert("1")</script>', "<!--<script>", "{{data}} {{script}}", "\ud800 lone", "]]> & \u2028"]


def test_nothing_that_a_run_says_ends_its_block(recipe: Path, tmp_path: Path) -> None:
    data = page_data([RecordedRun(tmp_path, load_recipe(recipe), [], [])])
    data["runs"][0]["settings"] = [["data", text] for text in HOSTILE]
    data["title"] = HOSTILE[0]
    text = page(data)
    text.encode()
    told = data_in(text)
    assert [said for _, said in told["runs"][0]["settings"]] == [*HOSTILE[:3], "? lone", HOSTILE[4]]
    assert text.count("<script") == text.count("</script>") == 3
    assert "<title>&lt;/script&gt;" in text
    assert text.count("alert(") == 3  # in the <title> as text, and in the data: as the title, and as a setting


def test_a_page_that_is_live_knows_where_its_data_is() -> None:
    text = page(page_data([]), live='data.json?a&b"', seconds=0.5)
    assert 'data-live="data.json?a&amp;b&quot;" data-seconds="0.5"' in text
    assert 'data-live=""' in page(page_data([]))


def test_time_goes_to_phases_and_not_to_what_is_inside_them(recipe: Path, tmp_path: Path) -> None:
    """By hand: 7.9 of 10 seconds are the reward's; how long its calls take is no phase beside it."""
    values = {"time/reward": 7.9, "time/rollout": 0.7, "time/update": 1.4, "time/logprobs": 0.0, "step_time": 10.0}
    values |= {"time/rewards/digits/p50": 6.0, "rewards/digits/failures": 0.0, "rewards/Game/failures": 3.0}
    values |= {"rewards/Game/crash_rate": 0.125, "rewards/Game/memory_rate": 0.0, "rewards/digits/none_rate": 0.5}
    (run,) = page_data([RecordedRun(tmp_path, load_recipe(recipe), [StepMetrics(1, values)], [])])["runs"]
    assert run["phases"] == [["reward", 7.9], ["update", 1.4], ["rollout", 0.7], ["logprobs", 0]]
    headings = ["reward", "failures", "no score", "errors", "timeouts", "crashes", "too much memory"]
    rows = [["Game", "3", "", "", "", "12.5%", "0.0%"], ["digits", "0", "50.0%", "", "", "", ""]]
    assert run["failures"] == {"headings": headings, "rows": rows}
    assert run["cards"]["failures"] == 3


def test_the_cards_say_what_changed(recipe: Path, tmp_path: Path) -> None:
    """By hand, over 20 steps: the first two rewards and the last two are a tenth of them each."""
    steps = [
        StepMetrics(n, {"reward": n / 10, "step_time": 2.0, "peak_memory_gb": 1 + n / 100, "num_tokens": 10.0})
        for n in range(1, 21)
    ]
    made = [
        EvalMetrics(step, 8, "exact", {"greedy": value}, {"greedy": (value - 0.1, value + 0.1)})
        for step, value in ((0, 0.25), (10, 0.375), (20, 0.5))
    ]
    (run,) = page_data([RecordedRun(tmp_path, load_recipe(recipe), steps, made)])["runs"]
    cards = run["cards"]
    assert cards["reward"] == {"before": 0.15, "after": 1.95, "steps": 2}
    assert (cards["seconds"], cards["peak_memory"], cards["tokens"], cards["steps"]) == (40, 1.2, 200, 20)
    before, after = ({"step": step, "value": v, "low": v - 0.1, "high": v + 0.1} for step, v in ((0, 0.25), (20, 0.5)))
    assert cards["evaluations"] == [{"name": "greedy", "n": 8, "before": before, "after": after}]


def test_a_run_with_nothing_on_record(recipe, run_cli) -> None:
    assert run_cli("train", recipe, "log.completions=null", "optim.steps=1").code == 0
    assert run_cli("report", "runs/toy", "--to", "page.html").code == 0
    (run,) = data_in(Path("page.html").read_text())["runs"]
    assert (run["evaluations"], run["completions"], run["cards"]["evaluations"]) == (None, None, [])
    assert "completions" not in page_data([read_run(Path("runs/toy"))], completions=False)["runs"][0]
    assert run_cli("report", ".").code == 2
    assert "cannot write absent/x.html" in run_cli("report", "runs/toy", "--to", "absent/x.html").err


def test_runs_of_one_name_are_told_apart(recipe: Path, tmp_path: Path) -> None:
    cfg = load_recipe(recipe)
    folders = [tmp_path / "a/run", tmp_path / "b/run", tmp_path / "c/other"]
    data = page_data([RecordedRun(folder, cfg, [], []) for folder in folders])
    assert [run["name"] for run in data["runs"]] == [str(folders[0]), str(folders[1]), "other"]


def test_a_long_run_is_thinned_and_says_so(recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By hand: two metrics of five steps in five values are means of two steps."""
    monkeypatch.setattr("grpo.telemetry.page.data.MOST_POINTS", 5)
    steps = [StepMetrics(n, {"reward": float(n), "loss": 1.0} | ({"kl": 8.0} if n == 2 else {})) for n in range(1, 6)]
    (run,) = page_data([RecordedRun(tmp_path, load_recipe(recipe), steps, [])])["runs"]
    assert (run["every"], run["x"]) == (3, [3, 5])
    assert run["metrics"] == {"reward": [2, 4.5], "loss": [1, 1], "kl": [8, None]}


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
        (run,) = page_data([RecordedRun(tmp_path, cfg, steps, [])])["runs"]
        settings = dict(run["settings"])
        assert ("Room × 1" in settings["rewards"], "Room" in settings["environments and tools"]) == (rewards, True)


LOOKS = (ASSETS / "style.css").read_text()


def luminance(color: str) -> float:
    """WCAG 2's relative luminance."""
    parts = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def test_what_is_drawn_can_be_seen_in_both_modes() -> None:
    blocks = re.findall(r":root[^{]*\{([^}]*)\}", LOOKS)
    light, dark, _ = (dict(re.findall(r"--([\w-]+): (#\w{6})", block)) for block in blocks)
    assert set(light) == set(dark)
    for mode in (light, dark):
        for curve in range(8):
            assert contrast(mode[f"curve-{curve}"], mode["panel"]) >= 3, curve
        for text in ("ink", "faint", "accent"):
            for ground in ("panel", "page", "soft"):
                assert contrast(mode[text], mode[ground]) >= 4.5, (text, ground)
        for word in ("good", "bad"):
            assert contrast(mode[word], mode[f"{word}-soft"]) >= 4.5, word


@pytest.mark.slow
@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
def test_it_opens_in_a_browser_without_errors(two, run_cli, tmp_path) -> None:
    assert run_cli("report", *two).code == 0
    path = Path("one/report.html")
    whole = path.read_text()
    # What the scripts do, seen from inside; a broken script is caught by the handler before it.
    probe = (
        "<script>window.errors = []; window.onerror = message => errors.push(message);</script>",
        "<script>browser.search.value = 'no such text'; browser.search.dispatchEvent(new Event('input'));"
        "const left = browser.found.length; toggleRun('two', document.querySelector('.run:last-child'));"
        "zoomTo([2, 3]); at('log').click();"
        "document.body.dataset.seen = JSON.stringify({errors, entries: browser.entries.length, left,"
        " drawn: cells.filter(cell => cell.chart && cell.chart.width > 100).length,"
        " range: state.zoom[1], articles: document.querySelectorAll('article').length})</script>",
    )
    policy = re.search(r'<meta http-equiv="Content-Security-Policy"[^>]*>', whole)[0]
    whole = whole.replace(policy, policy + probe[0]).replace("</body>", f"{probe[1]}</body>")
    path.write_text(whole)
    dom, log = browse(path, tmp_path)
    seen = json.loads(html.unescape(re.search(r'data-seen="([^"]*)"', dom).group(1)))
    assert seen["errors"] == []
    assert seen["entries"] == 32
    assert (seen["left"], seen["range"], seen["articles"]) == (0, 3, 1)
    assert seen["drawn"] > 12
    assert "CONSOLE" not in log


def browse(path: Path, tmp_path: Path) -> tuple[str, str]:
    """The page's DOM after its scripts, and what the browser had to say."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += " --disable-component-update --disable-sync --enable-logging=stderr --virtual-time-budget=2000"
    command = [
        BROWSER,
        *flags.split(),
        f"--user-data-dir={tmp_path / 'profile'}",
        "--dump-dom",
        path.resolve().as_uri(),
    ]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout, ran.stderr
