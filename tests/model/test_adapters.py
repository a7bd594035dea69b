"""LoRA states: off at first, swapped and never lost, and readable by mlx-lm."""

import shutil
import subprocess
import sys

import mlx.core as mx
import pytest
from conftest import shaken
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import load_adapters

from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import Adapters, linear_layers, load_adapter
from grpo.model.load import load

TOKENS = mx.array([[5, 6, 7, 8], [9, 10, 11, 12]])


def test_a_fresh_adapter_changes_nothing(toy) -> None:
    model, _ = toy
    before = model(TOKENS)
    Adapters(model, AdapterConfig(), mx.random.key(0))
    assert mx.array_equal(model(TOKENS), before)


def test_every_linear_layer_of_every_block_is_adapted(make_policy) -> None:
    adapters = make_policy().policy.adapters
    layers = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
    layers += ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    expected = {f"model.layers.{n}.{layer}.lora_{x}" for n in range(2) for layer in layers for x in "ab"}
    assert set(adapters.state()) == expected


def test_the_reference_is_the_base_model(make_policy, toy) -> None:
    policy = make_policy().policy
    base, _ = toy
    trained = policy.model(TOKENS)
    with policy.use("reference"):
        reference = policy.model(TOKENS)
        mx.eval(reference)
    assert mx.array_equal(reference, base(TOKENS))
    assert mx.array_equal(policy.model(TOKENS), trained)
    assert mx.abs(trained - reference).max().item() > 0.01


@pytest.mark.skipif(shutil.which("g++") is None, reason="mx.compile on a CPU calls a C++ compiler")
def test_the_reference_is_the_base_model_when_compiled(make_policy, toy) -> None:
    policy = make_policy().policy
    base, _ = toy
    mx.enable_compile()
    try:
        state = policy.model.state
        forward = mx.compile(policy.model, inputs=state, outputs=state)
        trained = forward(TOKENS)  # traced with the policy active
        with policy.use("reference"):
            reference = forward(TOKENS)
            mx.eval(reference)
        again = forward(TOKENS)
        mx.eval(trained, again)
    finally:
        mx.disable_compile()
    assert mx.allclose(reference, base(TOKENS), atol=1e-5)
    assert mx.array_equal(trained, again)
    assert mx.abs(trained - reference).max().item() > 0.01


def test_an_error_inside_the_block_brings_the_policy_back(make_policy) -> None:
    adapters = make_policy().policy.adapters
    before = adapters.state()
    with pytest.raises(ZeroDivisionError), adapters.use("reference"):
        raise ZeroDivisionError
    assert adapters.active == "policy"
    assert all(mx.array_equal(array, before[path]) for path, array in adapters.state().items())


def test_saved_adapters_load_in_mlx_lm(make_policy, toy_folder, tmp_path) -> None:
    from mlx_lm.utils import load as mlx_lm_load

    policy = make_policy().policy
    policy.adapters.save(tmp_path)
    theirs, _ = mlx_lm_load(str(toy_folder), adapter_path=str(tmp_path))
    assert mx.allclose(theirs(TOKENS), policy.model(TOKENS), atol=1e-5)
    ours, _ = load(ModelConfig(name=str(toy_folder)))
    load_adapter(ours, tmp_path)
    assert mx.allclose(ours(TOKENS), policy.model(TOKENS), atol=1e-5)


def test_mlx_lm_generate_takes_a_saved_adapter(make_policy, toy_folder, tmp_path) -> None:
    make_policy().policy.adapters.save(tmp_path)
    command = [sys.executable, "-m", "mlx_lm", "generate", "--model", str(toy_folder), "--adapter-path", str(tmp_path)]
    ran = subprocess.run([*command, "--prompt", "hi", "-m", "4"], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "Generation:" in ran.stdout


def test_a_saved_adapter_comes_back(make_policy, tmp_path) -> None:
    first, second = make_policy().policy, make_policy(trained=False).policy
    first.adapters.save(tmp_path)
    second.adapters.load(tmp_path)
    assert mx.array_equal(first.model(TOKENS), second.model(TOKENS))


def test_an_adapter_of_another_rank_is_refused(make_policy, toy, tmp_path) -> None:
    make_policy().policy.adapters.save(tmp_path)
    other = Adapters(toy[0], AdapterConfig(rank=2), mx.random.key(0))
    with pytest.raises(UserError, match="another rank"):
        other.load(tmp_path)


def test_the_name_of_one_target_is_a_list_of_one() -> None:
    assert AdapterConfig.model_validate({"targets": "q_proj"}) == AdapterConfig(targets=("q_proj",))
    assert AdapterConfig.model_validate({"targets": "all-linear"}).targets == "all-linear"


def test_chosen_targets(toy) -> None:
    model, _ = toy
    adapters = Adapters(model, AdapterConfig(targets=("self_attn.q_proj",)), mx.random.key(0))
    assert {path.split(".", 3)[3] for path in adapters.state()} == {
        "self_attn.q_proj.lora_a",
        "self_attn.q_proj.lora_b",
    }


def test_an_unknown_target_is_named(toy) -> None:
    with pytest.raises(UserError, match=r"no linear layer 'attn\.q'.*self_attn\.q_proj"):
        Adapters(toy[0], AdapterConfig(targets=("attn.q",)), mx.random.key(0))


def test_a_name_means_every_layer_that_is_called_so(toy, zoo) -> None:
    """As PEFT's `target_modules`; what routes to experts is named by its whole path or by its own name."""
    adapters = Adapters(toy[0], AdapterConfig(targets=("q_proj", "mlp.up_proj", "self_attn.q_proj")), mx.random.key(0))
    assert adapters.config["lora_parameters"]["keys"] == ["self_attn.q_proj", "mlp.up_proj"]
    experts = Adapters(zoo("moe"), AdapterConfig(targets=("up_proj", "gate")), mx.random.key(0))
    assert experts.config["lora_parameters"]["keys"] == ["mlp.switch_mlp.up_proj", "mlp.gate"]
    for name in ("proj", "_proj", "q_proj.self_attn"):
        with pytest.raises(UserError, match=f"no linear layer {name!r} in this model.*It has mlp"):
            Adapters(zoo("tied"), AdapterConfig(targets=(name,)), mx.random.key(0))


@pytest.mark.parametrize("rank", [1, 4, 16])
def test_rslora_multiplies_by_scale_over_the_root_of_the_rank(zoo, tmp_path, rank: int) -> None:
    cfg = AdapterConfig(rank=rank, scale=6.0, use_rslora=True, targets=("up_proj",))
    model = zoo("tied")
    base, adapters = model(TOKENS), Adapters(model, cfg, mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    adapters.save(tmp_path)
    ours = model(TOKENS)
    for layer in model.layers:
        up = layer.mlp.up_proj
        up.linear.weight = up.linear.weight + 6.0 / rank**0.5 * (up.lora_a @ up.lora_b).T
        layer.mlp.up_proj = up.linear
    assert mx.allclose(model(TOKENS), ours, atol=1e-5)
    assert mx.abs(ours - base).max() > 0.01
    theirs = zoo("tied")
    load_adapters(theirs, str(tmp_path))  # mlx-lm's, which knows no rsLoRA
    assert mx.allclose(theirs(TOKENS), ours, atol=1e-5)


def test_only_the_adapter_trains(make_policy) -> None:
    model = make_policy().policy.model
    names = [path for path, _ in tree_flatten(model.trainable_parameters())]
    assert names
    assert all(path.rpartition(".")[2] in ("lora_a", "lora_b") for path in names)


def test_the_same_key_draws_the_same_adapter(toy_folder) -> None:
    states = []
    for _ in range(2):
        model, _ = load(ModelConfig(name=str(toy_folder)))
        mx.random.normal((3,))  # other draws from the global state do not matter
        states.append(Adapters(model, AdapterConfig(), mx.random.key(7)).state())
    assert all(mx.array_equal(states[0][path], states[1][path]) for path in states[0])
    different = shaken(states[0])
    assert not mx.array_equal(
        different["model.layers.0.mlp.up_proj.lora_a"], states[0]["model.layers.0.mlp.up_proj.lora_a"]
    )


def test_linear_layers_are_listed_once(toy) -> None:
    assert len(linear_layers(toy[0])) == 7
