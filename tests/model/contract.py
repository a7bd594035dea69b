"""What grpo relies on in mlx-lm, by the names of `grpo.model.mlxlm`, each with the parts of grpo that need it.

A test of the contract says by `holds` which of the names it is about; where it fails, the parts are named.
"""

from __future__ import annotations

import functools
import importlib.metadata
from collections.abc import Callable

NEEDED = {
    "ArraysCache": "model/promptcaches and generation/caches, for recurrent layers",
    "BPEStreamingDetokenizer": "benchmark/models, for a tokenizer of random words",
    "BatchGenerator": "benchmark/rollout, which measures it",
    "CacheList": "generation/caches, for layers with several caches",
    "KVCache": "generation/buffers, generation/caches and model/promptcaches, for layers with plain keys and values",
    "DoRALinear": "model/dora, which computes the same without the whole matrix",
    "LoRALinear": "model/lora, which computes the same in fewer passes",
    "MultiLinear": "model/quantized, for latent attention",
    "QuantizedMultiLinear": "model/quantized, for latent attention",
    "QuantizedSwitchLinear": "model/adapters and model/outline, for experts",
    "RotatingKVCache": "model/promptcaches, for sliding windows",
    "SwitchGLU": "benchmark/ops, which measures experts",
    "SwitchLinear": "model/adapters and model/outline, for experts",
    "TokenizerWrapper": "data/prompts, data/rendering, environments (calls and thinking) and generation/generator",
    "create_causal_mask": "model/promptcaches, for models that ask for a mask as an array",
    "generate_step": "benchmark/rollout, which measures it",
    "linear_to_lora_layers": "model/adapters, which adds every adapter with it",
    "load_config": "tools/export, for --format fused",
    "load_model": "model/load",
    "load_tokenizer": "model/load",
    "make_prompt_cache": "generation/buffers, generation/batchcaches and model/sharing",
    "make_sampler": "benchmark/rollout",
    "model_classes": "model/classifier, which replaces the head by a score, and model/load",
    "new_model": "model/outline (grpo recipes costs), model/drawn and the built-in students",
    "quantize": "model/load (model.quantize) and tools/export (--quantize)",
    "save_model": "tools/export, for --format fused",
    "scaled_dot_product_attention": "model/attending, for decoding and training, which put their own in its place",
    "swiglu": "model/attending, which puts a faster one in its place on a CPU",
}

HELD: set[str] = set()
"""The names that tests are about."""


def holds(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Mark a test as one about these names: if it fails, say which part of grpo a new mlx-lm would break."""
    HELD.update(names)
    versions = " and ".join(f"{name} {importlib.metadata.version(name)}" for name in ("mlx", "mlx-lm"))
    parts = "".join(f"\n  {name}: {NEEDED[name]}" for name in names)

    def mark(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def run(*args, **kwargs) -> None:
            try:
                test(*args, **kwargs)
            except Exception as error:
                error.add_note(f"With {versions} this does not behave as grpo needs it:{parts}")
                raise

        return run

    return mark
