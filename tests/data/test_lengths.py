"""How long prompts are: measured over all rows once, kept by contents, and bounded."""

from __future__ import annotations

from pathlib import Path

import pytest
from datasets import Dataset

from grpo.config import DataConfig
from grpo.data import fingerprint as prints
from grpo.data import lengths as module
from grpo.data.fingerprint import fingerprint
from grpo.data.lengths import Lengths, measure_lengths
from grpo.data.prompts import PromptRenderer
from grpo.data.rows import renamed
from grpo.errors import UserError

ROWS = [{"question": "x" * n} for n in (1, 5, 9)] + [{"question": None}]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(module, "cache_folder", lambda: tmp_path)
    return tmp_path / "lengths"


def renderer(toy, vocabulary: int | None = None, **settings) -> PromptRenderer:
    settings = {"source": "rows", "prompt": "question", "chat_template": "never"} | settings
    return PromptRenderer(DataConfig(**settings), toy[1], vocabulary)


def tokens(toy, question: str) -> int:
    return len(toy[1].encode(question))


def test_every_row_counts_wherever_it_stands(toy) -> None:
    found = measure_lengths(ROWS, renderer(toy))
    shortest = min(tokens(toy, row["question"]) for row in ROWS if row["question"] is not None)
    assert found == Lengths(4, tokens(toy, "x" * 9), shortest, too_long=0, null=1)
    limit = tokens(toy, "x" * 5)
    short = measure_lengths(ROWS, renderer(toy, max_prompt_length=limit))
    assert short == Lengths(4, limit, shortest, too_long=1, null=1)


def test_a_second_start_renders_nothing(toy, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = measure_lengths(Dataset.from_list(ROWS), renderer(toy))
    with monkeypatch.context() as within:
        within.setattr(PromptRenderer, "task", lambda *_: pytest.fail("rendered again"))
        assert measure_lengths(Dataset.from_list(ROWS), renderer(toy)) == first
    (kept,) = cache.iterdir()
    kept.write_text("{")  # damaged
    assert measure_lengths(ROWS, renderer(toy)) == first


@pytest.mark.parametrize(
    "changed",
    [
        {"max_prompt_length": 99},
        {"prompt": "{question}!"},
        {"chat_template": "never"},
        {"system": "Be brief."},
        {"chat_template_kwargs": {"enable_thinking": True}},
    ],
)
def test_whatever_changes_prompts_is_measured_anew(toy, cache: Path, changed: dict) -> None:
    chat = {"chat_template": "auto"}
    measure_lengths(ROWS, renderer(toy, **chat))
    measure_lengths(ROWS, renderer(toy, **chat | changed))
    measure_lengths(ROWS, renderer(toy, **chat | {"shuffle": False}))  # changes none of them
    assert len(list(cache.iterdir())) == 2


def test_prefilled_messages_are_measured_anew(toy, cache: Path) -> None:
    """Whether an answer at the end is refused is no property of the rows alone: one start must not decide the next."""
    rows = [{"question": [{"role": "user", "content": "1+1?"}]}]
    for prefilled in (False, True):
        measure_lengths(rows, renderer(toy, chat_template="auto", continue_final_message=prefilled))
    assert len(list(cache.iterdir())) == 2


def test_another_tokenizer_or_vocabulary_is_measured_anew(toy, cache: Path) -> None:
    measure_lengths(ROWS, renderer(toy))
    measure_lengths(ROWS, renderer(toy, vocabulary=10_000))
    toy[1].chat_template += " "
    measure_lengths(ROWS, renderer(toy))
    toy[1].add_tokens(["xxx"])
    measure_lengths(ROWS, renderer(toy))
    assert len(list(cache.iterdir())) == 4


@pytest.mark.parametrize(("bound", "least"), [("MOST_ROWS", 3), ("MOST_TOKENS", 10)])
def test_too_much_text_is_not_measured(toy, monkeypatch: pytest.MonkeyPatch, bound: str, least: int) -> None:
    monkeypatch.setattr(module, bound, least)
    for _ in range(2):  # the second time from the cache, where there was something to find out
        assert measure_lengths(ROWS, renderer(toy)) is None


def test_a_cache_that_cannot_be_written_is_done_without(toy, cache: Path) -> None:
    cache.write_text("a file, where a folder should be")
    assert measure_lengths(ROWS, renderer(toy)).rows == 4


def test_a_token_without_an_embedding_is_found_in_the_last_row(toy) -> None:
    highest = max(toy[1].encode("x"))
    rows = [{"question": "x"}] * 99 + [{"question": "?"}]
    vocabulary = max(toy[1].encode("?")) if max(toy[1].encode("?")) > highest else None
    text, known = ("?", vocabulary) if vocabulary else ("x", highest)
    rows = [{"question": "?" if text == "x" else "x"}] * 99 + [{"question": text}]
    with pytest.raises(
        UserError, match=rf"row 99 of rows has a token {known}, but the model's vocabulary has only {known}"
    ):
        measure_lengths(rows, renderer(toy, vocabulary=known))


def test_all_prompts_too_long(toy) -> None:
    with pytest.raises(UserError, match="every prompt is null or longer"):
        measure_lengths([{"question": None}, {"question": "x" * 50}], renderer(toy, max_prompt_length=3))


def test_a_fingerprint_is_of_the_contents(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"question": "a", "n": 1}, {"question": "b", "n": 2}]
    table = Dataset.from_list(rows)
    table.to_parquet(tmp_path / "rows.parquet")
    same = [rows, table, Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path / "cache"))]
    assert len({fingerprint(one) for one in same}) == 1
    others = [rows[:1], rows[::-1], [rows[0], rows[1] | {"n": 3}], table.select([1, 0])]
    assert fingerprint(rows) not in {fingerprint(one) for one in others}
    columns = {"answer": "n"}
    assert fingerprint(renamed(rows, DataConfig(source="rows", columns=columns))) != fingerprint(rows)
    monkeypatch.setattr(prints, "MOST_ROWS", 3)
    many = [{"n": n} for n in range(9)]
    assert fingerprint(many) == fingerprint(Dataset.from_list(many)) != fingerprint(many[:-1])
    assert fingerprint(many) != fingerprint([*many[:-1], {"n": 99}])
    assert fingerprint([{"n": 1}] * 9) != fingerprint([{"n": 1}] * 8)
