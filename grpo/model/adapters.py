"""The trained arrays of a model, and their named states.

A state holds all trained arrays: those of the LoRA or DoRA layers, or the weights themselves. Switching states swaps
arrays in the modules, which takes microseconds. It works under `mx.compile` too, if the model's state is an input of
the compiled function. (A layer's `scale` is a constant of the trace: setting it to 0 would be silently ignored.)
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from grpo.backend.hub import one_line
from grpo.backend.ranks import Ranks
from grpo.config import AdapterConfig
from grpo.errors import UserError, did_you_mean
from grpo.model.distance import distance
from grpo.model.dora import fold_magnitudes
from grpo.model.dropout import add_dropout
from grpo.model.lora import fold
from grpo.model.materialize import materialize
from grpo.model.merging import merge
from grpo.model.mlxlm import QuantizedSwitchLinear, SwitchLinear, linear_to_lora_layers
from grpo.model.quantized import dtype_of
from grpo.model.saved import CONFIG, WEIGHTS, SavedAdapter, read_adapter
from grpo.model.shards import Shards

AdapterState = Mapping[str, mx.array]

Snapshot = tuple[str, AdapterState, Mapping[str, AdapterState]]
"""The active state's name, its arrays, and the other states by name."""

POLICY, REFERENCE, TEACHER, JUDGE = "policy", "reference", "teacher", "judge"
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
LINEAR = (nn.Linear, nn.QuantizedLinear, *EXPERTS)
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
"""Path, in a block with experts, of the module that chooses a token's experts. In many models it is not a linear layer.
"""


class Adapters:
    """The trained arrays of a model, and their named states: `policy`, which trains, `reference`, and any added states.

    One state is active: its arrays are in the model. If several processes share the model, the arrays here are this
    process's parts (`shards`), and files contain whole arrays.
    """

    shards = Shards()

    def __init__(
        self,
        model: nn.Module,
        cfg: AdapterConfig,
        key: mx.array,
        reference: bool = True,
        ranks: Ranks | None = None,
    ) -> None:
        """Make `model` trainable in place, as `cfg` says, with unchanged outputs: A is drawn with `key`, B is zero.

        The reference is the unchanged model. With `cfg.path`, the saved adapter is the policy, and a frozen copy of it
        is the reference. In full training, the reference is a second copy of the weights: it is kept only if
        `reference` is set. `ranks` are the processes that share the model.
        Raises UserError if a target is not a linear layer of the model, or if the saved adapter does not fit.
        """
        self.model = model
        self._settings = cfg
        self.config = make_trainable(model, cfg, key, ranks)
        self.shards = Shards(model, ranks)
        materialize(model.trainable_parameters())  # a magnitude is computed from a whole matrix
        mx.eval(model.state)
        self.active = POLICY
        self._slots = _slots(model)
        self._parked: dict[str, AdapterState] = {}
        if cfg.path is not None:
            self.load(Path(cfg.path))
        self._start = self.state() if cfg.path is not None and cfg.type != "full" else {}
        if reference or cfg.type != "full":
            self.copy(POLICY, REFERENCE)

    @property
    def names(self) -> list[str]:
        """The names of all states, the active one first."""
        return [self.active, *self._parked]

    def state(self, name: str | None = None) -> dict[str, mx.array]:
        """The arrays of a state by their path in the model. `name` defaults to the active state."""
        if name is None or name == self.active:
            return {path: holder[key] for path, (holder, key) in self._slots.items()}
        return dict(self._parked[name])

    def load_state(self, state: AdapterState) -> None:
        """Replace the given arrays of the active state.

        Raises ValueError, and replaces nothing, if the model does not train one of these arrays.
        """
        if unknown := sorted(set(state) - set(self._slots)):
            raise ValueError(f"the model has no trained array {unknown[0]}")
        for path, array in state.items():
            holder, key = self._slots[path]
            holder[key] = array

    def snapshot(self) -> Snapshot:
        """All present states, for `restore`. A snapshot keeps their arrays in memory."""
        return self.active, self.state(), dict(self._parked)

    def restore(self, snapshot: Snapshot) -> None:
        """Restore the states of a snapshot, even after an error inside `use` or while a gradient was traced."""
        self.active, state, parked = snapshot
        self._parked = dict(parked)
        self.load_state(state)

    def add(self, name: str, state: AdapterState) -> None:
        """Store a state under a name. An inactive state of this name is replaced.

        Raises ValueError for the active state's name, and if the arrays are not exactly the trained ones: switching to
        half a state would mix it with another.
        """
        if name == self.active:
            raise ValueError(f"{name} is active")
        if odd := sorted(set(state) ^ set(self._slots)):
            raise ValueError(f"{name} does not have exactly the arrays that train: {odd[0]} is in only one of the two")
        self._parked[name] = dict(state)

    def copy(self, name: str, new: str) -> None:
        """Store a frozen copy of a state. The two share memory until one of them changes."""
        self.add(new, self.state(name))

    def drop(self, name: str) -> None:
        """Delete an inactive state."""
        del self._parked[name]

    def mix(self, name: str, other: str, alpha: float) -> None:
        """Replace the inactive state `name` by alpha × `other` + (1 - alpha) × itself, array by array."""
        target = self.state(other)
        mixed = {path: alpha * target[path] + (1 - alpha) * array for path, array in self._parked[name].items()}
        mx.eval(mixed)
        self._parked[name] = mixed

    def sync_reference(self, cfg: AdapterConfig, step: int) -> None:
        """Move the reference towards the policy every `cfg.sync_reference_every` steps (TR-DPO, arXiv 2404.09656)."""
        if cfg.sync_reference_every is not None and step % cfg.sync_reference_every == 0:
            self.mix(REFERENCE, POLICY, cfg.ref_model_mixup_alpha)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Make another state active inside the block. The former state is restored after it, also after an error."""
        if name == self.active:
            yield
            return
        former = self.active
        self._swap(name)
        try:
            yield
        finally:
            self._swap(former)

    def _swap(self, name: str) -> None:
        state = self._parked.pop(name)
        self._parked[self.active] = self.state()
        self.load_state(state)
        self.active = name

    def merge(self) -> nn.Module:
        """Merge the active state into the weights and remove the adapter's layers. Returns the model.

        Quantized layers are quantized again, as in mlx-lm's `fuse`. All states are deleted.
        """
        materialize(merge(self.model).parameters())
        self._slots, self._parked, self._start = {}, {}, {}
        return self.model

    def delta(self) -> float | None:
        """Distance of the weights from those at the run's start, as a norm over all layers: 0 at first.

        For LoRA, the norm of `scale · (B A - B₀ A₀)`, where B₀ A₀ is 0 unless the run began with a saved adapter. For
        full training and DoRA's magnitudes, the norm of their difference from the start: the saved adapter, or else
        the reference. None without a reference.
        """
        if REFERENCE not in self.names:
            return None
        scale = self.config.get("lora_parameters", {}).get("scale", 1.0)
        return distance(self.state(), self._start or self.state(REFERENCE), bool(self._start), scale, self.shards)

    def whole_state(self, name: str | None = None) -> dict[str, mx.array]:
        """A state with whole arrays. If several processes share the model, all of them must call this."""
        return self.shards.whole(self.state(name))

    def save(self, folder: Path, state: AdapterState | None = None) -> None:
        """Write the policy's state in mlx-lm's format (`mlx_lm.generate --adapter-path`).

        `state` is the policy's `whole_state`, if the caller already has it.
        """
        assert self.active == POLICY
        mx.save_safetensors(str(folder / WEIGHTS), dict(state or self.whole_state()))
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Make a saved adapter, in mlx-lm's format or PEFT's, the policy's state. Raises UserError as `read` does."""
        assert self.active == POLICY
        self.load_state(self.read(folder))

    def read(self, folder: Path, purpose: str = "continue from it") -> AdapterState:
        """Read a saved adapter, in mlx-lm's format or PEFT's, as a state. Error messages name the `purpose`.

        Raises UserError if the adapter does not fit the model, or was trained with another scale.
        """
        saved, mine = read_adapter(folder), self.state()
        arrays = saved.fitted(mine)
        shapes = {path: self.shards.shape(path, array) for path, array in mine.items()}
        if {path: array.shape for path, array in arrays.items()} != shapes:
            cfg = self._settings
            odd = f"is of type {saved.kind}, but adapter.type is {cfg.type}"
            why = odd if saved.kind != cfg.type else "has other layers or another rank than this recipe's adapter"
            section = _as_section(saved.section(len(self.model.layers)), cfg)
            raise UserError(f"adapter {folder}: {why}. To {purpose}, set this in the recipe: {section}")
        ours = self.config.get("lora_parameters", {}).get("scale")
        if ours is not None and saved.scale is not None and not math.isclose(saved.scale, ours, rel_tol=1e-6):
            raise UserError(
                f"adapter {folder}: was trained with B A multiplied by {saved.scale:g}, but this recipe multiplies it "
                f"by {ours:g}: set adapter.scale to {saved.scale * self._settings.scale / ours:g}"
            )
        return {path: array.astype(mine[path].dtype) for path, array in self.shards.part(arrays).items()}


class NoAdapters(Adapters):
    """The adapters of a model that does not train. Its only state has no arrays."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.active, self.config = model, POLICY, {}
        self._slots, self._parked, self._start = {}, {}, {}


def _as_section(section: Mapping[str, Any], cfg: AdapterConfig) -> str:
    """A recipe's `adapter` section on one line, without unknown values, and without defaults that `cfg` has too."""
    defaults = {"layers": "all", "use_rslora": False, "type": "lora"}
    shown = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in section.items()
        if value is not None and not (name in defaults and defaults[name] == value == getattr(cfg, name))
    }
    return f"adapter: {json.dumps(shown)}".replace('"', "")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Add a saved adapter, in mlx-lm's format or PEFT's, to `model`. Raises UserError if it does not fit."""
    saved = read_adapter(folder)  # raises for a damaged or unsupported adapter
    try:
        _add_saved(model, saved)
    except Exception as error:  # a malformed file can make the loader raise anything
        raise UserError(f"adapter {folder}: cannot be loaded into this model: {one_line(error)}") from error
    model.eval()  # new layers of mlx-lm are in training mode, with dropout


def _add_saved(model: nn.Module, saved: SavedAdapter) -> None:
    """Add exactly the layers that a saved adapter has arrays for, in the form used for training, with these arrays.

    Saved whole weights replace the model's. Raises ValueError for an array that the model does not have.
    """
    arrays = saved.fitted(_places(model, saved.kind))
    if saved.kind != "full":
        if saved.rank is None:
            raise ValueError(f"the folder has no {CONFIG}, which contains the rank and scale")
        keys = {path.rpartition(".")[0] for path in arrays}
        parameters = {"rank": saved.rank, "scale": saved.scale, "dropout": 0.0, "keys": keys}
        linear_to_lora_layers(model, 0, parameters, use_dora=saved.kind == "dora")
        fold(model)
        fold_magnitudes(model)  # while magnitudes are still the norms of the model's own weights
    there = {path: array.shape for path, array in tree_flatten(model.parameters()) if path in arrays}
    if odd := [path for path, array in arrays.items() if there.get(path) != array.shape]:
        raise ValueError(f"this model has no {odd[0]} of shape {arrays[odd[0]].shape}")
    model.load_weights(list(arrays.items()), strict=False)


def _places(model: nn.Module, kind: str) -> set[str]:
    """The paths of all arrays that a saved adapter of this kind may contain."""
    if kind == "full":
        return {path for path, _ in tree_flatten(model.parameters())}
    return {f"{path}.{part}" for path, _ in model.named_modules() for part in ("lora_a", "lora_b", "m")}


def linear_layers(model: nn.Module) -> list[str]:
    """The paths, inside a block, of the linear layers of all blocks: sorted, without duplicates."""
    paths = [path for block in model.layers for path, module in block.named_modules() if isinstance(module, LINEAR)]
    return list(dict.fromkeys(sorted(paths)))


def routers(model: nn.Module) -> set[str]:
    """The paths, inside a block, of modules that choose experts. They train only if a target names them, so that
    sampled tokens keep their experts."""
    blocks = [dict(block.named_modules()) for block in model.layers]
    sparse = [block for block in blocks if any(isinstance(module, EXPERTS) for module in block.values())]
    return {path for block in sparse for path in block if ROUTER.search(path)}


def _mlx_lm_config(model: nn.Module, cfg: AdapterConfig) -> dict[str, Any]:
    """The contents of mlx-lm's `adapter_config.json`."""
    depth = len(model.layers)
    first, last = (0, depth) if cfg.layers == "all" else cfg.layers
    if last > depth:
        raise UserError(f"adapter.layers: the last block is {last}, but this model has {depth} blocks")
    config: dict[str, Any] = {"fine_tune_type": cfg.type, "num_layers": depth}
    if cfg.type == "full":
        return config
    there = linear_layers(model)
    if cfg.targets == "all-linear":
        left_out = routers(model)
        keys = [key for key in there if key not in left_out]
    else:
        keys = list(dict.fromkeys(path for name in cfg.targets for path in _named(name, there)))
    if cfg.layers != "all":  # mlx-lm counts blocks only from the last, but accepts whole paths
        blocks = {id(block) for block in model.layers[first:last]}
        prefixes = [path for path, module in model.named_modules() if id(module) in blocks]
        keys = [f"{prefix}.{key}" for prefix in prefixes for key in keys]
    parameters = {"rank": cfg.rank, "scale": cfg.multiplier, "dropout": cfg.dropout, "keys": keys}
    return {**config, "lora_parameters": parameters}


def _named(name: str, there: Sequence[str]) -> list[str]:
    """The layers that a target means: the layer with this path in a block, or else every layer whose path ends with it.

    As in PEFT, `q_proj` means `self_attn.q_proj`. Raises UserError if there is no such layer.
    """
    found = [name] if name in there else [path for path in there if path.endswith(f".{name}")]
    if not found:
        names = [*dict.fromkeys(path.rpartition(".")[2] for path in there), *there, "all-linear"]
        hint = did_you_mean(name, names)
        raise UserError(f"adapter.targets: no linear layer {name!r} in this model.{hint} It has {', '.join(there)}")
    return found


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, mx.array], str]]:
    """The holder and key of each trained array, by path. Looking them up at every switch would take milliseconds."""
    held = {}
    for path, _ in tree_flatten(model.trainable_parameters()):
        *parents, key = path.split(".")
        holder: Any = model
        for name in parents:
            holder = holder[int(name) if isinstance(holder, list) else name]
        held[path] = (holder, key)
    return held


def make_trainable(model: nn.Module, cfg: AdapterConfig, key: mx.array, ranks: Ranks | None = None) -> dict[str, Any]:
    """Make the model trainable, in place, unevaluated. Returns the contents of mlx-lm's `adapter_config.json`.

    `ranks` are the processes that share the model: each gets its part of the arrays that one process would draw.
    Raises UserError if a target is not a linear layer of the model.
    """
    config = _mlx_lm_config(model, cfg)
    model.freeze()
    if cfg.type == "full":
        _unfreeze(model, cfg)
    else:
        _add_layers(model, config, key, ranks or Ranks())
    return config


def _unfreeze(model: nn.Module, cfg: AdapterConfig) -> None:
    """Make all weights trainable, or those of the chosen blocks. Raises UserError for a quantized model."""
    if any(hasattr(module, "bits") for module in model.modules()):
        raise UserError("adapter.type: full: quantized weights cannot be trained; use lora or dora")
    for part in [model] if cfg.layers == "all" else model.layers[slice(*cfg.layers)]:
        part.unfreeze()


def _add_layers(model: nn.Module, config: dict[str, Any], key: mx.array, ranks: Ranks) -> None:
    dora = config["fine_tune_type"] == "dora"
    try:
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=dora)
    except ValueError as error:  # mlx-lm has no DoRA for experts
        why = f"{one_line(error)} Use lora, or set adapter.targets without this layer"
        raise UserError(f"adapter.type: {config['fine_tune_type']}: {why}") from None
    fold(model)
    fold_magnitudes(model)
    if (dropout := config["lora_parameters"]["dropout"]) > 0:
        add_dropout(model, dropout, ranks.rank, ranks.size)
    fresh = tree_flatten(model.trainable_parameters())
    keys, dtype = mx.random.split(key, len(fresh)), dtype_of(model)
    shards = Shards(model, ranks)
    drawn = [(path, _redraw(path, array, k, shards)) for (path, array), k in zip(fresh, keys, strict=True)]
    # In float32, A and B would cast every layer's inputs to float32. The optimizer keeps a float32 copy.
    model.update(tree_unflatten([(path, a.astype(dtype) if "lora_" in path else a) for path, a in drawn]))


def _redraw(path: str, array: mx.array, key: mx.array, shards: Shards) -> mx.array:
    """Draw a layer's A from `key` instead of MLX's global state, uniform in ± 1/√d as in mlx-lm."""
    if not path.endswith("lora_a"):
        return array
    shape = shards.shape(path, array)
    inputs = shape[0] if array.ndim == 2 else shape[-1]
    return shards.part_of(path, mx.random.uniform(-(inputs**-0.5), inputs**-0.5, shape, array.dtype, key=key))
