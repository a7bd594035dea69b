"""Roles, common plan, and notes of several processes of a run, before the first step."""

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
    "speculation: off, because rollout.speculate: auto decides by measured times, and processes that share a model "
    "must all decide alike"
)
SPREAD = (
    "model.shard: fsdp: {} processes split the weights among them during an update, and each holds all weights while "
    "it samples and evaluates. Memory is per process"
)


def roles_of(cfg: RanksConfig | None, ranks: Ranks, alone: bool) -> Roles | None:
    """The roles of the processes if some sample and others train (`ranks`). None if each process does both."""
    if cfg is None:
        return None
    return Roles.alone() if alone else Roles.of(ranks, cfg)


def updating(ranks: Ranks, roles: Roles | None) -> tuple[int, bool]:
    """The number of processes that share an update, and whether this process makes updates."""
    return (ranks.size, True) if roles is None else (roles.trainers, roles.trains)


def untimed(rollout: RolloutConfig, ranks: Ranks) -> RolloutConfig:
    """The section without decisions by measured time if processes share a model: they must all decide alike."""
    timed = ranks.shard.size > 1 and rollout.speculate == "auto"
    return with_settings(rollout, {"speculate": "off"}) if timed else rollout


def one_plan(
    ranks: Ranks, policy: Policy, plan: Plan, optim: OptimConfig, trainers: int | None = None
) -> tuple[Plan, OptimConfig, list[int]]:
    """A common plan and `optim` section for all processes, and the bytes that each process had planned for itself.

    The common plan is the plan of the process with the least memory, except for settings of decoding, which stay those
    of each process. Processes divide the micro-batches of a step among them, so all must cut the same micro-batches.
    Processes that share a model must decode alike too. If only the first `trainers` processes make updates, only their
    plans count.
    """
    plans = ranks.everyone.gather((plan, optim))
    least, optim = min(plans[:trainers], key=lambda planned: (planned[0].micro_batch, -planned[0].recomputed))
    decodes = "slots", "kept_bytes", "fed", "drafts", "logits"
    decoding = {name: getattr(plan, name) for name in decodes}
    if ranks.shard.size > 1:
        decoding = {name: min(getattr(one, name) for one, _ in plans) for name in decodes}
    policy.gradient_checkpointing, policy.logits = least.checkpointing, decoding["logits"]
    alone = any(plan.alone for plan, _ in plans)
    common = replace(least, **decoding, alone=alone, lanes=1 if alone else least.lanes)
    return common, optim, [one.total for one, _ in plans]


def notes_of_processes(
    ranks: Ranks, roles: Roles | None, rollout: RolloutConfig, slots: int, needs: Sequence[int]
) -> list[str]:
    """Notes on what each process does. `slots` is the number of slots per process, `needs` the bytes per process."""
    shared = [] if roles else _by_ticket(ranks, rollout, slots)
    return [*_on_shards(ranks, rollout), *on_roles(roles, needs), *shared]


def _on_shards(ranks: Ranks, rollout: RolloutConfig) -> list[str]:
    """Notes on how the model is divided, and on what that switches off. Empty if each process has the whole model."""
    size, groups = ranks.shard.size, ranks.size
    if ranks.spread is not None:
        return [SPREAD.format(ranks.spread.shard.size)]
    if size == 1:
        return []
    among = f", in {groups} groups that share the prompts of a step" if groups > 1 else ""
    together = f"model.shard: tensor: {size} processes share one model{among}"
    off = [UNTIMED] if rollout.speculate == "auto" else []
    return [f"{together}. Parameters and memory are per process", *off]


def on_roles(roles: Roles | None, needs: Sequence[int]) -> list[str]:
    """A note on which processes sample and which train, with the bytes that each `needs`. Empty if all do both."""
    if roles is None or len(needs) == 1:
        return []
    train, sample = needs[: roles.trainers], needs[roles.trainers :]
    who = f"{_named('train', 0, train)}; {_named('sample', len(train), sample)}"
    return [f"ranks: {who}. A step learns from completions of the policy before its last update"]


def _named(does: str, first: int, needs: Sequence[int]) -> str:
    """`processes 0 to 1 train, about 2.0 GB each`: processes from number `first`, and the largest need of memory."""
    alone = len(needs) == 1
    which = f"process {first} {does}s" if alone else f"processes {first} to {first + len(needs) - 1} {does}"
    return f"{which} and takes about {size_of(max(needs))}" if alone else f"{which}, about {size_of(max(needs))} each"


def _by_ticket(ranks: Ranks, rollout: RolloutConfig, slots: int) -> list[str]:
    """A note that processes take prompts as they become free. Empty if each has slots for its whole share (`Deal`)."""
    begin = max(1, slots // rollout.num_generations)
    if ranks.size == 1 or ranks.watch is None or begin * ranks.size >= rollout.prompts_per_step:
        return []
    first = "1 prompt" if begin == 1 else f"{begin} prompts"
    return [
        f"sampling: each of {ranks.size} processes starts with {first}, as many as its {slots} slots hold, and takes "
        "more as completions end"
    ]
