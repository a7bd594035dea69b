"""Other toolkits' steps: processes that answer a line of JSON for each line, and what is said where one does not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from grpo.benchmark import peers, process
from grpo.benchmark.peers import Toolkit, running
from grpo.benchmark.process import Peer
from grpo.benchmark.protocol import alternate
from grpo.benchmark.resident import RESIDENT, watch_resident
from grpo.benchmark.setting import Setting
from grpo.benchmark.train import compare_steps
from grpo.errors import RunError, UserError

SMALL = Setting("qwen3-tiny", prompts=2, completions=2, prompt_length=8, completion_length=6)
SCRIPTS = Path(__file__).parents[2] / "scripts/benchmarks"

TOOLKIT = """
import sys
sys.path.insert(0, {scripts!r})
from served import Turns
turns = Turns(tokens=24)
for step in range(100):
    turns.begin()
    turns.sampled({tokens})
    turns.scored()
"""


def answering(program: str, name: str = "other") -> Peer:
    return Peer(name, [sys.executable, "-c", program])


def test_a_process_works_once_for_each_line() -> None:
    program = "import sys\nfor n, _ in enumerate(sys.stdin):\n  print('{\"s\": %d}' % n, flush=True)"
    with answering(program) as peer:
        rows = alternate("case", [peer.side()], runs=2)
    (row,) = [row for row in rows if row.unit == "s"]
    assert (row.side, row.cold, row.runs) == ("other", 0.0, (1.0, 2.0))


@pytest.mark.parametrize(
    ("program", "said"),
    [
        ("print('no numbers')", "Expecting value"),
        ("print(7)", "it answered '7'"),
        ("", "it exited with code 0 without output"),
        ("raise SystemExit('broken')", "broken"),
    ],
)
def test_a_process_that_measures_nothing_has_failed(program: str, said: str) -> None:
    with answering(program) as peer, pytest.raises(RunError, match=f"other by .* failed: .*{said}"):
        peer.side().run()


def test_a_file_that_is_no_program_has_failed(tmp_path: Path) -> None:
    (tmp_path / "python").write_text("not a program")
    with pytest.raises(RunError, match=r"other by .*python failed: .*Permission denied"):
        Peer("other", [tmp_path / "python"])


def test_a_toolkit_s_steps_are_served_one_by_one() -> None:
    with answering(TOOLKIT.format(scripts=str(SCRIPTS), tokens=24)) as peer:
        rows = {row.unit: row for row in alternate("case", [peer.side()], runs=2)}
    assert rows.keys() - {RESIDENT} == {"s", "s rollout", "s update", "GB"}
    assert rows["s"].mean >= rows["s rollout"].mean + rows["s update"].mean > 0


def test_steps_that_warm_a_toolkit_up_are_not_told() -> None:
    program = TOOLKIT.format(scripts=str(SCRIPTS), tokens=24).replace("turns.scored()", "step < 2 and turns.scored()")
    with answering(program) as peer:
        assert "s update" not in peer.side().run()


def test_resident_memory_is_the_process_s_own(monkeypatch) -> None:
    watched: list[int] = []
    monkeypatch.setattr(process, "watch_resident", lambda pid: watched.append(pid) or dict)
    with answering("input()\nimport os\nprint('{\"s\": %d}' % os.getpid())") as peer:
        assert peer.side().run() == {"s": watched[0]}


def test_a_toolkit_that_samples_fewer_tokens_is_not_measured() -> None:
    short = answering(TOOLKIT.format(scripts=str(SCRIPTS), tokens=23))
    with short, pytest.raises(RunError, match="23 tokens were sampled instead of 24"):
        short.side().run()


def test_a_toolkit_is_given_the_same_model_and_sizes_and_held_against_ours(tmp_path, monkeypatch) -> None:
    """A script in the place of a toolkit's, which tells what it was given."""
    script = tmp_path / "steps.py"
    script.write_text(
        "import json, pathlib, sys\nmodel, *given = sys.argv[1:]\n"
        "assert json.loads((pathlib.Path(model) / 'config.json').read_text())['vocab_size'] == 256\n"
        "assert given == ['2', '2', '8', '6', '--blas', '--an', 'option'], given\n"
        "for _ in sys.stdin: print(json.dumps({'s': 3600, 'GB': 1}), flush=True)\n"
    )
    monkeypatch.setitem(peers.PEERS, "unsloth", script)
    rows = compare_steps(SMALL, Toolkit("unsloth", Path(sys.executable), blas=True, options="--an option"))
    by = {(row.side, row.unit): row for row in rows}
    theirs, ours = by["unsloth, same BLAS, --an option", "s"], by["grpo", "s"]
    assert theirs.runs == (3600,)
    assert ours.case == f"step, {SMALL}, against {theirs.side}"
    assert ours.ratio == 3600 / ours.mean


def test_a_toolkit_s_script_has_to_be_there(tmp_path, monkeypatch) -> None:
    monkeypatch.setitem(peers.PEERS, "unsloth", tmp_path / "none.py")
    with pytest.raises(UserError, match="comes with the repository"), running(Toolkit("unsloth", tmp_path), SMALL):
        pass


def test_every_toolkit_s_script_is_there() -> None:
    assert all(script.is_file() for script in peers.PEERS.values())


@pytest.mark.skipif(sys.platform != "linux", reason="Linux alone lets a peak be measured anew")
def test_the_resident_peak_is_of_what_happened_since() -> None:
    def peak(size: int) -> float:
        told = watch_resident()
        bytearray(b"x" * size)
        return told()[RESIDENT]

    assert peak(200_000_000) > peak(1000) + 0.15


def test_where_the_system_does_not_tell_nothing_is_said() -> None:
    assert watch_resident("nobody")() == {}
