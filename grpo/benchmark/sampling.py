"""`grpo bench sampling` and `grpo bench logprobs`: the cost of sampling filters and of logprobs."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement, alternate
from grpo.benchmark.rollout import ours
from grpo.benchmark.setting import Setting
from grpo.generation.sampling import Sampling

FILTERS = {
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.9": {"top_p": 0.9},
    "min_p 0.05": {"min_p": 0.05},
    "repetition_penalty 1.1": {"repetition_penalty": 1.1},
    "all of them": {"temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "repetition_penalty": 1.1},
}


def sampling_costs(setting: Setting) -> list[Measurement]:
    """Sampling with each filter, compared with sampling at temperature 1; all with logprobs."""
    model, plain = model_for(setting), Sampling(max_tokens=setting.completion_length)
    sides = [ours(model, setting, name="plain")]
    for name, settings in FILTERS.items():
        sides.append(ours(model, setting, replace(plain, **cast("dict[str, Any]", settings)), name=name))
    return alternate(str(setting), sides, setting.runs)


def logprob_costs(setting: Setting) -> list[Measurement]:
    """Sampling without logprobs and with logprobs."""
    model = model_for(setting)
    sides = [ours(model, setting, logprobs=on, name="with logprobs" if on else "without") for on in (False, True)]
    return alternate(str(setting), sides, setting.runs)
