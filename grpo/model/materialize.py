"""Computing a model's arrays a few at a time.

MLX reads, casts and quantises weights when somebody looks at them. Looked at all at once, they are all there in float
before the first is quantised: a model of 4 bits needs three to eight times its size to load. Looked at in turn, what
each array is made of makes room for the next.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten


def materialize(parameters: Any) -> None:
    """Compute a model's arrays one after another: beside the finished ones, only one is in the making.

    What stands outside the layers (the embedding and the head, often ten times a layer's largest matrix) comes first,
    while there is nothing else. So the peak is the finished model, or what the embedding is made of, if that is more: 6
    bytes a number where bfloat16 is cast to float32 and then quantised (a CPU), 2 where it is quantised as it is. A
    small model of 4 bits with a vocabulary of 150,000 tokens takes more while it is loaded than afterwards. Nobody else
    must hold what the arrays are made of.
    """
    arrays = tree_flatten(parameters)
    arrays.sort(key=lambda found: "layers" in found[0].split("."))
    for _, array in arrays:
        mx.eval(array)
    mx.clear_cache()  # buffers of the size of float arrays, which nothing will ask for again
