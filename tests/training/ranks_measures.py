"""What a process of several measures of a step beside the update, for ranks_worker.py."""

from __future__ import annotations

from itertools import chain
from typing import Any

from training.sections import gauges, make_minibatches, with_advantages
from training.test_gauges import filtered
from training.test_teachers import recipe as taught_recipe
from training.test_teachers import teacher_of
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.model.policy import Policy
from grpo.training.passes import PassSettings, passes_of, shared, with_top_entropy
from grpo.training.teaching import taught
from grpo.training.update import Updater


def measures(policy: Policy, ranks: Ranks) -> dict[str, Any]:
    """Entropy masks by two normalizers, KL and mean entropy; and how many rows this process sent through the model."""
    seen: list[int] = []
    forward = policy.group_logprobs

    def counting(*given: Any, **settings: Any) -> Any:
        seen.append(given[3].shape[0])
        return forward(*given, **settings)

    policy.group_logprobs = counting  # type: ignore[method-assign]
    found: dict[str, Any] = {}
    for kind in ("dapo", "grpo"):
        cfg = recipe(loss={"type": kind, "top_entropy_quantile": 0.4}, optim={"micro_batch_tokens": 20})
        made = with_advantages(groups(policy), cfg)
        settings, minibatches = PassSettings(cfg.loss, False, ranks), make_minibatches(made, cfg)
        whole = [batch.token_ids.tolist() for batch in minibatches[0]]
        for enrich in (shared, with_top_entropy):
            minibatches = enrich(policy, minibatches, settings)
        found[kind] = ranks.merge([batch.weights.tolist() for batch in minibatches[0]])
        assert len(found[kind]) == len(whole)
    found["divergences"] = gauges(policy, cfg, ranks).divergences(made)
    found["entropy"] = (
        gauges(policy, recipe(), ranks).entropy_left_out(filtered(with_advantages(groups(policy, True), cfg))).total
    )
    policy.group_logprobs = forward  # type: ignore[method-assign]
    found["taught"] = [taught_update(policy, ranks, kl) for kl in ("sampled", "exact", "top_k")]
    return {**found, "rows": sum(seen)}


def taught_update(policy: Policy, ranks: Ranks, kl: str) -> list[float]:
    """The loss, the KL and the gradient (some of its numbers) of a step with a teacher of which each process asks for
    its own rows: an adapter, and for `exact` a second model."""
    cfg = taught_recipe(kl, optim={"micro_batch_tokens": 20})
    teacher, made = teacher_of(cfg, policy, kl == "exact"), with_advantages(groups(policy), cfg)
    minibatches = make_minibatches(taught(made), cfg)
    for enrich in passes_of(PassSettings(cfg.loss, False, ranks, teacher)):
        minibatches = enrich(policy, minibatches)
    gradient = Updater(policy, cfg.optim, cfg.loss, ranks=ranks, teacher=teacher).gradient(minibatches[0])
    numbers: Any = [array.reshape(-1)[::7].tolist() for _, array in sorted(gradient.arrays.items())]
    return [gradient.loss, gradient.metrics["teacher/kl"], *chain.from_iterable(numbers)]
