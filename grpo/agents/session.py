"""One rollout of an agent: samples answers to its requests until it returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf

from grpo.agents.decoder import Cancelled, Left, Mail, Posted, session_over
from grpo.agents.strands import Strand, gone_on_with, idle, in_order
from grpo.environments.inbox import Inbox
from grpo.environments.sampler import Sampler
from grpo.environments.seats import ConversationLimits, Reply
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.serving.asks import Ask, Piece, Ticket
from grpo.serving.refusals import ENDED, Refusal
from grpo.types import FinishReason


@dataclass(frozen=True, slots=True)
class Room:
    """The limits of a rollout: `longest_prompt` tokens in the first prompt, and the `limits` of a conversation."""

    longest_prompt: int
    limits: ConversationLimits


class AgentSession:
    """Decodes the requests of one agent, in the thread of the rollout.

    A prompt that extends a whole row (its prompt and all sampled tokens) continues this row. Any other prompt starts a
    new row. `strands` are the rows; `cut` is the limit that the agent reached, if any; `refused` is the refusal of the
    last request, or None if the request was accepted.
    """

    def __init__(self, sampler: Sampler, sample: int, room: Room) -> None:
        self._sampler, self._sample, self._room = sampler, sample, room
        self.strands: list[Strand] = []
        self.cut: FinishReason | None = None
        self.refused: Refusal | None = None
        self._inbox: Inbox[Mail] = sampler.inbox()
        self._under_way: dict[Ticket, list[Strand]] = {}
        self._asked = self._wave = 0

    @property
    def inbox(self) -> Inbox[Mail]:
        """Gets the agent's requests, and its end."""
        return self._inbox

    @property
    def answered(self) -> list[Strand]:
        """The rows with an answer, in a deterministic order."""
        return in_order(self.strands)

    async def until_it_leaves(self) -> Reply:
        """Answer requests until the agent has returned, and then refuse the remaining requests. Returns the reply to
        the agent's `run`."""
        refusal = ENDED  # if the rollout is broken off
        try:
            while True:
                self._inbox.patient = bool(self._under_way)
                mail = await self._inbox.next()
                if isinstance(mail, Left):
                    break
                if isinstance(mail, Cancelled):
                    self._cancel(mail.ticket)
                else:
                    self._begin(mail.ticket)
            refusal = session_over()
        finally:
            waiting = [one.ticket for one in self._inbox.close() if isinstance(one, Posted)]
            for ticket in [*self._under_way, *waiting]:
                _refuse(ticket, refusal)
        self._end()
        return mail.reply

    @property
    def ended_by(self) -> FinishReason:
        """Why the rollout of an agent that has returned ended: by a limit of the run, or because the agent was done."""
        last = self.strands[-1].reason if self.strands else None
        return self.cut or (last if last in ("length", "max_turn_tokens", "repetition") else None) or "done"

    def _begin(self, ticket: Ticket) -> None:
        """Start to decode a request, or refuse it."""
        try:
            strands = self._strands_for(ticket.ask)
        except Refusal as refusal:
            self.refused = refusal
            _refuse(ticket, refusal)
            return
        self.refused = None
        self._asked += 1
        self._under_way[ticket] = strands
        for strand in strands:
            ticket.rows[strand.row] = len(strand.row.token_ids)
            ticket.order.append(strand.row)
            self._sampler.watch(strand.row, lambda row, ticket=ticket: self._tell(ticket, row))  # type: ignore[misc]

    def _strands_for(self, ask: Ask) -> list[Strand]:
        """Start and return the rows that decode for a request. Raises Refusal."""
        prompt, most = tuple(ask.prompt_ids), self._room.limits.max_turns
        if most is not None and self._asked >= most:
            self.cut = "max_turns"
            raise Refusal(403, f"the rollout has used all of its {most} turns (environment.max_turns)", "max_turns")
        if not self.strands and len(prompt) > self._room.longest_prompt:
            raise _too_long(f"the first prompt has {len(prompt):,} tokens, but data.max_prompt_length is "
                            f"{self._room.longest_prompt:,}: raise it, or begin with a shorter prompt")  # fmt: skip
        before = gone_on_with(self.strands, prompt)
        limit = before.limit if before is not None else self._limit(prompt)
        if len(prompt) >= limit:
            self.cut = "length"
            raise _too_long(f"{len(prompt):,} tokens leave no room for an answer: rollout.max_completion_length is "
                            f"{self._sampler.longest:,} for everything after a prompt")  # fmt: skip
        if before is not None and self._fits(before, ask):
            return [self._go_on(before, ask)]
        return self._anew(ask, limit)

    def _limit(self, prompt: Sequence[int]) -> int:
        """Return the maximum number of tokens of a new row: the completion limit, plus its prompt up to the limit of a
        first prompt. The rest of a longer prompt counts toward the completion limit."""
        return min(len(prompt), self._room.longest_prompt) + self._sampler.longest

    def _fits(self, strand: Strand, ask: Ask) -> bool:
        """Whether a request that continues a strand can be decoded in the strand's row."""
        row, sampling = strand.row, self._of_turn(ask, strand.row.stopping.sampling.max_tokens, 0)
        recorded = row.wants_logprobs or not ask.logprobs
        return ask.n == 1 and strand.goes_on and recorded and sampling.reshaped is strand.row.stopping.sampling.reshaped

    def _go_on(self, strand: Strand, ask: Ask) -> Strand:
        row, suffix = strand.row, ask.prompt_ids[strand.length :]
        most = row.stopping.sampling.max_tokens
        self._sampler.go_on(row, suffix, self._of_turn(ask, most, len(row.token_ids) + len(suffix)))
        strand.decoding, strand.reason = True, None
        self.strands.remove(strand)
        self.strands.append(strand)  # keep the most recently used strand last
        return strand

    def _anew(self, ask: Ask, limit: int) -> list[Strand]:
        prompt = tuple(ask.prompt_ids)
        for strand in idle(self.strands):
            self._sampler.release(strand.row)
        self._wave += not self._under_way
        sampling = self._of_turn(ask, limit - len(prompt), 0)
        rows = self._sampler.begin_apart(prompt, self._sample, sampling, ask.n, ask.logprobs)
        begun = [Strand(row, prompt, limit, self._wave) for row in rows]
        self.strands += begun
        return begun

    def _of_turn(self, ask: Ask, most: int, before: int) -> Sampling:
        """Return how to sample a turn after `before` tokens of its row, which may have at most `most` tokens. The
        lengths in a request apply to its turn."""
        asked, run = ask.sampling, self._sampler.sampling
        turn = min(asked.max_tokens, self._room.limits.max_turn_tokens or inf)
        least = asked.min_tokens if asked.min_tokens in (0, run.min_tokens) else before + asked.min_tokens
        return replace(asked, max_tokens=most, max_turn_tokens=int(turn) if turn < most else 0, min_tokens=least)

    def _tell(self, ticket: Ticket, row: Row) -> None:
        """Send a row's new tokens to the client. A request is answered when its last row has ended."""
        told, ended = ticket.rows[row], row.finish_reason
        if ended is None and not ticket.ask.gradually:
            return
        ticket.rows[row] = len(row.token_ids)
        logprobs = tuple(row.logprobs[told:]) if ticket.ask.logprobs else ()
        piece = Piece(ticket.order.index(row), tuple(row.token_ids[told:]), logprobs, ended)
        if ended is not None:
            del ticket.rows[row]
        if not ticket.rows:
            self._answered(ticket)
        ticket.tell([piece])

    def _answered(self, ticket: Ticket) -> None:
        ticket.over = True
        for strand in self._under_way.pop(ticket):
            strand.answer()
            own = strand.reason == "max_turn_tokens" and ticket.ask.sampling.max_tokens <= (
                self._room.limits.max_turn_tokens or inf
            )
            strand.reason = None if own else strand.reason  # the agent's own limit, not a limit of the run
        self._inbox.patient = bool(self._under_way)

    def _cancel(self, ticket: Ticket) -> None:
        """Stop decoding a request. It has not been answered, so it does not count as a turn."""
        ticket.over = True
        strands = self._under_way.pop(ticket, None)
        if strands is not None:
            self._asked -= 1
            for strand in strands:
                strand.decoding = False
                self._sampler.give_up(strand.row)

    def _end(self) -> None:
        """Free all rows."""
        for ticket in list(self._under_way):
            self._cancel(ticket)
        for strand in self.strands:
            self._sampler.release(strand.row)


def _refuse(ticket: Ticket, refusal: Refusal) -> None:
    ticket.over = True
    ticket.tell(refusal)


def _too_long(why: str) -> Refusal:
    return Refusal(400, why, "context_length_exceeded", "messages")
