"""The test of a chat template before the first rollout: what ends a turn, and whether a conversation can go on."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from grpo.environments.template import MARK, Calls, Template, before, shared, with_ids
from grpo.environments.thinking import Thinking
from grpo.errors import UserError
from grpo.types import Message

WAYS_OUT = "use a model whose template can (Qwen2.5, Qwen3, Llama 3.1, GLM-4.5, gpt-oss: they can)"
RESULT = "wvyqpz"
THOUGHT = "hgbnmw"


@dataclass(frozen=True, slots=True)
class Joint:
    """How messages of one kind follow a turn.

    end       the token that ends a turn in the rendered conversation, as text
    sampled   the tokens, any of which the model must have ended its turn with
    kept      whether earlier thinking stays, that the template would leave out
    moves     whether the template would write a system message elsewhere than it stood in the prompt
    ids       whether the template says of a tool's result which call it is of
    calls     which of a turn's calls the template writes
    """

    end: str
    sampled: frozenset[int]
    kept: bool = False
    moves: bool = False
    ids: bool = False
    calls: Calls = "all"


def joint_of(template: Template, role: str, thinking: Thinking | None) -> Joint:
    """How messages of a role follow a turn. Raises UserError where they cannot."""
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
    """Which of the calls before these results the template writes."""
    ways: tuple[Calls, ...] = ("all", "first")
    for way in ways:
        calling = before(results, way)
        if template.takes(calling) and MARK in template.render(calling, generation=False):
            return way
    return "none"


def _ends(template: Template, last: str, text: str, role: str) -> tuple[str, frozenset[int]]:
    """The token that ends a turn which others follow, and those that the model may end it with.

    Most templates write the same token after a last turn; gpt-oss writes another, and the model samples that.
    """
    if MARK not in text or MARK not in last:
        raise UserError(f"the model's chat template leaves out what the model said: {WAYS_OUT}")
    inner = text[: text.index(RESULT)] if RESULT in text else text
    found, final = (template.end_in(one, one.index(MARK)) for one in (inner, last))
    if found is None:
        raise UserError(
            f"the model's chat template ends a turn with no special token, before a message of role {role}: where a "
            f"turn ends is not certain then; {WAYS_OUT}"
        )
    ends = {found[0]: template.special[found[0]]}
    if final is not None and ends[found[0]] not in template.stop_ids:
        ends[final[0]] = template.special[final[0]]
    sampled = frozenset(ends.values()) & frozenset(template.stop_ids)
    if not sampled:
        ids = sorted(ends.values())
        raise UserError(
            f"the model's chat template ends a turn with {found[0]}, where sampling does not stop: set "
            f"rollout.stop_token_ids: {ids}"
        )
    return found[0], sampled


def _check_shown(suffix: str, messages: Sequence[Message], role: str) -> None:
    if missing := [message["content"] for message in messages if message["content"] not in suffix]:
        what = "the results of tools" if role == "tool" else f"a message of role {role}"
        which = "" if len(missing) == len(messages) else " where there are several"
        raise UserError(f"the model's chat template leaves out {what}{which}: {WAYS_OUT}")


def _check_prefix(template: Template, last: str, head: str, role: str, thinking: Thinking | None) -> None:
    """Whether what came before a turn, and the turn, stay as they were when messages follow."""
    final = template.end_in(last, last.index(MARK))
    begun = last if final is None else last[: final.start()]
    if begun == head:
        return
    if thinking is not None and _bare(thinking, begun) == _bare(thinking, head):
        return
    same = len(shared(begun, head))
    raise UserError(
        f"the model's chat template changes what came before when a message of role {role} follows: after "
        f"{begun[max(0, same - 30) : same]!r} comes {head[same : same + 30]!r} instead of {begun[same : same + 30]!r}. "
        f"Tokens that were sampled would then be others; {WAYS_OUT}"
    )


def _bare(thinking: Thinking, text: str) -> str:
    return re.sub(r"\s", "", thinking.without(text))


def _moves_system(template: Template, messages: Sequence[Message], calls: Calls) -> bool:
    """Whether a system message stands elsewhere, or nowhere, when these messages follow a turn."""
    said = [{"role": "system", "content": THOUGHT}, *before(messages, calls)]
    if not template.takes(said):
        return False
    prompt = template.render(said[:2], generation=True)
    whole = template.render([*said, *with_ids(messages, ())], generation=True)
    return THOUGHT in prompt and prompt.partition(THOUGHT)[0] != whole.partition(THOUGHT)[0]


def _check_cut(template: Template, end: str, text: str, at: int) -> None:
    """Whether the tokens after an end of turn are the same without what comes before it."""
    whole, suffix = template.encode(text), list(template.encode_after(end, text[at + len(end) :]))
    if whole[-len(suffix) - 1 :] != [template.special[end], *suffix]:
        raise UserError(
            f"the tokens after {end} depend on what comes before it in this model's tokenizer, so that a conversation "
            "cannot go on with the tokens that its chat template means; use another model"
        )


def _drops(template: Template, messages: Sequence[Message], calls: Calls) -> bool:
    """Whether the template renders the thinking of a last turn, and no longer when these messages follow."""
    thought = before(messages, calls, reasoning_content=THOUGHT, thinking=THOUGHT)
    if THOUGHT not in template.render(thought, generation=False):
        return False
    return THOUGHT not in template.render([*thought, *with_ids(messages, ())], generation=True)
