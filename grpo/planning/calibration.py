"""What a step takes on CUDA, fitted to steps measured on one H200 (`scripts/benchmarks/RESULTS.md`).

There generator and trainer are far from the machine's limits. A decoding step waits for launches, about 17 a layer, and
for its bytes. Training waits for activations that go through memory between small kernels: seconds in proportion to
tokens × layers × hidden size, until the products themselves take longer. Launches take as long on another card, and
what goes through memory is scaled by its bandwidth.
"""

from __future__ import annotations

from grpo.model.costs import Costs, Work
from grpo.planning.machines import Chip

LAYER = 1.8e-4
"""Seconds of a decoding step that a layer takes to launch."""
TOKEN = 7.7e-10 * 4.8e12
"""Bytes that an update moves for each token, layer and number of a hidden state: fitted seconds × bandwidth there."""
FORWARD = 1 / 4
"""Of an update, a forward pass."""
REACHED = 0.6
"""Of the operations a second that a machine is sold with: what long products reach at most."""


def decode(chip: Chip, costs: Costs, step: Work) -> float:
    """Seconds of one decoding step."""
    return costs.depth * LAYER + step.seconds(REACHED * chip.flops, chip.bandwidth)


def update(chip: Chip, costs: Costs, tokens: int, work: Work) -> float:
    """Seconds of an update of so many tokens, prompts' included, in which `work` is done."""
    moved = TOKEN * tokens * costs.depth * costs.hidden
    return max(moved / chip.bandwidth, work.flops / (REACHED * chip.flops))


def forward(chip: Chip, costs: Costs, tokens: int, work: Work) -> float:
    """Seconds of a forward pass of so many tokens."""
    moved = FORWARD * TOKEN * tokens * costs.depth * costs.hidden
    return max(moved / chip.bandwidth, work.flops / (REACHED * chip.flops))
