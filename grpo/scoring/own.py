"""The environment's own reward, a score beside those of the reward functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from grpo.config import EnvironmentConfig
from grpo.environments.seats import Host
from grpo.scoring.contract import Answer, checked
from grpo.scoring.records import Placed
from grpo.types import Conversation, Group, Rollout, Trajectory


@dataclass(frozen=True, slots=True)
class OwnTerms:
    """What an environment's own reward weighs, the fraction of its conversations that may fail, and what it is: an
    `environment`, or an `agent`."""

    weight: float = 1.0
    max_failure_rate: float = EnvironmentConfig.model_fields["max_failure_rate"].default
    noun: str = "environment"


def terms_of(hosts: Sequence[tuple[Host, EnvironmentConfig]]) -> dict[str, OwnTerms]:
    """The terms of each environment, by the name that its host describes."""
    return {host.description.name: OwnTerms(cfg.weight, cfg.max_failure_rate, _noun(cfg)) for host, cfg in hosts}


def _noun(cfg: EnvironmentConfig) -> str:
    return "agent" if cfg.is_agent else "environment"


def rewarding_steps(groups: Sequence[Group]) -> set[str]:
    """The names of the environments of which a step gave a reward."""
    talks = (rollout.trajectory.conversation for group in groups for rollout in group.rollouts)
    return {talk.environment for talk in talks if talk and any(reward is not None for reward in talk.turn_rewards)}


def own_answers(
    groups: Sequence[Group], environments: Mapping[str, OwnTerms], by_steps: Collection[str] = ()
) -> dict[str, Placed]:
    """What each environment gave for its conversations: an answer for each, and none for those of others.

    A conversation whose environment failed is a failure of the kind that it says. The environments `by_steps` reward
    steps: a conversation in which the model had a turn, and none of its turns got a reward, has the sum of none, 0. It
    was cut off, or never did what is rewarded, and its group's baseline must count it. Of other environments it has
    no score.
    """
    rollouts = [rollout for group in groups for rollout in group.rollouts]
    answers: dict[str, Placed] = {name: [] for name in environments}
    for place, rollout in enumerate(rollouts):
        conversation = rollout.trajectory.conversation
        if conversation is not None and conversation.environment in answers:
            answers[conversation.environment].append(
                ((place,), _answer(conversation, conversation.environment in by_steps))
            )
    return answers


def with_sums_of_none(groups: Sequence[Group], by_steps: Collection[str]) -> list[Group]:
    """The scored groups in which conversations of the environments `by_steps` that have no score have the sum of none,
    where `own_answers` would have given it."""
    return [replace(group, rollouts=tuple(_summed(one, by_steps) for one in group.rollouts)) for group in groups]


def _summed(rollout: Rollout, by_steps: Collection[str]) -> Rollout:
    talk = rollout.trajectory.conversation
    if talk is None or talk.environment not in by_steps or rollout.scores.get(talk.environment) is not None:
        return rollout
    (score,) = _answer(talk, True).values
    return replace(rollout, scores={**rollout.scores, talk.environment: score})


RAISED = {
    "length": "rollout.max_completion_length",
    "max_turns": "environment.max_turns",
    "max_tool_calls": "environment.max_tool_calls",
    "max_turn_tokens": "environment.max_turn_tokens",
    "rollout_timeout": "environment.rollout_timeout",
}
"""The settings to raise where conversations end at a limit before anything is rewarded, by the stop reason."""


def unrewarded(names: Collection[str], groups: Sequence[Group]) -> str:
    """What to say of environments none of whose conversations in `groups` was rewarded: how these ended, what to do."""
    rollouts = [rollout.trajectory for group in groups for rollout in group.rollouts]
    talks = [one for one in rollouts if one.conversation is not None and one.conversation.environment in names]
    returned = sum(map(_returned_none, talks))
    if returned > len(talks) / 2:
        said = f"{' and '.join(names)} rewarded no conversation: the agent returned None in {returned:,} of "
        return f"{said}{len(talks):,}. Let it return a number, or a dict with 'reward'"
    nothing = "no step gave a reward, no get_reward a score, and no agent returned one"
    said = f"{' and '.join(names)} rewarded no conversation: {nothing}"
    raised = "raise the limit that ends them first, if one does"
    if talks:
        ((reason, count),) = Counter(one.finish_reason for one in talks).most_common(1)
        said += f"; {count:,} of {len(talks):,} conversations ended by {reason}"
        raised = f"raise {RAISED[reason]}" if reason in RAISED else "read how they go (grpo generate)"
    scored = "have a conversation scored wherever it ends (by get_reward, or by what an agent returns)"
    return f"{said}. To have them rewarded, {raised}, or {scored}"


def _returned_none(unrewarded: Trajectory) -> bool:
    """Whether an agent had its say and gave no reward: an environment that is done has had turns, rewarded or not."""
    talk = unrewarded.conversation
    return unrewarded.finish_reason == "done" and talk is not None and not talk.turn_rewards and talk.failure is None


def mostly_cut(groups: Sequence[Group]) -> str:
    """The limit that ended most conversations, as a sentence after a space; empty where none did."""
    ends = [one.trajectory.finish_reason for group in groups for one in group.rollouts if one.trajectory.conversation]
    ((reason, count),) = Counter(ends).most_common(1) or [("done", 0)]
    if reason not in RAISED or count <= len(ends) / 2:
        return ""
    return f" {count:,} of {len(ends):,} conversations ended by {reason}: see whether {RAISED[reason]} is too small."


def _answer(conversation: Conversation, by_steps: bool) -> Answer:
    if (failure := conversation.failure) is not None:
        return Answer.failed(1, failure.error, failure.kind)
    reward = conversation.reward
    if reward is None and by_steps and conversation.turn_rewards:
        reward = 0.0
    scores, failures = checked([reward], 1)
    return Answer(scores, failures)


def without_home(rollout: Rollout) -> Rollout:
    """The same rollout, whose environment has been given back."""
    conversation = rollout.trajectory.conversation
    if conversation is None or conversation.home is None:
        return rollout
    trajectory = replace(rollout.trajectory, conversation=replace(conversation, home=None))
    return replace(rollout, trajectory=trajectory)
