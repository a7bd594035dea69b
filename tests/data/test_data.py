"""Where tasks come from: sources, prompts, and a stream that resumes."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
from datasets import Dataset

from grpo.config import DataConfig
from grpo.data.loading import load_rows
from grpo.data.prompts import PromptRenderer
from grpo.data.rows import rows_with_null
from grpo.data.stream import TaskStream, first_tasks
from grpo.errors import UserError

ROWS = [{"question": f"{'x' * n}?", "answer": str(n)} for n in range(1, 8)]


def config(**settings) -> DataConfig:
    return DataConfig(**({"source": "rows", "prompt": "question"} | settings))


def renderer(toy, **settings) -> PromptRenderer:
    return PromptRenderer(config(**settings), toy[1])


def text(toy, task) -> str:
    return toy[1].decode(list(task.prompt_ids))


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_files(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"rows.{kind}"
    dataset = Dataset.from_list(ROWS)
    if kind == "json":
        path.write_text(json.dumps(ROWS))
    else:
        {"jsonl": dataset.to_json, "csv": dataset.to_csv, "parquet": dataset.to_parquet}[kind](str(path))
    rows = load_rows(config(source=str(path)))
    assert [str(rows[i]["answer"]) for i in range(len(rows))] == [row["answer"] for row in ROWS]


def test_columns_go_by_the_names_that_a_recipe_gives_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"nums": [1, 2], "inner": {"gold": "3"}, "answer": "no"}, {"nums": None, "inner": None, "answer": "no"}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    renamed = load_rows(
        config(source=str(path), columns={"numbers": "nums", "answer": "inner.gold", "second": "nums.1"})
    )
    assert len(renamed) == 2
    assert renamed[0] == {"nums": [1, 2], "numbers": [1, 2], "second": 2, "inner": {"gold": "3"}, "answer": "3"}
    assert (renamed[1]["answer"], renamed[1]["second"]) == (None, None)
    assert rows_with_null(renamed, ["numbers"]) == 1


@pytest.mark.parametrize("old", ["golden", "inner.golden", "answer.gold", "many.one"])
def test_a_column_that_is_not_there_is_named_with_those_that_are(tmp_path: Path, old: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"inner": {"gold": "3"}, "answer": "no", "many": [1]}))
    said = f"data.columns.right: no column {old!r} in row 0 of {path}; it has inner, answer, many"
    with pytest.raises(UserError, match=re.escape(said)):
        load_rows(config(source=str(path), columns={"right": old}))


@pytest.mark.parametrize("later", ["text", ["an item"]])
def test_a_path_that_ends_in_a_later_row_is_the_recipes_mistake(tmp_path: Path, later: object) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"inner": inner}) + "\n" for inner in (None, later)))
    rows = load_rows(config(source=str(path), columns={"right": "inner.gold"}))
    assert rows[0]["right"] is None
    with pytest.raises(UserError, match=f"no column 'inner.gold' in row 1 of {re.escape(str(path))}"):
        rows[1]


def test_items_are_counted_from_either_end(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"many": many}) + "\n" for many in ([], ["a"], ["a", "b"])))
    rows = load_rows(config(source=str(path), columns={"last": "many.-1", "second": "many.1"}))
    assert [(rows[i]["last"], rows[i]["second"]) for i in range(3)] == [(None, None), ("a", None), ("b", "b")]


def test_a_folder_is_no_file(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"save_to_disk did not write this folder: name a file in it, .*/\*\.jsonl \(\.jsonl, "
    ):
        load_rows(config(source=str(tmp_path)))
    with pytest.raises(UserError, match=r"no such file or folder \(\.jsonl, "):
        load_rows(config(source=str(tmp_path / "absent")))


@pytest.mark.parametrize(
    ("name", "content", "settings", "said"),
    [
        ("none.jsonl", None, {}, "there is no such file"),
        ("empty.jsonl", "", {}, "the file is empty"),
        ("none.csv", "question,answer\n", {}, "has no rows"),
        ("none.json", "[]", {}, "has no rows"),
        ("bad.jsonl", "{not json", {}, "cannot be read as jsonl: line 1, column 2: Expecting property name"),
        ("bad.jsonl", '{"question": "?"}\n\nnot json\n', {}, "line 3, column 1: Expecting value"),
        ("bad.jsonl", '{"question": "?"}\n[1]\n', {}, "line 2 is not an object: [1]"),
        ("good.jsonl", '{"question": "?"}', {"split": "test"}, "a file is one split, 'train'; there is no 'test'"),
    ],
)
def test_files_that_will_not_do(tmp_path: Path, name: str, content: str | None, settings: dict, said: str) -> None:
    path = tmp_path / name
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError) as error:
        load_rows(config(source=str(path), **settings))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("columns", "count"), [(["question"], 1), (["question", "answer"], 2), (["absent"], 0)])
def test_rows_without_a_prompt_are_counted(tmp_path: Path, columns: list[str], count: int) -> None:
    path = tmp_path / "rows.jsonl"
    rows = [{"question": "?", "answer": "1"}, {"question": None, "answer": None}, {"question": "?", "answer": None}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert rows_with_null(load_rows(config(source=str(path))), columns) == count
    assert rows_with_null(load_rows(config(source="builtin:arithmetic")), columns) == 0


def test_missing_numbers_are_counted_like_nulls() -> None:
    rows = [{"x": 1.0}, {"x": float("nan")}, {"x": None}]
    assert rows_with_null(rows, ["x"]) == rows_with_null(Dataset.from_list(rows), ["x"]) == 2


def test_text_goes_through_the_chat_template(toy) -> None:
    task = renderer(toy).task(0, {"question": "3+4?"})
    assert text(toy, task) == "<|im_start|>user\n3+4?<|im_end|>\n<|im_start|>assistant\n"
    assert task.prompt == "3+4?"


def test_text_as_it_is(toy) -> None:
    assert text(toy, renderer(toy, chat_template="never").task(0, {"question": "3+4?"})) == "3+4?"


def test_a_system_message(toy) -> None:
    task = renderer(toy, system="Be brief.").task(0, {"question": "3+4?"})
    assert text(toy, task).startswith("<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n3+4?")


def test_a_template_over_columns(toy) -> None:
    task = renderer(toy, prompt="{question} Put it in \\boxed{{}}.").task(0, {"question": "3+4?", "other": 1})
    assert task.prompt == "3+4? Put it in \\boxed{}."


def test_a_list_of_numbers_in_a_template(toy) -> None:
    task = renderer(toy, prompt="Use {numbers}.").task(0, {"numbers": [44, 19, 35]})
    assert task.prompt == "Use 44, 19, 35."


def test_messages(toy) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "3+4?"}]
    task = renderer(toy).task(0, {"question": messages})
    assert task.prompt == messages
    assert text(toy, task).count("<|im_start|>") == 3


def test_template_arguments_reach_the_chat_template(toy) -> None:
    toy[1].chat_template = "{{ messages[0]['content'] }} in {{ mood }}"
    task = renderer(toy, chat_template_kwargs={"mood": "style"}).task(0, {"question": "3+4?"})
    assert text(toy, task) == "3+4? in style"


@pytest.mark.parametrize(
    ("settings", "row", "said"),
    [
        ({"prompt": "qestion"}, {"question": "?"}, "no column 'qestion' in row 0 of rows; it has question"),
        ({"prompt": "{qestion}!"}, {"question": "?"}, "no column 'qestion' in row 0 of rows; it has question"),
        ({"prompt": "{question"}, {"question": "?"}, "is not a template"),
        ({"prompt": "{0}"}, {"question": "?"}, "a template may contain only column names"),
        ({"prompt": "{question:>9}"}, {"question": "?"}, "a template may contain only column names"),
        ({"prompt": "{question}"}, {"question": [{"role": "user", "content": "?"}]}, "a template takes only text"),
        ({"chat_template": "never"}, {"question": ""}, "has no tokens; check the model's tokenizer"),
        ({}, {"question": 7}, "neither text nor a list of messages"),
        ({}, {"question": [{"text": "?"}]}, "neither text nor a list of messages"),
    ],
)
def test_prompts_that_will_not_do(toy, settings: dict, row: dict, said: str) -> None:
    with pytest.raises(UserError) as error:
        renderer(toy, **settings).task(0, row)
    assert said in str(error.value)


@pytest.mark.parametrize(("prompt", "setting"), [([{"role": "user", "content": "?"}], "auto"), ("?", "always")])
def test_no_chat_template(toy, prompt, setting: str) -> None:
    toy[1].has_chat_template = False
    with pytest.raises(UserError, match="need a chat template"):
        renderer(toy, chat_template=setting).task(0, {"question": prompt})
    plain = renderer(toy, chat_template="auto").task(0, {"question": "3+4?"})
    assert text(toy, plain) == "3+4?"


def indices(stream: TaskStream, n: int) -> list[int]:
    return [task.index for task in stream.take(n)]


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own(toy) -> None:
    seen = indices(TaskStream(ROWS, renderer(toy), seed=0), 21)
    epochs = [seen[:7], seen[7:14], seen[14:]]
    assert all(Counter(epoch) == Counter(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert indices(TaskStream(ROWS, renderer(toy), seed=1), 21) != seen


def test_rows_keep_their_order_where_they_are_not_shuffled(toy) -> None:
    assert indices(TaskStream(ROWS, renderer(toy, shuffle=False), seed=0), 16) == [*range(7), *range(7), 0, 1]


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_stream_goes_on_from_its_cursor(toy, shuffle: bool) -> None:
    whole = indices(TaskStream(ROWS, renderer(toy, shuffle=shuffle), seed=0), 20)
    first = TaskStream(ROWS, renderer(toy, shuffle=shuffle), seed=0)
    begun = indices(first, 9)
    second = TaskStream(ROWS, renderer(toy, shuffle=shuffle), seed=0)
    second.load_state(first.state())
    assert begun + indices(second, 11) == whole


def test_long_prompts_are_dropped_and_counted_never_cut(toy) -> None:
    lengths = {index: len(renderer(toy).task(index, row).prompt_ids) for index, row in enumerate(ROWS)}
    limit = sorted(lengths.values())[2]
    short = {index for index, length in lengths.items() if length <= limit}
    stream = TaskStream(ROWS, renderer(toy, max_prompt_length=limit), seed=0)
    tasks = stream.take(2 * len(short))
    assert Counter(task.index for task in tasks) == Counter({index: 2 for index in short})
    assert all(len(task.prompt_ids) == lengths[task.index] for task in tasks)
    assert stream.cursor == stream.dropped + len(tasks)
    assert {task.index for task in first_tasks(ROWS, renderer(toy, max_prompt_length=limit), 99)} == short


def test_all_prompts_too_long(toy) -> None:
    with pytest.raises(UserError, match=r"longer than max_prompt_length \(2 tokens\)"):
        TaskStream(ROWS, renderer(toy, max_prompt_length=2), seed=0).take(1)
    with pytest.raises(UserError, match="longer than max_prompt_length"):
        first_tasks(ROWS, renderer(toy, max_prompt_length=2), 3)


def test_an_environment_may_supply_prompts(toy) -> None:
    """Rows without the column `prompt`, which is the default, have an empty message; others are missed."""
    row = {"question": "?"}
    with pytest.raises(UserError, match="no column 'prompt'"):
        renderer(toy, prompt="prompt").task(0, row)
    made = PromptRenderer(config(prompt="prompt"), toy[1], supplied=True)
    assert made.task(0, row).prompt == [{"role": "user", "content": ""}]
    assert text(toy, made.task(0, row)) == "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"
    assert made.task(0, {"prompt": "x"}).prompt == "x"
    assert made.task(0, {"prompt": None}) is None
    with pytest.raises(UserError, match="no column 'quest'"):
        PromptRenderer(config(prompt="quest"), toy[1], supplied=True).task(0, row)
