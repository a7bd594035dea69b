"""Before a run it is said who rewards the model: nobody at all is refused, and so are weights of no reward."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Optional, Union

import pytest

import grpo
from grpo.environments.describe import may_return_step
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.given import NOTHING
from grpo.runs.partners import invite
from grpo.runs.rewarding import check_rewarded

ROOMS = '''
from grpo import Step

class Silent:
    def look(self, query: str) -> str:
        """
        Looks something up.

        Args:
            query: What.
        """
        return query

class Mute(Silent):
    def step(self, message) -> str | None:
        return None

class Dumb:
    def reset(self, **row): ...

class Unsure:
    def step(self, text):
        return Step("No.", 0.5)

class Stepping(Silent):
    def step(self, message) -> str | Step:
        return Step("No.", 0.5)

class Scoring(Silent):
    def get_reward(self):
        return 1.0

class Own:
    async def rollout(self, task, sampler):
        return await sampler.sample(task.prompt_ids, sampler.n)
'''
HEAD = "model: {name: some/model}\ndata: {source: some/data}\noptim: {steps: 1}\n"


@pytest.fixture(autouse=True)
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rooms.py").write_text(ROOMS)


def checked(text: str) -> list[str]:
    """The notes on a recipe with this text."""
    Path("mine.yaml").write_text(HEAD + text)
    cfg = load_recipe(Path("mine.yaml"))
    partners = invite(cfg.conversations, cfg.tools, NOTHING, 1)
    try:
        return check_rewarded(cfg.rewards, cfg.advantage, partners)
    finally:
        partners.close()


def of(name: str, more: str = "") -> str:
    return f'environment: {{use: "rooms.py:{name}", workers: 1{more}}}\n'


REWARDED = "rewards: [{use: exact_match}]\n"
TWO = "environments: {a: {use: rooms.py:Scoring, workers: 1}, b: {use: rooms.py:Silent, workers: 1}}\n"
ALSO_WEIGHTLESS = "rewards: [{use: exact_match, weight: 0}]\n"


@pytest.mark.each_value
@pytest.mark.parametrize("more", ["", ALSO_WEIGHTLESS])
@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("Silent", "it has no get_reward, and by its annotation look returns no grpo.Step"),
        ("Mute", "it has no get_reward, and by their annotations look and step return no grpo.Step"),
        ("Dumb", "it has no get_reward, and it has nothing that the model can call"),
    ],
)
def test_a_run_that_nothing_rewards_is_refused(name: str, why: str, more: str) -> None:
    with pytest.raises(UserError) as refused:
        checked(of(name) + more)
    said = str(refused.value)
    assert said.startswith("rewards: nothing rewards the model: the recipe names no reward with a weight, and")
    assert f"{name} gives no reward: {why}. Name a reward" in said


def test_an_environment_whose_weight_is_0_rewards_nobody() -> None:
    with pytest.raises(UserError, match=r"nothing rewards the model: .* Silent gives no reward"):
        checked(TWO.replace("Scoring,", "Scoring, weight: 0,"))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (of("Silent", ", weight: 2"), "environment.weight does nothing: Silent gives no reward: it has no get_reward"),
        (of("Silent", ", weight: 0"), "environment.weight does nothing: Silent gives no reward"),
        (
            'environments: {a: {use: "rooms.py:Silent", workers: 1, weight: 2}}\n',
            "environments.a.weight does nothing: Silent gives no reward",
        ),
        ("tools: [calculator]\nenvironment: {weight: 2, workers: 1}\n", "environment.weight does nothing: tools gives"),
    ],
)
def test_a_weight_of_no_reward_is_refused(text: str, said: str) -> None:
    with pytest.raises(UserError) as refused:
        checked(text + REWARDED)
    assert str(refused.value).startswith(said)


@pytest.mark.parametrize("name", ["Unsure", "Stepping", "Scoring"])
def test_a_weight_of_a_reward_that_may_come_is_taken(name: str) -> None:
    assert checked(of(name, ", weight: 2") + REWARDED) == []


@pytest.mark.parametrize("name", ["Unsure", "Stepping"])
def test_it_is_said_where_only_steps_can_reward(name: str) -> None:
    (note,) = checked(of(name))
    assert note == (
        f"rewards: the recipe names none, and {name} has no get_reward: only a grpo.Step that step returns can reward "
        "the model"
    )


def test_of_several_environments_it_is_said_which_teaches_nothing() -> None:
    (note,) = checked(TWO)
    assert note.startswith(
        "rewards: the recipe names none, so the model learns nothing from conversations with Silent: Silent gives"
    )


@pytest.mark.parametrize("text", [of("Scoring"), of("Silent") + REWARDED, "tools: [calculator]\n" + REWARDED])
def test_nothing_is_said_where_something_rewards(text: str) -> None:
    assert checked(text) == []


def test_an_environment_that_makes_trajectories_needs_a_reward() -> None:
    own = 'environment: {use: "rooms.py:Own"}\n'
    with pytest.raises(UserError, match=r"rewards: the run needs a reward with a weight: .* and gives no rewards"):
        checked(own)
    with pytest.raises(UserError, match=r"advantage\.turns: turn does nothing"):
        checked(own + REWARDED + "advantage: {turns: turn}\n")
    assert checked(own + REWARDED) == []


def test_a_dry_run_says_it(recipe: Path, run_cli) -> None:
    Path("rooms.py").write_text(ROOMS)
    text = recipe.read_text()
    begin, end = text.index("rewards:"), text.index("\n", text.index("rewards:"))
    recipe.write_text(text[:begin] + of("Unsure").strip() + text[end:])
    ran = run_cli("train", recipe, "--dry-run")
    assert ran.code == 0, ran.err
    assert "rewards: the recipe names none, and Unsure has no get_reward" in ran.out
    ran = run_cli("train", recipe, "--dry-run", "environment.use=rooms.py:Mute")
    assert ran.code == 2
    assert "rewards: nothing rewards the model" in ran.err


@pytest.mark.parametrize(
    ("hint", "may"),
    [
        (str, False),
        (list[str], False),
        (dict[str, Any], False),
        (None, False),
        (str | None, False),
        (Optional[int], False),  # noqa: UP045  the older way to write it
        ("str | None", False),
        (str | grpo.Step, True),
        (Union[str, grpo.Step], True),  # noqa: UP007
        ("grpo.Step", True),
        (Any, True),
        (object, True),
        ("NotThere", True),
    ],
)
def test_which_results_may_reward(hint: object, may: bool) -> None:
    def call(query: str): ...

    assert may_return_step(call)
    call.__annotations__["return"] = hint
    assert may_return_step(call) is may


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("environment: {use: rooms.py:Scoring, weight: 0}\n", "environment.weight"),
        ("environments: {a: {use: rooms.py:Scoring, weight: 0}}\n", "environments.a.weight"),
    ],
)
def test_the_weight_that_is_0_is_named(text: str, place: str) -> None:
    Path("recipe.yaml").write_text(HEAD + text)
    with pytest.raises(UserError, match=rf"recipe.yaml:4: {place}: every reward has weight 0"):
        load_recipe(Path("recipe.yaml"))
