"""`grpo bench train`: a whole GRPO step against mlx-lm-lora's, and the update by itself in its variants."""

from __future__ import annotations

import gc
import json
import math
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
from mlx.utils import tree_flatten

from grpo.backend.device import setup
from grpo.backend.random import derive_key, derive_seed
from grpo.benchmark.models import NoTokenizer, make_model, write_model
from grpo.benchmark.protocol import Row, Side, Values, alternate
from grpo.benchmark.rollout import Load
from grpo.config import AdapterConfig, Recipe
from grpo.errors import RunError, UserError
from grpo.generation.generator import Generator
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.objective.groups import with_advantages
from grpo.rollout import RolloutEngine, sampling_of
from grpo.scoring.scorer import Scorer
from grpo.training.batches import make_batches, make_minibatches
from grpo.training.footprint import measure_footprint
from grpo.training.packing import Packing, Shape, pack
from grpo.training.plan import make_plan
from grpo.training.trainer import Trainer
from grpo.training.update import Updater
from grpo.types import Completion, Group, Rollout, Task

Variants = dict[str, dict[str, Any]]

VARIANTS: Variants = {
    "plain": {"share_prompts": False, "gradient_checkpointing": True, "micro_batch_tokens": 8192, "compile": False},
    "shared": {"gradient_checkpointing": True, "micro_batch_tokens": 8192, "compile": False},
    "shared, kept": {"gradient_checkpointing": False, "micro_batch_tokens": 4096, "compile": False},
    "shared, compiled": {"gradient_checkpointing": True, "micro_batch_tokens": 8192},
    "shared, kept, compiled": {"gradient_checkpointing": False, "micro_batch_tokens": 4096},
    "shared, kept, large": {"gradient_checkpointing": False, "micro_batch_tokens": 16384, "compile": False},
}
"""Ways to make one update: the prompt with each completion (plain) or once (shared), activations computed again or
kept, eager or compiled. The first is what the others are held against."""


def variant_names(text: str) -> list[str]:
    """The variants that are named, separated by semicolons; all where none is. Raises UserError for an unknown one."""
    names = [name.strip() for name in text.split(";") if name.strip()]
    if unknown := [name for name in names if name not in VARIANTS]:
        raise UserError(f"no variant {unknown[0]!r}; there are {'; '.join(VARIANTS)}")
    return names or list(VARIANTS)


def recipe(load: Load, optim: dict[str, Any]) -> Recipe:
    """The setting that everything here is measured at: LoRA of rank 16 on every linear layer, AdamW, no penalty."""
    decided = {"micro_batch_tokens": 8192, "gradient_checkpointing": False}
    return Recipe.model_validate(
        {
            "model": {"name": "bench"},
            "data": {"source": "bench"},
            "rewards": [{"use": "bench"}],
            "rollout": {
                "prompts_per_step": load.prompts,
                "num_generations": load.completions,
                "max_completion_length": load.completion_length,
                "max_concurrency": load.rows,
            },
            "optim": {"steps": 1_000_000, "learning_rate": 1e-5, **decided, **optim},
        },
        strict=False,
    )


def make_policy(shape: str, cfg: Recipe) -> Policy:
    """A policy of a named shape with random weights."""
    model = make_model(shape, rank=None)
    adapters = Adapters(model, AdapterConfig(), mx.random.key(0))
    optim = cfg.optim
    return Policy(model, adapters, 1.0, optim.share_prompts, optim.gradient_checkpointing is True)


def compare_updates(shape: str, load: Load, runs: int, names: Sequence[str], seconds: float) -> Iterator[Row]:
    """Variants of one update, each warmed up and then measured `runs` times; none is begun after `seconds`.

    They run one after the other, not in turn: a variant's compiled kernels and memory are its own.
    """
    setup()
    started = time.perf_counter()
    first: dict[str, float] = {}
    for name in names:
        if time.perf_counter() - started > seconds:
            return
        cfg = recipe(load, VARIANTS[name])
        side = update_side(name, make_policy(shape, cfg), cfg, load)
        for row in alternate(f"{shape} {load}", [side], runs):
            base = first.setdefault(row.unit, row.mean)
            yield replace(row, ratio=base / row.mean if name != names[0] else None)
        del side
        gc.collect()  # a compiled function is part of a cycle, and holds its model
        mx.clear_cache()


def update_side(name: str, policy: Policy, cfg: Recipe, load: Load) -> Side:
    """One update of synthetic completions, batches made anew each time."""
    groups = with_advantages(synthetic(load, policy.model.args.vocab_size), cfg)
    update = Updater(policy, cfg)
    footprint = measure_footprint(policy, policy.gradient_checkpointing)
    planned = mx.get_active_memory() + max(footprint.bytes(shape) for shape in shapes(groups, cfg))

    def run() -> Values:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        update(make_minibatches(groups, cfg), 1)
        return {"s": time.perf_counter() - start, "GB": mx.get_peak_memory() / 1e9, "GB planned": planned / 1e9}

    return Side(name, run)


def shapes(groups: Sequence[Group], cfg: Recipe) -> list[Shape]:
    """The shapes of an update's micro-batches."""
    rows = [(group.task, rollout) for group in groups for rollout in group.rollouts]
    return [shape for _, shape in pack(rows, Packing.of(cfg))]


def synthetic(load: Load, vocabulary: int) -> list[Group]:
    """Groups of random prompts and completions of full length, with rewards that differ."""
    made = []
    for number, prompt in enumerate(load.draw(vocabulary)):
        ids: Any = mx.random.randint(
            1, vocabulary, (load.completions, load.completion_length), key=derive_key(0, "completions", number)
        ).tolist()
        rollouts = tuple(
            Rollout(Completion(tuple(row), (0.0,) * len(row), "", "length"), {"even": _drawn(number, i)})
            for i, row in enumerate(ids)
        )
        made.append(Group(Task(number, "", tuple(prompt), {}), rollouts))
    return made


def _drawn(*position: int) -> float:
    return derive_seed(0, "reward", *position) / 2**64


def parity(shape: str, load: Load) -> str:
    """How far the shared way's loss and gradient are from the plain way's on this machine, in one line.

    Raises RunError where they are further apart than the model's dtype explains.
    """
    setup()
    found = []
    for sharing, checkpointing in ((False, False), (True, False), (True, True)):
        cfg = recipe(load, {"share_prompts": sharing, "gradient_checkpointing": checkpointing, "compile": False})
        policy = make_policy(shape, cfg)
        groups = with_advantages(synthetic(load, policy.model.args.vocab_size), cfg)
        adapters = policy.adapters
        drawn = {path: mx.random.normal(a.shape, key=mx.random.key(5)) * 0.01 for path, a in adapters.state().items()}
        adapters.load_state({path: array.astype(policy.dtype) for path, array in drawn.items()})
        found.append(dict(tree_flatten(Updater(policy, cfg).gradient(make_batches(groups, cfg)).tree)))
    plain, *others = found
    norm = _norm(plain)
    gaps = [_norm({path: array - plain[path] for path, array in other.items()}) / norm for other in others]
    bound = 1e-3 if policy.dtype == mx.float32 else 5e-2
    line = f"gradient, shared against plain: {gaps[0]:.1e} of its norm, checkpointed {gaps[1]:.1e} (bound {bound:.0e})"
    if not max(gaps) <= bound:
        raise RunError(line)
    return line


def _norm(tree: dict[str, mx.array]) -> float:
    total: Any = sum((array**2).sum() for array in tree.values())
    return math.sqrt(total.item())


class _Prompts:
    """In the place of a dataset: the same prompts at every step."""

    dropped = 0

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._tasks = list(tasks)

    def take(self, n: int) -> list[Task]:
        return self._tasks[:n]


def step_side(shape: str, load: Load) -> Side:
    """A whole step of this trainer as its plan decides: rollout, reward, logprobs, update, each in seconds."""
    cfg = recipe(load, {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"})
    policy = make_policy(shape, cfg)
    generator = Generator(policy.model, cast("Any", NoTokenizer()), load.rows)
    plan, cfg = make_plan(cfg, policy, generator.decoding, (load.prompt_length,) * 2)
    generator.slots = plan.slots
    engine = RolloutEngine(generator, sampling_of(cfg.rollout))
    tasks = [group.task for group in synthetic(load, policy.model.args.vocab_size)]
    scorer = Scorer({"even": lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) for ids in completion_ids]})
    trainer = Trainer(cfg, policy, cast("Any", _Prompts(tasks)), engine, scorer)
    steps = iter(range(1, 1_000_000))

    def run() -> Values:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        values = trainer.step(next(steps)).values
        total = time.perf_counter() - start
        phases = {f"s {phase}": values[f"time/{phase}"] for phase in ("rollout", "reward", "logprobs", "update")}
        other = {"s other": total - sum(phases.values())}
        return {"s": total, **phases, **other, "GB": mx.get_peak_memory() / 1e9}

    return Side("grpo", run)


def compare_steps(shape: str, load: Load, runs: int, peer_python: Path | None, blas: bool) -> list[Row]:
    """A whole step, this trainer's and, with `peer_python`, mlx-lm-lora's: the same weights, prompts and lengths.

    `peer_python` is the Python of an environment in which mlx-lm-lora is installed. With `blas` the peer gets the BLAS
    that this project loads for itself.
    """
    setup()
    sides = [step_side(shape, load)]
    if peer_python is None:
        return alternate(f"step {shape} {load}", sides, runs)
    with tempfile.TemporaryDirectory() as folder:
        peer = _mlx_lm_lora(peer_python, Path(folder), shape, load, blas)
        return alternate(f"step {shape} {load}", [peer, *sides], runs)


PEER = Path(__file__).parents[2] / "scripts/benchmarks/mlx_lm_lora_steps.py"
PEER_STEPS = 6
"""Iterations of the peer in one run, of which the first half warms up."""


def _mlx_lm_lora(python: Path, folder: Path, shape: str, load: Load, blas: bool) -> Side:
    write_model(shape, folder / "model")
    rows = [json.dumps({"prompt": "?", "answer": "1", "system": "?"})] * max(64, load.prompts)  # its place is taken
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text("\n".join(rows) + "\n")
    command = [str(python), str(PEER), str(folder / "model"), str(folder / "data"), str(PEER_STEPS)]
    command += [str(n) for n in (load.prompts, load.completions, load.prompt_length, load.completion_length)]
    command += ["--blas"] if blas else []

    def run() -> Values:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if ran.returncode:
            raise RunError(f"mlx-lm-lora failed: {ran.stderr.strip()[-500:]}")
        measured: dict[str, float] = json.loads(ran.stdout.strip().splitlines()[-1])
        return measured

    return Side(f"mlx-lm-lora{', same BLAS' if blas else ''}", run)
