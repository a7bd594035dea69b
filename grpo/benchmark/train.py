"""`grpo bench train`: a whole GRPO step against mlx-lm-lora's."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from pathlib import Path

import mlx.core as mx

from grpo.backend.ranks import Ranks
from grpo.benchmark.models import base_model, write_model
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import untold
from grpo.benchmark.setting import Setting
from grpo.benchmark.work import Prompts, policy_of, recipe, synthetic
from grpo.config import ModelConfig
from grpo.errors import RunError, UserError
from grpo.model.load import model_folder
from grpo.model.widehead import widen_head
from grpo.planning.plan import make_plan
from grpo.planning.workload import Workload
from grpo.recipes import with_settings
from grpo.rollout import RolloutEngine, sampling_of
from grpo.scoring.scorer import Scorer
from grpo.training.trainer import Trainer

PHASES = ("rollout", "reward", "logprobs", "update")


def step_trainer(setting: Setting, ranks: Ranks | None = None, scorer: Scorer | None = None) -> Trainer:
    """A trainer as its plan decides, whose completions all have their full length. Even tokens are rewarded, unless a
    scorer with another reward is given."""
    cfg = recipe(setting, {"micro_batch_tokens": "auto", "gradient_checkpointing": "auto"})
    model = base_model(setting)
    widen_head(model)  # as a run does, unless it is float32
    policy = policy_of(model, cfg.optim)
    generator = untold(policy.model, setting.rows)
    workload = Workload(cfg.optim, cfg.rollout, cfg.adapter, cfg.eval, setting.prompt_length, setting.prompt_length)
    plan, optim = make_plan(workload, policy, generator.decoding)
    cfg = with_settings(cfg, {"optim": optim})
    generator.slots = plan.slots
    engine = RolloutEngine(generator, sampling_of(cfg.rollout))
    tasks = [group.task for group in synthetic(setting, policy.model)]
    even = {"even": lambda completion_ids, **_: [sum(i % 2 == 0 for i in ids) for ids in completion_ids]}
    return Trainer(cfg, policy, Prompts(tasks), engine, scorer or Scorer(even), ranks=ranks)


def step_side(setting: Setting) -> Side:
    """A whole step: rollout, reward, logprobs, update, each in seconds."""
    trainer, steps = step_trainer(setting), iter(range(1, 1_000_000))

    def run() -> Values:
        mx.clear_cache()
        mx.reset_peak_memory()
        start = time.perf_counter()
        values = trainer.step(next(steps)).values
        total = time.perf_counter() - start
        phases = {f"s {phase}": values[f"time/{phase}"] for phase in PHASES}
        other = {"s other": total - sum(phases.values())}
        return {"s": total, **phases, **other, "GB": mx.get_peak_memory() / 1e9}

    return Side("grpo", run)


def compare_steps(setting: Setting, peer_python: Path | None, blas: bool) -> list[Measurement]:
    """A whole step, this trainer's and, with `peer_python`, mlx-lm-lora's: the same weights, prompts and lengths.

    `peer_python` is the Python of an environment in which mlx-lm-lora is installed. With `blas` the peer gets the BLAS
    that this project loads for itself.
    """
    sides = [step_side(setting)]
    if peer_python is None:
        return alternate(f"step, {setting}", sides, setting.runs)
    with tempfile.TemporaryDirectory() as folder:
        peer = _mlx_lm_lora(peer_python, Path(folder), setting, blas)
        return alternate(f"step, {setting}", [peer, *sides], setting.runs)


PEER = Path(__file__).parents[2] / "scripts/benchmarks/mlx_lm_lora_steps.py"
PEER_STEPS = 6
"""Iterations of the peer in one run, of which the first half warms up."""


def _mlx_lm_lora(python: Path, folder: Path, setting: Setting, blas: bool) -> Side:
    if not PEER.is_file():
        raise UserError(f"--peer-python: {PEER} is not there: it comes with the repository, and not with the package")
    model = model_folder(ModelConfig(name=setting.model)) if setting.model else folder / "model"
    if not setting.model:
        write_model(setting, model)
    rows = [json.dumps({"prompt": "?", "answer": "1", "system": "?"})] * max(64, setting.prompts)  # its place is taken
    (folder / "data").mkdir()
    (folder / "data/train.jsonl").write_text("\n".join(rows) + "\n")
    sizes = (setting.prompts, setting.completions, setting.prompt_length, setting.completion_length)
    command = [python, PEER, model, folder / "data", PEER_STEPS, *sizes, *(["--blas"] if blas else [])]

    def run() -> Values:
        return _last_line(list(map(str, command)), folder)

    return Side(f"mlx-lm-lora{', same BLAS' if blas else ''}", run)


def _last_line(command: list[str], folder: Path) -> Values:
    """What a process measured and printed last. Raises RunError where it has not."""
    try:
        ran = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder)
        if ran.returncode == 0:
            measured: Values = json.loads(ran.stdout.strip().rpartition("\n")[2])
            return measured
    except (OSError, ValueError) as error:
        raise RunError(f"mlx-lm-lora by {command[0]} failed: {error}") from error
    raise RunError(f"mlx-lm-lora by {command[0]} failed: {ran.stderr.strip()[-500:]}")
