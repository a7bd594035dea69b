"""Damaged checkpoints: whatever happens to the files of one, it is detected, skipped, and refused."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
from runs.driver import run
from runs.test_checkpoint import save

from grpo.errors import UserError
from grpo.runs.checkpoint import STATE, SUMS, checkpoints, damage, hash_of, load_checkpoint, newest_whole

Damage = Callable[[Path, random.Random], None]


def some_file(folder: Path, draw: random.Random) -> Path:
    return draw.choice(sorted(folder.iterdir()))


def flips_a_bit(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)


def is_cut_off(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def grows(folder: Path, draw: random.Random) -> None:
    with some_file(folder, draw).open("ab") as file:
        file.write(draw.choice([b"\n", b"\0" * 100, b"more"]))


def loses_a_file(folder: Path, draw: random.Random) -> None:
    some_file(folder, draw).unlink()


def loses_a_file_and_its_sum(folder: Path, draw: random.Random) -> None:
    path = draw.choice([path for path in sorted(folder.iterdir()) if path.name != SUMS])
    path.unlink()
    drop_sums(folder, path.name)


def loses_a_sum(folder: Path, draw: random.Random) -> None:
    """And the file under it is another's: what a shorter list would let through."""
    path = draw.choice([path for path in sorted(folder.iterdir()) if path.name not in (SUMS, STATE)])
    drop_sums(folder, path.name)
    if draw.random() < 0.5:
        path.write_bytes(b"another")


def gains_a_file(folder: Path, draw: random.Random) -> None:
    """With or without a line in the sums. The trainer would read a `reference` that it finds."""
    path = folder / draw.choice(["reference.safetensors", "notes.txt", "adapters (1).safetensors"])
    shutil.copy(folder / "adapters.safetensors", path)
    if draw.random() < 0.5:
        lines = (folder / SUMS).read_text().splitlines(keepends=True)
        lines.insert(draw.randrange(len(lines) + 1), f"{hash_of(path)}  {path.name}\n")
        (folder / SUMS).write_text("".join(lines))


def is_renamed(folder: Path, draw: random.Random) -> None:
    path = some_file(folder, draw)
    path.rename(path.with_name(draw.choice(["old-", "_"]) + path.name))


def has_two_files_swapped(folder: Path, draw: random.Random) -> None:
    one, other = draw.sample(sorted(folder.iterdir()), 2)
    data = one.read_bytes()
    one.write_bytes(other.read_bytes())
    other.write_bytes(data)


def has_a_file_of_another_step(folder: Path, draw: random.Random) -> None:
    name = draw.choice(["adapters.safetensors", STATE, SUMS])
    shutil.copy(folder.parent / "step-000005" / name, folder / name)


def is_another_step(folder: Path, draw: random.Random) -> None:
    shutil.rmtree(folder)
    shutil.copytree(folder.parent / "step-000005", folder)


def has_its_sums_edited(folder: Path, draw: random.Random) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    one, other = draw.sample(range(len(lines)), 2)
    edited = draw.choice(
        [
            [*lines, lines[one]],
            [line for line in lines if line is not lines[one]],
            [line.upper() if line is lines[one] else line for line in lines],
            [line.replace("  ", " *") if line is lines[one] else line for line in lines],
            [lines[one] if line is lines[other] else line for line in lines],
            ["# sums\n", *lines],
            [*lines, "\n"],
        ]
    )
    (folder / SUMS).write_text("".join(edited))


def has_its_state_edited(folder: Path, draw: random.Random) -> None:
    state = json.loads((folder / STATE).read_text())
    name = draw.choice(sorted(state))
    state[name] = draw.choice([11, "odd", [None]])
    (folder / STATE).write_text(json.dumps(state, indent=2) + "\n")


DAMAGES: list[Damage] = [
    flips_a_bit,
    is_cut_off,
    grows,
    loses_a_file,
    loses_a_file_and_its_sum,
    loses_a_sum,
    gains_a_file,
    is_renamed,
    has_two_files_swapped,
    has_a_file_of_another_step,
    is_another_step,
    has_its_sums_edited,
    has_its_state_edited,
]


DIFFERENT = {loses_a_file: 6, loses_a_file_and_its_sum: 5, loses_a_sum: 8, is_another_step: 1}
DIFFERENT |= {has_a_file_of_another_step: 3, gains_a_file: 20, is_renamed: 12, has_two_files_swapped: 15, grows: 18}
"""How many of a kind there are, where they are fewer than 30."""


def drop_sums(folder: Path, name: str) -> None:
    lines = (folder / SUMS).read_text().splitlines(keepends=True)
    (folder / SUMS).write_text("".join(line for line in lines if not line.endswith(f"  {name}\n")))


def sum_anew(folder: Path, *names: str) -> None:
    """Write the sums as they would be for these files: what only a forger does."""
    (folder / SUMS).write_text("".join(f"{hash_of(folder / name)}  {name}\n" for name in names))


@pytest.fixture
def two(tmp_path: Path) -> tuple[Path, Path]:
    """Two checkpoints, the older of another state."""
    older, newest = save(tmp_path, 5), save(tmp_path, 10)
    arrays = mx.load(str(older / "adapters.safetensors"))
    mx.save_safetensors(str(older / "adapters.safetensors"), {path: a + 1 for path, a in arrays.items()})
    sum_anew(older, *[line.split("  ")[1] for line in (older / SUMS).read_text().splitlines()])
    assert (damage(older), damage(newest)) == (None, None)
    return older, newest


@pytest.mark.parametrize("do", DAMAGES, ids=lambda do: do.__name__)
def test_two_hundred_damages_are_noticed_passed_over_and_refused(two, do: Damage) -> None:
    older, newest = two
    kept = shutil.copytree(newest, newest.parent / "kept")
    draw = random.Random(do.__name__)
    seen: set[bytes] = set()
    for _ in range(200):
        if len(seen) == DIFFERENT.get(do, 30):
            break
        do(newest, draw)
        seen.add(repr([(path.name, path.read_bytes()) for path in sorted(newest.iterdir())]).encode())
        found, passed_over = newest_whole(newest.parent)
        assert found == older
        assert [line.partition(": ")[0] for line in passed_over] == [f"skipped {newest}"]
        with pytest.raises(UserError, match=f"checkpoint {newest}: "):
            load_checkpoint(newest)
        shutil.rmtree(newest)
        shutil.copytree(kept, newest)
        assert damage(newest) is None
    assert len(seen) == DIFFERENT.get(do, 30)


def test_a_shorter_list_is_not_believed_though_all_that_it_lists_is_right(two) -> None:
    _, newest = two
    (newest / "optimizer.safetensors").unlink()
    sum_anew(newest, "adapter_config.json", "adapters.safetensors", "recipe.yaml", STATE)
    assert damage(newest) == "SHA256SUMS: changed since it was written"


def test_what_more_there_is_and_another_steps_name_are_said(two) -> None:
    older, newest = two
    (newest / ".DS_Store").write_bytes(b"a file manager's")
    assert damage(newest) is None
    (newest / "notes.txt").write_text("mine")
    assert damage(newest) == "notes.txt: not part of this checkpoint; move it out of the folder"
    shutil.copytree(older, newest.with_name("step-000012"))
    assert damage(newest.with_name("step-000012")) == "is named step 12 but was written after step 5"
    assert damage(shutil.copytree(older, newest.with_name("my-best"))) is None
    assert damage(shutil.copytree(older, newest.with_name("step-000005-copy"))) is None
    assert [path.name for path in checkpoints(newest.parent)] == ["step-000005", "step-000010", "step-000012"]


def test_one_of_an_older_form_is_refused_for_that_reason(two) -> None:
    _, newest = two
    state = json.loads((newest / STATE).read_text())
    del state["format"], state["files"]
    (newest / STATE).write_text(json.dumps(state))
    sum_anew(newest, *[line.split("  ")[1] for line in (newest / SUMS).read_text().splitlines()])
    assert "in a format that grpo" in damage(newest)


@pytest.fixture
def diverged(recipe) -> Path:
    """A run whose last checkpoint is whole, and has a NaN in its adapter."""
    checkpoint = run(recipe, "output_dir=diverged").checkpoint
    arrays = mx.load(str(checkpoint / "adapters.safetensors"))
    path = sorted(arrays)[0]
    arrays[path] = mx.where(mx.arange(arrays[path].size).reshape(arrays[path].shape) == 3, mx.nan, arrays[path])
    mx.save_safetensors(str(checkpoint / "adapters.safetensors"), arrays)
    sum_anew(checkpoint, *[line.split("  ")[1] for line in (checkpoint / SUMS).read_text().splitlines()])
    assert damage(checkpoint) is None
    return checkpoint


def test_an_adapter_with_nan_is_refused_by_every_command(recipe, diverged, run_cli) -> None:
    recipe.write_text(recipe.read_text() + "eval: {split: train, prompts: 2, samples: 1}\n")
    commands = [
        ("eval", "diverged", "--data", "train.jsonl"),
        ("eval", recipe, "--adapter", diverged),
        ("generate", "diverged", "hello"),
        ("export", "diverged", "--format", "mlx"),
        ("export", "diverged", "--format", "peft"),
        ("export", "diverged", "--format", "fused"),
        ("train", recipe, f"adapter.path={diverged}"),
        ("train", recipe, "output_dir=diverged", "--resume-changed", "optim.steps=3"),
    ]
    for command in commands:
        ran = run_cli(*command)
        assert (ran.code, "Traceback" in ran.err) == (2, False), command
        assert "NaN or infinities in 1 of" in ran.err, (command, ran.err)
        assert "its training diverged" in ran.err
    assert not list(Path("diverged").glob("export-*"))
