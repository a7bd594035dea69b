"""Runs whose tasks come from several sources, each with its own rows, prompts, rewards and place."""

from __future__ import annotations

import json
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from runs.driver import run, same_end
from telemetry.pages import data_in, plots_in, rows_in

from grpo.config import RewardConfig
from grpo.data.mixture import Mixture
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.prepare import Prepared, prepare
from grpo.runs.resume import changes, context, context_now
from grpo.runs.sections import data_of, read_as, text_system
from grpo.tools.rescore import rescore
from grpo.types import StepMetrics

REWARDS = """
def sums(completions, answer, **columns):
    assert all(answer)
    return [sum(c.isdigit() for c in str(text)) / 8 for text in completions]

def words(prompts, completions, completion_ids, word, answer=None):
    assert all(word)
    return [str(text).count(word[0]) / 8 for text, word in zip(completions, word)]

def length(completions, **columns):
    return [len(str(text)) / 80 for text in completions]
"""
SOURCES = """
data:
  sources:
    - {source: sums.jsonl, prompt: "{question}", rewards: [sums, length]}
    - {source: spell.jsonl, ratio: 3, prompt: "Spell {word}.", rewards: [length, words]}
"""


@pytest.fixture
def mixed(recipe: Path) -> Path:
    """The toy recipe with two sources: four sums, and three words under another column and template."""
    folder = recipe.parent
    (folder / "train.jsonl").rename(folder / "sums.jsonl")
    (folder / "spell.jsonl").write_text("".join(json.dumps({"word": word}) + "\n" for word in ("cat", "dog", "emu")))
    (folder / "grades.py").write_text(REWARDS)
    text = recipe.read_text()
    (before, after), names = (
        text.split('data: {source: train.jsonl, prompt: "{question}"}\n'),
        ("sums", "words", "length"),
    )
    after = after.replace('[{use: "digits.py:reward"}]', json.dumps([{"use": f"grades.py:{name}"} for name in names]))
    recipe.write_text(before + SOURCES.lstrip() + after)
    return recipe


def prepared(recipe: Path, *overrides: str) -> Prepared:
    run = prepare(load_recipe(recipe, overrides))
    with closing(run.opened):
        return run


def step(recipe: Path, *overrides: str) -> StepMetrics:
    run = prepare(load_recipe(recipe, overrides))
    with closing(run.opened):
        return run.trainer.step(1)


def stop_after(step: int) -> Any:
    """Have a run end after a step."""

    def change(trainer: Any, stop: Any) -> None:
        make = trainer.step

        def stepped(n: int) -> StepMetrics:
            made: StepMetrics = make(n)
            if n == step:
                stop.ask()
            return made

        trainer.step = stepped

    return change


def test_each_source_has_its_own_prompts_columns_and_rewards(mixed: Path) -> None:
    metrics = step(mixed, "rollout.prompts_per_step=8")
    sources = [group.task.source for group in metrics.groups]
    assert {"sums", "spell"} == set(sources)
    for group in metrics.groups:
        for rollout in group.rollouts:
            given = {name for name, score in rollout.scores.items() if score is not None}
            assert list(rollout.scores) == ["sums", "words", "length"]
            assert given == ({"sums", "length"} if group.task.source == "sums" else {"words", "length"})
            assert not rollout.failures
            assert rollout.reward == pytest.approx(sum(rollout.scores[name] for name in given))
        asked = group.task.prompt
        assert asked.startswith("What is" if group.task.source == "sums" else "Spell ")
        assert set(group.task.columns) == ({"question", "answer"} if group.task.source == "sums" else {"word"})


def test_metrics_are_told_by_source(mixed: Path) -> None:
    metrics = step(mixed, "rollout.prompts_per_step=8")
    values = metrics.values
    for name, rows in (("sums", 4), ("spell", 3)):
        own = [group for group in metrics.groups if group.task.source == name]
        rollouts = [rollout for group in own for rollout in group.rollouts]
        assert values[f"sources/{name}/share"] == len(own) / 8
        assert values[f"sources/{name}/epoch"] == len(own) / rows
        assert values[f"sources/{name}/reward"] == pytest.approx(sum(r.reward for r in rollouts) / len(rollouts))
        lengths = [rollout.trajectory.trained_tokens for rollout in rollouts]
        assert values[f"sources/{name}/mean_length"] == sum(lengths) / len(lengths)
        assert {
            f"sources/{name}/{other}" for other in ("solved_all", "solved_none", "mixed", "dropped_prompts")
        } <= set(values)
    assert values["rewards/sums/none_rate"] == values["rewards/words/none_rate"] == 0
    assert "epoch" not in values


def test_a_source_without_a_task_in_a_step_has_a_share_of_nothing(mixed: Path) -> None:
    metrics = step(mixed, "rollout.prompts_per_step=1")
    (drawn,) = {group.task.source for group in metrics.groups}
    other = "spell" if drawn == "sums" else "sums"
    assert metrics.values[f"sources/{other}/share"] == 0
    assert f"sources/{other}/reward" not in metrics.values
    unasked = "sums" if other == "sums" else "words"
    assert not any(name.startswith(f"rewards/{unasked}/m") for name in metrics.values)


@pytest.mark.quick_cases("pools", "streamed")
@pytest.mark.parametrize(
    "settings",
    [
        (),
        ("data.curriculum={hard_threshold: 0.1, easy_threshold: 0.2}",),
        ("rollout.dynamic_sampling=1",),
        ("rollout.reuse=3", "data.sources.1.curriculum={hard_threshold: 0.1, easy_threshold: 0.2}"),
        ("data.sources.1.streaming=true", "data.sources.1.window=2"),
    ],
    ids=["plain", "pools", "dynamic", "reuse", "streamed"],
)
def test_a_resumed_run_draws_and_learns_as_if_it_had_never_stopped(mixed: Path, settings: tuple[str, ...]) -> None:
    settings = (*settings, "optim.steps=4", "checkpoint.every=9", "rollout.prompts_per_step=3")
    run(mixed, "output_dir=whole", *settings)
    run(mixed, "output_dir=parts", *settings, change=stop_after(2))
    run(mixed, "output_dir=parts", *settings, resume=True)
    same_end(Path("whole"), Path("parts"))
    told = [json.loads(line) for line in Path("whole/metrics.jsonl").read_text().splitlines()]
    assert ("curriculum/spell/unseen" in told[0]) is any("curriculum" in setting for setting in settings)


def test_what_is_scored_again_is_what_the_reward_is_for(mixed: Path) -> None:
    """A new reward is tried on all completions, and its columns are checked for each source."""
    run(mixed, "output_dir=whole", "optim.steps=2", "rollout.prompts_per_step=4")
    stored = [group for path in stored_steps(Path("whole/completions")) for group in read_completions(path)[1]]
    spelled = sum(len(group.rollouts) for group in stored if group.task.source == "spell")
    again = rescore(Path("whole"), RewardConfig(use="grades.py:words"), None)
    assert 0 < len(again.completions) == spelled < 2 * 4 * 4
    assert all(one.before == one.now is not None for one in again.completions)
    assert len(rescore(Path("whole"), RewardConfig(use="grades.py:length", name="new"), None).completions) == 2 * 4 * 4
    with pytest.raises(UserError, match=r"'word'.*columns of the source 'sums'"):
        rescore(Path("whole"), RewardConfig(use="grades.py:words", name="new"), None)


def test_the_report_shows_the_curriculum_of_each_source_that_has_one(mixed: Path, run_cli: Any) -> None:
    run(mixed, "output_dir=whole", "data.sources.1.curriculum={}", "optim.steps=2")
    assert run_cli("report", "whole").code == 0
    data = data_in(Path("whole/report.html").read_text())
    plots = {title: plot for (section, title), plot in plots_in(data).items() if section == "Curriculum"}
    assert list(plots) == ["Tasks by solve rate (spell)", "Draws by pool (spell)"]
    rates = plots["Tasks by solve rate (spell)"]
    assert ["curriculum/spell/solve_rate/10", "0.1 to 0.2"] in rates["series"]
    assert data["runs"][0]["metrics"]["curriculum/spell/unseen"][-1] is not None
    assert {row["task"]["source"] for row in rows_in(data)} == {"sums", "spell"}


def test_a_file_of_a_source_that_has_changed_is_noticed(mixed: Path) -> None:
    cfg = load_recipe(mixed)
    written = context(cfg, {}, {}, {}, prepared(mixed).rows)
    assert changes(written, context_now(cfg, written)) == []
    with Path("spell.jsonl").open("a") as file:
        file.write('{"word": "fox"}\n')
    (line,) = changes(written, context_now(cfg, written))
    assert line.startswith("contents of spell: ")


def test_rows_that_are_streamed_are_planned_for_by_their_limit_and_watched_too(mixed: Path) -> None:
    overrides = ["data.sources.1.streaming=true", "data.sources.1.max_prompt_length=77", "data.sources.1.window=2"]
    run, cfg = prepared(mixed, *overrides), load_recipe(mixed, overrides)
    assert run.plan.tokens == 8 * (77 + 8)
    (note,) = [note for note in run.notes if "rows are streamed" in note]
    assert note.startswith("prompts of spell: planned for spell.max_prompt_length (77 tokens)")
    assert note.endswith("they are shuffled in windows of 2")
    written = context(cfg, {}, {}, {}, run.rows)
    assert changes(written, context_now(cfg, written)) == []
    Path("spell.jsonl").write_text('{"word": "fox"}\n')
    (line,) = changes(written, context_now(cfg, written))
    assert line.startswith("contents of spell: ")


def test_a_run_goes_on_with_a_source_more_and_the_others_where_they_were(mixed: Path) -> None:
    Path("more.jsonl").write_text('{"word": "yak"}\n')
    run(mixed, "output_dir=parts", "optim.steps=3", change=stop_after(2))
    text = mixed.read_text().replace(
        "rollout:", '    - {source: more.jsonl, prompt: "{word}?", rewards: [words]}\nrollout:'
    )
    mixed.write_text(text)
    with pytest.raises(UserError, match=r"data\.sources\.2\.source: not set → "):
        run(mixed, "output_dir=parts", "optim.steps=3", resume=True)
    held: list[Any] = []
    run(mixed, "output_dir=parts", "optim.steps=3", changed=True, change=lambda trainer, _: held.append(trainer.tasks))
    state = held[0].state()
    assert (state["draws"], set(state["sources"])) == (6, {"sums", "spell", "more"})
    assert sum(one["cursor"] for one in state["sources"].values()) == 6


def test_the_plan_is_for_the_longest_prompt_of_all_and_notes_name_the_sources(mixed: Path) -> None:
    with Path("spell.jsonl").open("a") as file:
        file.write(json.dumps({"word": "x" * 60}) + "\n" + json.dumps({"word": None}) + "\n")
    run = prepared(mixed)
    longest = {task.source: len(task.prompt_ids) for task in run.tasks if "x" * 60 in str(task.prompt)}["spell"]
    assert run.plan.tokens == 8 * (longest + 8)
    assert f"prompts of spell: at most {longest:,} tokens, measured over all 5 rows" in run.notes
    run = prepared(mixed, "data.sources.1.max_prompt_length=60")
    (note,) = [note for note in run.notes if "longer than" in note]
    assert note.endswith(
        "spell.jsonl, train: 1 of 5 rows are longer than spell.max_prompt_length (60 tokens) and are left out"
    )
    assert run.plan.tokens < 8 * (longest + 8)


def test_the_first_tasks_are_of_all_sources(mixed: Path) -> None:
    assert [task.source for task in prepared(mixed).tasks[:4]] == ["sums", "spell"] * 2


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("data.sources.1.rewards=[word]", r"'spell': the recipe has no reward 'word'\. .*Did you mean 'words'"),
        ("data.sources.1.rewards=null", r"reward 'sums'.*'answer'.*columns of the source 'spell'"),
        ("data.sources.1.rewards=[length]", r"reward 'words' does nothing: each of data\.sources names its rewards"),
        (
            "data={prompt: '{word}', sources: [{source: spell.jsonl, rewards: []}, {source: spell.jsonl, name: two}]}",
            r"nothing rewards the tasks of 'spell', so the model learns nothing from them",
        ),
        ("data.sources.1.prompt={noun}", r"no column 'noun' in row 0 of .*spell\.jsonl"),
        ("data.sources.1.source=away.jsonl", r"away\.jsonl: there is no such file"),
        ("data.source=sums.jsonl", r"data\.source does nothing with data\.sources"),
        ("data.sampler=mine.py:Mine", r"data\.sampler does nothing with data\.sources"),
        ("data.sources.1.name=sums", r"data\.sources\.1 has the same name as data\.sources\.0, 'sums'"),
        (
            "data.sources.1.name=eval",
            r"data\.sources\.1\.name: expected a name in one line, without slashes, other than data and eval",
        ),
        ("data.sources.1.name=' '", r"data\.sources\.1\.name: expected a name in one line"),
        (
            "data.sources.1.source='*/*.jsonl'",
            r"data\.sources\.1 would get the name '\*/\*\.jsonl', which metrics cannot use",
        ),
        ("data.window=5", r"data\.window does nothing: it is for sources with streaming"),
        (
            "data.sources.1={streaming: true, source: spell.jsonl, curriculum: {}}",
            r"data\.sources\.1\.curriculum needs",
        ),
        ("data.sources.1.use=rows.py", r"data\.sources\.1\.use and data\.sources\.1\.source both say"),
        ("data.sources.1.ratio=0", r"data\.sources\.1\.ratio: expected greater than 0"),
        ("data.sources.1.streams=true", r"unknown key data\.sources\.1\.streams"),
        ("data.sources.0.curriculum={reward: words}", r"'words' does not score tasks of the source 'sums'"),
    ],
)
def test_what_does_not_fit_is_said_before_the_first_step(mixed: Path, override: str, said: str) -> None:
    with pytest.raises(UserError, match=said):
        prepared(mixed, override)


def test_settings_of_data_are_those_of_sources_that_leave_them_out(mixed: Path) -> None:
    cfg = load_recipe(
        mixed, ["data.system=Be brief.", "data.max_prompt_length=99", "data.sources.0.max_prompt_length=7"]
    )
    parts = cfg.data.parts
    assert {name: part.max_prompt_length for name, part in parts.items()} == {"sums": 7, "spell": 99}
    assert {part.system for part in parts.values()} == {"Be brief."}
    assert text_system(cfg) == "Be brief."


def test_what_is_wrong_with_a_setting_that_sources_share_is_said_of_it(mixed: Path) -> None:
    one = ["data.sources.1.streaming=true", "data.window=2"]
    windows = {name: part.window for name, part in load_recipe(mixed, one).data.parts.items()}
    assert windows == {"sums": 10_000, "spell": 2}
    with pytest.raises(UserError, match=r"data\.curriculum needs all rows, but data\.sources\.1\.streaming"):
        load_recipe(mixed, [*one, "data.curriculum={}"])
    with pytest.raises(UserError, match=r"data\.streaming is for files and Hub datasets, .* \(data\.sources\.0\)"):
        load_recipe(mixed, ["data.streaming=true", "data.sources.0.source=builtin:countdown"])


def test_a_system_message_of_one_source_makes_messages_of_its_texts(mixed: Path) -> None:
    """For rewards too: the message before texts is one for all."""
    tasks = prepared(mixed, "data.sources.1.system=Be brief.").tasks
    assert {task.source: type(task.prompt) for task in tasks} == {"sums": str, "spell": list}
    asked = next(task for task in tasks if task.source == "spell")
    assert [message["role"] for message in asked.prompt] == ["system", "user"]
    common = prepared(mixed, "data.system=Be brief.").tasks
    assert next(task for task in common if task.source == "spell").prompt_ids == asked.prompt_ids


def test_held_out_rows_are_read_as_the_first_source_or_the_source_of_the_same_place(mixed: Path) -> None:
    for override, like, prompt in (
        ("eval={split: train, samples: 2}", "sums", "What is 1+1?"),
        ("eval={source: spell.jsonl, split: train, samples: 2}", "spell", "Spell cat."),
        ("eval={source: other.jsonl, split: train, samples: 2}", None, "2+2?"),
    ):
        Path("other.jsonl").write_text('{"prompt": "2+2?", "answer": "4", "word": "four"}\n')
        cfg = load_recipe(mixed, [override])
        assert read_as(cfg) == like
        assert list(data_of(cfg)) == ["sums", "spell", "eval"]
        run = prepare(cfg)
        with closing(run.opened):
            assert run.evaluator.tasks[0].prompt == prompt
            measured = run.evaluator(0)
        assert measured.grader == {"sums": "sums", "spell": "words", None: "sums"}[like]
        rewards = {name for name in measured.values if name.startswith("rewards/")}
        asked = {"sums": "sums length", "spell": "words length", None: "sums words length"}[like]
        assert rewards == {f"rewards/{name}" for name in asked.split()}


def test_a_mixture_of_one_is_the_source_alone(mixed: Path) -> None:
    text = mixed.read_text()
    mixed.write_text(
        text.replace(text[text.index("    - {source: spell") : text.index("rollout:")], "").replace(
            '{"use": "grades.py:words"}, ', ""
        )
    )
    mixture = prepared(mixed).trainer.tasks
    assert isinstance(mixture, Mixture)
    alone = (
        mixed.read_text().replace("  sources:\n    - {source", "  {source").replace(", rewards: [sums, length]}", "}")
    )
    mixed.write_text(
        alone.replace(
            'data:\n  {source: sums.jsonl, prompt: "{question}"}', 'data: {source: sums.jsonl, prompt: "{question}"}'
        )
    )
    stream = prepared(mixed).trainer.tasks
    assert [task.index for task in mixture.take(20)] == [task.index for task in stream.take(20)]


TALK = """
class Adds:
    reward = 0.0
    def reset(self, question, answer, **columns):
        self.right = answer
    def step(self, text):
        self.reward = float(str(self.right) in text)
    def get_reward(self):
        return self.reward

class Spells:
    reward = 0.0
    def reset(self, word, **columns):
        self.word = word
    def step(self, text):
        self.reward = float(self.word in text)
    def get_reward(self):
        return self.reward
"""
HOSTS = "environments={adds: {use: 'talk.py:Adds', workers: 1}, spells: {use: 'talk.py:Spells', workers: 1}}"


def test_each_source_begins_its_own_environment(mixed: Path) -> None:
    (mixed.parent / "talk.py").write_text(TALK)
    own = ("data.sources.0.environment=adds", "data.sources.1.environment=spells")
    length = ("rewards=[{use: 'grades.py:length'}]", "data.sources.0.rewards=null", "data.sources.1.rewards=null")
    metrics = step(mixed, HOSTS, *own, *length, "rollout.prompts_per_step=8", "rollout.max_completion_length=40")
    named = {group.task.source: group.task.columns["environment"] for group in metrics.groups}
    assert named == {"sums": "adds", "spell": "spells"}
    for group in metrics.groups:
        for rollout in group.rollouts:
            assert rollout.trajectory.conversation.environment == named[group.task.source].title()
            assert not rollout.failures


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("data.sources.0.environment=adds",), r"data\.sources\.0\.environment does nothing without `environments`"),
        (
            (HOSTS, "data.environment=chess"),
            r"data\.sources\.0\.environment: there is no environment 'chess'.*adds, spells",
        ),
    ],
)
def test_environments_that_do_not_fit_the_sources_are_refused(
    mixed: Path, settings: tuple[str, ...], said: str
) -> None:
    (mixed.parent / "talk.py").write_text(TALK)
    with pytest.raises(UserError, match=said):
        load_recipe(mixed, settings)


def test_two_sources_of_the_same_rows_are_not_shuffled_alike(mixed: Path) -> None:
    settings = ("data.sources.0.name=a", "data.sources.1={source: sums.jsonl, name: b, prompt: '{question}'}")
    source = prepared(
        mixed, *settings, "rewards=[{use: 'grades.py:length'}]", "data.sources.0.rewards=null"
    ).trainer.tasks
    drawn = source.take(400)
    orders = [[task.index for task in drawn if task.source == name][:40] for name in ("a", "b")]
    assert orders[0] != orders[1]
