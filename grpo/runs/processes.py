"""What several processes of a run do, plan, and say of it before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from grpo.backend.ranks import Ranks
from grpo.config import OptimConfig, RanksConfig, RolloutConfig
from grpo.model.policy import Policy
from grpo.planning.plan import Plan, size_of
from grpo.recipes import with_settings
from grpo.training.roles import Roles

UNTIMED = (
    "speculation: off, because rollout.speculate: auto goes by the times of steps, and processes that hold a model "
    "together must all do the same"
)
SPREAD = (
    "model.shard: fsdp: {} processes spread the weights among them during an update, and have the whole while they "
    "sample and evaluate. Memory is what one of them has"
)


def roles_of(cfg: RanksConfig | None, ranks: Ranks, alone: bool) -> Roles | None:
    """What this process does, where processes sample or train. None where each does both."""
    if cfg is None:
        return None
    return Roles.alone() if alone else Roles.of(ranks, cfg)


def updating(ranks: Ranks, roles: Roles | None) -> tuple[int, bool]:
    """Among how many processes an update is divided, and whether this one makes updates."""
    return (ranks.size, True) if roles is None else (roles.trainers, roles.trains)


def untimed(rollout: RolloutConfig, ranks: Ranks) -> RolloutConfig:
    """The section without what goes by the clock, where processes that hold a model together must all do the same."""
    timed = ranks.shard.size > 1 and rollout.speculate == "auto"
    return with_settings(rollout, {"speculate": "off"}) if timed else rollout


def one_plan(
    ranks: Ranks, policy: Policy, plan: Plan, optim: OptimConfig, trainers: int | None = None
) -> tuple[Plan, OptimConfig, list[int]]:
    """One plan for all processes: that of the one with the least room, but for what each decodes with; and the bytes
    that each had planned for itself.

    They share out the micro-batches that each of them makes, so these must be the same. Those that hold a model
    together decode together, too. Where only the first `trainers` make updates, theirs count.
    """
    plans = ranks.everyone.gather((plan, optim))
    least, optim = min(plans[:trainers], key=lambda planned: (planned[0].micro_batch, -planned[0].recomputed))
    decodes = "slots", "kept_bytes", "fed", "drafts", "logits"
    own = {name: getattr(plan, name) for name in decodes}
    if ranks.shard.size > 1:
        own = {name: min(getattr(one, name) for one, _ in plans) for name in decodes}
    policy.gradient_checkpointing, policy.logits = least.checkpointing, own["logits"]
    alone = any(plan.alone for plan, _ in plans)
    return replace(least, **own, alone=alone, lanes=1 if alone else least.lanes), optim, [one.total for one, _ in plans]


def notes_of_processes(
    ranks: Ranks, roles: Roles | None, rollout: RolloutConfig, slots: int, needs: Sequence[int]
) -> list[str]:
    """What there is to say of who does what, where each process has so many `slots` and `needs` so many bytes."""
    shared = [] if roles else _by_ticket(ranks, rollout, slots)
    return [*_on_shards(ranks, rollout), *on_roles(roles, needs), *shared]


def _on_shards(ranks: Ranks, rollout: RolloutConfig) -> list[str]:
    """How the model is divided, and what that switches off. Nothing where each process has the whole."""
    size, groups = ranks.shard.size, ranks.size
    if ranks.spread is not None:
        return [SPREAD.format(ranks.spread.shard.size)]
    if size == 1:
        return []
    among = f", {groups} times; the prompts of a step are shared out among these" if groups > 1 else ""
    together = f"model.shard: tensor: {size} processes hold one model together{among}"
    off = [UNTIMED] if rollout.speculate == "auto" else []
    return [f"{together}. Parameters and memory are what one of them has", *off]


def on_roles(roles: Roles | None, needs: Sequence[int]) -> list[str]:
    """Who samples and who trains, and the bytes that each `needs`. Nothing where every process does both."""
    if roles is None or len(needs) == 1:
        return []
    train, sample = needs[: roles.trainers], needs[roles.trainers :]
    who = f"{_named('train', 0, train)}; {_named('sample', len(train), sample)}"
    return [f"ranks: {who}. A step learns from completions of the policy before its last update"]


def _named(does: str, first: int, needs: Sequence[int]) -> str:
    """Processes that do the same, the `first` of them by its number, and what the largest takes of memory."""
    alone = len(needs) == 1
    which = f"process {first} {does}s" if alone else f"processes {first} to {first + len(needs) - 1} {does}"
    return f"{which} and takes about {size_of(max(needs))}" if alone else f"{which}, about {size_of(max(needs))} each"


def _by_ticket(ranks: Ranks, rollout: RolloutConfig, slots: int) -> list[str]:
    """That processes take prompts as they become free. Nothing where each has slots for its share (`Deal`)."""
    begin = max(1, slots // rollout.num_generations)
    if ranks.size == 1 or ranks.watch is None or begin * ranks.size >= rollout.prompts_per_step:
        return []
    first = "a prompt" if begin == 1 else f"{begin} prompts"
    return [
        f"sampling: each of {ranks.size} processes begins with {first}, for which it has slots ({slots}), and takes "
        "others as rows end"
    ]
