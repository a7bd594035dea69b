"""What a refusal and a report advise: settings that help there, and none that is set already or does nothing."""

from __future__ import annotations

from dataclasses import replace

import pytest
from planning.test_elsewhere import of_8b, there

from grpo.errors import TooLargeError
from grpo.model.known import CONFIGS
from grpo.planning.elsewhere import Elsewhere
from grpo.planning.lengths import FittingLengths
from grpo.planning.plan import PACKED, size_of, ways_out

OFFLOAD = "optim.offload_activations: true"
OFFLOADING = {"optim": {"steps": 1, "offload_activations": True}}
LONG = 2**18
"""Tokens of a completion for which no machine here has room."""


def ways(gigabytes: float, backend, **sections) -> list[str]:
    asked = there(gigabytes, backend, of_8b(LONG, **sections))
    plan = asked.draft(asked.load)
    assert not plan.fits
    return ways_out(plan, asked.load)


def test_layers_inputs_are_offloaded_on_cuda_where_the_update_is_too_large() -> None:
    assert OFFLOAD in ways(24, "cuda")
    assert OFFLOAD not in ways(24, "metal")
    assert OFFLOAD not in ways(24, "cuda", **OFFLOADING)


@pytest.mark.parametrize(("bits", "said"), [(None, PACKED), (8, "rollout.kv_bits: 4"), (4, None)])
def test_keys_and_values_get_fewer_bits_where_decoding_takes_too_much(bits: int | None, said: str | None) -> None:
    rollout = {"num_generations": 8, "max_completion_length": LONG, "kv_bits": bits}
    loss = {"importance_sampling_correction": "token_truncate"}
    asked = there(8, "cuda", of_8b(rollout=rollout, loss=loss))
    plan = asked.draft(asked.load)
    for phase, expected in (("rollout", said), ("update", None)):
        binding = replace(plan, phases={**dict.fromkeys(plan.phases, 1), phase: 2**40})
        assert [way for way in ways_out(binding, asked.load) if "kv_bits" in way] == [expected] * (expected is not None)


def test_what_is_quantized_already_is_not_to_be_quantized() -> None:
    assert "a smaller model or one in fewer bits" in ways(24, "metal")
    whole = {key: value for key, value in CONFIGS["mlx-community/Qwen3-8B-4bit"].items() if key != "quantization"}
    asked = there(24)
    asked = Elsewhere.of(of_8b(LONG), whole, asked.machine)
    assert "a smaller or quantized model (model.quantize)" in ways_out(asked.draft(asked.load), asked.load)


def test_offloaded_inputs_must_have_room_in_the_other_memory() -> None:
    """By hand: 36 layers' inputs of 4,096 numbers in bfloat16 are 288 kB a token, and there are 2 GB for them."""
    cfg = of_8b(**OFFLOADING)
    asked, room = there(80, cfg=cfg), 2 * 2**30
    tight = replace(asked, machine=replace(asked.machine, host=room))
    most = room // (36 * 4096 * 2) - 512  # beside a prompt of 512 tokens
    length = tight.lengths.longest()
    assert 0.9 * most < length <= most < asked.lengths.longest()  # in lines of a few widths
    plan = tight.draft(tight.lengths._of(length))
    assert plan.fits
    assert plan.offloaded <= room
    short = tight.draft(asked.load)  # of more rows at once, with room for them
    assert short.fits
    assert short.micro_batch < asked.draft(asked.load).micro_batch

    def longer() -> FittingLengths:
        return FittingLengths(tight.lengths._of(2 * length), tight.draft, None)

    with pytest.raises(TooLargeError, match=r"moves 3\.\d GB of layers' inputs to the host's memory, which has room"):
        replace(tight, load=longer().load).plan()
    assert any(f"of {size_of(room)} in the machine's own memory" in line for line in longer().report(plan))
    ways = ways_out(tight.draft(longer().load), longer().load)
    assert ways == ["a smaller rollout.max_completion_length or data.max_prompt_length", "a smaller model"]
