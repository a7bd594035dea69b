"""Completions behind one another: what whole sequences give, for every kind of model that can."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import pytest
from mlx.utils import tree_flatten
from model.test_sharing import COMPLETIONS, INDEX, LENGTHS, PROMPTS, WEIGHTS, difference, policy_of

from grpo.model.dropout import add_dropout, dropping
from grpo.model.lines import Lines, at_rows, by_token, laid_out, rows_by_line
from grpo.model.policy import Policy

ENDS = [7, 2, 5, 1, 7, 6]
ROWS = [
    (tuple(PROMPTS[place, : LENGTHS[place].item()].tolist()), tuple(completion[:end]))
    for place, completion, end in zip(INDEX.tolist(), COMPLETIONS.tolist(), ENDS, strict=True)
]
LINES, STARTS = laid_out(ROWS, 4, 18)  # two lines are full of padding


def test_lines_by_hand() -> None:
    a, b, c = (1, 2, 3), (4,), (5, 6)
    rows = [(a, (10, 11)), (a, (12,)), (b, (13, 14)), (c, (15,)), (a, (16,))]
    assert rows_by_line(rows, 7) == [[0, 1, 2], [3, 4]]
    assert rows_by_line(rows, 8) == [[0, 1, 2], [3, 4]]
    assert rows_by_line(rows, 10) == [[0, 1, 2, 3, 4]]  # the prompt is there already
    laid, starts = laid_out(rows, 3, 7)
    lines = Lines(*laid.tolist())
    assert lines.token_ids == [[1, 2, 3, 10, 3, 4, 13], [5, 6, 1, 2, 3, 0, 0], [0] * 7]
    assert lines.targets == [[0, 0, 10, 11, 12, 13, 14], [0, 15, 0, 0, 16, 0, 0], [0] * 7]
    assert lines.positions == [[0, 1, 2, 3, 2, 0, 1], [0, 1, 0, 1, 2, 0, 0], [0] * 7]
    assert lines.prompts == [[1, 1, 1, 1, 1, 2, 2], [1, 1, 2, 2, 2, 0, 0], [0] * 7]
    assert lines.rows == [[0, 0, 1, 1, 2, 3, 3], [0, 4, 0, 0, 5, 0, 0], [0] * 7]
    assert starts == [2, 4, 5, 8, 11]
    found = at_rows(laid[1].astype(mx.float32), mx.array(starts), 2, laid[4]).tolist()
    assert [found[0], found[2]] == [[10, 11], [13, 14]]
    assert [row[0] for row in found] == [10, 12, 13, 15, 16]


def loss_and_gradient(policy: Policy, lines: bool, key: mx.array | None = None) -> tuple[float, dict[str, mx.array]]:
    def loss(_: nn.Module) -> mx.array:
        with dropping(key):
            if lines:
                logprobs, entropy = policy.line_logprobs(LINES, mx.array(STARTS), 7, entropy_gradient=True)
            else:
                logprobs, entropy = policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS, entropy_gradient=True)
        return ((logprobs + 0.1 * entropy) * WEIGHTS).sum()

    value, gradient = nn.value_and_grad(policy.model, loss)(policy.model)
    mx.eval(value, gradient)
    return value.item(), dict(tree_flatten(gradient))


def alike(policy: Policy, checkpointing: bool) -> None:
    assert policy.packs
    assert policy.slow == []
    policy.share_prompts = False
    plain, expected = loss_and_gradient(policy, lines=False)
    policy.share_prompts, policy.gradient_checkpointing = True, checkpointing
    packed, gradient = loss_and_gradient(policy, lines=True)
    assert packed == pytest.approx(plain, rel=1e-5)
    assert difference(expected, gradient) < 1e-5


@pytest.mark.parametrize("kind", ["dense", "tied", "untied", "moe", "quantised", "gemma3_text", "cohere", "granite"])
def test_lines_give_whole_sequences_loss_and_gradient(zoo, kind: str) -> None:
    alike(policy_of(zoo(kind)), checkpointing=kind in ("tied", "moe"))


@pytest.mark.parametrize(("base", "kind"), [("tied", "full"), ("untied", "full"), ("tied", "dora")])
def test_so_do_weights_that_train_themselves(zoo, base: str, kind: str) -> None:
    alike(policy_of(zoo(base), kind), checkpointing=True)


SCALED: dict[str, dict[str, Any]] = {
    "llama3": {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64},
    "yarn": {"original_max_position_embeddings": 64},
    "linear": {},
}


@pytest.mark.parametrize("kind", SCALED)
def test_positions_that_are_scaled_are_each_token_s_own_too(zoo, kind: str) -> None:
    alike(policy_of(zoo("tied", rope_scaling={"rope_type": kind, "factor": 4.0, **SCALED[kind]})), checkpointing=False)


def test_a_window_is_of_positions_and_not_of_places(zoo) -> None:
    """The window is shorter than a prompt with its completion, and these than a line."""
    alike(policy_of(zoo("gemma3_text", sliding_window=6, sliding_window_pattern=2)), checkpointing=False)


def test_nothing_else_in_a_line_is_seen(zoo) -> None:
    """Other tokens of the second row, and of the third, which has a prompt of its own, change only these rows."""
    policy = policy_of(zoo("tied"))
    before = policy.line_logprobs(LINES, mx.array(STARTS), 7)[0]
    changed = [row if place not in (1, 2) else (row[0], (3,) * len(row[1])) for place, row in enumerate(ROWS)]
    lines, starts = laid_out(changed, 4, 18)
    assert starts == STARTS
    after = policy.line_logprobs(lines, mx.array(starts), 7)[0]
    same = [mx.array_equal(before[row, :end], after[row, :end]).item() for row, end in enumerate(ENDS)]
    assert same == [True, False, False, True, True, True]


def test_without_entropies_there_are_the_same_logprobs_and_nothing_else(zoo) -> None:
    policy = policy_of(zoo("tied"))
    given = LINES, mx.array(STARTS), 7
    (alone,) = policy.line_logprobs(*given, entropies=False)
    assert mx.allclose(alone, policy.line_logprobs(*given)[0], atol=1e-6)


def test_rotary_embeddings_are_what_they_were_afterwards(zoo) -> None:
    model = zoo("tied")
    rope = model.layers[0].self_attn.rope
    kind, x = type(rope), mx.random.normal((2, 4, 3, 16), key=mx.random.key(0))
    expected = rope(x, offset=5)
    positions = mx.array([[0, 1, 2], [7, 0, 1]])
    with by_token(model):
        assert mx.array_equal(rope(x, offset=5), expected)
        turned = rope(x, offset=positions)
    assert type(rope) is kind
    for row, token in [(0, 2), (1, 0), (1, 1)]:
        one = rope(x[row : row + 1, :, token : token + 1], offset=positions[row, token].item())
        assert mx.allclose(turned[row, :, token], one[0, :, 0], atol=1e-6)


def test_dropout_is_on_in_lines(zoo) -> None:
    policy = policy_of(zoo("tied"))
    add_dropout(policy.model, 0.5)
    off, on, other = (loss_and_gradient(policy, True, key)[0] for key in (None, mx.random.key(1), mx.random.key(2)))
    assert len({off, on, other}) == 3
    assert loss_and_gradient(policy, True, mx.random.key(1))[0] == on


def test_recurrent_models_and_those_that_share_nothing_keep_their_rows(zoo) -> None:
    policy = policy_of(zoo("gemma2"))  # prompts cannot be shared, which is said already
    said = list(policy.slow)
    assert not policy.packs
    assert policy.slow == said
    policy = policy_of(zoo("tied"))
    from grpo.model.promptcaches import PromptState

    policy._layers = [PromptState, *policy._layers[1:]]
    assert not policy.packs
    assert policy.slow == [
        "completions are not packed; each trains in its own row: its layers keep recurrent states, which would carry "
        "over from one completion to the next"
    ]


def test_a_model_that_counts_its_tokens_is_found_out(zoo) -> None:
    policy = policy_of(zoo("tied"))
    body, head = policy.split
    policy.split = (lambda tokens, cache=None: body(tokens, cache=cache) * (tokens.shape[1] + 1.0)), head
    assert not policy.packs
    assert "depends on more than positions and masks" in policy.slow[0]


@pytest.mark.parametrize("kind", ["tied", "gemma3_text"])
def test_a_row_alone_in_its_line_is_a_whole_sequence(zoo, kind: str) -> None:
    """Also where layers see a window: no mask of a line's own has it then."""
    policy = policy_of(zoo(kind))
    laid, starts = laid_out(ROWS, len(ROWS) + 1, 18, alone=True)
    whole, entropies = policy.group_logprobs(PROMPTS, LENGTHS, INDEX, COMPLETIONS)
    found, also = policy.line_logprobs(laid, mx.array(starts), 7)
    for row, end in enumerate(ENDS):
        assert mx.allclose(found[row, :end], whole[row, :end], atol=1e-5)
        assert mx.allclose(also[row, :end], entropies[row, :end], atol=1e-5)
