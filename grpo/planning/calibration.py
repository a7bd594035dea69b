"""Times of a step on CUDA, fitted to steps measured on one H200 (`scripts/benchmarks/RESULTS.md`).

On that machine the generator and the trainer are far from the limits of bandwidth and arithmetic. A decoding step waits
for launches, about 17 per layer, and for its memory traffic. Training waits for activations that go through memory
between small kernels: its time grows with tokens × layers × hidden size, until the matrix products take longer. On
other cards, launches are assumed to take equally long, and memory traffic is scaled by the card's bandwidth.
"""

from __future__ import annotations

from grpo.model.costs import Costs, Demand
from grpo.planning.machines import Chip

LAYER = 1.8e-4
"""Seconds that one layer's launches add to a decoding step."""
TOKEN = 7.7e-10 * 4.8e12
"""Bytes that an update moves for each token, layer and element of the hidden state: fitted seconds × the H200's
bandwidth."""
FORWARD = 1 / 4
"""The share of an update's bytes that a forward pass alone moves."""
REACHED = 0.6
"""The largest share of a machine's advertised operations per second that large matrix products reach."""


def decode(chip: Chip, costs: Costs, step: Demand) -> float:
    """Seconds of one decoding step."""
    return costs.depth * LAYER + step.seconds(REACHED * chip.flops, chip.bandwidth)


def update(chip: Chip, costs: Costs, tokens: int, work: Demand) -> float:
    """Seconds of an update over `tokens` tokens, prompts included, with the cost `work`."""
    moved = TOKEN * tokens * costs.depth * costs.hidden
    return max(moved / chip.bandwidth, work.flops / (REACHED * chip.flops))


def forward(chip: Chip, costs: Costs, tokens: int, work: Demand) -> float:
    """Seconds of a forward pass over `tokens` tokens with the cost `work`."""
    moved = FORWARD * TOKEN * tokens * costs.depth * costs.hidden
    return max(moved / chip.bandwidth, work.flops / (REACHED * chip.flops))
