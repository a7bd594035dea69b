"""Every tutorial of the manual, and every example of its concepts, runs as it is written."""

from pathlib import Path

import pytest
from docs.pagerun import PAGES, blocks, commands, is_among, run_page

from grpo.builtin import models
from grpo.builtin.student import Student

TUTORIALS, CONCEPTS = (
    sorted(f"{folder}/{path.name}" for path in (PAGES / folder).glob("*.md")) for folder in ("tutorials", "concepts")
)
GUIDES = [f"{name}.md" for name in ("quickstart", "memory", "rewards", "run-folder", "running", "watching")]
"""Pages that are no tutorials and whose blocks run all the same."""
QUICK = [f"concepts/{name}.md" for name in ("corrections", "logprobs", "normalizers", "step")]
QUICK.append("tutorials/debugging.md")
"""What the default tests run; the other pages take longer."""


@pytest.fixture
def students(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The built-in models, each made in a few seconds, with the working directory in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path_factory.getbasetemp() / "students"))
    for name, settings in models.MODELS.items():
        steps = 60 if name == "builtin:arithmetic-student" else 2  # after 60 it writes answers, most of them wrong
        monkeypatch.setitem(models.MODELS, name, Student(task=settings.task, steps=steps, warmup=1))


@pytest.mark.parametrize(
    "page",
    [
        page if page in QUICK else pytest.param(page, marks=pytest.mark.slow)
        for page in [*TUTORIALS, *CONCEPTS, *GUIDES]
    ],
)
def test_a_page_runs(page: str, students: None, run_cli) -> None:
    assert run_page(page, run_cli) > 0


def test_what_is_not_run_has_a_reason() -> None:
    for page in [*TUTORIALS, *CONCEPTS, *GUIDES]:
        for block in blocks(page):
            known = ("with ", "output varies", "continues", "not run: ")
            assert not block.note or block.note.startswith(known), (page, block.note)


def test_a_command_and_its_output_are_told_apart() -> None:
    found = list(commands("$ grpo runs  # all of them\nrun\n...\n$ ls\n"))
    assert found == [("grpo runs", ["run", "..."]), ("ls", [])]


def test_a_line_that_is_not_printed_is_noticed() -> None:
    out = "step 2/30  reward 0.1\n│ greedy │ 18.8%  (11.1% to 30.0%) │\n"
    assert is_among("step 15/30  reward 0.9  kl 0.2", out)
    assert is_among("│ greedy        │ 1.8%  (1.1% to 3.0%) │", out)
    assert is_among("step 1...", out)
    assert not is_among("finished after step 30", out)
