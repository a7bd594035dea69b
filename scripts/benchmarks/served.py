"""Steps of another toolkit's training, one for each line of input, for the scripts beside it.

Imports MLX when a step begins, because a BLAS has to be loaded before it.
"""

import ctypes
import glob
import json
import os
import sys
import time

WARM_UP = 2
"""Steps before the first that is told: kernels are built in them."""


def preload_blas() -> None:
    """The BLAS that grpo loads, set as it sets it: MKL of this environment."""
    os.environ.setdefault("KMP_BLOCKTIME", "1")
    os.environ.setdefault("MKL_CBWR", "AUTO,STRICT")
    found = glob.glob(f"{sys.prefix}/lib/libmkl_rt.so*")
    if not found:
        sys.exit("--blas: there is no MKL here: pip install mkl in the peer's environment")
    ctypes.CDLL(found[0], mode=ctypes.RTLD_GLOBAL)


class Turns:
    """Waits for a line before each step, and answers with what the step took, in seconds, and MLX's peak in GB."""

    def __init__(self, tokens: int) -> None:
        """`tokens` is how many each step has to sample: the figures of one with fewer would mean nothing."""
        self._tokens, self._steps, self._start, self._parts = tokens, 0, 0.0, {}
        self._scored = None

    def begin(self) -> None:
        """A step begins, and the one before has ended: called where a toolkit begins to sample."""
        import mlx.core as mx

        if self._steps > WARM_UP:
            end = time.perf_counter()
            update = {} if self._scored is None else {"s update": end - self._scored}
            values = {"s": end - self._start, **self._parts, **update, "GB": mx.get_peak_memory() / 1e9}
            print(json.dumps(values), file=sys.__stdout__, flush=True)
        if self._steps >= WARM_UP and not sys.stdin.readline():
            os._exit(0)  # no toolkit has its way with the end of its training
        self._steps, self._parts, self._scored = self._steps + 1, {}, None
        mx.clear_cache()
        mx.reset_peak_memory()
        self._start = time.perf_counter()

    def sampled(self, tokens: int) -> None:
        """The step's rollout has ended, with so many tokens."""
        if tokens != self._tokens:
            sys.exit(f"{tokens} tokens were sampled instead of {self._tokens}: completions ended early")
        self._parts["s rollout"] = time.perf_counter() - self._start

    def scored(self) -> None:
        """The rewards are there, and the update begins."""
        self._scored = time.perf_counter()
