"""Help in full, completion, and what is said to those who write a setting as an option."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import typer

from grpo.cli import app


@pytest.mark.parametrize("width", [80, 140])
@pytest.mark.parametrize("group", [[], ["recipes"], ["rewards"], ["bench"]])
def test_summaries_are_not_cut_off(run_cli, monkeypatch, group: list[str], width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    long, short = run_cli(*group, "--help"), run_cli(*group, "-h")
    assert (long.code, long.out) == (0, short.out)
    commands = long.out.partition("\nCommands:\n")[2]
    assert commands
    assert "..." not in commands
    assert max(map(len, long.out.splitlines())) <= width


def commands(command: click.Command, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """The words of every command, groups included."""
    yield path
    for name, inner in getattr(command, "commands", {}).items():
        yield from commands(inner, (*path, name))


@pytest.mark.parametrize("width", [80, 100])
def test_every_page_fits_its_terminal_and_shows_all_words(run_cli, monkeypatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    paths = list(commands(typer.main.get_command(app)))
    assert ("rewards", "score") in paths
    for path in paths:
        ran = run_cli(*path, "-h")
        assert ran.code == 0, path
        assert max(map(len, ran.out.splitlines())) <= width, path
        assert "[[" not in ran.out, path
        assert "  …" not in ran.out, path  # no help text goes on from the text above it


def test_a_whole_summary_is_there(run_cli) -> None:
    listed = " ".join(run_cli("-h").out.split())
    assert "train Train an adapter, or the weights themselves, with GRPO, from a recipe. eval Measure" in listed


def test_every_command_takes_h(run_cli) -> None:
    assert run_cli("train", "-h").out == run_cli("train", "--help").out
    assert "--dry-run" in run_cli("train", "-h").out


def test_a_shell_completes(run_cli, monkeypatch) -> None:
    assert "--install-completion" in run_cli("-h").out
    monkeypatch.setenv("_GRPO_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", "grpo re")
    monkeypatch.setenv("COMP_CWORD", "1")
    assert run_cli().out.split() == ["report", "replay", "recipes", "rewards"]


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["--optim.steps", "10"], "--optim.steps: settings of a recipe are written without dashes: optim.steps=10"),
        (["--optim.steps=10"], "are written without dashes: optim.steps=10"),
        (["--seed", "3"], "are written without dashes: seed=3"),
        (["--output-dir", "x"], "are written without dashes: output_dir=x"),
        (["--loss.beta"], "are written without dashes: loss.beta=..."),
    ],
)
@pytest.mark.parametrize("command", ["train", "eval"])
def test_a_setting_written_as_an_option(run_cli, command: str, args: list[str], said: str) -> None:
    ran = run_cli(command, "quickstart", *args)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert said in ran.err


def test_an_option_that_is_none_stays_one(run_cli) -> None:
    for option in ("--nope", "--nope.x"):
        ran = run_cli("train", "quickstart", option, "1")
        assert ran.code == 2
        assert f"No such option: {option}" in ran.err


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("rewards.0.use=gsm8k", "Did you mean 'gsm8k_answer'?"),
        ("loss.type=grop", "got \"grop\". Did you mean 'grpo'?"),
        ("loss.type=zzz", 'got "zzz".'),
        ("rewards=gsm8k_answer", 'got "gsm8k_answer". Write rewards: [{use: gsm8k_answer}]'),
        ("rollout.stop=END", 'got "END". Write rollout.stop: ["END"]'),
        ("optim.steps=1e3", "got 1000.0. Write 1000."),
        ("optim.steps=1e12", "got 1000000000000.0. It should be less than 1000000.\n"),
        ("optim.steps=-2.0", "got -2.0. It should be greater than 0.\n"),
        ("optim.micro_batch_tokens=1e12", "It should be less than or equal to 10000000.\n"),
        ("adapter.layers=[1e30, 2]", "adapter.layers.0: expected a valid integer, got 1e+30.\n"),
        (
            "adapter.targets=[q_prj]",
            "no linear layer 'q_prj' in this model. Did you mean 'q_proj'? It has mlp.down_proj",
        ),
        ("adapter.targets=self_atn.q_proj", "Did you mean 'self_attn.q_proj'?"),
        ("adapter.targets=all_linear", "Did you mean 'all-linear'?"),
        ("adapter.targets=zzz", "no linear layer 'zzz' in this model. It has mlp.down_proj"),
        ("adapter.alpha=32", "TRL's lora_alpha is adapter.scale here (alpha / rank, so alpha is scale × rank)."),
        ("data.alpha=32", "unknown key data.alpha. Valid here: source,"),
        (
            "optim.betas=[0.9, 0.99]",
            "Did you mean optim.optimizer_args.betas? Arguments of the optimizer belong in op",
        ),
        ("momentum=0.9", "Did you mean optim.optimizer_args.momentum?"),
        ("loss.momentum=0.9", "unknown key loss.momentum. Valid here: "),
        (
            "optim.optimizer=adamw_8bit",
            "For 8-bit moments, set optim.moments",
        ),
        ("log.report=true", "unknown key log.report. Valid here: wandb, tensorboard, trackio, use, completions, kl.\n"),
    ],
)
def test_what_was_probably_meant(run_cli, recipe, override: str, said: str) -> None:
    ran = run_cli("train", recipe, override)
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert said in ran.err


@pytest.mark.parametrize(
    ("wanted", "column", "said"),
    [
        ("answer", "gold", "Is it gold? Write data.columns: {answer: gold}"),
        (
            "solution",
            "answers",
            "If the dataset has the column under another name, write data.columns: {solution: THAT_NAME}",
        ),
        ("answer", "answers", "Is it answers? Write data.columns: {answer: answers}"),
        ("tests", "unit_tests", "Is it unit_tests? Write data.columns: {tests: unit_tests}"),
    ],
)
def test_a_column_under_another_name(run_cli, recipe, wanted: str, column: str, said: str) -> None:
    Path("train.jsonl").write_text(f'{{"question": "1+1?", "{column}": "2"}}\n')
    Path("wants.py").write_text(f"def reward(completions, {wanted}, **_):\n    return [1.0 for _ in completions]\n")
    ran = run_cli("train", recipe, "rewards.0.use=wants.py:reward")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert f"missing a required argument: '{wanted}'" in ran.err
    assert said in ran.err
