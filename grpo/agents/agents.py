"""The environment for agents: programs that call the model themselves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from grpo.agents.decoder import Left
from grpo.agents.frontend import Frontend
from grpo.agents.outcome import APART, ENDPOINT, LOST, NOTHING, AgentOutcome
from grpo.agents.session import AgentSession, Room
from grpo.agents.told import Transcript, conversation_of
from grpo.environments.agent import RUN
from grpo.environments.anew import joined
from grpo.environments.openings import begun_with, messages_of, seed_of
from grpo.environments.sampler import Sampler
from grpo.environments.seats import ConversationLimits, Host, Reply, Seat
from grpo.generation.sampling import Sampling
from grpo.serving.sessions import SessionRules
from grpo.types import BEHAVIOUR, Conversation, Failure, FinishReason, Task, Trajectory

SEEDS = 2**31
"""Upper bound of agents' seeds, so that any random number generator in any language accepts them."""


@dataclass(slots=True)
class _Played:
    """A rollout that has ended."""

    session: AgentSession
    outcome: AgentOutcome
    told: Transcript = field(default=((), ()))


class Agents:
    """Runs the agents of a group concurrently, and answers their requests with the model.

    An agent is a seat's object: `reset` gets the row, and `run` gets the endpoint's `base_url`, `api_key` and a `seed`.
    Its requests are sampled immediately, together with all others. A request whose prompt extends a whole earlier row
    continues this row; any other prompt starts a new row. All rows of a rollout share its advantage. Training uses the
    sampled tokens, which are never encoded again; prompts are not trained on.

    Draws depend only on the dataset row, the sample, the prompt, and the position, not on when a request comes. If two
    simultaneous requests continue the same row, the first continues in it.

    A rollout ends when its agent returns; requests without an answer are dropped. An agent fails if it raises, takes
    too long, ends its process, or gets no answer from the model. But an agent that raises because a limit refused its
    last request gets reward 0: the policy caused a rollout to reach `max_turns` or a length limit, and would not learn
    from it if it were left out.
    """

    def __init__(
        self,
        host: Host,
        frontend: Frontend,
        limits: ConversationLimits,
        seed: int,
        max_prompt_length: int,
        recipe: Sampling,
        system: str | None = None,
        keep_thinking: bool = False,
    ) -> None:
        """Set up the environment.

        `seed` is the run's seed. `recipe` is the sampling in training: requests may repeat its values. The first prompt
        may have at most `max_prompt_length` tokens. See `SessionRules` for `keep_thinking`, and `Conversations` for the
        other arguments.
        """
        self.host, self.frontend, self.seed = host, frontend, seed
        self.max_prompt_length, self.recipe, self.system = max_prompt_length, recipe, system
        self.limits: dict[str, int] = {}
        """Limits that replace `max_prompt_length`, by the source of a task."""
        self._limits, self._keep_thinking = limits, keep_thinking

    async def rollout(self, task: Task, sampler: Sampler) -> list[Trajectory]:
        seats = self.host.seats(sampler.place, sampler.n)
        try:
            played = await sampler.gather(*(self._play(task, sampler, seat, i) for i, seat in enumerate(seats)))
        finally:
            for seat in seats:
                seat.release()
        _settle(sampler, played)
        return [self._trajectory(task, sampler, one) for one in played]

    async def _play(self, task: Task, sampler: Sampler, seat: Seat, sample: int) -> _Played:
        room = Room(self.limits.get(task.source, self.max_prompt_length), self._limits)
        session, seed = AgentSession(sampler, sample, room), seed_of(self.seed, task, sample)
        reply = await sampler.outside(seat.reset(begun_with(task), seed))
        if reply.kind != "ok":
            return _Played(session, AgentOutcome.of(reply))
        rules = SessionRules(sampler.sampling, self.recipe, self._keep_thinking)
        door = self.frontend.open(session.inbox, rules)
        try:
            given = {"base_url": door.base_url, "api_key": door.api_key, "seed": seed % SEEDS}
            running = seat.call(RUN, given)
            running.add_done_callback(lambda done: session.inbox.put(Left(done.result())))
            reply = await session.until_it_leaves()
        finally:
            memory = self.frontend.end(door)
        return _Played(session, _outcome(reply, session), conversation_of(memory.said))

    def _trajectory(self, task: Task, sampler: Sampler, played: _Played) -> Trajectory:
        outcome, shared = played.outcome, sampler.task.prompt_ids
        reason: FinishReason = played.session.ended_by if outcome.failure is None else _of_failure(outcome.failure)
        strands = [one for one in played.session.answered if one.prompt_ids[: len(shared)] == shared]
        rows = [strand.trajectory(len(shared), reason, sampler.logprobs) for strand in strands]
        if not rows:
            rows = [Trajectory((), (), {BEHAVIOUR: ()} if sampler.logprobs else {}, "", reason)]
        prompt, messages = played.told
        conversation = Conversation(
            environment=self.host.description.name,
            prompt=prompt or tuple(messages_of(task.prompt, self.system)),
            messages=messages,
            outcome=outcome.reward,
            failure=outcome.failure,
            metrics=dict(outcome.metrics),
        )
        return replace(joined([(row, "\n") for row in rows[:-1]], rows[-1]), conversation=conversation)


def _outcome(reply: Reply, session: AgentSession) -> AgentOutcome:
    """Return the outcome of an agent. It is a failure if the agent got no answer from the model."""
    if session.answered:
        stopped = reply.kind == "error" and session.refused is not None
        return AgentOutcome(LOST) if stopped else AgentOutcome.of(reply)
    outcome = AgentOutcome.of(reply)
    if outcome.failure is None:
        outcome = AgentOutcome(failure=Failure("error", f"{NOTHING}: {session.refused or ENDPOINT}"))
    return outcome


def _settle(sampler: Sampler, played: Sequence[_Played]) -> None:
    """Set the group's prompt to the common prefix of all rows. If there is none, the rollouts fail.

    Failed rollouts only count if all have failed: training does not use their rows.
    """
    good = [one for one in played if one.outcome.failure is None] or list(played)
    prompts = [strand.prompt_ids for one in good for strand in one.session.answered]
    if prompts and not sampler.settle(prompts):
        for one in good:
            one.outcome = AgentOutcome(failure=one.outcome.failure or Failure("error", APART))


def _of_failure(failure: Failure) -> FinishReason:
    return "rollout_timeout" if failure.kind == "timeout" else "failed"
