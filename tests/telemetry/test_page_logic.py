"""The page's pure functions, by node where there is one: numbers, curves, choosing completions, tokens, differences."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from typing import Any

import pytest

from grpo.telemetry.page.text import ALPHABET, counts, spans_of, surprises
from grpo.telemetry.report import ASSETS

NODE = shutil.which("node")
pytestmark = pytest.mark.skipif(NODE is None, reason="no node on this machine")


@pytest.fixture(scope="module")
def answers() -> list[Any]:
    """What node says of every expression below, asked once."""
    code = f"const logic = require({json.dumps(str(ASSETS / 'logic.js'))}); Object.assign(globalThis, logic);"
    code += f"console.log(JSON.stringify([{', '.join(f'(() => {asked})()' for asked, _ in CASES)}]));"
    ran = subprocess.run([NODE or "", "-e", code], capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    told: list[Any] = json.loads(ran.stdout)
    return told


def entry(step: int, reward: float | None, text: str, **more: Any) -> str:
    row = {"step": step, "reward": reward, "advantage": 0, "tokens": len(text), "finish": "stop", "text": text}
    about = {"run": "a", "row": row | more, "task": {"source": "data"}, "key": "k", "prompt": "Ask <b>", "text": text}
    return json.dumps(about)


FAILED = entry(3, 1, "whole", failures={"slow": "timeout: 1 s"})
THREE = f"[{entry(2, None, 'none')}, {entry(1, 0.5, 'half')}, {FAILED}]"


def sorted_texts(key: str, down: bool) -> str:
    return f"sortEntries({THREE}, '{key}', {json.dumps(down)}).map(one => one.text)"


def wanted(**wishes: str) -> str:
    return f"{THREE}.filter(one => isWanted(one, {json.dumps(wishes)})).map(one => one.text)"


TALK = json.dumps(
    {
        "text": "né 😀!",
        "characters": counts([1, 1, 1, 0, 1, 1]),
        "trained": spans_of([True, True, False, True, True, True]),
        "columns": {"surprise": surprises([-0.25, -1.0, float("nan"), -4.0, 0.0, -100.0], [1, 1, 0, 1, 1, 1])},
        "turn_advantages": [0.5, -1],
        "advantage": 0.5,
    }
)

CASES: list[tuple[str, Any]] = [
    (
        'alarmsInOrder([[1, "truncation"], [1, "equal_rewards"], [5, "kl"], [4, "failed"]]).map(one => one[1])',
        ["failed", "kl", "truncation", "equal_rewards"],
    ),
    (wanted(asked="ask"), ["none", "half", "whole"]),
    (wanted(asked="whole"), []),
    ("smooth([1, 3, null, 2], 0.5)", [1, 7 / 3, None, 15 / 7]),  # 0.5/0.5; 1.75/0.75; 1.875/0.875
    ("smooth([4, 4, 4], 0.9)", [4, 4, 4]),
    ("smooth([1, 2, 3], 0)", [1, 2, 3]),
    ("positive([1, 0, -1, null])", [1, None, None, None]),
    ("stacked([[1, null], [2, 3]])", [[1, 0], [3, 3]]),
    ("stacked([])", []),
    ("[0, 1, 2, 9].map(clockOf([1, 2, 4], [10, 20, 5]))", [0, 10, 30, 40]),  # a value stands for the steps before it
    ("valueBefore([null, 2, null], 2)", 2),
    ("valueBefore([null, 2], 0)", None),
    (
        "[1234.5, 0.5, 12.3456, 0.00012, -2, 0, null].map(formatNumber)",
        ["1,235", "0.5", "12.35", "1.2e−4", "−2", "0", "–"],
    ),
    ("formatInterval(0.92, 0.8671, 0.9)", "0.920 (0.867 to 0.900)"),
    ("formatInterval(0.92, null, null)", "0.920"),
    ("[0.5, 59.7, 61, 3600, 12000].map(formatSeconds)", ["0.5 s", "1 min", "1 min 1 s", "1 h", "3 h 20 min"]),
    ("formatSigned(0.5) + formatSigned(-0.5) + formatSigned(0)", "+0.5−0.50"),
    (sorted_texts("step", False), ["half", "none", "whole"]),
    (sorted_texts("reward", True), ["whole", "half", "none"]),
    (sorted_texts("reward", False), ["half", "whole", "none"]),  # without a reward: last either way
    (sorted_texts("advantage", True), ["none", "half", "whole"]),  # equal ones keep their order
    (sorted_texts("length", True), ["whole", "none", "half"]),
    (wanted(), ["none", "half", "whole"]),
    (wanted(step="3"), ["whole"]),
    (wanted(search="HAL"), ["half"]),
    (wanted(search="ask <B>"), ["none", "half", "whole"]),
    (wanted(outcome="no reward"), ["none"]),
    (wanted(outcome="slow failed"), ["whole"]),
    (wanted(outcome="ended: stop", source="data", run="a", task="k"), ["none", "half", "whole"]),
    (wanted(source="other"), []),
    (f"countsOf({json.dumps(counts([0, 1, 62, 63, 64, 200]))})", [0, 1, 62, 63, 64, 200]),
    (f"tokensOf({TALK}).map(one => one.text)", ["n", "é", " ", "", "😀", "!"]),
    (f"tokensOf({TALK}).map(one => one.surprise)", [0.25, 1, None, 4, 0, (63 / 16) ** 2]),
    (f"tokensOf({TALK}).map(one => one.advantage)", [0.5, 0.5, None, -1, -1, -1]),
    ("tokensOf({text: 'x'})", None),
    (
        "difference('the red cat', 'the blue cat!')",
        [["same", "the "], ["gone", "red"], ["new", "blue"], ["same", " cat"], ["new", "!"]],
    ),
    ("difference('same', 'same')", [["same", "same"]]),
    ("difference('', 'new')", [["new", "new"]]),
    ("difference('a b c', 'a c')", [["same", "a "], ["gone", "b "], ["same", "c"]]),
    ("difference('x '.repeat(3000), 'y '.repeat(3000)).map(one => one[0])", ["gone", "new"]),
    (
        "updated({runs: [{name: 'a', completions: 1}]}, "
        "{title: 't', runs: [{name: 'a'}, {name: 'b', completions: 2}]})",
        {"title": "t", "runs": [{"name": "a", "completions": 1}, {"name": "b", "completions": 2}]},
    ),
]


@pytest.mark.parametrize("place", range(len(CASES)), ids=[asked[:60] for asked, _ in CASES])
def test_what_the_functions_say(answers: list[Any], place: int) -> None:
    told, expected = answers[place], CASES[place][1]
    if isinstance(expected, list) and any(isinstance(one, float) for one in expected):
        assert [one is None for one in told] == [one is None for one in expected]
        assert [one for one in told if one is not None] == pytest.approx([one for one in expected if one is not None])
    else:
        assert told == expected


def test_both_languages_have_the_same_digits() -> None:
    (digits,) = re.findall(r'const DIGITS = "([^"]+)"', (ASSETS / "logic.js").read_text())
    assert digits == ALPHABET
    for name in ("logic.js", "plots.js", "completions.js", "main.js"):
        ran = subprocess.run([NODE or "", "--check", str(ASSETS / name)], capture_output=True, text=True, check=False)
        assert ran.returncode == 0, ran.stderr
