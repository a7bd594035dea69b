"""What an agent returned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo.environments.seats import Reply
from grpo.types import Failure, Trajectory

NOTHING = "it asked the model nothing that was answered"
ENDPOINT = (
    "it must use the base_url and the api_key that it is given (a program: OPENAI_BASE_URL and OPENAI_API_KEY in its "
    "environment)"
)
LOST = 0.0
"""The reward of an agent that a limit of the run stopped: it raises where it is refused, and returns no other."""
APART = (
    "the requests of this row's rollouts begin with different tokens, and the first at least must be the same: begin "
    "every prompt alike, as a chat template does"
)


@dataclass(frozen=True, slots=True)
class AgentOutcome:
    """The reward, None for none, the agent's own metrics, and why it failed if it did."""

    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    @classmethod
    def of(cls, reply: Reply) -> AgentOutcome:
        """What a call of `run` came to: its value is JSON, `{"reward": float | null, "metrics": {name: float}}`."""
        if reply.kind != "ok":
            return cls(failure=Failure(reply.kind, reply.error))
        try:
            told = json.loads(reply.value)
            reward, metrics = told["reward"], told["metrics"]
            return cls(None if reward is None else float(reward), {name: float(v) for name, v in metrics.items()})
        except (TypeError, ValueError, KeyError, AttributeError):
            return cls(failure=Failure("error", f"its process answered what is no result: {reply.value!r:.200}"))


def measured(trajectory: Trajectory) -> dict[str, float]:
    """What its agent measured of a rollout, by the names that these metrics have in a run."""
    talk = trajectory.conversation
    return {} if talk is None else {f"environment/{talk.environment}/{name}": v for name, v in talk.metrics.items()}
