"""The sampling of a request: from its fields, the server's defaults, the session's rules, and the length limit."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from grpo.generation.sampling import Sampling
from grpo.serving.refusals import wrong
from grpo.serving.sessions import SessionRules
from grpo.serving.wire import SamplingFields

DECIDED = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
"""The settings that an open session determines, in addition to the seed."""


def sampling_of(
    asked: SamplingFields, defaults: Sampling, prompt: int, longest: int | None, rules: SessionRules | None = None
) -> Sampling:
    """The sampling for a request after `prompt` tokens. The `defaults` apply to fields that the request leaves out; in
    a session with `rules`, the session's sampling replaces them.

    If a request sets temperature 0, the defaults for filters and penalties do not apply. `longest` limits the tokens of
    prompt and completion together; None: no limit. Raises Refusal.
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
        raise wrong("seed", "the draws of a rollout come from the run's own seed: leave it out", "session_decides")
    for name in DECIDED:
        decided = getattr(rules.recipe, name)
        if given.pop(name, decided) != decided:
            raise wrong(
                name,
                f"the run decides how its rollouts are sampled, and its recipe has rollout.{name}: {decided:g}. Remove "
                "it from the request, or change the recipe",
                "session_decides",
            )
    most = rules.sampling.max_tokens
    length = min(most, asked.length or most)
    return replace(rules.sampling, **given, max_tokens=_max_tokens(None, length, prompt, longest))


def _given(asked: SamplingFields) -> dict[str, Any]:
    """The fields that a request sets, under the names of `Sampling`, without its length."""
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
            f"{asked} tokens after a prompt of {prompt} tokens do not fit: the limit for both together is {longest}",
            "context_length_exceeded",
        )
    return asked or (default if room is None else min(default, room))
