"""The longest completion on a machine that is not at hand, as a command tells it."""

from __future__ import annotations

import re

import pytest
from mlx.utils import tree_flatten
from planning.test_estimate import recipe

from grpo.config import Recipe
from grpo.errors import TooLargeError, UserError
from grpo.model.known import CONFIGS
from grpo.planning.elsewhere import Elsewhere, outline_of
from grpo.planning.estimate import RECKONED, machine_of, report
from grpo.planning.held import Held
from grpo.planning.machines import GB, Backend, memory_of
from grpo.planning.plan import Plan
from grpo.recipes import with_settings

EIGHT_B = "mlx-community/Qwen3-8B-4bit"
ANY_LENGTH = {**CONFIGS[EIGHT_B], "rope_scaling": {"rope_type": "yarn", "factor": 4.0}}


def of_8b(length: int = 1024, **sections) -> Recipe:
    rollout = {"prompts_per_step": 1, "num_generations": 8, "max_completion_length": length}
    return recipe(EIGHT_B, **{"rollout": rollout, "data": {"source": "x", "max_prompt_length": 512}, **sections})


def there(gigabytes: float, backend: Backend = "cuda", cfg: Recipe | None = None) -> Elsewhere:
    cfg = of_8b() if cfg is None else cfg
    return Elsewhere.of(cfg, ANY_LENGTH, machine_of(int(gigabytes * GB), backend, cfg))


def test_the_longest_completion_fits_and_a_longer_one_does_not() -> None:
    length = there(16).lengths.longest()
    there(16, cfg=of_8b(length)).plan()
    with pytest.raises(TooLargeError):
        there(16, cfg=of_8b(length + 1)).plan()


def test_what_does_not_depend_on_lengths_is_counted_once(monkeypatch) -> None:
    held, counted = Held.of, []
    monkeypatch.setattr(Held, "of", lambda *given: counted.append(given) or held(*given))
    at_hand = there(16)
    assert at_hand.plan().stays == held(*counted[0]).stays
    at_hand.lengths.longest()
    assert len(counted) == 1


def test_more_memory_gives_longer_completions() -> None:
    lengths = [there(gigabytes).lengths.longest() for gigabytes in (4, 8, 16, 24)]
    assert lengths == sorted(set(lengths))
    assert lengths[0] == 0  # the weights alone are 4.3 GB


def test_more_memory_never_makes_micro_batches_smaller() -> None:
    """Fewer logits at once fit where more do, but for tiny micro-batches: a card waits for launches then."""
    rollout = {"prompts_per_step": 8, "num_generations": 8, "max_completion_length": 128}
    name, data = "Qwen/Qwen3-0.6B", {"source": "x", "max_prompt_length": 256}
    sizes = []
    for gigabytes in (2.5, 2.6, 2.8, 3.0, 3.2, 3.5, 4.0, 5.0):
        cfg = recipe(name, rollout=rollout, data=data, memory={"limit_gb": gigabytes})
        sizes.append(Elsewhere.of(cfg, CONFIGS[name], machine_of(24 * GB, "cuda", cfg)).plan().micro_batch)
    assert sizes == sorted(sizes)
    assert sizes[0] >= 2_048


@pytest.mark.parametrize("gigabytes", [16, 24, 80])
def test_metal_trains_at_least_three_quarters_of_the_lengths_of_cuda(gigabytes: int) -> None:
    limited = of_8b(memory={"limit_gb": gigabytes})
    on_cuda, on_metal = (there(200, backend, limited).lengths.longest() for backend in ("cuda", "metal"))
    assert on_metal >= 3 / 4 * on_cuda


def test_a_machine_is_told_what_a_dry_run_would_say_there(run_cli) -> None:
    ran = run_cli("recipes", "costs", "qwen3-math-4bit", "--memory", 16, "--backend", "metal")
    assert ran.code == 0, ran.err
    *lines, longest, said = ran.out.splitlines()
    what = ["weights", "optimizer", "other states", "rollout", "update", "optimizer's step", "peak"]
    assert [line.split("  ")[0] for line in lines] == what
    assert "of 10.7 GB (the machine)" in lines[-1]
    assert re.match(
        r"longest completion that would fit: about [\d,]+ tokens; for longer: a smaller model or one in fewer", longest
    )
    assert said == RECKONED


def test_what_does_not_fit_is_told_with_what_would() -> None:
    length = there(16).lengths.longest()
    said, _ = report(of_8b(2 * length), 16 * GB, "cuda")
    assert said.startswith("this cannot fit: it needs")
    assert f"Completions of up to about {length:,} tokens would fit." in said
    said, _ = report(of_8b(), 4 * GB, "cuda")
    assert "Not even completions of one token would fit." in said


def test_lengths_beyond_the_models_positions_are_told() -> None:
    *_, longest, said = report(of_8b(), 200 * GB, "cuda")
    assert longest == "longest completion that would fit: 40,448 tokens; the model has no more positions"
    *_, note, said = report(with_settings(of_8b(), {"rollout": of_8b(40_449).rollout}), 200 * GB, "cuda")
    assert "are 40,961 tokens together, but the model was made for 40,960 (max_position_embeddings)" in note
    assert said == RECKONED


def test_a_limit_above_what_the_machine_has_is_refused(run_cli) -> None:
    refused = run_cli("recipes", "costs", "qwen3-math", "--memory", 8, "memory.limit_gb=16")
    assert refused.code == 2
    assert "memory.limit_gb: 16 GB is more than the machine has for MLX (8.0 GB)" in refused.err
    refused = run_cli("recipes", "costs", "qwen3-math", "--memory", 16, "--backend", "metal", "memory.limit_gb=12")
    assert "for MLX (10.7 GB)" in refused.err
    ran = run_cli("recipes", "costs", "qwen3-math", "memory.limit_gb=32")
    assert [("memory.limit_gb: 32 GB is more" in line) for line in ran.out.splitlines()[:9]] == [
        False, True, True, False, False, False, True, True, True,
    ]  # fmt: skip


def test_a_model_that_is_quantised_already_is_refused_as_when_it_is_loaded() -> None:
    with pytest.raises(UserError, match=r"model\.quantize: .* is quantised already, to 4 bits"):
        report(of_8b(model={"name": EIGHT_B, "quantize": 4}), 80 * GB, "cuda")


def test_offloaded_inputs_of_layers_take_no_memory_of_the_device() -> None:
    offloads = of_8b(optim={"steps": 1, "offload_activations": True})
    held, offloaded = there(24).footprint(True), there(24, cfg=offloads).footprint(True)
    assert held.token - offloaded.token == pytest.approx(1.05 * (36 - 2) * 4096 * 2)  # of 36 layers, in bfloat16
    assert there(24).footprint(False) == there(24, cfg=offloads).footprint(False)
    assert there(24, cfg=offloads).lengths.longest() > 1.3 * there(24).lengths.longest()
    with pytest.raises(UserError, match="a Mac's GPU shares the machine's memory"):
        there(24, "metal", offloads)


def test_metal_lends_a_process_a_part_of_a_macs_memory() -> None:
    assert [memory_of(size, "metal") for size in (24, 36, 48)] == [16 * GB, 24 * GB, 36 * GB]
    assert memory_of(24, "cuda") == 24 * GB


def test_a_plan_for_a_divided_model_counts_what_one_process_holds() -> None:
    def weights(**model: object) -> dict[str, int]:
        cfg = of_8b(model={"name": EIGHT_B, **model})
        return {path: array.nbytes for path, array in tree_flatten(outline_of(cfg, ANY_LENGTH).parameters())}

    whole, quarter = weights(), weights(shard="tensor", shard_size=4)
    assert whole.keys() == quarter.keys()
    divided = {path for path in whole if quarter[path] != whole[path]}
    assert all(4 * quarter[path] == whole[path] for path in divided)
    one = "model.layers.7.self_attn.{}_proj.{}".format
    expected = {one("q", "linear.weight"), one("q", "lora_b"), one("o", "linear.scales"), one("o", "lora_a")}
    kept = {
        one("q", "lora_a"),
        one("o", "lora_b"),
        "model.embed_tokens.weight",
        "model.layers.7.input_layernorm.weight",
    }
    assert expected <= divided
    assert not divided & kept
    cfg = of_8b(model={"name": EIGHT_B, "shard": "tensor", "shard_size": 4})
    assert there(200, cfg=cfg).plan().stays["weights"] == sum(quarter.values())
    keys = [there(200, cfg=of).decoding.outside(0, 1) for of in (of_8b(), cfg)]
    assert keys[0] == 4 * keys[1]
    with pytest.raises(UserError, match=r"set model\.shard_size to the number"):
        weights(shard="tensor")


def test_a_plan_for_spread_weights_has_parts_during_an_update_and_the_whole_outside() -> None:
    config = {name: value for name, value in ANY_LENGTH.items() if "quantization" not in name}

    def plan(full: bool = True, gigabytes: int = 200, **model: object) -> Plan:
        adapter = {"type": "full"} if full else {}
        cfg = of_8b(model={"name": EIGHT_B, "dtype": "bfloat16", **model}, adapter=adapter)
        return Elsewhere.of(cfg, config, machine_of(gigabytes * GB, "cuda", cfg)).plan()

    of_two, of_four = (plan(shard="fsdp", shard_size=n) for n in (2, 4))
    for name in ("weights", "optimizer"):
        assert of_two.stays[name] == pytest.approx(2 * of_four.stays[name], rel=1e-3)
    weights = 2 * of_four.parameters  # bfloat16
    assert of_four.stays["weights"] == pytest.approx(weights / 4, rel=1e-3)
    assert of_four.stays["optimizer"] == pytest.approx(12 * of_four.parameters / 4, rel=1e-3)
    assert of_four.whole == pytest.approx(3 / 4 * weights, rel=1e-3)
    assert of_four.phases["rollout"] > of_four.whole
    largest = 4 * config["vocab_size"] * config["hidden_size"]  # a float32 moment, joined and in its shape
    assert of_four.phases["checkpoint"] == pytest.approx(1.5 * of_four.parameters + 2 * largest, rel=1e-3)
    assert of_four.checkpointing is True
    adapter = plan(full=False, shard="fsdp", shard_size=4)
    assert "checkpoint" not in adapter.phases
    assert adapter.stays["weights"] < 0.3 * plan(full=False).stays["weights"]
    assert any("outside updates weights are whole, which takes" in line for line in adapter.lines())
    with pytest.raises(TooLargeError, match=r"model\.shard: tensor"):
        plan(full=False, gigabytes=14, shard="fsdp", shard_size=4)
