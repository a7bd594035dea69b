"""Exports a run's adapter in the format of mlx-lm or PEFT, or fused into the model's weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from grpo.backend.device import setup
from grpo.backend.hub import send
from grpo.config import AdapterConfig, ModelConfig
from grpo.errors import UserError
from grpo.model.adapters import load_adapter
from grpo.model.load import cast, is_local, load, model_folder
from grpo.model.materialize import materialize
from grpo.model.merging import merge
from grpo.model.mlxlm import load_config, quantize, save_model
from grpo.model.quantized import Quantization, dequantized, dtype_of, quantization, type_embeddings, words
from grpo.model.saved import CONFIG, PEFT_WEIGHTS, WEIGHTS, read_adapter
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE
from grpo.runs.folder import check_is_run, find_checkpoint
from grpo.runs.revisions import pinned
from grpo.tools.card import model_card

Format = Literal["mlx", "peft", "fused"]

PROBE = "What is 17 + 25? Let us work it out step by step: 17 + 25 = 42. #### 42\n"
"""The text on which a fused model is compared with the base plus adapter."""


@dataclass(frozen=True, slots=True)
class Exported:
    """An export: its folder, and notes about it."""

    folder: Path
    notes: list[str] = field(default_factory=list)


def export(
    run: Path,
    form: Format,
    to: Path | None = None,
    which: str = "newest",
    to_quantize: int | str | None = None,
    repo: str | None = None,
) -> Exported:
    """Write a run's adapter as `form` into the folder `to` (`<run>/export-<form>` unless named), with a model card.

    `to_quantize` quantizes fused weights, with a value of `model.quantize`; `repo` is the Hub repository for which the
    card is written. Raises UserError if `run` is not a run, if the folder exists, and for an adapter that cannot be
    exported in this form.
    """
    check_is_run(run)
    if to_quantize is not None and form != "fused":
        raise UserError(f"--quantize requires --format fused: an adapter ({form}) does not contain the base's weights")
    checkpoint = find_checkpoint(run, which)
    cfg = pinned(load_recipe(run / RECIPE), checkpoint)
    folder = to or run / f"export-{form}"
    if folder.exists():
        raise UserError(f"{folder} exists already; name another folder (--to) or delete it")
    aside = folder.with_name(f".{folder.name}.partial")
    shutil.rmtree(aside, ignore_errors=True)
    try:
        aside.mkdir(parents=True)
        notes = _write(aside, form, cfg.model, cfg.adapter, checkpoint, to_quantize, repo)
        (aside / "README.md").write_text(model_card(cfg, checkpoint, form, notes, repo), encoding="utf-8")
        aside.rename(folder)
    except OSError as error:
        raise UserError(f"cannot write {folder}: {error.strerror or error}") from error
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return Exported(folder, notes)


def _write(
    folder: Path,
    form: Format,
    model: ModelConfig,
    adapter: AdapterConfig,
    checkpoint: Path,
    to_quantize: int | str | None,
    repo: str | None,
) -> list[str]:
    if form == "fused":
        return _write_fused(folder, model, checkpoint, to_quantize)
    if form == "peft":
        _write_peft(folder, model, adapter, checkpoint, _base_elsewhere(model, repo))
    else:
        read_adapter(checkpoint)  # refuses adapters that must not be exported
        for name in (WEIGHTS, CONFIG):
            shutil.copyfile(checkpoint / name, folder / name)
    return _of_the_base(form, model)


def _of_the_base(form: Format, cfg: ModelConfig) -> list[str]:
    """Return notes about the base that the adapter needs."""
    if form == "mlx" and cfg.quantize is None:  # the stored base is the base that was trained, quantized or not
        return []
    if not _was_quantized(cfg):
        return []
    if form == "mlx" and cfg.quantize is not None:
        same = f"quantize it in the same way (mlx_lm.convert {quantization(cfg.quantize).arguments})"
        return [f"the base was quantized when it was loaded: {same}, or the results will differ"]
    return [
        "the base was quantized in training: with a base of other weights the results differ, so evaluate the adapter "
        "there"
    ]


def _base_elsewhere(cfg: ModelConfig, repo: str | None) -> str | None:
    """Return the name by which PEFT loads the base: a name on the Hub, or a folder. None if the export is for `repo`,
    whose readers do not have the folder."""
    if not is_local(cfg):
        return cfg.name
    return str(model_folder(cfg)) if repo is None else None


def _write_peft(folder: Path, model: ModelConfig, adapter: AdapterConfig, checkpoint: Path, base: str | None) -> None:
    """Write the adapter as PEFT does: A and B transposed, alpha before its division, modules by the Hub's names."""
    config, weights = _read(checkpoint)
    parameters, rslora = config["lora_parameters"], adapter.use_rslora
    rank = parameters["rank"]
    names = {path: _hub_name(path, model) for path in weights}
    arrays = {peft_name(names[path]): array.T for path, array in weights.items()}
    mx.save_safetensors(str(folder / PEFT_WEIGHTS), arrays, metadata={"format": "pt"})
    peft = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "revision": model.revision,
        "r": rank,
        "lora_alpha": parameters["scale"] * (rank**0.5 if rslora else rank),
        "lora_dropout": parameters["dropout"],
        "use_rslora": rslora,
        "target_modules": sorted({name.rpartition(".")[0] for name in names.values()}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(peft, indent=2) + "\n", encoding="utf-8")


def _hub_name(path: str, model: ModelConfig) -> str:
    """Return a parameter's path in the model that transformers' `AutoModelForCausalLM` loads from the base.

    From a vision-language model, mlx-lm loads the language model inside a wrapper. transformers loads the whole model
    (Gemma 3), or the language model without a wrapper (Qwen3.5).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    inner = path.removeprefix("language_model.")
    if inner == path:
        return path
    kind = json.loads((model_folder(model) / "config.json").read_text(encoding="utf-8"))["model_type"]
    bare = str(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(kind)).endswith("ForCausalLM")
    return inner if bare else inner.replace("model.", "model.language_model.", 1)


def peft_name(path: str) -> str:
    """Return PEFT's name of a parameter such as `model.layers.0.self_attn.q_proj.lora_a`."""
    module, _, part = path.rpartition(".")
    return f"base_model.model.{module}.{part[:-1]}{part[-1].upper()}.weight"


def _read(checkpoint: Path) -> tuple[dict[str, Any], dict[str, mx.array]]:
    """Return a checkpoint's configuration and LoRA matrices. Raises UserError for adapters of another kind."""
    config = json.loads((checkpoint / CONFIG).read_text(encoding="utf-8"))
    weights = read_adapter(checkpoint).arrays
    found = {"dora": "DoRA", "full": "whole weights"}.get(config["fine_tune_type"])
    if found is None and any(array.ndim != 2 for array in weights.values()):
        found = "experts in one array (train with adapter.targets without experts to use this format)"
    if found is not None:
        raise UserError(
            f"--format peft only writes LoRA on linear layers, but this adapter has {found}; --format fused supports "
            "all adapters"
        )
    return config, weights


def _write_fused(folder: Path, cfg: ModelConfig, checkpoint: Path, to_quantize: int | str | None) -> list[str]:
    """Write the model with the adapter merged into its weights, in mlx-lm's format. Returns notes on what changed.

    A quantized base is written without quantization: quantizing the sum again would round most of the adapter away.
    """
    setup()
    source, quantized = model_folder(cfg), _was_quantized(cfg)
    config = load_config(source)
    model, tokenizer = load(cfg)
    load_adapter(model, checkpoint)
    probe = mx.array([tokenizer.encode(PROBE)])
    before = _logprobs(model, probe)
    model = _whole(merge(model, dequantize=True))
    for key in ("quantization", "quantization_config"):
        config.pop(key, None)
    cast(model, _stored_dtype(config))
    materialize(model.parameters())
    notes = (
        ["the base was quantized; these weights are not, so that nothing of the adapter is lost"] if quantized else []
    )
    if to_quantize is not None:
        model, config = quantize(model, config, **_fitting(model, to_quantize).config)
        materialize(model.parameters())
        type_embeddings(model, dtype_of(model))
        notes = [
            f"quantized to {words(to_quantize)} after the adapter was merged: the adapter is rounded with the weights"
        ]
    gap: Any = (mx.exp(before) * (before - _logprobs(model, probe))).sum(axis=-1).mean().item()
    notes.append(
        f"KL divergence from the base plus adapter, on a line of arithmetic: {max(gap, 0.0):.1e} nats per token"
    )
    save_model(folder, source, model, tokenizer, config, donate_model=False)
    return notes


def _whole(model: nn.Module) -> nn.Module:
    """Dequantize all weights of the model in place, including experts and the projections of latent attention."""
    dtype = dtype_of(model)
    found = [(path, module) for path, module in model.named_modules() if "scales" in module]
    model.update_modules(tree_unflatten([(path, dequantized(module, dtype)) for path, module in found]))
    return model


def _logprobs(model: nn.Module, tokens: mx.array) -> mx.array:
    logits: mx.array = model(tokens).astype(mx.float32)
    logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
    mx.eval(logprobs)
    return logprobs


def _was_quantized(cfg: ModelConfig) -> bool:
    """Whether the base's weights were quantized in training, by the recipe or in the stored model."""
    config = json.loads((model_folder(cfg) / "config.json").read_text(encoding="utf-8"))
    return cfg.quantize is not None or bool(config.get("quantization") or config.get("quantization_config"))


def _stored_dtype(config: Mapping[str, Any]) -> mx.Dtype:
    """Return the dtype of the weights according to the model's config."""
    text = config.get("text_config") or {}
    named = next((c[key] for c in (config, text) for key in ("torch_dtype", "dtype") if c.get(key)), "bfloat16")
    dtype: mx.Dtype = getattr(mx, str(named), mx.bfloat16)
    return dtype


def _fitting(model: nn.Module, asked: int | str) -> Quantization:
    """Return how to quantize.

    For a number of bits, the groups are the largest (64, or 32 for small models) that divide the inputs of every linear
    layer; a format has its own group size. Raises UserError if the groups do not divide the inputs.
    """
    widths = [m.weight.shape[-1] for m in model.modules() if isinstance(m, nn.Linear | nn.Embedding)]
    possible = [quantization(asked, size) for size in (64, 32)]
    fitting = [way for way in possible if all(width % way.group_size == 0 for width in widths)]
    if not fitting:
        least = possible[-1].group_size
        raise UserError(f"--quantize: this model's layers are not divisible into groups of {least} weights")
    return fitting[0]


def push(folder: Path, repo: str) -> str:
    """Upload an export to the Hub as `repo`. Returns its URL. Raises UserError if the Hub refuses."""
    from huggingface_hub import HfApi

    def upload() -> str:
        api = HfApi()
        url = api.create_repo(repo, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter trained with GRPO")
        return str(url)

    later = f"`hf upload {repo} {folder}` uploads it later"
    return send(f"the export is in {folder}, but was not uploaded ({later}); --push-to-hub {repo}", upload)
