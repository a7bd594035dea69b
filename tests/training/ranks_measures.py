"""What a process of several measures of a step beside the update, for ranks_worker.py."""

from __future__ import annotations

from typing import Any

from training.sections import gauges, make_minibatches, with_advantages
from training.test_gauges import filtered
from training.test_update import groups, recipe

from grpo.backend.ranks import Ranks
from grpo.model.policy import Policy
from grpo.training.passes import PassSettings, shared, with_top_entropy


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
    return {**found, "rows": sum(seen)}
