"""Groups in the form in which they are kept, and back: nothing that training or the stored completions need is lost."""

import math
from dataclasses import fields, replace

import mlx.core as mx
import numpy as np
import pytest

from grpo.training.keeping import OlderGroup, pack, unpack
from grpo.types import BEHAVIOUR, SAMPLER, Conversation, Failure, Group, Rollout, Task, Trajectory

TALK = Conversation(
    "Game",
    ({"role": "user", "content": "Guess."},),
    ({"role": "assistant", "content": "7"}, {"role": "tool", "name": "look", "content": "no"}),
    (0.1, None),
    outcome=1 / 3,
    calls=2,
    failed_calls=1,
    failure=Failure("timeout", "too slow"),
)


def f32(*values: float) -> tuple[float, ...]:
    return tuple(np.array(values, np.float32).tolist())


def group(step: int = 3) -> Group:
    """One plain completion, sampled through filters; one conversation with holes, a new beginning, and a failure."""
    plain = Trajectory.sampled((5, 70_000), f32(-0.1, -1e-30), "a\ud800", "stop", sampler=f32(-0.2, -3))
    holed = Trajectory(
        (1, 2, 3),
        (True, False, True),
        {BEHAVIOUR: f32(-1.5, -2.5, -0.25)},
        "ünï\n",
        "failed",
        conversation=TALK,
        begins=(2,),
    )
    rollouts = (
        Rollout(replace(plain, policy_step=step), {"r": 0.1, "s": None}, extras={"parsed": [1, "x"]}),
        Rollout(
            replace(holed, policy_step=step), {"r": None, "s": -0.0}, {"r": Failure("error", "broke")}, failed=True
        ),
    )
    return Group(Task(4, [{"role": "user", "content": "?"}], (9, 8, 7), {"answer": "x"}, "other"), rollouts)


def test_a_group_comes_back_as_it_was() -> None:
    kept = OlderGroup.of(group())
    assert kept.group() == group()
    assert (kept.policy_step, kept.replays) == (3, 0)
    assert [array.dtype for array in (kept.ids, kept.trained, kept.values)] == [np.int32, np.uint8, np.float32]


def test_every_field_is_kept_or_made_anew() -> None:
    """A new field is to be put on one of the sides: silently lost, it would be another value after a replay."""
    anew = {"logged", "reward", "penalty", "advantage", "taught", "turn_advantages", "lag", "replayed"}
    known = {
        Task: {"index", "prompt", "prompt_ids", "columns", "source"},
        Trajectory: {
            "token_ids",
            "trained",
            "columns",
            "text",
            "finish_reason",
            "policy_step",
            "conversation",
            "begins",
        },
        Rollout: {"trajectory", "scores", "failures", "extras", "failed", *anew},
        Failure: {"kind", "error"},
        Group: {"task", "rollouts"},
    }
    assert {kind: {field.name for field in fields(kind)} for kind in known} == known


def test_several_groups_come_back_from_arrays(tmp_path) -> None:
    kept = (OlderGroup.of(group(1)), replace(OlderGroup.of(group(2)), replays=2))
    mx.save_safetensors(str(tmp_path / "kept.safetensors"), pack(kept))
    again = unpack(mx.load(str(tmp_path / "kept.safetensors")))
    assert [one.group() for one in again] == [group(1), group(2)]
    assert [one.replays for one in again] == [0, 2]
    packed = pack(again)
    assert all(mx.array_equal(array, packed[name]) for name, array in pack(kept).items())
    assert pack(()) == {}
    assert unpack({}) == ()


def test_what_stands_at_untrained_tokens_stays_to_the_bit(tmp_path) -> None:
    """NaN too: a checkpoint with a NaN among its floats would be refused."""
    holed = group().rollouts[1]
    nan = replace(holed.trajectory, columns={BEHAVIOUR: f32(-1, math.nan, -2), SAMPLER: f32(-1, -math.inf, 0)})
    arrays = pack([OlderGroup.of(Group(group().task, (replace(holed, trajectory=nan),)))])
    assert not any(mx.issubdtype(array.dtype, mx.floating) for array in arrays.values())
    columns = unpack(arrays)[0].group().rollouts[0].trajectory.columns
    assert math.isnan(columns[BEHAVIOUR][1])
    assert columns[SAMPLER] == (-1, -math.inf, 0)


def test_a_secret_that_a_tool_quoted_is_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_API_KEY", "hunter2hunter2")
    said = replace(TALK, messages=({"role": "tool", "name": "env", "content": "hunter2hunter2"},))
    first, second = group().rollouts
    talking = replace(second, trajectory=replace(second.trajectory, conversation=said))
    kept = OlderGroup.of(Group(group().task, (replace(first, extras={"env": "hunter2hunter2"}), talking)))
    assert "hunter2" not in kept.about
    assert kept.about.count("[SOME_API_KEY]") == 2
