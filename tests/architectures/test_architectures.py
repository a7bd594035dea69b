"""Every architecture of the manual's table, small and with random weights, through everything; and the table itself.

`scripts/architectures` writes the table anew.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Collection
from pathlib import Path

import mlx.core as mx
import pytest
from measured import Measured, train
from small import SMALL, write
from table import table, written
from table import write as write_table

from grpo.errors import UserError
from grpo.model.saved import WEIGHTS
from grpo.tools.export import export

Measure = Callable[[str, int | None], Measured]
EVERY = pytest.mark.parametrize("name", SMALL)
DENSE, EXPERTS, RECURRENT = "Qwen3", "Mixtral", "Qwen3-Next"
SLOW = pytest.mark.slow
QUICK: dict[int | None, Collection[str]] = {None: SMALL, 4: (DENSE, EXPERTS, RECURRENT), 3: (DENSE, EXPERTS)}
"""Weights of 4 and 3 bits of all architectures are the slow tests'."""


def every_with(*bits: int | None) -> pytest.MarkDecorator:
    """Every architecture with its weights in so many bits a number."""
    cases = [pytest.param(name, each, marks=() if name in QUICK[each] else SLOW) for name in SMALL for each in bits]
    return pytest.mark.parametrize(("name", "bits"), cases)


EVERY_BITS = every_with(None, 4, 3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, toy_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("architectures")
    return {name: write(name, root / str(number), toy_folder) for number, name in enumerate(SMALL)}


@pytest.fixture(scope="module")
def measured(folders: dict[str, Path]) -> Measure:
    """A trained model of an architecture, made when it is first asked for."""
    made: dict[tuple[str, int | None], Measured] = {}

    def measure(name: str, bits: int | None = None) -> Measured:
        if (name, bits) not in made:
            made[name, bits] = Measured(folders[name], bits)
        return made[name, bits]

    return measure


@EVERY_BITS
def test_what_is_decoded_is_what_teacher_forcing_says(measured: Measure, name: str, bits: int | None) -> None:
    assert measured(name, bits).decoding_gap < 1e-4
    assert measured(name, bits).greedy


@pytest.mark.parametrize("name", ["Qwen3", "Qwen3-Next", "Gemma 3 1B"])
def test_conversations_are_decoded_as_teacher_forcing_says(measured: Measure, name: str) -> None:
    assert measured(name).conversation_gap < 1e-4


@pytest.mark.slow
@EVERY_BITS
def test_so_they_are_by_every_architecture(measured: Measure, name: str, bits: int | None) -> None:
    assert measured(name, bits).conversation_gap < 1e-4


@EVERY_BITS
def test_a_step_moves_every_layer_of_the_adapter_and_the_reference_stays(measured, name: str, bits) -> None:
    model = measured(name, bits)
    assert model.still == []
    assert model.moved > 0.1
    assert model.reference_gap == 0


@every_with(None, 4)
def test_the_gradient_is_the_same_whichever_way(measured: Measure, name: str, bits: int | None) -> None:
    """With prompts once for their group, with layers computed again, and row by row: to rounding."""
    model = measured(name, bits)
    if model.not_shared is None:
        assert model.sharing_gap < 1e-5
    assert model.policy.split is not None  # logprobs go in chunks
    assert model.checkpointing_gap < 1e-5
    assert model.split_gap < 1e-5


@EVERY
def test_all_linear_takes_experts_and_leaves_out_what_routes_to_them(measured: Measure, name: str) -> None:
    model = measured(name)
    assert not model.adapted & model.routers
    assert bool(model.experts) == bool(model.routers) == model.has_experts


@EVERY_BITS
def test_exports_compute_the_same(measured: Measure, name: str, bits: int | None) -> None:
    model = measured(name, bits)
    assert model.mlx_gap < 1e-5
    assert model.fused_gap < 1e-4
    if model.no_peft is not None:
        assert model.experts
        assert "adapter.targets without experts" in model.no_peft


def test_an_adapter_that_leaves_experts_out_goes_to_peft(folders: dict[str, Path]) -> None:
    run = folders["Mixtral"].with_name("attention")
    train(folders["Mixtral"], None, run, "adapter.targets=[self_attn.q_proj, self_attn.v_proj]")
    assert (export(run, "peft").folder / "adapter_model.safetensors").is_file()


@pytest.mark.parametrize(
    ("name", "prefix"),
    [("Qwen3", "model.layers"), ("Qwen3.5", "model.layers"), ("Gemma 3 4B and larger", "model.language_model.layers")],
)
def test_peft_s_names_are_those_of_transformers(measured: Measure, name: str, prefix: str) -> None:
    """Of models that see, `AutoModelForCausalLM` makes the whole model, or the language model alone."""
    config = json.loads((measured(name).exported("peft") / "adapter_config.json").read_text())
    assert all(module.startswith(f"{prefix}.") for module in config["target_modules"])
    arrays = mx.load(str(measured(name).exported("peft") / "adapter_model.safetensors"))
    modules = {path.removeprefix("base_model.model.").rpartition(".lora_")[0] for path in arrays}
    assert modules == set(config["target_modules"])


@pytest.mark.parametrize("name", ["Mixtral", "GLM-4.5-Air", "DeepSeek-V3, Kimi K2"])
def test_a_model_that_is_stored_in_3_bits_trains(measured: Measure, name: str) -> None:
    model = measured(name)
    stored = export(model.run, "fused", model.run.with_name(f"{model.run.name}-stored"), to_quantize=3)
    assert Measured(stored.folder, None).trains


def test_routers_train_where_they_are_named(folders: dict[str, Path]) -> None:
    run = folders["Mixtral"].with_name("router")
    checkpoint = train(folders["Mixtral"], None, run, "adapter.targets=[block_sparse_moe.gate]")
    moved = {path: (array != 0).any().item() for path, array in mx.load(str(checkpoint / WEIGHTS)).items()}
    gates = [f"model.layers.{block}.block_sparse_moe.gate.lora_{x}" for block in (0, 1) for x in "ab"]
    assert moved == dict.fromkeys(gates, True)


def test_experts_have_no_dora(folders: dict[str, Path]) -> None:
    with pytest.raises(UserError, match=r"Use lora, or set adapter\.targets without this layer"):
        train(folders["Mixtral"], None, folders["Mixtral"].with_name("dora"), "adapter.type=dora")


def test_gradients_are_taken_without_kernels_that_have_none(measured: Measure, monkeypatch) -> None:
    """A recurrent layer asks whether it is in training; on Metal it takes a kernel without a gradient otherwise."""
    from mlx_lm.models import qwen3_next

    model, original, asked = measured("Qwen3-Next"), qwen3_next.gated_delta_update, []

    def update(*arrays, use_kernel: bool, **others):
        asked.append(use_kernel)
        return original(*arrays, use_kernel=use_kernel, **others)

    monkeypatch.setattr(qwen3_next, "gated_delta_update", update)
    train(model.folder, None, model.folder.with_name("kernels"))
    assert set(asked) == {False, True}
    sampled = len(asked) - asked[::-1].index(True)  # the step ends with its gradient
    assert asked[sampled:]
    assert not any(asked[sampled:])


@pytest.mark.parametrize("whole", [False, pytest.param(True, marks=SLOW)])
def test_the_readme_s_table_is_what_was_measured(measured: Measure, whole: bool) -> None:
    """The columns of 4 and 3 bits are measured as a whole by the slow tests; the others expect there, of most
    architectures, what their own weights have."""

    def taken(name: str, bits: int | None) -> Measured:
        return measured(name, bits if whole or name in QUICK[bits] else None)

    found = table({(name, bits): taken(name, bits) for name in SMALL for bits in QUICK})
    if os.environ.get("WRITE_TABLE"):
        write_table(found)
    assert written() == found
