"""mlx-lm's side in a separate process with the BLAS of MLX's wheel, which `against_wheel` starts."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict

from grpo.backend import blas
from grpo.benchmark.models import model_for
from grpo.benchmark.process import Peer
from grpo.benchmark.protocol import Measurement, alternate
from grpo.benchmark.rollout import mlx_lm, ours
from grpo.benchmark.setting import Setting
from grpo.errors import UserError


def against_wheel(setting: Setting) -> list[Measurement]:
    """grpo's generator with the BLAS that grpo loads, and mlx-lm with the BLAS of MLX's wheel, in turns.

    Raises UserError if grpo has not loaded a BLAS: both sides would use the same one.
    """
    if not blas.loaded():
        raise UserError(f"--wheel-blas has no effect on this machine: the BLAS is {blas.describe()}")
    here = ours(model_for(setting), setting)
    command = [sys.executable, "-m", "grpo.benchmark.peer", json.dumps(asdict(setting))]
    with Peer("mlx-lm, its wheel's BLAS", command, {**os.environ, "GRPO_BLAS": "off"}) as peer:
        return alternate(str(setting), [peer.side(), here], setting.runs)


def main() -> None:
    """Print one line of measurements for each line of input."""
    setting = Setting(**json.loads(sys.argv[1]))
    side = mlx_lm(model_for(setting), setting)
    for _ in sys.stdin:
        print(json.dumps(side.run()), flush=True)


if __name__ == "__main__":
    main()
