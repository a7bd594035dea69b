"""One process of several, for test_ranks.py: `gradient OUT` or `die OUT`."""

import grpo  # noqa: F401  before mlx, so that the BLAS is in place

# isort: split

import json
import os
import signal
import sys
import time
from pathlib import Path

import mlx.core as mx
from conftest import make_model, shaken
from test_update import groups, recipe
from training.ranks_measures import measures
from training.sections import make_batches, updater, with_advantages

from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy


def die(ranks: Ranks, out: Path) -> None:
    """Wait for the second process, which is killed; write how long that took."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which may be faster than what is tested
    ranks.gather("here")
    if ranks.rank == 1:
        os.kill(os.getpid(), 9)
    started = time.monotonic()
    try:
        ranks.gather("still here")
    finally:
        (out / f"waited-{ranks.rank}").write_text(str(time.monotonic() - started))


def gradient(ranks: Ranks, out: Path) -> None:
    """Make one update of a toy policy, and write what this process has of it."""
    model = make_model("tied")
    adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
    adapters.load_state(shaken(adapters.state()))
    policy, cfg = Policy(model, adapters, 1.0), recipe(loss={"type": "grpo"})
    batches = make_batches(with_advantages(groups(policy), cfg), cfg)
    mine = ranks.share(batches)
    update = updater(policy, cfg, ranks=ranks)
    found = update.gradient(mine)
    told = ranks.merge(ranks.share(["a", "b", "c"]))
    mx.save_safetensors(str(out / f"gradient-{ranks.rank}.safetensors"), found.arrays)
    update([mine], 1)
    mx.save_safetensors(str(out / f"policy-{ranks.rank}.safetensors"), adapters.state())
    (out / f"facts-{ranks.rank}.json").write_text(
        json.dumps({"loss": found.loss, "batches": len(mine), "told": told, "size": ranks.size, **found.metrics})
    )
    (out / f"measures-{ranks.rank}.json").write_text(json.dumps(measures(policy, ranks)))


if __name__ == "__main__":
    {"gradient": gradient, "die": die}[sys.argv[1]](Ranks.launched(), Path(sys.argv[2]))
