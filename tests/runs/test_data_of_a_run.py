"""What a run makes of its data before the first step: lengths for the plan, held-out rows, and the order of tasks."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path

import pytest
from datasets import Dataset

from grpo.backend.ranks import Ranks
from grpo.data import lengths
from grpo.data.lengths import Lengths
from grpo.data.loading import load_rows
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.prepare import Prepared, prepare
from grpo.runs.resume import changes, context, context_now
from grpo.runs.sections import data_of
from grpo.tools.card import _recipe, short_name
from grpo.tools.evaluate import EvalOptions


def write(path: Path, *questions: str | None) -> None:
    path.write_text("".join(json.dumps({"question": question, "answer": "1"}) + "\n" for question in questions))


def prepared(recipe: Path, *overrides: str) -> Prepared:
    run = prepare(load_recipe(recipe, ["rewards.0.isolation=inline", *overrides]))
    with closing(run.trainer.scorer):
        return run


SHORT_THEN_LONG = [*["x?"] * 64, "What is this? " * 20]


def length_of(run: Prepared, question: str) -> int:
    tokenizer = run.trainer.engine.generator.tokenizer
    return len(tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True))


def test_the_plan_is_for_the_longest_prompt_wherever_it_stands(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *SHORT_THEN_LONG)
    run = prepared(recipe)
    longest = length_of(run, SHORT_THEN_LONG[-1])
    assert run.plan.tokens == 8 * (longest + 8)
    assert run.notes[0] == f"prompts: at most {longest:,} tokens, measured over all 65 rows"


def test_rows_that_are_left_out_are_not_planned_for_and_are_told(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "train.jsonl", *SHORT_THEN_LONG, None)
    run = prepared(recipe, "data.max_prompt_length=64")
    assert run.plan.tokens == 8 * (length_of(run, "x?") + 8)
    where = f"data {tmp_path / 'train.jsonl'}, train"
    assert run.notes[1:3] == [
        f"{where}: 1 of 66 rows are longer than data.max_prompt_length (64 tokens) and are left out",
        f"{where}: 1 of 66 rows have a null prompt and are left out",
    ]


def test_what_is_too_much_to_measure_is_planned_by_max_prompt_length(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.jsonl", *SHORT_THEN_LONG, None)
    monkeypatch.setattr(lengths, "MOST_ROWS", 65)
    run = prepared(recipe, "data.max_prompt_length=300")
    assert run.plan.tokens == 8 * (300 + 8)
    assert run.notes[0].startswith("prompts: planned for data.max_prompt_length (300 tokens), because 66 rows are too")
    assert "1 of 66 rows have a null prompt" in run.notes[1]


def test_a_token_without_an_embedding_is_found_at_the_start_or_when_its_row_is_drawn(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "train.jsonl", *["x?"] * 64, "a~b")
    monkeypatch.setattr("mlx_lm.tokenizer_utils.TokenizerWrapper.apply_chat_template", _odd)
    with pytest.raises(UserError, match=r"row 64 of .*train.jsonl has a token 100000"):
        prepared(recipe)
    monkeypatch.setattr(lengths, "MOST_ROWS", 10)
    run = prepared(recipe, "data.shuffle=false")
    assert len(run.trainer.tasks.take(64)) == 64
    with pytest.raises(UserError, match=r"row 64 of .*train.jsonl has a token 100000"):
        run.trainer.tasks.take(1)


def _odd(self, messages, **kwargs) -> list[int]:
    return [1, 100_000 if "~" in messages[-1]["content"] else 2]


def test_held_out_rows_that_are_the_training_rows_are_a_note(recipe: Path, tmp_path: Path) -> None:
    def notes(*overrides: str) -> list[str]:
        return [
            note for note in prepared(recipe, *overrides).notes if note.startswith("eval: its rows are the training")
        ]

    (note,) = notes("eval.split=train")
    assert "train.jsonl, train), so the evaluation measures prompts that the model has trained on" in note
    write(tmp_path / "held.jsonl", "x?", "y?", "z?", "a?")
    assert notes("eval.source=held.jsonl", "eval.split=train") == []
    (tmp_path / "held.jsonl").write_text((tmp_path / "train.jsonl").read_text())
    assert len(notes("eval.source=held.jsonl", "eval.split=train")) == 1  # the same rows in another file
    assert notes() == []


def test_held_out_prompts_are_checked_and_planned_for(recipe: Path, tmp_path: Path) -> None:
    write(tmp_path / "held.jsonl", *SHORT_THEN_LONG)
    held = ["eval.source=held.jsonl", "eval.split=train"]
    run = prepared(recipe, *held)
    assert max(len(task.prompt_ids) for task in run.evaluator.tasks) == length_of(run, SHORT_THEN_LONG[-1])
    assert run.plan.phases["rollout"] > prepared(recipe, *held, "eval.prompts=64").plan.phases["rollout"]
    write(tmp_path / "held.jsonl", "x?")
    with pytest.raises(UserError, match=r"no column 'messages' in row 0 of .*train.jsonl"):
        prepared(recipe, "data.prompt=messages", *held)


ROWS = """
def rows(split, n=3):
    return [{"question": f"{split} {i}?", "answer": "1"} for i in range(n)]

def others():
    return [{"question": "other?", "answer": "1"}]
"""


@pytest.mark.parametrize(
    ("overrides", "held_out"),
    [
        ([], ["test 0?", "test 1?", "test 2?"]),
        (["data.kwargs={n: 1}"], ["test 0?"]),
        (["eval.split=dev"], ["dev 0?", "dev 1?", "dev 2?"]),
        (["eval.use=rows.py:others", "eval.split=train", "data.kwargs={n: 1}"], ["other?"]),
        (["eval.use=rows.py:rows", "eval.kwargs={n: 2}"], ["test 0?", "test 1?"]),
        (["eval.source=train.jsonl", "eval.split=train", "eval.prompts=1"], ["What is 1+1?"]),
    ],
)
def test_rows_of_a_function_train_and_evaluate(recipe: Path, overrides: list[str], held_out: list[str]) -> None:
    (recipe.parent / "rows.py").write_text(ROWS)
    run = prepared(recipe, "data.source=null", "data.use=rows.py:rows", "data.shuffle=false", "eval={}", *overrides)
    assert [task.prompt for task in run.trainer.tasks.take(1)] == ["train 0?"]
    assert [task.prompt for task in run.evaluator.tasks] == held_out
    assert {task.source for task in run.evaluator.tasks} == {"eval"}
    assert run.trainer.step(1).values["completions/mean_length"] > 0


def test_several_processes_must_see_the_same_prompts(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held = []
    monkeypatch.setattr(Ranks, "check_same", lambda self, what, mine: held.append((what, mine)))
    run = prepared(recipe)
    lengths = [len(task.prompt_ids) for task in run.tasks]
    assert held == [("the prompts of data", Lengths(4, max(lengths), min(lengths), too_long=0, null=0))]


def test_a_function_that_has_changed_is_noticed_when_a_run_goes_on(recipe: Path) -> None:
    code = recipe.parent / "rows.py"
    code.write_text(ROWS)
    cfg = load_recipe(
        recipe, ["data.source=null", "data.use=rows.py:rows", "eval={use: 'rows.py:others', split: train}"]
    )
    before = context(cfg, {}, {}, {}, {name: load_rows(source) for name, source in data_of(cfg).items()})
    code.write_text(f"{ROWS}\n# only a remark")
    assert changes(before, context_now(cfg, before)) == []
    code.write_text(ROWS.replace("other?", "another?"))
    (line,) = changes(before, context_now(cfg, before))
    assert "eval" in line


@pytest.mark.parametrize(("name", "split"), [("held/*.jsonl", "train"), ("held.csv", "train"), ("owner/name", None)])
def test_what_has_one_split_is_evaluated_on_it(name: str, split: str | None) -> None:
    assert EvalOptions(data=name).settings() == [f"eval.source={name}", *([f"eval.split={split}"] if split else [])]


def test_a_saved_dataset_is_evaluated_on_its_one_split(tmp_path: Path) -> None:
    Dataset.from_list([{"question": "?"}]).save_to_disk(tmp_path / "saved")
    assert "eval.split=train" in EvalOptions(data=str(tmp_path / "saved")).settings()


def test_what_others_see_has_no_path_of_this_machine(recipe: Path, tmp_path: Path) -> None:
    for value, shown in (("'*.jsonl'", "*.jsonl"), ("[train.jsonl, train.jsonl]", "train.jsonl and 1 more")):
        cfg = load_recipe(recipe, [f"data.source={value}"])
        assert short_name(cfg.data.label) == shown
        assert f"{tmp_path}/train" not in _recipe(cfg)
        assert f"{tmp_path}/*" not in _recipe(cfg)


def test_a_function_without_splits_has_no_held_out_rows(recipe: Path) -> None:
    (recipe.parent / "rows.py").write_text(ROWS)
    with pytest.raises(UserError, match=r"has no parameter `split`.* eval.source or eval.use"):
        prepared(recipe, "data.source=null", "data.use=rows.py:others", "eval={}")


def test_lists_and_patterns_are_looked_for_beside_the_recipe(
    recipe: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "more.jsonl", "more?")
    monkeypatch.chdir("/")
    listed = prepared(recipe, "data.source=[more.jsonl, train.jsonl]", "data.shuffle=false")
    assert [task.prompt for task in listed.trainer.tasks.take(2)] == ["more?", "What is 1+1?"]
    assert load_recipe(recipe, ["data.source=*.jsonl"]).data.source == str(tmp_path / "*.jsonl")
    assert load_recipe(recipe, ["data.source=**/*.jsonl"]).data.source == str(tmp_path / "**/*.jsonl")
    assert load_recipe(recipe, ["data.source=gone/**/*.jsonl"]).data.source == "gone/**/*.jsonl"
    found = prepared(recipe, "data.source=*.jsonl", "data.shuffle=false")
    assert [task.prompt for task in found.trainer.tasks.take(2)] == ["more?", "What is 1+1?"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["eval={source: a.jsonl, use: 'a.py:b'}"], "eval.use and eval.source both say"),
        (["eval={kwargs: {n: 1}}"], "eval.kwargs does nothing without eval.use"),
        (["eval={config: main}"], "eval.config is for Hub datasets"),
        (["eval={source: a.jsonl, config: main}"], "eval.config is for Hub datasets"),
        (["data.source=null"], "data.source is missing"),
        (["data.use=a.py:b"], "data.use and data.source both say"),
    ],
)
def test_settings_of_data_that_do_nothing_are_refused(recipe: Path, overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe(recipe, overrides)
