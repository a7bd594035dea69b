"""`grpo generate`: a run's model talks with its environment and its tools."""

import json
from pathlib import Path

from runs.conversing import conversing  # noqa: F401
from runs.driver import run

NEEDY = """
class Needy:
    def reset(self, answer, **row):
        return f" (It is {answer}.)"
    def step(self, text):
        return "No."
"""
TWICE = """
class Twice:
    async def rollout(self, task, sampler):
        rows = sampler.begin(task.prompt_ids, sampler.n, keep=True)
        return await sampler.gather(*(self.play(row, sampler) for row in rows))
    async def play(self, row, sampler):
        first = await sampler.ended(row)
        said = sampler.tokenizer.encode("AGAIN", add_special_tokens=False)
        return await sampler.extend(row, said) if len(said) <= row.room else first
"""


def test_a_conversation_is_told_as_it_goes(conversing: Path, run_cli) -> None:  # noqa: F811
    run(conversing, "optim.steps=1")
    asked = ["generate", "runs/toy", "What is 9+9?", "--temperature", "1", "--max-tokens", "200"]
    found = [run_cli(*asked, "--seed", str(seed)).out for seed in (1, 3, 3)]
    assert found[1] == found[2]
    for out in found:
        prompt, *lines, last = out.splitlines()
        assert prompt.startswith("prompt: What is 9+9? Begin with ")
        assert "rewarded" in last
        assert {line[:2] for line in lines} <= {"→ ", "← "}  # the model says nothing beside its calls
    assert any("→ draw(most=" in out and "\n← draw: " in out for out in found)
    row = run_cli("generate", "runs/toy", "--row", "2")
    assert row.out.startswith("prompt: What is 3+3? Begin with ")
    for given, said in (
        ([], "give either a prompt, or --row with the number of a row"),
        (["What?", "--row", "1"], "give either a prompt, or --row"),
        (["--row", "9"], "--row 9: the run's data has 4 rows, numbered from 0"),
    ):
        refused = run_cli("generate", "runs/toy", *given)
        assert (refused.code, said in refused.err) == (2, True)


def test_an_environment_that_needs_more_columns(conversing: Path, run_cli) -> None:  # noqa: F811
    Path("room.py").write_text(NEEDY)
    ended = run_cli("train", conversing, "optim.steps=1", "environment.use=room.py:Needy")
    assert "try it   grpo generate runs/toy --row 0\n" in ended.out
    refused = run_cli("generate", "runs/toy", "What is 9+9?")
    assert refused.code == 2
    assert "'answer'" in refused.err
    assert "as a JSON object instead of the prompt, or begin with a row of the run's data: --row 0" in refused.err
    for given in (["--row", "1"], [json.dumps({"question": "What is 2+2?", "answer": "4"})]):
        assert run_cli("generate", "runs/toy", *given).out.startswith("prompt: What is 2+2? (It is 4.)\n")


def test_broken_json_is_not_taken_as_text(conversing: Path, run_cli) -> None:  # noqa: F811
    run(conversing, "optim.steps=1")
    refused = run_cli("generate", "runs/toy", '{"question": "What is 2+2?" "answer": "4"}')
    assert (refused.code, refused.out) == (2, "")
    assert (
        "begins with { like a JSON object, but cannot be parsed: Expecting ',' delimiter: line 1 column 29"
        in refused.err
    )
    assert """begins with { as '{"question": "{..."}'""" in refused.err
    told = run_cli("generate", "runs/toy", '{"question": "{x} is what?"}')
    assert told.out.startswith("prompt: {x} is what? Begin with ")


def test_an_environment_that_samples_by_itself_has_the_text_of_all_turns(conversing: Path, run_cli) -> None:  # noqa: F811
    Path("room.py").write_text(TWICE)
    run(conversing, "optim.steps=1", "environment={use: 'room.py:Twice'}", "rollout.max_completion_length=16")
    told = run_cli("generate", "runs/toy", "What is 9+9?", "--max-tokens", "40")
    assert told.code == 0, told.err
    assert told.out.startswith("prompt: What is 9+9?\n")


def test_a_run_without_conversations_takes_a_prompt(recipe: Path, run_cli) -> None:
    run(recipe, "optim.steps=1")
    assert "--row requires a run with an environment" in run_cli("generate", "runs/toy", "--row", "1").err
    assert "a prompt is missing" in run_cli("generate", "runs/toy").err


def test_a_dataset_without_prompts(conversing: Path, run_cli) -> None:  # noqa: F811
    conversing.write_text(conversing.read_text().replace(', prompt: "{question}"', ""))
    run(conversing, "optim.steps=1")
    for given in (["--row", "1"], ['{"answer": "4"}']):
        told = run_cli("generate", "runs/toy", *given)
        assert told.out.startswith("prompt:  Begin with "), told.err
