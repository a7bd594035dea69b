"""Estimates the time of a step on several devices from a chip, a link, and the number of processes.

    python scripts/benchmarks/devices.py                                    # the tables of the manual's page
    python scripts/benchmarks/devices.py --link 2.4 --latency 0.3           # GB/s and ms, from `grpo doctor --ranks`

The work of a process comes from `grpo.planning.estimate` (as in `grpo recipes costs`), fitted to one H200 and scaled to
other chips; figures for Macs are lower bounds. The communication comes from the link: gradients once per update, the
step's completions once, and in tensor parallel two sums per layer and pass. A ring's sum of S bytes over n processes
takes 2 (n - 1) / n × S / bandwidth + 2 (n - 1) × latency; gathering S bytes in total takes half of that.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from grpo.benchmark.models import config_of
from grpo.config import Recipe
from grpo.model.costs import Costs
from grpo.planning import calibration
from grpo.planning.elsewhere import Elsewhere
from grpo.planning.estimate import estimate, machine_of
from grpo.planning.machines import CHIPS, Chip
from grpo.recipes import with_settings

PICKLED = 15.4
"""Bytes per token in the exchange of completions: its id, its logprob, whether it is trained, its text."""
ROUNDS = 12
"""Approximate number of small exchanges per step: row counts, metrics, counts, stops."""


@dataclass(frozen=True, slots=True)
class LinkSpeed:
    """A link between neighbors: bytes per second, and seconds until the first byte arrives."""

    name: str
    bandwidth: float
    latency: float

    def sum(self, n: int, nbytes: float) -> float:
        """Seconds of a ring's sum over `n` processes of an array of `nbytes`."""
        return 2 * (n - 1) / n * nbytes / self.bandwidth + 2 * (n - 1) * self.latency

    def gather(self, n: int, nbytes: float) -> float:
        """Seconds until each of `n` processes has all `nbytes`, of which each process has a part."""
        return self.sum(n, nbytes) / 2


LINKS = (
    LinkSpeed("NVLink, 4th generation", 300e9, 3e-6),
    LinkSpeed("Thunderbolt 5", 6e9, 2e-4),
    LinkSpeed("Thunderbolt 4", 3e9, 2e-4),
    LinkSpeed("10 Gbit Ethernet", 1.1e9, 2e-4),
    LinkSpeed("1 Gbit Ethernet", 0.11e9, 4e-4),
)
"""Figures from vendors and users, not measured here; `grpo doctor --ranks` measures your link."""


def recipe(shape: str, prompts: int, completions: int, prompt: int, completion: int) -> Recipe:
    """A recipe with LoRA of rank 16 on every linear layer, and prompts and completions of full length."""
    return Recipe.model_validate(
        {
            "model": {"name": shape},
            "data": {"source": "none", "max_prompt_length": prompt},
            "rewards": [{"use": "none"}],
            "optim": {"steps": 1},
            "rollout": {
                "prompts_per_step": prompts,
                "num_generations": completions,
                "max_completion_length": completion,
            },
        },
        strict=False,
    )


def data_parallel(cfg: Recipe, chip: Chip, n: int, link: LinkSpeed) -> tuple[float, float]:
    """Seconds of a step of `n` processes that each hold the whole model, and the part of it that is communication."""
    config, rollout = config_of(cfg.model.name), cfg.rollout
    own = with_settings(
        cfg, {"rollout": with_settings(rollout, {"prompts_per_step": -(-rollout.prompts_per_step // n)})}
    )
    made = rollout.prompts_per_step * rollout.num_generations * rollout.max_completion_length
    if n == 1:
        return estimate(chip, own, config).step, 0.0
    trained = Elsewhere.of(cfg, config, machine_of(chip.memory, chip.backend, cfg)).costs.trained
    exchange = link.sum(n, 4 * trained) + link.gather(n, PICKLED * made) + ROUNDS * link.gather(n, 8 * n)
    return estimate(chip, own, config).step + exchange, exchange


def tensor_parallel(cfg: Recipe, chip: Chip, n: int, link: LinkSpeed) -> tuple[float, float]:
    """Seconds of a step of `n` processes that share one model, and the part of it that is communication.

    Matrices and attention are divided, but kernel launches are not. Every layer sums hidden states twice in the forward
    pass and twice in the backward pass.
    """
    costs: Costs = Elsewhere.of(cfg, config_of(cfg.model.name), machine_of(chip.memory, chip.backend, cfg)).costs
    rollout, prompt = cfg.rollout, cfg.data.longest_prompt
    rows = rollout.prompts_per_step * rollout.num_generations
    length = rollout.max_completion_length
    slots = min(rollout.max_concurrency, rows)
    steps = length * rows / slots
    step = costs.decode(slots, prompt + length // 2, prompt, max(1, slots // rollout.num_generations))
    work = costs.update(rollout.prompts_per_step, prompt, rollout.num_generations, length)
    tokens = rollout.prompts_per_step * prompt + rows * length
    hidden, sums = costs.hidden * costs.itemsize, 2 * costs.depth
    if chip.times == "bound":
        own = (step * (steps / n) + work * (1 / n)).seconds(chip.flops, chip.bandwidth)
    else:
        launches = calibration.decode(chip, costs, step * 0)
        own = steps * (launches + (calibration.decode(chip, costs, step) - launches) / n)
        own += calibration.update(chip, costs, tokens, work) / n
    exchange = steps * sums * link.sum(n, slots * hidden) + 2 * sums * link.sum(n, tokens * hidden) if n > 1 else 0.0
    return own + exchange, exchange


def table(cfg: Recipe, chip: Chip, counts: tuple[int, ...], links: tuple[LinkSpeed, ...], way: Any) -> Iterator[str]:
    """Yield lines of a Markdown table: the speedup over one process and the share of communication, by link and number
    of processes."""
    yield "| link | " + " | ".join(f"{n} processes" for n in counts) + " |"
    yield "|---|" + "---|" * len(counts)
    alone, _ = way(cfg, chip, 1, links[0])
    for link in links:
        cells = []
        for n in counts:
            seconds, exchange = way(cfg, chip, n, link)
            cells.append(f"{alone / seconds:.2f} × ({exchange / seconds:.0%})")
        yield f"| {link.name} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=float, help="GB/s between two processes")
    parser.add_argument("--latency", type=float, default=0.2, help="latency of the link in ms")
    args = parser.parse_args()
    own = () if args.link is None else (LinkSpeed("this link", args.link * 1e9, args.latency / 1e3),)
    h200, mac = (next(chip for chip in CHIPS if chip.name.startswith(name)) for name in ("H200", "M4 Max 128"))
    measured = recipe("qwen3-0.6b", 32, 8, 130, 128)
    one, two = (data_parallel(measured, h200, n, LINKS[0])[0] for n in (1, 2))
    print(
        f"H200, 0.6B, 32 × 8 × (130 + 128): one {one:.2f} s, two {two:.2f} s, {one / two:.2f} × (measured: 3.54, 1.92)"
    )
    for shape, chip, links, counts in (
        ("qwen3-0.6b", h200, own or LINKS[:1], (2, 4, 8)),
        ("qwen3-8b", h200, own or LINKS[:1], (2, 4, 8)),
        ("qwen3-8b", mac, own or LINKS[1:], (2, 4)),
    ):
        cfg = recipe(shape, 32, 8, 256, 512)
        for name, way in (("data parallel", data_parallel), ("tensor parallel", tensor_parallel)):
            alone, _ = way(cfg, chip, 1, links[0])
            print(f"\n{chip.name}, {shape}, 32 × 8 × (256 + 512), {name}; one process: {alone:.0f} s a step\n")
            print("\n".join(table(cfg, chip, counts, links, way)))
    far = recipe("qwen3-8b", 1024, 8, 256, 512)
    print("\nH200, qwen3-8b, 1,024 × 8 × (256 + 512), data parallel, 50 GB/s and 0.1 ms between hosts\n")
    print("\n".join(table(far, h200, (8, 64, 1024), (LinkSpeed("one ring over all", 50e9, 1e-4),), data_parallel)))


if __name__ == "__main__":
    main()
