"""Files, lists of them, patterns, and folders that `save_to_disk` wrote."""

from __future__ import annotations

import json
import socket
import subprocess
from pathlib import Path

import pytest
from datasets import Dataset, DatasetDict

from grpo.config import DataConfig
from grpo.data.loading import is_local, load_rows, open_stream
from grpo.errors import UserError


def write(path: Path, *questions: str, encoding: str = "utf-8", **more: object) -> Path:
    rows = [json.dumps({"question": question, **more}, ensure_ascii=False) + "\n" for question in questions]
    path.write_text("".join(rows), encoding=encoding)
    return path


def questions(source: object, **settings) -> list[str]:
    cfg = DataConfig(source=source, **settings)
    assert is_local(cfg)
    rows = load_rows(cfg)
    return [rows[index]["question"] for index in range(len(rows))]


def refused(source: object, **settings) -> str:
    with pytest.raises(UserError) as error:
        questions(source, **settings)
    assert "\n" not in str(error.value)
    return str(error.value)


def test_nobody_is_asked_over_the_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`datasets` counts its calls at its maker's; without a network that takes seconds."""
    asked: list[object] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *given, **_: asked.append(given) or [])
    path = write(tmp_path / "own.jsonl", "one", "two")
    assert questions(str(path)) == ["one", "two"]
    assert len(list(open_stream(DataConfig(source=str(path), streaming=True)).read())) == 2
    assert not asked


def test_files_of_a_list_come_in_its_order_whatever_their_kinds(tmp_path: Path) -> None:
    first, last = write(tmp_path / "z.jsonl", "one", "two"), write(tmp_path / "a.jsonl", "four")
    table = tmp_path / "m.csv"
    table.write_text("question\nthree\n")
    assert questions((str(first), str(table), str(last))) == ["one", "two", "three", "four"]


def test_files_of_a_pattern_come_by_name(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        write(tmp_path / f"{name}.jsonl", name)
    (tmp_path / "deep").mkdir()
    write(tmp_path / "deep" / "d.jsonl", "d")
    assert questions(str(tmp_path / "*.jsonl")) == ["a", "b", "c"]
    assert questions(str(tmp_path / "**" / "*.jsonl")) == ["a", "b", "c", "d"]
    (tmp_path / "notes.md").write_text("?")
    assert "matches" in (said := refused(str(tmp_path / "*")))
    assert "notes.md" in said
    assert "no file matches this pattern" in refused(str(tmp_path / "*.csv"))


def test_a_file_may_have_a_bracket_in_its_name(tmp_path: Path) -> None:
    assert questions(str(write(tmp_path / "rows[1].jsonl", "one"))) == ["one"]


def test_of_several_files_the_one_at_fault_is_named(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "good.jsonl", "one"), tmp_path / "bad.jsonl"
    assert f"data {bad}: there is no such file" in refused((str(good), str(bad)))
    bad.write_text('{"question": "two"}\nnot json\n')
    assert f"data {bad}: cannot be read as jsonl: line 2" in refused((str(good), str(bad)))
    table = tmp_path / "numbers.csv"
    table.write_text("question\n7\n")
    assert "columns differ" in refused((str(good), str(table)))


@pytest.mark.parametrize(
    ("encoding", "kind", "said"),
    [
        ("latin-1", "jsonl", "line 2, byte 40 (0xe9) is not UTF-8; the file is probably WINDOWS-1252"),
        ("latin-1", "csv", "line 3, byte 19 (0xe9) is not UTF-8"),
        ("utf-16", "jsonl", "line 1, byte 1 (0xff) is not UTF-8; the file is probably UTF-16"),
    ],
)
def test_other_encodings_are_named_with_place_and_remedy(tmp_path: Path, encoding: str, kind: str, said: str) -> None:
    path = tmp_path / f"rows.{kind}"
    if kind == "csv":
        path.write_bytes("question\nplain\ncafé\n".encode(encoding))
    else:
        write(path, "plain", "café", encoding=encoding)
    message = refused(str(path))
    assert f"data {path}: {said}" in message
    command = message.partition("Convert it: ")[2]
    subprocess.run(command, shell=True, check=True, cwd=tmp_path)
    assert questions(str(tmp_path / f"utf8.{kind}")) == ["plain", "café"]


def test_a_wrong_byte_is_found_wherever_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Readers take a wrong byte in a later block without a word, and a character may lie across two blocks."""
    monkeypatch.setattr("grpo.data.files.BLOCK", 7)
    path = write(tmp_path / "rows.jsonl", *["é€"] * 20)
    assert questions(str(path)) == ["é€"] * 20
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"question": "\xff"}\n')
    assert f"line 21, byte {len(whole) + 15} (0xff)" in refused(str(path))
    path.write_bytes(whole + "é".encode()[:1])
    assert f"line 21, byte {len(whole) + 1} (0xc3)" in refused(str(path))


def test_saved_folders(tmp_path: Path) -> None:
    rows = Dataset.from_dict({"question": ["one", "two"]})
    rows.save_to_disk(tmp_path / "one")
    DatasetDict(train=rows, held_out=rows.select([1])).save_to_disk(tmp_path / "splits")
    assert questions(str(tmp_path / "one")) == questions(str(tmp_path / "splits")) == ["one", "two"]
    assert questions(str(tmp_path / "splits"), split="held_out") == ["two"]
    assert "no split 'test'; it has train, held_out" in refused(str(tmp_path / "splits"), split="test")
    assert "one dataset, split 'train'; there is no 'test'" in refused(str(tmp_path / "one"), split="test")
    assert "data.config is for Hub datasets" in refused(str(tmp_path / "one"), config="main")
    next((tmp_path / "one").glob("*.arrow")).write_bytes(b"damaged")
    assert "cannot be read as a saved dataset" in refused(str(tmp_path / "one"))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"source": ("a.jsonl", "owner/name")}, "'owner/name' is not a file"),
        ({"source": ()}, "at least 1 item"),
        ({"source": ("a.jsonl",), "config": "main"}, "data.config is for Hub datasets"),
        ({"source": "data/*.jsonl", "revision": "main"}, "data.revision is for Hub datasets"),
        ({"use": "a.py:rows", "config": "main"}, "data.config is for Hub datasets"),
        ({"source": "a.jsonl", "use": "a.py:rows"}, "data.use and data.source both say"),
        ({"source": "a.jsonl", "kwargs": {"n": 1}}, "data.kwargs does nothing without data.use"),
        ({}, "data.source is missing"),
        ({"source": "a.jsonl", "prompt": "{q}", "continue_final_message": True}, "does nothing with a prompt template"),
    ],
)
def test_settings_that_do_not_go_together(settings: dict, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        DataConfig(**settings)
