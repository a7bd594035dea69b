"""Checks before a run that something rewards the model, as far as descriptions of environments tell."""

from __future__ import annotations

from collections.abc import Sequence

from grpo.config import AdvantageConfig, RewardConfig
from grpo.environments.seats import Description
from grpo.errors import UserError
from grpo.runs.partners import ANSWERING, Partners, place_of
from grpo.scoring.scorer import Scorer

REMEDY = (
    "add a get_reward to the environment, or let a call return a grpo.Step with a reward (and annotate the call's "
    "result: -> str | grpo.Step)"
)


def check_rewarded(
    rewards: Sequence[RewardConfig], advantage: AdvantageConfig, partners: Partners, taught: bool = False
) -> list[str]:
    """Notes on environments that may or may not reward the model, which only a run can show.

    Raises UserError if nothing can reward the model, unless a teacher trains it (`taught`), and for weights of rewards
    that do not exist.
    """
    by_functions = any(reward.weight for reward in rewards)
    if partners.own is not None:
        _check_alone(advantage, by_functions or taught)
    for name, (host, config) in partners.hosts.items():
        if "weight" in config.changed and not host.description.may_reward:
            raise UserError(f"{place_of(name)}.weight does nothing: {_lacks(host.description)}. Remove it, or {REMEDY}")
    if by_functions or taught or not partners.hosts:
        return []
    weighed = [host.description for host, config in partners.hosts.values() if config.weight]
    if not any(description.may_reward for description in weighed):
        lacks = "; ".join(_lacks(description) for description in weighed)
        raise UserError(
            f"rewards: nothing rewards the model: the recipe names no reward with a weight, and {lacks}. Name a "
            f"reward, such as rewards: [{{use: math_answer}}], or {REMEDY}"
        )
    return [_unsure(description) for description in weighed if not description.rewards]


def check_sources_rewarded(sources: Sequence[str], scorer: Scorer, taught: bool) -> None:
    """Raise UserError if there are several sources and nothing rewards the tasks of one of them.

    A run with a teacher (`taught`) needs no rewards.
    """
    for source in sources if len(sources) > 1 and not taught else ():
        weights = {name: weight for name, weight in scorer.weights.items() if scorer.applies(name, source)}
        if not any((weights | {name: scorer.weights[name] for name in scorer.environments}).values()):
            raise UserError(
                f"data.sources: nothing rewards the tasks of {source!r}, so the model learns nothing from them: name "
                f"a reward with a weight in its rewards, such as {next(iter(scorer.weights))}, or remove the source"
            )


def _check_alone(advantage: AdvantageConfig, by_functions: bool) -> None:
    """Raise UserError for a recipe that needs rewards from an environment that itself makes trajectories."""
    why = "the environment makes trajectories itself (it has a method rollout)"
    if not by_functions:
        raise UserError(f"rewards: the run needs a reward with a weight: {why} and gives no rewards")
    if advantage.turns == "turn":
        raise UserError(f"advantage.turns: turn does nothing: {why}, and its turns have no separate rewards")


def _lacks(description: Description) -> str:
    """A text that says why an environment gives no reward."""
    tools = [str(tool["function"]["name"]) for tool in description.tools]
    called = [*tools, *(["step"] if description.kind in ANSWERING else [])]
    steps = (
        f"by {'their' if len(called) > 1 else 'its'} annotation{'s' if len(called) > 1 else ''} "
        f"{' and '.join(called)} return{'' if len(called) > 1 else 's'} no grpo.Step"
        if called
        else "it has nothing that the model can call"
    )
    return f"{description.name} gives no reward: it has no get_reward, and {steps}"


def _unsure(description: Description) -> str:
    if not description.may_reward:
        return (
            f"rewards: the recipe names none, so the model learns nothing from conversations with {description.name}: "
            f"{_lacks(description)}"
        )
    return (
        f"rewards: the recipe names none, and {description.name} has no get_reward: only a grpo.Step that "
        f"{' or '.join(description.steps)} returns can reward the model"
    )
