"""How a request is sampled: what it asks for, what the server or the session decides, and what there is room for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo.generation.sampling import Sampling
from grpo.serving.refusals import wrong
from grpo.serving.sessions import SessionRules
from grpo.serving.wire import SamplingFields

DECIDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""What an open session decides, beside the seed."""


def sampling_of(
    asked: SamplingFields, defaults: Sampling, prompt: int, longest: int | None, rules: SessionRules | None = None
) -> Sampling:
    """How to sample after `prompt` tokens: what was asked for, and otherwise the `defaults`, which in a session with
    rules are the session's.

    At temperature 0 nothing reshapes the answer but what was asked for. `longest` is the most tokens of prompt and
    completion together, None for no limit. Raises Refusal.
    """
    given = _given(asked)
    if rules is not None:
        return _in_session(asked, given, prompt, longest, rules)
    base = defaults
    if given.get("temperature") == 0:
        base = replace(base, top_k=0, top_p=1.0, min_p=0.0, repetition_penalty=1.0)
    sampling = replace(base, **given)
    return replace(sampling, max_tokens=_max_tokens(asked.length, sampling.max_tokens, prompt, longest))


def _in_session(
    asked: SamplingFields, given: dict[str, Any], prompt: int, longest: int | None, rules: SessionRules
) -> Sampling:
    if asked.seed is not None:
        raise wrong("seed", "the run's own seed decides what is drawn in a rollout: leave it out", "session_decides")
    for name in DECIDED:
        decided = getattr(rules.recipe, name)
        if given.pop(name, decided) != decided:
            raise wrong(
                name,
                f"the run decides how its rollouts are sampled, and its recipe has rollout.{name}: {decided:g}. Leave "
                "it out of the request, or change the recipe",
                "session_decides",
            )
    most = rules.sampling.max_tokens
    length = min(most, asked.length or most)
    return replace(rules.sampling, **given, max_tokens=_max_tokens(None, length, prompt, longest))


def _given(asked: SamplingFields) -> dict[str, Any]:
    """What a request asks for, by the names that `Sampling` has; without its length."""
    names = (*DECIDED, "min_tokens")
    given: dict[str, Any] = {name: getattr(asked, name) for name in names if getattr(asked, name) is not None}
    if given.get("top_k") == -1:
        given["top_k"] = 0
    if asked.stop is not None:
        given["stop"] = (asked.stop,) if isinstance(asked.stop, str) else asked.stop
    if asked.stop_token_ids is not None:
        given["stop_ids"] = asked.stop_token_ids
    return given


def _max_tokens(asked: int | None, default: int, prompt: int, longest: int | None) -> int:
    room = None if longest is None else longest - prompt
    if asked is not None and room is not None and asked > room:
        raise wrong(
            "max_tokens",
            f"{asked} after a prompt of {prompt} tokens is more than the {longest} that both have together",
            "context_length_exceeded",
        )
    return asked or (default if room is None else min(default, room))
