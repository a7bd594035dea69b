"""mlx-lm's side in a process of its own, which has the BLAS of MLX's wheel. Run by `WheelPeer`, not by hand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from typing import Any

from grpo.backend import blas
from grpo.benchmark.models import model_for
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import mlx_lm, ours
from grpo.benchmark.setting import Setting
from grpo.errors import RunError, UserError


class WheelPeer:
    """A process that generates with mlx-lm whenever it is asked, without the BLAS that grpo loads."""

    def __init__(self, setting: Setting) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "grpo.benchmark.peer", json.dumps(asdict(setting))],
            env={**os.environ, "GRPO_BLAS": "off"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def side(self) -> Side:
        return Side("mlx-lm, its wheel's BLAS", self._run)

    def close(self) -> None:
        self._process.communicate()

    def _run(self) -> Values:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("run\n")
        self._process.stdin.flush()
        if not (line := self._process.stdout.readline()):
            raise RunError("the process that runs mlx-lm has ended")
        values: Any = json.loads(line)
        return {unit: float(value) for unit, value in values.items()}


def against_wheel(setting: Setting) -> list[Measurement]:
    """This generator with the BLAS that grpo loads against mlx-lm with that of MLX's wheel, in turns.

    Raises UserError where grpo has loaded none: there would be nothing to tell apart.
    """
    if not blas.loaded():
        raise UserError(f"--wheel-blas would change nothing here: the BLAS is {blas.describe()}")
    here = ours(model_for(setting), setting)
    peer = WheelPeer(setting)
    try:
        return alternate(str(setting), [peer.side(), here], setting.runs)
    finally:
        peer.close()


def main() -> None:
    """One line of measurements for each line of input."""
    setting = Setting(**json.loads(sys.argv[1]))
    side = mlx_lm(model_for(setting), setting)
    for _ in sys.stdin:
        print(json.dumps(side.run()), flush=True)


if __name__ == "__main__":
    main()
