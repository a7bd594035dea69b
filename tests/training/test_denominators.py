"""N is fixed when a step is made: truncated completions are among it, whatever is chosen of the rest, and however."""

from dataclasses import replace
from itertools import product

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from objective.oracle import highest_entropy, weights
from training.sections import make_minibatches, with_top_entropy
from training.test_update import groups, recipe

from grpo.types import Group, Rollout, Task, Trajectory

AVERAGING = {"sequence": "sequence", "sequence_sum": "sum", "constant": "constant", "token": "token"}
LONGEST, TRUNCATED = 8, {(0, 1), (0, 2), (2, 0)}
"""max_completion_length, and which completions of which group are cut off."""


class FixedEntropies:
    """In a policy's place: an entropy for each token of the toy groups, no two of them equal."""

    def __init__(self) -> None:
        self.model = nn.Module()
        self.model.layers = []

    def group_logprobs(self, prompts, lengths, index, completions, gradient, entropies):
        assert entropies
        del prompts, lengths, index, gradient
        first, place = completions[:, :1], mx.arange(completions.shape[1])[None]
        return mx.zeros(completions.shape), ((first * 37 + place * 101) % 499).astype(mx.float32)


def cut(policy) -> list:
    """The toy groups, some completions truncated, each with an advantage."""
    made = []
    for g, group in enumerate(groups(policy)):
        rollouts = []
        for i, rollout in enumerate(group.rollouts):
            reason = "length" if (g, i) in TRUNCATED else "stop"
            rollouts.append(replace(rollout, trajectory=replace(rollout.trajectory, finish_reason=reason), advantage=1))
        made.append(replace(group, rollouts=tuple(rollouts)))
    return made


def expected(made: list, averaging: str, fraction: float, parts: int) -> dict[tuple[int, int], float]:
    """The oracle's weight of each token that has any, by its completion's first token and its place."""
    rows = [(g, i, r.trajectory.token_ids) for g, group in enumerate(made) for i, r in enumerate(group.rollouts)]
    mask, entropies = np.zeros((len(rows), LONGEST)), np.zeros((len(rows), LONGEST))
    for n, (g, i, ids) in enumerate(rows):
        mask[n, : len(ids)] = (g, i) not in TRUNCATED
        entropies[n] = (ids[0] * 37 + np.arange(LONGEST) * 101) % 499
    chosen = highest_entropy(entropies, mask, fraction)
    each = np.concatenate([weights(part, averaging, LONGEST) for part in np.split(chosen, parts)])
    return {(rows[n][2][0], t): each[n, t] for n, t in np.argwhere(each)}


@pytest.mark.each_value
@pytest.mark.parametrize("normalize", AVERAGING)
@pytest.mark.parametrize("fraction", [0.3, 0.999999, 1.0])
def test_truncated_completions_stay_among_n(make_policy, normalize: str, fraction: float) -> None:
    made = cut(make_policy().policy)
    for size, parts in product((999, 40, 1), (1, 3)):
        cfg = recipe(
            loss={"normalize": normalize, "mask_truncated_completions": True, "top_entropy_quantile": fraction},
            optim={"micro_batch_tokens": size, "num_minibatches": parts},
            rollout={"prompts_per_step": 3, "max_completion_length": LONGEST},
        )
        found = {}
        for batches in with_top_entropy(make_minibatches(made, cfg), FixedEntropies(), cfg):
            for batch in batches:
                for ids, row in zip(batch.token_ids.tolist(), batch.weights.tolist(), strict=True):
                    found |= {(ids[0], t): weight for t, weight in enumerate(row) if weight}
        assert found == pytest.approx(expected(made, AVERAGING[normalize], fraction, parts), rel=1e-6)


def test_four_completions_of_which_one_is_truncated() -> None:
    """By hand: 4 completions of 2, 2, 4 and 8 tokens, the last one cut off; nearly all tokens are chosen."""
    rollouts = []
    for i, (length, reason) in enumerate(zip((2, 2, 4, 8), ("stop", "stop", "stop", "length"), strict=True)):
        completion = Trajectory.sampled((7 + i,) * length, (0.0,) * length, "", reason)
        rollouts.append(Rollout(completion, advantage=1.0))
    group = Group(Task(0, "?", (1, 2), {}), tuple(rollouts))
    sums = []
    for fraction in (1.0, 0.999999):
        cfg = recipe(loss={"type": "grpo", "mask_truncated_completions": True, "top_entropy_quantile": fraction})
        (batches,) = with_top_entropy(make_minibatches([group], cfg), FixedEntropies(), cfg)
        sums.append(sum(batch.weights.sum().item() for batch in batches))
    assert sums == pytest.approx([3 / 4, 3 / 4])
