"""What a run asks of a machine, by hand: 4 prompts of 8 completions a step, and what an evaluation adds."""

from dataclasses import replace

import pytest
from planning.loads import workload
from planning.test_elsewhere import of_8b, there
from training.test_packing import row

from grpo.config import OptimConfig, Recipe
from grpo.generation.memory import Need
from grpo.planning.plan import ways_out
from grpo.planning.table import table
from grpo.planning.workload import OLDER
from grpo.training.keeping import OlderGroup
from grpo.training.packing import Packing, Shape, pack
from grpo.types import Group, Rollout, Task, Trajectory


def asked(**sections) -> Recipe:
    own = {
        "model": {"name": "m"},
        "data": {"source": "d"},
        "rewards": ({"use": "r"},),
        "rollout": {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 64},
        "optim": {"steps": 1},
    }
    return Recipe.model_validate(own | sections)


@pytest.mark.parametrize(
    ("evaluation", "rows", "prompts"),
    [
        (None, 32, 4),
        ({"prompts": 3, "samples": 2}, 32, 4),
        ({"prompts": 6, "samples": 2}, 32, 6),
        ({"prompts": 3, "samples": 16}, 48, 4),
    ],
)
def test_what_is_sampled_at_once_is_the_larger_of_a_step_and_an_evaluation(evaluation, rows, prompts) -> None:
    load = workload(asked(eval=evaluation), 100, 120)
    group = 8 if evaluation is None else 1  # greedy answers are one for each prompt
    assert load.need() == Need(rows, prompts, 120, 64, False, group=group)
    assert (load.rows, load.tokens) == (32, 32 * (100 + 64))  # an evaluation trains on nothing


def test_the_largest_micro_batch_shares_prompts_as_far_as_its_tokens_go() -> None:
    """A prompt of 100 tokens with eight completions of 64 is 612; the next completion brings a prompt with it.

    Where only seven fit, the eighth begins the next micro-batch, with five of the next prompt: 584 tokens.
    """
    load = workload(asked(), 100)
    assert load.largest(612, gpu=False) == [Shape(1, 100, 8, 64)]
    assert load.largest(611, gpu=False) == [Shape(2, 100, 6, 64)]
    assert load.largest(612 + 164, gpu=False) == [Shape(2, 100, 9, 64)]
    assert load.largest(10**6, gpu=False) == [Shape(4, 100, 32, 64)]


def test_the_widest_lines_are_planned_too_where_completions_go_behind_one_another() -> None:
    """A prompt of 100 and a completion of 64 take 163 places: lines of 256 on a Mac, and up to 4,096 on CUDA.

    32 rows are all there are: 3 of them in a line of 256, 62 in a line of 4,096.
    """
    load = workload(asked(), 100)
    assert load.largest(2048, gpu=True)[1:] == [Shape(32, 256, 32, 256, lines=8, width=256)]
    assert load.largest(2**14, gpu=True)[1:] == [Shape(32, 256, 32, 256, lines=16, width=256)]
    assert load.largest(2**14, gpu=True, cuda=True)[1:] == [Shape(32, 4096, 32, 4096, lines=1, width=4096)]
    assert load.largest(1024, gpu=True, cuda=True)[1:] == [Shape(32, 1024, 32, 1024, lines=1, width=1024)]
    long = workload(asked(rollout={"max_completion_length": 20_000}), 100)
    alone = Shape(1, 20_480, 1, 20_480, lines=1, width=20_480, alone=True)
    assert long.largest(2**14, gpu=True, cuda=True)[1:] == [alone]  # and no line of several rows is as wide
    for changed in ({"pack_completions": False}, {"share_prompts": False}):
        apart = replace(load, optim=load.optim.model_copy(update=changed))
        assert not apart.packs
        assert len(apart.largest(2**14, gpu=True)) == 1


def test_what_environments_add_to_prompts_is_each_completion_s_own() -> None:
    load = replace(workload(asked(), 100), own=20)
    assert load.need() == Need(32, 4, 100, 84, False, group=8)
    assert load.tokens == 32 * (100 + 64)  # the longest prompt has it already
    assert load.largest(100 + 8 * 84, gpu=False) == [Shape(1, 100, 8, 84)]
    assert load.largest(100 + 8 * 84 - 1, gpu=False) == [Shape(2, 100, 6, 84)]


@pytest.mark.parametrize("parts", [1, 2, 3])
@pytest.mark.parametrize("minibatches", [1, 2])
@pytest.mark.parametrize(("groups", "prompt", "length"), [((4, 8), 100, 64), ((8, 4), 65, 25), ((8, 3), 120, 8)])
@pytest.mark.parametrize("tokens", [150, 400, 512, 611, 900, 5_000])
def test_the_largest_is_what_packing_makes_of_rows_that_are_all_the_longest(
    parts: int, minibatches: int, groups: tuple[int, int], prompt: int, length: int, tokens: int
) -> None:
    prompts, completions = groups
    rollout = {"prompts_per_step": prompts, "num_generations": completions, "max_completion_length": length}
    cfg = asked(rollout=rollout, optim={"steps": 1, "num_minibatches": minibatches, "micro_batch_tokens": tokens})
    rows = [row(prompt, length, number) for number in range(prompts // minibatches) for _ in range(completions)]
    made = [shape for _, shape in pack(rows, Packing.of(cfg.optim, cfg.rollout, parts, gpu=False))]
    found = replace(workload(cfg, prompt), parts=parts).largest(tokens, gpu=False)
    assert found == [max(made, key=lambda shape: shape.tokens)]


def test_of_very_many_rows_the_first_ones_are_enough() -> None:
    rollout = {"prompts_per_step": 4_000, "num_generations": 8, "max_completion_length": 64}
    assert workload(asked(rollout=rollout), 100).largest(612, gpu=False) == [Shape(1, 100, 8, 64)]


def test_older_groups_are_held_where_memory_is_one() -> None:
    """Two steps of 4 prompts of 100 tokens with 8 completions of 64: 5 + 9 bytes a token, and 4 more with a filter.

    Of these, a group's arrays take exactly what is not its text, about 5 bytes a token.
    """
    asks = {"prompts_per_step": 4, "num_generations": 8, "max_completion_length": 64}
    for filters, columns in (({}, {"behaviour"}), ({"top_p": 0.9}, {"behaviour", "sampler"})):
        load = workload(asked(rollout={**asks, **filters, "reuse": 2}, optim={"steps": 9}), 100)
        values = {name: (-1.0,) * 64 for name in columns}
        sampled = Trajectory((5,) * 64, (True,) * 64, values, "", "length", policy_step=0)
        kept = OlderGroup.of(Group(Task(0, "", (3,) * 100, {}), (Rollout(sampled),) * 8))
        arrays = kept.ids.nbytes + kept.trained.nbytes + kept.values.nbytes
        assert load.stays(cuda=False) == {"older groups": 2 * 4 * (arrays + 5 * (100 + 8 * 64))}
        assert load.stays(cuda=True) == {}
        short = replace(load, optim=OptimConfig(steps=1))  # no more than it samples
        assert short.stays(cuda=False)["older groups"] == load.stays(cuda=False)["older groups"] / 2
    assert workload(asked(rollout=asks), 100).stays(cuda=False) == {}


def test_the_plan_and_its_table_have_older_groups_and_advise_fewer_where_they_are_many() -> None:
    long_run = {"optim": {"steps": 500}}
    rollout = {"prompts_per_step": 64, "num_generations": 16, "max_completion_length": 4096, "reuse": 4}
    mac = there(64, "metal", of_8b(rollout=rollout, **long_run))
    plan = mac.draft(mac.load)
    assert plan.stays[OLDER] == pytest.approx(4 * 64 * 16 * 4096 * 14, rel=0.01)
    (line,) = [line for line in table(plan, mac.load) if line.startswith(OLDER)]
    assert " ".join(line.split()) == (
        "older groups 225 MB groups of up to 4 steps ago (rollout.reuse), at their longest"
    )
    assert "a smaller rollout.reuse" not in ways_out(plan, mac.load)
    many = there(64, "metal", of_8b(rollout={**rollout, "reuse": 400}, **long_run))
    assert "a smaller rollout.reuse" in ways_out(many.draft(many.load), many.load)
    assert OLDER not in there(64, "cuda", of_8b(rollout=rollout, **long_run)).draft(mac.load).stays
