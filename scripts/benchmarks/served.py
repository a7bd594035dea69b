"""Runs one training step of another toolkit per line of input, for the other scripts in this folder.

Imports MLX only when a step begins, because a BLAS must be loaded first.
"""

import ctypes
import glob
import json
import os
import sys
import time

WARM_UP = 2
"""Number of first steps that are not reported, because kernels are built in them."""


def preload_blas() -> None:
    """Load the BLAS that grpo loads, with the same settings: MKL from this environment."""
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    found = glob.glob(f"{sys.prefix}/lib/libmkl_rt.so*")
    if not found:
        sys.exit("--blas: this environment has no MKL: pip install mkl in the peer's environment")
    ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)


class Turns:
    """Waits for a line before each step, then prints the step's seconds and MLX's peak memory in GB."""

    def __init__(self, tokens: int) -> None:
        """`tokens` is the number of tokens that each step must sample: with fewer, its figures would be wrong."""
        self._tokens, self._steps, self._start, self._parts = tokens, 0, 0.0, {}
        self._scored = None

    def begin(self) -> None:
        """End the previous step and begin a new one: called when the toolkit begins to sample."""
        import mlx.core as mx

        if self._steps > WARM_UP:
            end = time.perf_counter()
            update = {} if self._scored is None else {"s update": end - self._scored}
            values = {"s": end - self._start, **self._parts, **update, "GB": mx.get_peak_memory() / 1e9}
            print(json.dumps(values), file=sys.__stdout__, flush=True)
        if self._steps >= WARM_UP and not sys.stdin.readline():
            os._exit(0)  # skip the toolkit's own code at the end of training
        self._steps, self._parts, self._scored = self._steps + 1, {}, None
        mx.clear_cache()
        mx.reset_peak_memory()
        self._start = time.perf_counter()

    def sampled(self, tokens: int) -> None:
        """The step's rollout has ended, with `tokens` sampled tokens."""
        if tokens != self._tokens:
            sys.exit(f"{tokens} tokens were sampled instead of {self._tokens}: completions ended early")
        self._parts["s rollout"] = time.perf_counter() - self._start

    def scored(self) -> None:
        """The rewards are computed, and the update begins."""
        self._scored = time.perf_counter()
