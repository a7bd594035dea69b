"""What prompts take on their way through the model is tried before the run, and counted in the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from types import SimpleNamespace

import mlx.core as mx
import pytest
from conftest import make_model
from planning.loads import workload
from training.test_update import recipe

from grpo.config import AdapterConfig
from grpo.errors import TooLargeError
from grpo.generation.choice import find_decoding
from grpo.generation.memory import Need
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.planning import choosing
from grpo.planning import planner as planning
from grpo.planning.held import FORMER
from grpo.planning.planner import Planner
from grpo.planning.rehearsal import entering


def planner(limit: float | None = None, **optim) -> Planner:
    model = make_model("tied")
    policy = Policy(model, Adapters(model, AdapterConfig(rank=2), mx.random.key(0)), 1.0)
    rollout = {"prompts_per_step": 4, "num_generations": 4, "max_completion_length": 16}
    cfg = recipe(rollout=rollout, optim={"micro_batch_tokens": "auto", **optim})
    return Planner(workload(cfg, 24), policy, find_decoding(model), limit, cfg.loss)


def test_what_stays_of_prompts_is_not_counted_among_what_they_take_besides() -> None:
    """Each prompt keeps 4,000 bytes, and all take 1,000,000 for a moment."""
    opened, forgotten, kept = [], [], []

    def admit(slots: Sequence[int], lines: Sequence) -> None:
        assert list(slots) == [0, 1, 2]
        assert [len(line.prompt.ids) for line in lines] == [50] * 3
        assert len({line.prompt for line in lines}) == 3
        for _ in lines:
            kept.append(mx.zeros(1_000))
            mx.eval(kept[-1])
        mx.eval(mx.zeros(250_000))

    def opens(size) -> SimpleNamespace:
        opened.append((size.slots, size.places, size.prefix))
        return SimpleNamespace(admit=admit)

    seen = entering(SimpleNamespace(open=opens, forget=lambda: forgotten.append(True)), 3, 50)
    assert 1_000_000 <= seen < 1_020_000
    assert (opened, forgotten) == ([(3, 3, 49)], [True])


def test_what_was_seen_of_prompts_takes_the_place_of_what_is_reckoned(monkeypatch) -> None:
    asked = []

    def seen(_, prompts: int, length: int) -> int:
        asked.append((prompts, length))
        return 10**8

    reckoned, _ = planner().plan()
    monkeypatch.setattr(planning, "entering", seen)
    plan, _ = planner().plan()
    assert asked == [(4, 24)]
    assert plan.phases["rollout"] > 10**8 > reckoned.phases["rollout"]
    monkeypatch.setattr(planning, "is_cheap", lambda *_, **__: False)
    assert planner().plan()[0].phases["rollout"] < 10**8
    assert len(asked) == 1


def test_fewer_slots_are_taken_where_prompts_take_more_than_is_reckoned(monkeypatch) -> None:
    """10 MB for each prompt: four enter sixteen slots or eight, and two of them with room for no more."""
    asked = []

    def seen(_, prompts: int, length: int) -> int:
        asked.append(prompts)
        return prompts * 10_000_000

    monkeypatch.setattr(planning, "entering", seen)
    plan, _ = planner(35e6 / 2**30).plan()
    assert (plan.slots, asked) == (8, [4, 2])
    assert plan.fits
    assert 20_000_000 < plan.phases["rollout"] < 30_000_000
    with pytest.raises(TooLargeError, match="decoding one completion takes"):
        planner(9e6 / 2**30).plan()


@pytest.mark.parametrize(("slots", "prompts"), [(1, 1), (4, 1), (5, 2), (16, 4), (64, 8)])
def test_prompts_enter_with_all_their_rows(slots: int, prompts: int) -> None:
    need = Need(32, 8, 10, 10, group=4)
    assert need.entering(slots) == prompts
    assert replace(need, group=1).entering(slots) == min(slots, 8)


def test_a_rollout_has_not_yet_what_a_failed_step_is_taken_back_to(monkeypatch) -> None:
    monkeypatch.setattr(planning, "entering", lambda *_: 10**6)
    once, twice = (planner(num_iterations=number).plan()[0] for number in (1, 2))
    former = twice.stays[FORMER]
    assert former > once.stays[FORMER] == 0
    assert twice.phases["rollout"] == once.phases["rollout"] - former


def test_what_fits_by_far_is_tried_and_no_line_is_measured(monkeypatch) -> None:
    """A line takes two small gradients, which is most of what planning a toy would cost."""
    measured = []
    genuine = planning.measure_footprint
    monkeypatch.setattr(planning, "measure_footprint", lambda *given: measured.append(given) or genuine(*given))
    plan, _ = planner().plan()
    assert not measured
    assert not plan.checkpointing
    monkeypatch.setattr(choosing, "MUCH", 10**6)
    again, _ = planner().plan()
    assert len(measured) == 1
    assert (again.micro_batch, again.shape) == (plan.micro_batch, plan.shape)
