"""A fast way that fails says its real reason, in the plan and in the doctor; an architecture is not blamed for it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import pytest

from grpo.backend.blame import cause, is_ours
from grpo.config import AdapterConfig
from grpo.doctor import agreement
from grpo.generation import attention, blocks, choice, decoders
from grpo.generation.batchcaches import BatchCaches
from grpo.generation.choice import find_decoding
from grpo.generation.generator import Generator
from grpo.model import head, sharing
from grpo.model.adapters import Adapters
from grpo.model.drawn import NoTokenizer
from grpo.model.policy import Policy
from grpo.recipes import load_recipe
from grpo.runs.prepare import prepare

TEXT = "nvrtc: error: no such\n kernel"
SAID = "nvrtc: error: no such kernel"


class OfAModelError(Exception):
    """Of no kind that anyone could have listed."""


@pytest.fixture(params=[RuntimeError, AssertionError, NotImplementedError, OfAModelError])
def broken(request):
    """A function that raises an error, of one kind after the other."""

    def call(*_args: Any, **_kwargs: Any) -> Any:
        raise request.param(TEXT)

    call.kind = request.param.__name__
    return call


def test_broken_attention_is_told_for_what_it_is(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(attention.StockAttention, "attend", broken)
    decoding = find_decoding(zoo("tied"))
    assert isinstance(decoding, BatchCaches)
    assert f"{broken.kind} in " in decoding.description
    assert SAID in decoding.description
    assert "architecture" not in decoding.description
    (joined,) = decoding.refused
    assert joined.startswith("joined layers, shared prompts, stock operations: ")
    assert SAID in joined


def test_one_broken_way_leaves_the_others(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(decoders.BlockDecoder, "logits", broken)
    generator = Generator(zoo("tied"), NoTokenizer(), 2)
    first, second = generator.describe()
    assert first == "decoding: the model's layers, shared prompts, stock operations"
    assert second.startswith("decoding does not use joined layers, shared prompts, stock operations: ")
    assert second.endswith(SAID)


def test_what_breaks_while_the_layers_are_read_is_told(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(blocks, "_rotation", broken)
    decoding = find_decoding(zoo("tied"))
    assert decoding.description.startswith("the model's layers, shared prompts")
    (reason,) = decoding.refused
    assert reason.startswith(f"joined layers: {broken.kind} in ")
    assert reason.endswith(SAID)


def test_caches_that_cannot_be_looked_at_are_told(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(choice, "cache_shapes", broken)
    decoding = find_decoding(zoo("tied"))
    assert isinstance(decoding, BatchCaches)
    assert f"running one token to inspect the caches failed: {broken.kind} in " in decoding.description


def test_a_way_that_computes_something_else_says_how_far_off(zoo, monkeypatch) -> None:
    logits = decoders.BlockDecoder.logits
    monkeypatch.setattr(decoders.BlockDecoder, "logits", lambda *args: 2 * logits(*args))
    (reason,) = find_decoding(zoo("tied")).refused
    assert "from the model's forward pass (bound 0.001)" in reason


def test_a_model_that_does_otherwise_with_several_tokens_is_fed_one_at_a_step(zoo, monkeypatch) -> None:
    assert find_decoding(zoo("moe")).narrow is None
    logits = decoders.ModelDecoder.logits

    def other(self, tokens: mx.array, *rest: Any) -> mx.array:
        return tokens.shape[1] * logits(self, tokens, *rest)

    monkeypatch.setattr(decoders.ModelDecoder, "logits", other)
    decoding = find_decoding(zoo("moe"))
    assert decoding.description.startswith("the model's layers")
    assert (decoding.narrow or "").startswith("this model cannot decode several tokens per step: its logprobs differ ")


@pytest.mark.parametrize(
    ("kind", "way", "reasons"),
    [
        ("tied", "joined layers", []),
        ("moe", "the model's layers", ["joined layers: this architecture has parts that Llama does not have: mlp."]),
        ("gemma3_text", "mlx-lm's batch caches (this architecture keeps more than plain keys and values)", []),
        ("gemma2", "mlx-lm's batch caches, row by row", ["joined layers: this architecture", "the model's layers"]),
    ],
)
def test_an_architecture_that_is_not_supported_is_said_to_be_that(zoo, kind: str, way: str, reasons: list[str]) -> None:
    decoding = find_decoding(zoo(kind))
    assert decoding.description.startswith(way)
    assert all(any(reason in found for found in (*decoding.refused, decoding.description)) for reason in reasons)


def test_dora_says_so(zoo) -> None:
    model = zoo("tied")
    Adapters(model, AdapterConfig(type="dora", rank=4), mx.random.key(0))
    assert find_decoding(model).refused == ("joined layers: adapters with magnitudes (DoRA) cannot be joined",)


def policy_of(model) -> Policy:
    return Policy(model, Adapters(model, AdapterConfig(rank=4), mx.random.key(0)), 1.0)


def test_a_broken_head_is_told(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(head._Handed, "__call__", broken)
    (said,) = policy_of(zoo("tied")).slow
    assert "full logits" in said
    assert f"the trial failed: {broken.kind} in " in said
    assert said.endswith(SAID)
    assert "architecture" not in said


def test_broken_sharing_is_told(zoo, monkeypatch, broken) -> None:
    monkeypatch.setattr(sharing, "RowPrompts", broken)
    policy = policy_of(zoo("tied"))
    assert not policy.share_prompts
    (said,) = policy.slow
    assert f"{broken.kind} in " in said
    assert said.endswith(SAID)


def test_an_architecture_that_cannot_share_is_told_with_its_own_error(zoo) -> None:
    _, said = policy_of(zoo("gemma2")).slow  # its attention keeps its scores, too
    assert "this architecture does not take positions and masks by row: ValueError in mlx_lm/models/" in said


def test_a_model_without_a_body_is_said_to_be_that(zoo) -> None:
    model = zoo("tied")
    with pytest.raises(head.Unsplit, match="no module named model or transformer or backbone"):
        head.split_head(model.model)


def test_the_plan_and_the_doctor_tell(recipe, monkeypatch) -> None:
    def broken(*_args: Any) -> Any:
        raise RuntimeError(TEXT)

    monkeypatch.setattr(decoders.BlockDecoder, "logits", broken)
    monkeypatch.setattr(sharing, "RowPrompts", broken)
    notes = prepare(load_recipe(recipe)).notes
    told = [note for note in notes if SAID in note]
    assert len(told) == 2
    finding = agreement.parity()
    assert finding.status == "warn"
    assert finding.text.count(SAID) == 2


def test_an_error_s_place_is_that_of_the_code_that_raised_it() -> None:
    errors = []
    for call in (lambda: head.split_head(mx), lambda: mx.array([1]) @ mx.zeros((2, 2))):
        try:
            call()
        except Exception as error:
            errors.append(error)
    ours, theirs = errors
    assert is_ours(ours)
    assert "in grpo/model/head.py:" in cause(ours)
    assert not is_ours(theirs)
    assert cause(theirs).startswith("ValueError in ")
    assert cause(ValueError("never raised")) == "ValueError: never raised"
