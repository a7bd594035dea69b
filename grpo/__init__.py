"""GRPO fine-tuning on one machine with MLX."""

from grpo.backend import blas, device

# Whatever part of the package is imported first, this runs before it, and so before `mlx.core`.
blas.preload()
device.preset()

__version__ = "0.1.0"
