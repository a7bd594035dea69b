"""`grpo generate`: a run answers as it did in training."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from grpo.generation.generator import Generator
from grpo.generation.sampling import Sampling
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare


@pytest.fixture
def asked(monkeypatch):
    """What the generator was asked: prompts and samplings."""
    seen = []
    stream = Generator.stream

    def watched(self, request, sampling, key):
        seen.append((tuple(request.prompt_ids), sampling))
        return stream(self, request, sampling, key)

    monkeypatch.setattr(Generator, "stream", watched)
    return seen


def test_a_run_answers_with_its_template_its_system_message_and_its_stops(recipe, run_cli, asked) -> None:
    settings = [
        "data.prompt={question} Think first.",
        "data.system=Be short.",
        "rollout.stop=[zq]",
        "rollout.stop_token_ids=[7]",
        "rollout.max_repeats=3",
        "rollout.top_p=0.9",
        "rollout.repetition_penalty=1.1",
    ]
    cfg = load_recipe(recipe, settings)
    trainer = prepare(cfg).trainer
    trained = {task.columns["question"]: task.prompt_ids for task in trainer.tasks.take(4)}
    trainer.scorer.close()
    assert run_cli("train", recipe, *settings).code == 0
    question = "What is 3+3?"
    for options in ([], ["--base"], ["--temperature", "0.5"], ["--stop", "x", "--max-tokens", "3"], ["--no-template"]):
        ran = run_cli("generate", "runs/toy", question, *options)
        assert ran.code == 0, ran.err
    prompts = [prompt for prompt, _ in asked]
    assert prompts[:4] == [trained[question]] * 4
    assert prompts[4] != trained[question]
    stops = {"stop": ("zq",), "stop_ids": (7,), "max_repeats": 3}
    samplings = [sampling for _, sampling in asked]
    assert samplings[0] == samplings[1] == samplings[4] == Sampling(0.0, 8, **stops)
    assert samplings[2] == Sampling(0.5, 8, top_p=0.9, repetition_penalty=1.1, **stops)
    assert samplings[3] == Sampling(0.0, 3, **{**stops, "stop": ("x",)})


def test_a_model_answers_greedily_and_at_length(toy_folder, run_cli, asked) -> None:
    assert run_cli("generate", toy_folder, "What is 3+3?", "--max-tokens", "2").code == 0
    assert run_cli("generate", toy_folder, "hi", "--max-tokens", "2", "--temperature", "1", "--top-k", "5").code == 0
    assert [sampling for _, sampling in asked] == [Sampling(0.0, 2), Sampling(1.0, 2, top_k=5)]


def test_a_template_of_several_columns_is_filled_from_json(recipe, run_cli, asked) -> None:
    assert run_cli("train", recipe, "data.prompt={question} It is {answer}.", "optim.steps=1").code == 0
    for prompt in ("What?", '{"question": "What?"}', "[1, 2]"):
        refused = run_cli("generate", "runs/toy", prompt)
        assert (refused.code, len(refused.err.splitlines())) == (2, 1)
        assert '\'{"question": "...", "answer": "..."}\', or give the whole prompt with --no-template' in refused.err
    assert run_cli("generate", "runs/toy", '{"question": "What?", "answer": "7"}').code == 0
    assert run_cli("generate", "runs/toy", "What? It is 7.", "--no-template").code == 0
    assert asked[0] == asked[1]


@pytest.mark.slow
def test_an_adapter_in_pefts_format_is_taken_everywhere(recipe, run_cli, toy_folder) -> None:
    """With rsLoRA and dropout: exported, it answers and measures the same, and training goes on from it."""
    kind = ["adapter.rank=4", "adapter.scale=6.0", "adapter.use_rslora=true"]
    dropout = ["adapter.dropout=0.1", "adapter.targets=[q_proj, up_proj]"]
    ran = run_cli("train", recipe, "optim.learning_rate=0.05", *kind, *dropout)
    assert ran.code == 0, ran.err
    for form in ("peft", "mlx"):
        assert run_cli("export", "runs/toy", "--format", form).code == 0
    generate = ["generate", toy_folder, "What is 3+3?", "--max-tokens", "8", "--temperature", "1", "--adapter"]
    evaluate = ["eval", toy_folder, "--data", "train.jsonl", "--prompt", "{question}", "--reward", "digits.py:reward"]
    evaluate += ["--samples", "2", "--prompts", "2", "rollout.max_completion_length=8", "--adapter"]
    for command in (generate, evaluate):
        of_run, of_peft = (
            run_cli(*command, folder) for folder in ("runs/toy/checkpoints/step-000002", "runs/toy/export-peft")
        )
        assert of_run.code == of_peft.code == 0, of_run.err + of_peft.err
        assert of_peft.out.replace("with the adapter", "after step 2    ") == of_run.out
    assert run_cli(*generate[:-1]).out != run_cli(*generate, "runs/toy/export-peft").out
    refused = run_cli("train", recipe, "output_dir=more", "adapter.path=runs/toy/export-peft")
    assert "rank: 4, scale: 3.0, targets: [" in refused.err
    plain = ["adapter.rank=4", "adapter.scale=3.0", "adapter.targets=[q_proj, up_proj]", "output_dir=more"]
    for settings in (plain, [*kind, *dropout, "output_dir=again"]):
        ran = run_cli("train", recipe, "adapter.path=runs/toy/export-peft", *settings)
        assert ran.code == 0, ran.err
    ran = run_cli("eval", "more", "eval={split: train, prompts: 2, samples: 2}")
    assert ran.code == 0, ran.err
    assert "start (adapter.path)" in ran.out
    assert "base" not in ran.out
    other = run_cli("train", recipe, "adapter.rank=2", "output_dir=other")
    assert other.code == 0, other.err
    adapter = "other/checkpoints/step-000002"
    ran = run_cli("eval", "more", "eval={split: train, prompts: 2, samples: 2}", "--adapter", adapter)
    assert ran.code == 0, ran.err
    assert " base " in ran.out
    assert Path("again/checkpoints/step-000002").is_dir()


def test_a_run_on_prefilled_messages_answers_a_question(recipe, run_cli) -> None:
    prefilled = [{"role": "user", "content": "What is 3+3?"}, {"role": "assistant", "content": "It is"}]
    Path("chat.jsonl").write_text(json.dumps({"messages": prefilled, "answer": "6"}) + "\n")
    data = ["data.source=chat.jsonl", "data.prompt=messages", "data.continue_final_message=true"]
    Path("order.py").write_text("def reward(completions, **columns):\n    return list(range(len(completions)))\n")
    one = ["rewards=[{use: order.py, completions: text}]", "optim.steps=1", "rollout.prompts_per_step=1"]
    ran = run_cli("train", recipe, *data, *one)  # whatever is drawn, its one group has a signal
    assert ran.code == 0, ran.err
    assert "'What is 3+3?'" in ran.out
    assert run_cli("generate", "runs/toy", "What is 3+3?", "--max-tokens", "2").code == 0
