"""A dry run calls each reward once, as a run would: what fails there is found before anything is sampled."""

from pathlib import Path

import pytest

from grpo.errors import UserError
from grpo.scoring.rehearsal import rehearse
from grpo.scoring.scorer import Scorer
from grpo.types import Task

TASKS = [Task(n, f"{n}?", (7,), {"answer": str(n)}) for n in range(3)]


def encode(text: str) -> list[int]:
    return list(range(len(text.split())))


def test_each_is_called_as_a_run_would_and_nothing_is_counted() -> None:
    seen = {}

    def mine(**given):
        seen.update(given)
        return [1.0, None, 0.0, 1 / 3]

    scorer = Scorer({"mine": mine}, max_steps=5)
    assert rehearse(scorer, TASKS, encode) == []
    assert seen["prompts"] == ["0?", "0?", "1?", "1?"]
    assert seen["answer"] == ["0", "0", "1", "1"]
    assert seen["completions"][1] == "I do not know."
    assert seen["completion_ids"][1] == [0, 1, 2, 3]
    assert vars(seen["trainer_state"]) == {"global_step": 0, "max_steps": 5}
    assert scorer.failures == {"mine": 0}
    assert "time/rewards/mine/p50" not in scorer.metrics()


def test_one_that_fails_on_all_is_refused_with_what_it_raised_and_where() -> None:
    def wrong(answer, **_):
        return [float(one["value"]) for one in answer]

    with pytest.raises(UserError) as error:
        rehearse(Scorer({"fine": lambda **_: [1.0] * 4, "wrong": wrong}), TASKS, encode)
    (line,) = str(error.value).splitlines()
    assert line.startswith("reward 'wrong' failed on 4 of 4 trial completions, the first of them '<think>3 + 4")
    assert "TypeError: string indices must be integers" in line
    assert line.endswith(f"({__file__}:{wrong.__code__.co_firstlineno + 1})")


def test_what_a_run_would_survive_is_a_note() -> None:
    scorer = Scorer({"some": lambda **_: [1.0, ValueError("no"), 1.0, 1.0], "metric": lambda **_: 1 / 0}, {"metric": 0})
    some, metric = rehearse(scorer, TASKS, encode)
    assert (
        some == "reward 'some' failed on 1 of 4 trial completions, the first of them 'I do not know.': ValueError: no"
    )
    assert metric.startswith("reward 'metric' failed on 4 of 4 trial completions")


def test_a_constant_reward_is_a_note_unless_few_rows_were_tried() -> None:
    rows = [Task(n, f"{n}?", (7,), {"answer": str(n)}) for n in range(4)]
    said = []

    def constant(completions, **_):
        said.extend(completions)
        return [1.0] * len(completions)

    (note,) = rehearse(Scorer({"same": constant}), rows, encode)
    assert note.startswith("reward 'same' gave 1 to all 12 trial completions, on 4 rows. If it gives equal scores")
    assert "every advantage is 0" in note
    assert "3" in said
    (note,) = rehearse(Scorer({"zero": lambda completions, **_: [0.0] * len(completions)}), rows, encode)
    assert "on 4 rows. They may all be wrong answers. But if it gives equal scores" in note
    assert rehearse(Scorer({"same": constant}), rows[:3], encode) == []
    assert rehearse(Scorer({"metric": constant}, {"metric": 0}), rows, encode) == []
    assert rehearse(Scorer({"none": lambda completions, **_: [None] * len(completions)}), rows, encode) == []


def test_a_reward_that_knows_the_answer_is_not_called_constant() -> None:
    """All made-up answers are wrong; those that quote the row are not."""
    rows = [Task(n, f"{n}?", (7,), {"answer": str(n)}) for n in range(100, 104)]
    for reward in (
        lambda completions, answer, **_: [float(a == b) for a, b in zip(completions, answer, strict=True)],
        lambda completions, answer, **_: [f"boxed{{{b}}}" in a for a, b in zip(completions, answer, strict=True)],
        lambda completions, answer, **_: [f"#### {b}" in a for a, b in zip(completions, answer, strict=True)],
    ):
        assert rehearse(Scorer({"exact": reward}), rows, encode) == []


@pytest.mark.parametrize("isolation", ["process", "inline"])
def test_a_dry_run_calls_rewards_but_none_that_costs_money(run_cli, recipe, isolation: str) -> None:
    Path("mine.py").write_text(
        "def mine(completions, **_):\n    with open('called', 'a') as file:\n        file.write('x')\n"
        "    return [float(len(c)) for c in completions]\n"
    )
    Path("judge.py").write_text(f"PAID = True\n{Path('mine.py').read_text()}".replace("called", "paid"))
    Path("bad.py").write_text("def mine(completions, **_):\n    return [c.no_such_thing for c in completions]\n")
    one = f"{{use: '%s.py:mine', name: %s, isolation: {isolation}}}"
    both = ", ".join(one % (name, name) for name in ("mine", "judge"))
    ran = run_cli("train", recipe, "--dry-run", f"rewards=[{both}]")
    assert ran.code == 0, ran.err
    assert "reward 'judge' was not called: its file says that calls cost money" in ran.out
    assert Path("called").read_text() == "x"
    assert not Path("paid").exists()
    bad = run_cli("train", recipe, "--dry-run", f"rewards=[{one % ('bad', 'bad')}]")
    assert bad.code == 2
    assert "AttributeError: 'str' object has no attribute 'no_such_thing'" in bad.err
    assert not Path("runs").exists()
