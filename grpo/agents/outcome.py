"""The outcome of an agent."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field

from grpo.environments.seats import Reply
from grpo.types import Failure, Trajectory

NOTHING = "it got no answer from the model"
ENDPOINT = (
    "it must call the model with the base_url and api_key that it gets (a program: OPENAI_BASE_URL and OPENAI_API_KEY "
    "in its environment)"
)
LOST = 0.0
"""The reward of an agent that raises because a limit of the run refused its request."""
APART = (
    "the requests of this row's rollouts must share at least their first token, but begin with different tokens: begin "
    "every prompt in the same way, as a chat template does"
)


@dataclass(frozen=True, slots=True)
class AgentOutcome:
    """The reward (None if there is none), the agent's metrics, and the failure, if any."""

    reward: float | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    failure: Failure | None = None

    @classmethod
    def of(cls, reply: Reply) -> AgentOutcome:
        """Parse the reply to `run`: its value is JSON, `{"reward": float | null, "metrics": {name: float}}`."""
        if reply.kind != "ok":
            return cls(failure=Failure(reply.kind, reply.error))
        try:
            told = json.loads(reply.value)
            reward, metrics = told["reward"], told["metrics"]
            return cls(None if reward is None else float(reward), {name: float(v) for name, v in metrics.items()})
        except (TypeError, ValueError, KeyError, AttributeError):
            return cls(failure=Failure("error", f"its process sent an invalid result: {reply.value!r:.200}"))


def measured(trajectory: Trajectory) -> dict[str, float]:
    """Return the agent's metrics of a rollout, by their names in the run's metrics."""
    talk = trajectory.conversation
    return {} if talk is None else {f"environment/{talk.environment}/{name}": v for name, v in talk.metrics.items()}
