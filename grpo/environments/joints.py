"""Tests a chat template before the first rollout: which token ends a turn, and whether messages can follow it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.environments.template import MARK, Calls, Template, before, shared, with_ids
from grpo.environments.thinking import Thinking
from grpo.errors import UserError
from grpo.types import Message

WAYS_OUT = "use a model whose template supports this (Qwen2.5, Qwen3, Llama 3.1, GLM-4.5, and gpt-oss do)"
RESULT = "wvyqpz"
THOUGHT = "hgbnmw"


@dataclass(frozen=True, slots=True)
class Joint:
    """How messages of one kind follow a turn.

    end       the text of the token that ends a turn in the rendered conversation
    sampled   ids of the tokens with which the model may end its turn so that messages can follow
    kept      whether the conversation keeps earlier thinking that the template would leave out
    moves     whether the template would move a system message from its place in the prompt
    ids       whether the template writes the id of the call next to a tool's result
    calls     which calls of a turn the template writes
    """

    end: str
    sampled: frozenset[int]
    kept: bool = False
    moves: bool = False
    ids: bool = False
    calls: Calls = "all"


def joint_of(template: Template, role: str, thinking: Thinking | None) -> Joint:
    """Return how messages of a role follow a turn. Raises UserError if they cannot."""
    name = template.tools[0]["function"]["name"] if template.tools else "tool"
    one: Message = {"role": role, "content": RESULT, **({"name": name} if role == "tool" else {})}
    two = [one, {**one, "content": RESULT[::-1]}] if role == "tool" else [one]
    calls = _calls(template, two) if role == "tool" else "all"
    last = template.render(before(two, calls), generation=False)
    text = template.render([*before(two, calls), *with_ids(two, ())], generation=True)
    end, sampled = _ends(template, last, text, role)
    at = text.index(end, text.index(MARK))
    _check_shown(text[at:], two, role)
    _check_prefix(template, last, text[:at], role, thinking)
    _check_cut(template, end, text, at)
    kept = _drops(template, two, calls)
    ids = role == "tool" and "call00000" in text[at:]
    return Joint(end, sampled, kept, _moves_system(template, two, calls), ids, calls)


def _calls(template: Template, results: Sequence[Message]) -> Calls:
    """Return which of the calls before these results the template writes."""
    ways: tuple[Calls, ...] = ("all", "first")
    for way in ways:
        calling = before(results, way)
        if template.takes(calling) and MARK in template.render(calling, generation=False):
            return way
    return "none"


def _ends(template: Template, last: str, text: str, role: str) -> tuple[str, frozenset[int]]:
    """Return the token that ends a turn when messages follow it, and the tokens with which the model may end it.

    Most templates write the same token after the last turn. gpt-oss writes a different token there, and the model
    samples that token.
    """
    if MARK not in text or MARK not in last:
        raise UserError(f"the model's chat template leaves out the model's own turns: {WAYS_OUT}")
    inner = text[: text.index(RESULT)] if RESULT in text else text
    found, final = (template.end_in(one, one.index(MARK)) for one in (inner, last))
    if found is None:
        raise UserError(
            f"the model's chat template writes no special token between a turn and a message of role {role}, so the "
            f"end of the turn is ambiguous: {WAYS_OUT}"
        )
    ends = {found[0]: template.special[found[0]]}
    if final is not None and ends[found[0]] not in template.stop_ids:
        ends[final[0]] = template.special[final[0]]
    sampled = frozenset(ends.values()) & frozenset(template.stop_ids)
    if not sampled:
        ids = sorted(ends.values())
        raise UserError(
            f"the model's chat template ends a turn with {found[0]}, but sampling does not stop at this token: set "
            f"rollout.stop_token_ids: {ids}"
        )
    return found[0], sampled


def _check_shown(suffix: str, messages: Sequence[Message], role: str) -> None:
    if missing := [message["content"] for message in messages if message["content"] not in suffix]:
        what = "the results of tools" if role == "tool" else f"a message of role {role}"
        which = "" if len(missing) == len(messages) else " if there are several"
        raise UserError(f"the model's chat template leaves out {what}{which}: {WAYS_OUT}")


def _check_prefix(template: Template, last: str, head: str, role: str, thinking: Thinking | None) -> None:
    """Raise UserError if the template changes a turn, or the text before it, when messages follow.

    Differences in thinking and in blanks are allowed.
    """
    final = template.end_in(last, last.index(MARK))
    begun = last if final is None else last[: final.start()]
    if begun == head:
        return
    if thinking is not None and _bare(thinking, begun) == _bare(thinking, head):
        return
    same = len(shared(begun, head))
    raise UserError(
        f"the model's chat template changes earlier text when a message of role {role} follows: after "
        f"{begun[max(0, same - 30) : same]!r} comes {head[same : same + 30]!r} instead of {begun[same : same + 30]!r}. "
        f"The conversation would no longer hold the tokens that were sampled: {WAYS_OUT}"
    )


def _bare(thinking: Thinking, text: str) -> str:
    return re.sub(r"\s", "", thinking.without(text))


def _moves_system(template: Template, messages: Sequence[Message], calls: Calls) -> bool:
    """Whether the template moves or drops a system message when these messages follow a turn."""
    said = [{"role": "system", "content": THOUGHT}, *before(messages, calls)]
    if not template.takes(said):
        return False
    prompt = template.render(said[:2], generation=True)
    whole = template.render([*said, *with_ids(messages, ())], generation=True)
    return THOUGHT in prompt and prompt.partition(THOUGHT)[0] != whole.partition(THOUGHT)[0]


def _check_cut(template: Template, end: str, text: str, at: int) -> None:
    """Raise UserError if the tokens after an end of turn depend on the text before it."""
    whole, suffix = template.encode(text), list(template.encode_after(end, text[at + len(end) :]))
    if whole[-len(suffix) - 1 :] != [template.special[end], *suffix]:
        raise UserError(
            f"in this model's tokenizer the tokens after {end} depend on the text before it, so a conversation cannot "
            "continue with the tokens of its chat template: use another model"
        )


def _drops(template: Template, messages: Sequence[Message], calls: Calls) -> bool:
    """Whether the template renders the thinking of the last turn, but leaves it out when these messages follow."""
    thought = before(messages, calls, reasoning_content=THOUGHT, thinking=THOUGHT)
    if THOUGHT not in template.render(thought, generation=False):
        return False
    return THOUGHT not in template.render([*thought, *with_ids(messages, ())], generation=True)
