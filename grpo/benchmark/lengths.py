"""`grpo bench length` and `grpo bench context`: whether some length costs more than it should."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.random import derive_key
from grpo.benchmark.models import model_for, vocabulary_of
from grpo.benchmark.protocol import Measurement, Side, Values, alternate, milliseconds
from grpo.benchmark.rollout import requests_of, untold
from grpo.benchmark.setting import Setting
from grpo.generation.decoding import Decoding
from grpo.generation.rows import Line, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.slots import Size

LENGTHS = (10, 25, 50, 100, 400)
CONTEXTS = (32, 64, 116, 120, 124, 127, 128, 129, 132, 140, 256, 512, 1023, 1024, 1025)
NEAR = 1.2
"""Maximum ratio of two lengths whose passes should cost about the same."""
DECODED = 8
"""Number of decoding steps at each context length."""
GROWTH = "× as long"


def length_costs(setting: Setting) -> list[Measurement]:
    """Milliseconds per decoding step by completion length, without the first token, which includes the prompt.

    The reference is the second longest length, because the measurement of a short completion is too noisy.
    """
    model = model_for(setting)
    generator, requests = untold(model, setting.rows), requests_of(setting, model)

    def spent(length: int) -> float:
        return milliseconds(lambda: generator.generate(requests, Sampling(max_tokens=length), derive_key(0, "draw")))

    def side(length: int) -> Side:
        return Side(
            f"{length} tokens",
            lambda: {"ms": (spent(length) - spent(1)) / (length - 1)},
            against=f"{LENGTHS[-2]} tokens",
        )

    case = f"decoding step, {setting.name} {setting.prompts}x{setting.completions}, prompts of {setting.prompt_length}"
    return alternate(case, [side(length) for length in LENGTHS], setting.runs)


def context_costs(setting: Setting) -> Iterator[Measurement]:
    """Milliseconds of a forward pass over each number of tokens, and of a decoding step that attends to this many.

    Then the growth from each length to the next one, turn by turn, which shows a length with a sudden cost.
    """
    model = model_for(setting)
    decoding = untold(model, 1).decoding
    passes: dict[str, Callable[[int], Callable[[], Values]]] = {
        "forward": lambda length: _forward(model, length),
        "decoding step": lambda length: _steps(decoding, length, vocabulary_of(model)),
    }
    for name, measure in passes.items():
        sides = [Side(f"{length} tokens", measure(length)) for length in CONTEXTS]
        measured = alternate(f"{name}, {setting.name}", sides, setting.runs)
        yield from [*measured, *growth(measured, CONTEXTS)]


def _forward(model: nn.Module, length: int) -> Callable[[], Values]:
    tokens = mx.zeros((1, length), mx.int32)
    return lambda: {"ms": milliseconds(lambda: mx.eval(model(tokens)))}


def _steps(decoding: Decoding, context: int, vocabulary: int) -> Callable[[], Values]:
    prompt = [1 + i % (vocabulary - 1) for i in range(context)]

    def run() -> Values:
        session = decoding.open(Size(slots=1, places=1, prefix=context - 1, columns=DECODED))
        session.admit([0], [Line(SharedPrompt(prompt))])
        tokens = mx.array([1], mx.uint32)

        def decode() -> None:
            for _ in range(DECODED):
                mx.eval(session.logits(tokens))

        return {"ms": milliseconds(decode) / DECODED}

    return run


def growth(rows: Sequence[Measurement], lengths: Sequence[int]) -> list[Measurement]:
    """The ratio of each length's time to the time of the previous length, in each turn."""
    found = []
    for (before, first), (after, second) in pairwise(zip(rows, lengths, strict=True)):
        if second <= NEAR * first:
            runs = tuple(b / a for a, b in zip(before.runs, after.runs, strict=True))
            found.append(Measurement(after.case, f"{first} → {second} tokens", GROWTH, runs, after.cold / before.cold))
    return found
