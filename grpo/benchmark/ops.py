"""`grpo bench ops`: single operations at the model's shapes, with separate times to build and to run their graph."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.maths import silu
from grpo.benchmark.models import base_model
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.setting import Setting
from grpo.model.costs import Costs
from grpo.model.mlxlm import SwitchGLU
from grpo.model.outline import costs_of

REPEATS = 16
"""Number of copies of an operation in the graph: with one copy, the fixed cost of an evaluation would dominate."""

Operation = Callable[[], mx.array]


def operation_costs(setting: Setting) -> Iterator[Measurement]:
    """Milliseconds of each operation for one token per row (attention: over all tokens of the row)."""
    model = base_model(setting)
    for name, operation in _operations(model, setting).items():
        yield from alternate(f"one token of {setting}", [Side(name, _timed(operation))], setting.runs)


def _timed(operation: Operation) -> Callable[[], Values]:
    def run() -> Values:
        start = time.perf_counter()
        graph = [operation() for _ in range(REPEATS)]
        built = time.perf_counter()
        mx.eval(graph)
        done = time.perf_counter()
        return {"ms build": 1e3 * (built - start) / REPEATS, "ms run": 1e3 * (done - built) / REPEATS}

    return run


@dataclass(frozen=True, slots=True)
class _Drawn:
    """Draws random arrays of the model's dtype."""

    dtype: mx.Dtype

    def __call__(self, *shape: int) -> mx.array:
        array = mx.random.normal(shape, key=mx.random.key(len(shape))).astype(self.dtype)
        mx.eval(array)
        return array


def _operations(model: nn.Module, setting: Setting) -> dict[str, Operation]:
    costs, rows = costs_of(model), setting.rows
    norm = next(
        m for m in model.modules() if isinstance(m, nn.RMSNorm | nn.LayerNorm) and m.weight.size == costs.hidden
    )
    draw = _Drawn(norm.weight.dtype)
    hidden, wide = draw(rows, costs.hidden), _mlp_width(model)
    gate, up = draw(rows, wide), draw(rows, wide)
    down, head = draw(wide, costs.hidden), draw(costs.hidden, costs.head.outputs)
    return {
        "SwiGLU": lambda: silu(gate) * up,
        "norm": lambda: norm(hidden),
        **_attention(costs, setting, draw),
        "matmul, MLP": lambda: gate @ down,
        "matmul, head": lambda: hidden @ head,
        **_routing(model, hidden),
    }


def _attention(costs: Costs, setting: Setting, draw: _Drawn) -> dict[str, Operation]:
    """Attention of one token over all tokens of its row, and causal attention over a whole prompt."""
    context, scale = setting.prompt_length + setting.completion_length, costs.head_dim**-0.5
    query = draw(setting.rows, costs.heads, 1, costs.head_dim)
    keys, values = (draw(setting.rows, costs.kv_heads, context, costs.head_dim) for _ in range(2))
    prompt = draw(1, costs.heads, setting.prompt_length, costs.head_dim)
    prompt_keys = draw(1, costs.kv_heads, setting.prompt_length, costs.head_dim)
    attend: Any = mx.fast.scaled_dot_product_attention
    return {
        "attention, decoding": lambda: attend(query, keys, values, scale=scale),
        "attention, one prompt": lambda: attend(prompt, prompt_keys, prompt_keys, scale=scale, mask="causal"),
    }


def _mlp_width(model: nn.Module) -> int:
    args = model.args
    return int(getattr(args, "moe_intermediate_size", None) or args.intermediate_size)


def _routing(model: nn.Module, hidden: mx.array) -> dict[str, Operation]:
    """The first mixture-of-experts block (routing and experts' matmuls); empty for a dense model."""
    blocks = [m for m in model.modules() if any(isinstance(child, SwitchGLU) for child in m.children().values())]
    return {"experts": lambda: blocks[0](hidden[:, None])} if blocks else {}
