"""Rows that a function of the user's returns: checked like any, with the function's mistakes told as such."""

from __future__ import annotations

from pathlib import Path

import pytest

from grpo.config import DataConfig
from grpo.data import objects
from grpo.data.loading import load_rows
from grpo.errors import UserError

CODE = """
from datasets import Dataset, DatasetDict, IterableDataset
from beside import QUESTIONS

def rows(n=2):
    return [{"question": question} for question in QUESTIONS[:n]]

def some(split):
    return [{"question": f"{split} {question}"} for question in QUESTIONS]

def table():
    return Dataset.from_list(rows(3))

def splits(split):
    return DatasetDict({name: Dataset.from_list(some(name)) for name in ("train", "test")})

def generated():
    yield from rows(3)

def streamed():
    return IterableDataset.from_generator(generated)

def endless():
    while True:
        yield {"question": "?"}

def broken():
    yield {"question": "?"}
    raise RuntimeError("no such table")

def none(): pass
def text(): return "question"
def one(): return {"question": "?"}
def texts(): return ["a", "b"]
def frame(): return __import__("pandas").DataFrame(rows())
def empty(): return []
"""


@pytest.fixture
def found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "mine.py").write_text(CODE)
    (tmp_path / "beside.py").write_text("QUESTIONS = ['a', 'b', 'c']\n")
    monkeypatch.setattr("sys.path", [*__import__("sys").path])
    monkeypatch.delitem(__import__("sys").modules, "beside", raising=False)

    def questions(name: str, **settings) -> list[str]:
        rows = load_rows(DataConfig(use=f"{tmp_path}/mine.py:{name}", **settings))
        return [rows[index]["question"] for index in range(len(rows))]

    return questions


@pytest.mark.parametrize(
    ("name", "settings", "questions"),
    [
        ("rows", {}, ["a", "b"]),
        ("rows", {"kwargs": {"n": 1}}, ["a"]),
        ("some", {}, ["train a", "train b", "train c"]),
        ("some", {"split": "dev"}, ["dev a", "dev b", "dev c"]),
        ("table", {}, ["a", "b", "c"]),
        ("splits", {"split": "test"}, ["test a", "test b", "test c"]),
        ("generated", {}, ["a", "b", "c"]),
        ("streamed", {}, ["a", "b", "c"]),
        ("frame", {}, ["a", "b"]),
    ],
)
def test_rows_of_a_function(found, name: str, settings: dict, questions: list[str]) -> None:
    assert found(name, **settings) == questions


@pytest.mark.parametrize(
    ("name", "settings", "said"),
    [
        ("absent", {}, "no function 'absent' in it"),
        ("rows", {"kwargs": {"m": 1}}, "unexpected keyword argument 'm'"),
        ("some", {"kwargs": {"split": "x"}}, "its argument `split` comes from data.split"),
        ("rows", {"split": "test"}, "has no parameter `split`, so its rows are one split, 'train'; there is no 'test'"),
        ("splits", {"split": "dev"}, "no split 'dev'; it has train, test"),
        ("broken", {}, r"it raised RuntimeError: no such table \(mine.py:\d+\)"),
        ("none", {}, "its result is of type NoneType; expected rows"),
        ("text", {}, "its result is of type str; expected rows"),
        ("one", {}, "its result is of type dict; expected rows"),
        ("texts", {}, "row 0 is not a dict with column names, but str: 'a'"),
        ("empty", {}, "split 'train' has no rows"),
        ("endless", {}, "more than 1,000 rows, so it may be infinite"),
    ],
)
def test_functions_that_will_not_do(found, monkeypatch, name: str, settings: dict, said: str) -> None:
    monkeypatch.setattr(objects, "MOST_ROWS", 1000)
    with pytest.raises(UserError, match=said) as error:
        found(name, **settings)
    assert "mine.py" in str(error.value)


def test_a_function_in_source_is_sent_to_use() -> None:
    with pytest.raises(UserError, match=r"set data\.use"):
        load_rows(DataConfig(source="mine.py:rows"))
