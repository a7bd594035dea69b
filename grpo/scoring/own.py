"""The environment's own reward: one more score, next to the scores of the reward functions."""

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
    """The weight of an environment's own reward, the fraction of its conversations that may fail, and the noun for
    messages: `environment` or `agent`."""

    weight: float = 1.0
    max_failure_rate: float = EnvironmentConfig.model_fields["max_failure_rate"].default
    noun: str = "environment"


def terms_of(hosts: Sequence[tuple[Host, EnvironmentConfig]]) -> dict[str, OwnTerms]:
    """The terms of each environment, by the name in its host's description."""
    return {host.description.name: OwnTerms(cfg.weight, cfg.max_failure_rate, _noun(cfg)) for host, cfg in hosts}


def _noun(cfg: EnvironmentConfig) -> str:
    return "agent" if cfg.is_agent else "environment"


def rewarding_steps(groups: Sequence[Group]) -> set[str]:
    """The names of the environments that rewarded at least one step of a conversation."""
    talks = (rollout.trajectory.conversation for group in groups for rollout in group.rollouts)
    return {talk.environment for talk in talks if talk and any(reward is not None for reward in talk.turn_rewards)}


def own_answers(
    groups: Sequence[Group], environments: Mapping[str, OwnTerms], by_steps: Collection[str] = ()
) -> dict[str, Placed]:
    """The answers of each environment, one per conversation of that environment.

    A conversation whose environment failed is a failure of the environment's kind. The environments in `by_steps`
    reward steps: a conversation with turns but without a rewarded turn gets 0, the empty sum. It was truncated, or
    never did what the environment rewards, and its group's baseline must count it. With other environments, such a
    conversation has no score.
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
    """The scored groups, with the score 0 for conversations that lack a score although their environment rewards steps
    (`by_steps`), as in `own_answers`."""
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
"""The setting to raise, by stop reason, if conversations reach a limit before they get a reward."""


def unrewarded(names: Collection[str], groups: Sequence[Group]) -> str:
    """A message about the environments `names`, which rewarded no conversation in `groups`: how the conversations
    ended, and what to do."""
    trajectories = [rollout.trajectory for group in groups for rollout in group.rollouts]
    talks = [t for t in trajectories if t.conversation is not None and t.conversation.environment in names]
    returned = sum(map(_returned_none, talks))
    if returned > len(talks) / 2:
        said = f"{' and '.join(names)} rewarded no conversation: the agent returned None in {returned:,} of "
        return f"{said}{len(talks):,}. Let it return a number, or a dict with 'reward'"
    nothing = "no step, get_reward or agent returned a reward"
    said = f"{' and '.join(names)} rewarded no conversation: {nothing}"
    raised = "raise the limit that ends them, if there is one"
    if talks:
        ((reason, count),) = Counter(talk.finish_reason for talk in talks).most_common(1)
        said += f"; {count:,} of {len(talks):,} conversations ended by {reason}"
        raised = f"raise {RAISED[reason]}" if reason in RAISED else "read the conversations (grpo generate)"
    scored = "return a score wherever a conversation ends (from get_reward, or from the agent)"
    return f"{said}. To get rewards, {raised}, or {scored}"


def _returned_none(unrewarded: Trajectory) -> bool:
    """Whether an agent finished without a reward. A finished environment has `turn_rewards`, rewarded or not."""
    talk = unrewarded.conversation
    return unrewarded.finish_reason == "done" and talk is not None and not talk.turn_rewards and talk.failure is None


def mostly_cut(groups: Sequence[Group]) -> str:
    """A sentence, after a space, on the limit that ended most conversations; empty if no limit did."""
    ends = [one.trajectory.finish_reason for group in groups for one in group.rollouts if one.trajectory.conversation]
    ((reason, count),) = Counter(ends).most_common(1) or [("done", 0)]
    if reason not in RAISED or count <= len(ends) / 2:
        return ""
    return f" {count:,} of {len(ends):,} conversations ended by {reason}: check whether {RAISED[reason]} is too small."


def _answer(conversation: Conversation, by_steps: bool) -> Answer:
    if (failure := conversation.failure) is not None:
        return Answer.failed(1, failure.error, failure.kind)
    reward = conversation.reward
    if reward is None and by_steps and conversation.turn_rewards:
        reward = 0.0
    scores, failures = checked([reward], 1)
    return Answer(scores, failures)


def without_home(rollout: Rollout) -> Rollout:
    """The same rollout without a reference to its environment, which has been released."""
    conversation = rollout.trajectory.conversation
    if conversation is None or conversation.home is None:
        return rollout
    trajectory = replace(rollout.trajectory, conversation=replace(conversation, home=None))
    return replace(rollout, trajectory=trajectory)
