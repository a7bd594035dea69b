"""The commands as a person meets them."""

import json
import os
import re
import shutil
import signal
from pathlib import Path

import mlx.core as mx
import pytest
from telemetry.pages import data_in

from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions
from grpo.training.trainer import Trainer


def files(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_rows_without_a_prompt_are_said_once(run_cli, recipe) -> None:
    with Path("train.jsonl").open("a") as file:
        file.write('{"question": null, "answer": "1"}\n')
    with recipe.open("a") as file:
        file.write("eval: {split: train, prompts: 2, samples: 2}\n")
    ran = run_cli("train", recipe, "--dry-run")
    assert ran.code == 0, ran.err
    assert ran.out.count("train.jsonl, train: 1 of 5 rows have a null prompt and are left out") == 1


def test_train_from_end_to_end(run_cli, recipe) -> None:
    with recipe.open("a") as file:
        file.write("eval: {split: train, every: 1, prompts: 3, samples: 2}\ncheckpoint: {every: 1, keep: 1}\n")
    ran = run_cli("train", recipe)
    assert ran.code == 0, ran.err
    folder = Path("runs/toy")
    steps, evals = lines(folder / "metrics.jsonl"), lines(folder / "eval.jsonl")
    assert [step["step"] for step in steps] == [1, 2]
    assert [(line["step"], line["n"]) for line in evals] == [(0, 3), (1, 3), (2, 3)]
    assert {"greedy", "avg@2", "pass@2"} < set(evals[0])
    trl = {"reward", "reward_std", "frac_reward_zero_std", "completions/mean_length", "completions/clipped_ratio"}
    assert trl | {"entropy", "clip_ratio/low_mean", "grad_norm", "learning_rate", "loss"} <= set(steps[0])
    assert {name for name in files(folder / "checkpoints") if "/" not in name} == {"step-000001", "step-000002"}
    assert files(folder / "checkpoints/step-000002") == {
        "adapters.safetensors",
        "adapter_config.json",
        "optimizer.safetensors",
        "recipe.yaml",
        "state.json",
        "SHA256SUMS",
    }
    for said in (
        "2 steps of 2 prompts",
        "mean gap",
        "step 2/2  reward",
        "greedy",
        "adapter  runs/toy/checkpoints/step-000002",
    ):
        assert said in ran.out
    command = re.search(r"try it   grpo (.*)", ran.out)
    assert command
    assert run_cli(*["generate", "runs/toy", "What is 3+3?", "--max-tokens", "5"]).code == 0
    measured = run_cli("eval", "runs/toy", "eval.prompts=2")
    assert measured.code == 0
    assert "after step 2" in measured.out


def test_a_dry_run_trains_and_writes_nothing(run_cli, recipe, tmp_path) -> None:
    before = files(tmp_path)
    ran = run_cli("train", recipe, "--dry-run")
    assert ran.code == 0
    for said in ("2 steps of 2 prompts, 8 completions, at most", "memory about", "digits.py:reward × 1"):
        assert said in ran.out
    assert files(tmp_path) - {name for name in files(tmp_path) if "__pycache__" in name} == before


def test_a_folder_with_another_run_is_not_touched(run_cli, recipe) -> None:
    assert run_cli("train", recipe).code == 0
    before = Path("runs/toy/metrics.jsonl").read_text()
    again = run_cli("train", recipe)
    assert again.code == 2
    assert "runs/toy already holds a run: resume it (--resume), name another folder (output_dir=...) or" in again.err
    assert Path("runs/toy/metrics.jsonl").read_text() == before
    assert run_cli("train", recipe, "optim.steps=1", "--overwrite").code == 0
    assert len(lines(Path("runs/toy/metrics.jsonl"))) == 1


def test_overwrite_deletes_what_a_run_wrote_and_only_once_the_new_one_has_begun(run_cli, recipe) -> None:
    assert run_cli("train", recipe).code == 0
    Path("runs/toy/notes.txt").write_text("mine")
    before = {name: (Path("runs/toy") / name).read_bytes() for name in ("metrics.jsonl", "recipe.yaml")}
    Path("digits.py").write_text("def reward(**_):\n    raise ValueError('broken')\n")
    assert run_cli("train", recipe, "--overwrite").code == 1
    assert {name: (Path("runs/toy") / name).read_bytes() for name in before} == before
    assert run_cli("generate", "runs/toy", "hi", "--max-tokens", "2").code == 0
    Path("digits.py").write_text("def reward(completions, **_):\n    return [len(c) % 3 for c in completions]\n")
    assert run_cli("train", recipe, "--overwrite", "optim.steps=1").code == 0
    assert len(lines(Path("runs/toy/metrics.jsonl"))) == 1
    assert sorted(path.name for path in Path("runs/toy").iterdir()) == sorted(
        [".ended", "checkpoints", "completions", "metrics.jsonl", "notes.txt", "recipe.yaml"]
    )


@pytest.mark.parametrize("name", ["recipe.yaml", "metrics.jsonl", "checkpoints"])
def test_files_that_no_run_wrote_are_never_touched(run_cli, recipe, name: str) -> None:
    mine = Path("precious") / name
    mine.parent.mkdir()
    mine.write_text("mine")
    for flags in ([], ["--overwrite"]):
        ran = run_cli("train", recipe, "output_dir=precious", *flags)
        assert ran.code == 2
        assert f"has a {name} that no grpo run wrote" in ran.err
    assert mine.read_text() == "mine"


def test_a_stopped_run_says_how_to_go_on(run_cli, recipe, monkeypatch) -> None:
    step = Trainer.step

    def asked(self, n: int):
        if n == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(self, n)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "step", asked)
        stopped = run_cli("train", recipe, "optim.learning_rate=1e-4")
    assert stopped.code == 143
    assert "resume   grpo train runs/toy/recipe.yaml --resume" in stopped.out
    refused = run_cli("train", "runs/toy", "--resume")
    assert (refused.code, len(refused.err.splitlines())) == (2, 1)
    assert "Name the recipe in it: runs/toy/recipe.yaml" in refused.err
    resumed = run_cli("train", "runs/toy/recipe.yaml", "--resume")
    assert resumed.code == 0, resumed.err
    assert "go on " not in resumed.out
    assert [line["learning_rate"] for line in lines(Path("runs/toy/metrics.jsonl"))] == [1e-4, 1e-4]


def test_a_dry_run_says_that_the_folder_cannot_be_written(run_cli, recipe, monkeypatch) -> None:
    ran = run_cli("train", recipe, "output_dir=train.jsonl/run", "--dry-run")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "cannot write to train.jsonl/run" in ran.err
    Path("theirs").mkdir()
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).name != "theirs")  # root may write everywhere
    ran = run_cli("train", recipe, "output_dir=theirs/runs/mine", "--dry-run")
    assert ran.code == 2
    assert re.search(r"cannot write to theirs/runs/mine: .*theirs is not writable", ran.err)


def test_what_is_named_in_the_wrong_place_is_called_what_it_is(run_cli, recipe, toy_folder) -> None:
    assert run_cli("train", recipe).code == 0
    newest = "runs/toy/checkpoints/step-000002"
    evaluate = ["eval", toy_folder, "--data", "train.jsonl", "--prompt", "{question}", "--adapter"]
    for args, said in (
        (["generate", recipe, "hi"], "is a recipe: give a run's folder, or a model"),
        (["generate", "quickstart", "hi"], "quickstart is a recipe"),
        (["train", recipe, "--resume-from", "runs/nosuch"], "--resume-from runs/nosuch: there is no such folder"),
        (["train", recipe, "--resume-from", "runs/toy"], f"is a run; name its checkpoint, such as {newest}"),
        (["generate", toy_folder, "hi", "--adapter", "runs/toy"], f"is a run; name its checkpoint, such as {newest}"),
        (["generate", toy_folder, "hi", "--adapter", "nosuch"], "adapter nosuch: there is no such folder"),
        ([*evaluate, "runs/toy"], f"name its checkpoint, such as {newest}"),
        (["train", recipe, "--overwrite", "adapter.path=runs/toy"], "is a run; name its checkpoint, such as"),
    ):
        ran = run_cli(*args)
        assert (ran.code, len(ran.err.splitlines())) == (2, 1), ran.err
        assert said in ran.err


def test_a_checkpoint_is_a_target_too(run_cli, recipe) -> None:
    assert run_cli("train", recipe).code == 0
    said = [
        run_cli("generate", target, "What is 3+3?", "--max-tokens", "4").out
        for target in ("runs/toy", "runs/toy/checkpoints/step-000002")
    ]
    assert said[0] == said[1] != ""


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("loss.bta=1", "Did you mean loss.beta?"),
        ("optim.steps=many", "optim.steps: expected a valid integer"),
        ("rollout.num_generations=1", "rollout.num_generations: expected greater than or equal to 2, got 1"),
        ("data.source=absent.jsonl", "there is no such file"),
        ("data.source=empty.jsonl", "the file is empty"),
        ("data.prompt=text", "no column 'text'"),
        ("data.prompt={text}?", "no column 'text'"),
        ("data.max_prompt_length=1", "every prompt is null or longer"),
        ("model.name=./absent", "there is no such folder"),
        ("model.name=empty_model", "no config.json"),
        ("rewards.0.use=absent.py:reward", "there is no file absent.py"),
        ("rewards.0.use=digits.py:rewrd", "Did you mean 'reward'?"),
        ("adapter.targets=[nothing]", "no linear layer 'nothing'"),
        ("output_dir=train.jsonl/run", "cannot write to train.jsonl/run"),
        ("eval.split=dev", "there is no 'dev'"),
        ("data.source=notes.txt", "unknown file type; grpo reads"),
        ("data.config=main", "data.config is for Hub datasets"),
        ("data.chat_template_kwargs={tokenize: false}", "grpo sets tokenize itself"),
        ("adapter.targets=[]", "adapter.targets"),
        ("rewards.0.use=needs.py:reward", "missing a required argument: 'solution'; grpo calls it with answer, comp"),
        ("rewards.0.use=exits.py:reward", "cannot be imported: SystemExit: 3"),
        ("loss.use=digits.py:rewrd", "no function 'rewrd' in it. Did you mean 'reward'?"),
        ("loss.epsilon_max=2", "loss.epsilon_max does nothing with the clip surrogate of dapo"),
        ("loss.kl_estimator=k1", "loss.kl_estimator does nothing while loss.beta is 0"),
        ("optim.num_minibatches=4", "must be divisible by optim.num_minibatches; got"),
    ],
)
def test_a_mistake_is_one_line_and_leaves_nothing_behind(run_cli, recipe, tmp_path, override: str, said: str) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "notes.txt").write_text("not data")
    (tmp_path / "needs.py").write_text("def reward(completions, solution, **_):\n    return [1.0]\n")
    (tmp_path / "exits.py").write_text("import sys\nsys.exit(3)\n")
    (tmp_path / "empty_model").mkdir()
    if override.startswith("data.prompt={"):
        override = "data.prompt='{text}?'"
    before = files(tmp_path)
    ran = run_cli("train", recipe, override)
    assert ran.code == 2
    assert said in ran.err
    assert len(ran.err.strip().splitlines()) == 1
    assert ran.err.startswith("grpo: ")
    assert {name for name in files(tmp_path) if "__pycache__" not in name} == before


def test_messages_without_a_chat_template(run_cli, recipe, tmp_path, toy_folder) -> None:
    shutil.copytree(toy_folder, tmp_path / "plain")
    config = json.loads((tmp_path / "plain/tokenizer_config.json").read_text())
    del config["chat_template"]
    (tmp_path / "plain/tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "chat.jsonl").write_text(json.dumps({"prompt": [{"role": "user", "content": "?"}]}) + "\n")
    ran = run_cli("train", recipe, "model.name=plain", "data.source=chat.jsonl", "data.prompt=prompt")
    assert ran.code == 2
    assert "need a chat template, but the model has none" in ran.err
    ran = run_cli("train", recipe, "model.name=plain", "data.chat_template_kwargs={enable_thinking: false}")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert "data.chat_template_kwargs does nothing" in ran.err


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(run_cli, recipe, toy_folder) -> None:
    """MLX would read what lies behind the last embedding, and give NaN or not, from run to run."""
    folder = Path(shutil.copytree(toy_folder, "smaller"))
    weights = mx.load(str(folder / "model.safetensors"))
    weights["model.embed_tokens.weight"] = weights["model.embed_tokens.weight"][:200]
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"vocab_size": 200}))
    ran = run_cli("train", recipe, "model.name=./smaller")
    assert (ran.code, len(ran.err.splitlines())) == (2, 1)
    assert re.search(r"row 0 of .*train.jsonl has a token \d+, but the model's vocabulary has only 200 tokens", ran.err)


def test_a_broken_reward_stops_the_run_with_its_traceback(run_cli, recipe, tmp_path) -> None:
    (tmp_path / "digits.py").write_text("def reward(**columns):\n    return [row['nothing'] for row in columns]\n")
    ran = run_cli("train", recipe)
    assert ran.code == 1
    assert "reward 'digits' failed on 8 of the last 8 completions" in ran.err
    assert "digits.py" in ran.err
    assert "with the error for each, are in runs/toy/failed_step.parquet" in ran.err
    assert files(Path("runs/toy")) == {"failed_step.parquet", "recipe.yaml", ".ended"}
    step, groups = read_completions(Path("runs/toy/failed_step.parquet"))
    failures = [rollout.failures["digits"] for group in groups for rollout in group.rollouts]
    assert (step, len(failures)) == (1, 8)
    assert "KeyError" in failures[0].error or "TypeError" in failures[0].error
    listed = run_cli("runs")
    assert "failed 0/2 " in " ".join(listed.out.split())
    assert "runs/toy failed: reward 'digits' failed on 8 of the last 8 completions" in listed.out
    assert run_cli("report", "runs/toy").code == 0
    (run,) = data_in(Path("runs/toy/report.html").read_text())["runs"]
    ((step, kind, what, advice),) = run["alarms"]
    assert (step, kind, advice) == (0, "failed", "Fix the cause, then run the same command again.")
    assert what.startswith("reward 'digits' failed on 8 of the last 8 completions")
    assert len(run["completions"]["rows"]) == 8
    assert "failed after step 0" in run_cli("runs", "--follow", "runs/toy").out
    assert "runs/toy" not in run_cli("train", recipe, "--dry-run").err  # it is in nobody's way
    assert run_cli("train", recipe, "log.completions=null").code == 1  # nor in a real run's
    assert files(Path("runs/toy")) == {"recipe.yaml", ".ended"}
    (tmp_path / "digits.py").write_text("def reward(completions, **_):\n    return [len(c) % 3 for c in completions]\n")
    assert run_cli("train", recipe).code == 0  # the mended command is not refused


def test_a_reward_that_breaks_in_the_first_evaluation_keeps_its_completions(run_cli, recipe, tmp_path) -> None:
    (tmp_path / "digits.py").write_text("def reward(**columns):\n    raise ValueError('no')\n")
    ran = run_cli("train", recipe, "eval={split: train, prompts: 2, samples: 3}")
    assert ran.code == 1
    assert "with the error for each, are in runs/toy/failed_step.parquet" in ran.err
    step, groups = read_completions(Path("runs/toy/failed_step.parquet"))
    assert (step, [len(group.rollouts) for group in groups]) == (0, [1, 1])  # the greedy ones come first
    assert "ValueError: no" in groups[0].rollouts[0].failures["digits"].error


@pytest.mark.parametrize(
    "args",
    [
        ["train", "absent"],
        ["train", "."],
        ["train", ""],
        ["eval", "."],
        ["generate", "./absent", "hi"],
        ["eval", "absent"],
        ["recipes", "copy", "absent"],
    ],
)
def test_what_is_not_there(run_cli, args: list[str]) -> None:
    ran = run_cli(*args)
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1


def test_no_network_is_said_in_one_line(run_cli, tmp_path, monkeypatch) -> None:
    from huggingface_hub import constants

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    ran = run_cli("train", "recipes/qwen3-math.yaml")
    assert ran.code == 2
    assert len(ran.err.strip().splitlines()) == 1
    assert f"model Qwen/Qwen3-0.6B: cannot be downloaded from {constants.ENDPOINT}" in ran.err
    assert files(tmp_path) == set()


def test_recipes_list_and_copy(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = run_cli("recipes", "list")
    assert re.search(r"^quickstart +Learns to compute sums", listed.out, re.MULTILINE)
    assert run_cli("recipes", "copy", "quickstart").out == "quickstart.yaml\n"
    assert run_cli("recipes", "copy", "quickstart").code == 2
    assert run_cli("recipes", "copy", "quickstart", "mine.yaml").code == 0
    assert files(tmp_path) == {"quickstart.yaml", "mine.yaml"}


def test_a_copied_recipe_has_the_files_that_it_names(run_cli, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run_cli("recipes", "copy", "qwen3-2048").out == "qwen3-2048.yaml\ngame_2048.py\n"
    cfg = load_recipe(Path("qwen3-2048.yaml"))
    assert (cfg.environment.use, cfg.data.use) == (
        f"{tmp_path}/game_2048.py:Game2048",
        f"{tmp_path}/game_2048.py:boards",
    )
    refused = run_cli("recipes", "copy", "qwen3-2048", "other.yaml")
    assert (refused.code, "game_2048.py exists already" in refused.err) == (2, True)
    assert files(tmp_path) == {"qwen3-2048.yaml", "game_2048.py"}


@pytest.mark.parametrize("command", [[], ["train"], ["eval"], ["generate"], ["recipes"], ["recipes", "list"]])
def test_every_command_explains_itself(run_cli, command: list[str]) -> None:
    ran = run_cli(*command, "--help")
    assert ran.code == 0
    assert "Usage: grpo" in ran.out


@pytest.mark.parametrize(
    ("arguments", "said"), [(["--top-p", "0.9"], "have no effect at temperature 0"), (["--stop", ""], "an empty text")]
)
def test_generate_refuses_what_would_do_nothing_or_everything(run_cli, arguments: list[str], said: str) -> None:
    ran = run_cli("generate", "builtin:arithmetic-student", "hi", *arguments)
    assert ran.code == 2
    assert said in ran.err


@pytest.mark.parametrize(
    "words",
    [
        "cudaMallocAsync(&data, size, stream) failed: out of memory",
        "[METAL] Command buffer execution failed: Insufficient Memory (00000008)",
        "[metal::malloc] Attempting to allocate 99 bytes which is greater than the maximum allowed.",
    ],
)
def test_too_little_memory_is_said_with_what_to_lower(run_cli, recipe, monkeypatch, words: str) -> None:
    monkeypatch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError(words)))
    ran = run_cli("train", recipe)
    assert ran.code == 1
    assert "out of memory" in ran.err
    assert "optim.micro_batch_tokens" in ran.err
    assert "Traceback" not in ran.err


def test_another_error_of_ours_keeps_its_traceback(run_cli, recipe, monkeypatch) -> None:
    monkeypatch.setattr(Trainer, "step", lambda *_: (_ for _ in ()).throw(RuntimeError("shapes do not match")))
    with pytest.raises(RuntimeError, match="shapes"):
        run_cli("train", recipe)
