"""The environment of agents: programs that drive the model themselves."""

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
"""Seeds that agents are given are below this, so that any generator of random numbers in any language takes them."""


@dataclass(slots=True)
class _Played:
    """A rollout that has ended."""

    session: AgentSession
    outcome: AgentOutcome
    told: Transcript = field(default=((), ()))


class Agents:
    """Runs the agents of a group side by side, and answers what they ask the model.

    An agent is a seat's object: `reset` gets the row, and `run` the endpoint's `base_url`, `api_key` and a `seed`. What
    it asks for is sampled at once, beside all others. Turns chain to one row while each prompt is all before it and
    more; any other prompt begins a row, and all rows of a rollout have its advantage. The sampled tokens are what is
    trained, and are never encoded again; prompts are not trained.

    What is drawn depends on the row of the dataset, the sample, the prompt and the position alone, whenever a request
    comes. Where two requests at once go on from the same row, the first to come goes on in it.

    A rollout ends when its agent returns: what it has asked for and not been answered is dropped. An agent that raises,
    takes too long, or ends its process is a failure, and so is an agent that asks the model nothing. One that raises
    because a limit refused its last request has lost, and its reward is 0: rollouts that come to `max_turns` or a
    length are the policy's doing, and would teach it nothing if they were left out.
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
        """`seed` is the run's, and `recipe` how the run samples in training: what requests may say again. The first
        prompt may have `max_prompt_length` tokens; see `SessionRules` for `keep_thinking`, and `Conversations` for the
        rest."""
        self.host, self.frontend, self.seed = host, frontend, seed
        self.max_prompt_length, self.recipe, self.system = max_prompt_length, recipe, system
        self.limits: dict[str, int] = {}
        """In the place of `max_prompt_length`, by the source of a task."""
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
    """What an agent came to that has asked, or not."""
    if session.answered:
        stopped = reply.kind == "error" and session.refused is not None
        return AgentOutcome(LOST) if stopped else AgentOutcome.of(reply)
    outcome = AgentOutcome.of(reply)
    if outcome.failure is None:
        outcome = AgentOutcome(failure=Failure("error", f"{NOTHING}: {session.refused or ENDPOINT}"))
    return outcome


def _settle(sampler: Sampler, played: Sequence[_Played]) -> None:
    """Make what all rows begin with the group's prompt. Rollouts without such a beginning have failed.

    Rollouts that have failed count only if all have: what becomes of their rows is of no interest to training.
    """
    good = [one for one in played if one.outcome.failure is None] or list(played)
    prompts = [strand.prompt_ids for one in good for strand in one.session.answered]
    if prompts and not sampler.settle(prompts):
        for one in good:
            one.outcome = AgentOutcome(failure=one.outcome.failure or Failure("error", APART))


def _of_failure(failure: Failure) -> FinishReason:
    return "rollout_timeout" if failure.kind == "timeout" else "failed"
