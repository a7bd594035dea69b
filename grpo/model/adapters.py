"""What trains, and its states by name.

A state is the arrays of everything that trains: the LoRA or DoRA layers', or the weights themselves. Switching swaps
arrays in the modules, which costs microseconds and holds under `mx.compile` too, as long as the model's state is an
input of the compiled function. (The `scale` of a layer is a constant of the trace: setting it to 0 would be silently
ignored.)
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
"""Which state is active, its arrays, and the others by name."""

POLICY, REFERENCE, TEACHER, JUDGE = "policy", "reference", "teacher", "judge"
EXPERTS = (SwitchLinear, QuantizedSwitchLinear)
LINEAR = (nn.Linear, nn.QuantizedLinear, *EXPERTS)
ROUTER = re.compile(r"(^|\.)(router|gate|shared_expert_gate)(\.|$)")
"""What chooses a token's experts, by its path in a block that has some. In many models it is no linear layer at all."""


class Adapters:
    """What trains in a model, and its named states: `policy`, which trains, `reference`, and any that are added.

    One state is active: its arrays are the ones in the model. Where several processes hold the model together, arrays
    here are this process's parts (`shards`), and files have the whole.
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
        """Make `model` (in place) one that trains as `cfg` says and computes what it did: A drawn with `key`, B zero.

        The reference is the model as it is. With `cfg.path` that adapter is the policy, and a frozen copy of it the
        reference. Where whole weights train, a reference is a second copy of them: it is kept only if `reference`.
        `ranks` are the processes that hold the model together.
        Raises UserError if a target is not a linear layer of the model, or where the saved adapter does not fit.
        """
        self.model = model
        self._settings = cfg
        self.config = make_trainable(model, cfg, key, ranks)
        self.shards = Shards(model, ranks)
        materialize(model.trainable_parameters())  # a magnitude is made of a whole matrix
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
        """The states there are."""
        return [self.active, *self._parked]

    def state(self, name: str | None = None) -> dict[str, mx.array]:
        """The arrays of a state, by their path in the model; of the active one unless named."""
        if name is None or name == self.active:
            return {path: holder[key] for path, (holder, key) in self._slots.items()}
        return dict(self._parked[name])

    def load_state(self, state: AdapterState) -> None:
        """Replace arrays of the active state: all of them, or those that are given.

        Raises ValueError, with nothing replaced, for arrays that the model does not have.
        """
        if unknown := sorted(set(state) - set(self._slots)):
            raise ValueError(f"the model trains no {unknown[0]}")
        for path, array in state.items():
            holder, key = self._slots[path]
            holder[key] = array

    def snapshot(self) -> Snapshot:
        """All states as they are, for `restore`: as long as it is held, so are their arrays."""
        return self.active, self.state(), dict(self._parked)

    def restore(self, snapshot: Snapshot) -> None:
        """Be what a snapshot was taken of, even where a switch, or a gradient's trace, was left in its middle."""
        self.active, state, parked = snapshot
        self._parked = dict(parked)
        self.load_state(state)

    def add(self, name: str, state: AdapterState) -> None:
        """Keep a state under a name; one of that name that is not active is replaced.

        Raises ValueError for the active one, and for arrays that are not those that train: switching to half a state
        would mix it with another.
        """
        if name == self.active:
            raise ValueError(f"{name} is active")
        if odd := sorted(set(state) ^ set(self._slots)):
            raise ValueError(f"{name} does not have the arrays that train: {odd[0]} is in one of them alone")
        self._parked[name] = dict(state)

    def copy(self, name: str, new: str) -> None:
        """Keep a frozen copy of a state. It shares memory with it until one of them changes."""
        self.add(new, self.state(name))

    def drop(self, name: str) -> None:
        """Forget a state that is not active."""
        del self._parked[name]

    def mix(self, name: str, other: str, alpha: float) -> None:
        """Make the parked state `name` alpha × `other` + (1 - alpha) × itself, array by array."""
        target = self.state(other)
        mixed = {path: alpha * target[path] + (1 - alpha) * array for path, array in self._parked[name].items()}
        mx.eval(mixed)
        self._parked[name] = mixed

    def sync_reference(self, cfg: AdapterConfig, step: int) -> None:
        """Move the reference towards the policy if `step` is one at which it is due (TR-DPO, arXiv 2404.09656)."""
        if cfg.sync_reference_every is not None and step % cfg.sync_reference_every == 0:
            self.mix(REFERENCE, POLICY, cfg.ref_model_mixup_alpha)

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Make another state active inside the block, and the former one again after it, come what may."""
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
        """Put the active state into the weights for good and take the adapter's layers out. Returns the model.

        Quantised layers are quantised again, as mlx-lm's `fuse` does. No states are left.
        """
        materialize(merge(self.model).parameters())
        self._slots, self._parked, self._start = {}, {}, {}
        return self.model

    def delta(self) -> float | None:
        """How far the weights are from where the run began, as a norm over all layers: 0 at first.

        For LoRA of `scale · (B A - B₀ A₀)`, what the adapter adds to the model's weights less what it added at first: 0
        unless it was a saved one. Where weights train themselves, and for the magnitudes of a fresh DoRA, of their
        difference from the reference; None where there is none.
        """
        if REFERENCE not in self.names:
            return None
        scale = self.config.get("lora_parameters", {}).get("scale", 1.0)
        return distance(self.state(), self._start or self.state(REFERENCE), bool(self._start), scale, self.shards)

    def whole_state(self, name: str | None = None) -> dict[str, mx.array]:
        """A state with whole arrays. Where the model is divided, all of its processes must ask."""
        return self.shards.whole(self.state(name))

    def save(self, folder: Path, state: AdapterState | None = None) -> None:
        """Write the policy's state as mlx-lm reads it (`mlx_lm.generate --adapter-path`).

        `state` is its `whole_state`, where that has been asked for already.
        """
        assert self.active == POLICY
        mx.save_safetensors(str(folder / WEIGHTS), dict(state or self.whole_state()))
        (folder / CONFIG).write_text(json.dumps(self.config, indent=2) + "\n")

    def load(self, folder: Path) -> None:
        """Make a saved adapter, in mlx-lm's format or PEFT's, the policy's state. Raises UserError as `read` does."""
        assert self.active == POLICY
        self.load_state(self.read(folder))

    def read(self, folder: Path, purpose: str = "go on from it") -> AdapterState:
        """A saved adapter, in mlx-lm's format or PEFT's, as a state. `purpose` says in errors what it is wanted for.

        Raises UserError if it does not fit the model, or was multiplied by another scale.
        """
        saved, mine = read_adapter(folder), self.state()
        arrays = saved.fitted(mine)
        shapes = {path: self.shards.shape(path, array) for path, array in mine.items()}
        if {path: array.shape for path, array in arrays.items()} != shapes:
            cfg = self._settings
            odd = f"is of type {saved.kind}, and adapter.type is {cfg.type}"
            why = odd if saved.kind != cfg.type else "has other layers or another rank than this recipe's adapter"
            section = _as_section(saved.section(len(self.model.layers)), cfg)
            raise UserError(f"adapter {folder}: {why}. To {purpose}, a recipe says {section}")
        ours = self.config.get("lora_parameters", {}).get("scale")
        if ours is not None and saved.scale is not None and not math.isclose(saved.scale, ours, rel_tol=1e-6):
            raise UserError(
                f"adapter {folder}: was trained with B A times {saved.scale:g}, and this recipe multiplies it by "
                f"{ours:g}: set adapter.scale to {saved.scale * self._settings.scale / ours:g}"
            )
        return {path: array.astype(mine[path].dtype) for path, array in self.shards.part(arrays).items()}


class NoAdapters(Adapters):
    """Those of a model in which nothing trains: its only state has no arrays."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.active, self.config = model, POLICY, {}
        self._slots, self._parked, self._start = {}, {}, {}


def _as_section(section: Mapping[str, Any], cfg: AdapterConfig) -> str:
    """A recipe's `adapter` section on one line, without what is unknown, or what defaults and `cfg` say, too."""
    defaults = {"layers": "all", "use_rslora": False, "type": "lora"}
    told = {
        name: list(value) if isinstance(value, tuple) else value
        for name, value in section.items()
        if value is not None and not (name in defaults and defaults[name] == value == getattr(cfg, name))
    }
    return f"adapter: {json.dumps(told)}".replace('"', "")


def load_adapter(model: nn.Module, folder: Path) -> None:
    """Put a saved adapter, in mlx-lm's format or PEFT's, into `model`. Raises UserError where it does not fit."""
    saved = read_adapter(folder)  # refuses what no model should be given
    try:
        _add_saved(model, saved)
    except Exception as error:  # whatever a file that is not what it should be makes the loader raise
        why = f"it wants an adapter as mlx-lm writes them: {one_line(error)}"
        raise UserError(f"adapter {folder}: cannot be loaded; {why}") from error
    model.eval()  # mlx-lm's layers come with dropout on


def _add_saved(model: nn.Module, saved: SavedAdapter) -> None:
    """Add exactly those layers that a saved adapter has arrays for, as training computes them, with these arrays.

    Whole weights take the place of the model's. Raises ValueError for what the model has not.
    """
    arrays = saved.fitted(_places(model, saved.kind))
    if saved.kind != "full":
        if saved.rank is None:
            raise ValueError(f"there is no {CONFIG}, which says rank and scale")
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
    """The paths of all arrays that a saved adapter of this kind may have."""
    if kind == "full":
        return {path for path, _ in tree_flatten(model.parameters())}
    return {f"{path}.{part}" for path, _ in model.named_modules() for part in ("lora_a", "lora_b", "m")}


def linear_layers(model: nn.Module) -> list[str]:
    """The linear layers of the model's blocks by their path in a block, in order and once each."""
    paths = [path for block in model.layers for path, module in block.named_modules() if isinstance(module, LINEAR)]
    return list(dict.fromkeys(sorted(paths)))


def routers(model: nn.Module) -> set[str]:
    """Those linear layers that choose experts: not trained unless named, so that what is sampled goes where it went."""
    blocks = [dict(block.named_modules()) for block in model.layers]
    sparse = [block for block in blocks if any(isinstance(module, EXPERTS) for module in block.values())]
    return {path for block in sparse for path in block if ROUTER.search(path)}


def _mlx_lm_config(model: nn.Module, cfg: AdapterConfig) -> dict[str, Any]:
    """What mlx-lm's `adapter_config.json` says."""
    depth = len(model.layers)
    first, last = (0, depth) if cfg.layers == "all" else cfg.layers
    if last > depth:
        raise UserError(f"adapter.layers: up to block {last}, and this model has {depth}")
    config: dict[str, Any] = {"fine_tune_type": cfg.type, "num_layers": depth}
    if cfg.type == "full":
        return config
    there = linear_layers(model)
    if cfg.targets == "all-linear":
        left_out = routers(model)
        keys = [key for key in there if key not in left_out]
    else:
        keys = list(dict.fromkeys(path for name in cfg.targets for path in _named(name, there)))
    if cfg.layers != "all":  # mlx-lm can only count blocks from the last, but takes whole paths
        blocks = {id(block) for block in model.layers[first:last]}
        prefixes = [path for path, module in model.named_modules() if id(module) in blocks]
        keys = [f"{prefix}.{key}" for prefix in prefixes for key in keys]
    parameters = {"rank": cfg.rank, "scale": cfg.multiplier, "dropout": cfg.dropout, "keys": keys}
    return {**config, "lora_parameters": parameters}


def _named(name: str, there: Sequence[str]) -> list[str]:
    """The layers that a target means: the layer of that path in a block, or every layer whose path ends with it.

    `q_proj` is `self_attn.q_proj`, as in PEFT. Raises UserError where there is no such layer.
    """
    found = [name] if name in there else [path for path in there if path.endswith(f".{name}")]
    if not found:
        names = [*dict.fromkeys(path.rpartition(".")[2] for path in there), *there, "all-linear"]
        hint = did_you_mean(name, names)
        raise UserError(f"adapter.targets: no linear layer {name!r} in this model.{hint} It has {', '.join(there)}")
    return found


def _slots(model: nn.Module) -> dict[str, tuple[dict[str, mx.array], str]]:
    """Where each array that trains is held, by its path: to look for it at every switch would take milliseconds."""
    held = {}
    for path, _ in tree_flatten(model.trainable_parameters()):
        *parents, key = path.split(".")
        holder: Any = model
        for name in parents:
            holder = holder[int(name) if isinstance(holder, list) else name]
        held[path] = (holder, key)
    return held


def make_trainable(model: nn.Module, cfg: AdapterConfig, key: mx.array, ranks: Ranks | None = None) -> dict[str, Any]:
    """Give the model (in place) what trains, with nothing evaluated; returns what mlx-lm's `adapter_config.json` says.

    `ranks` are the processes that hold the model together: each has its part of what one process would draw.
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
    """Every weight trains, or those of the chosen blocks. Raises UserError for a quantised model."""
    if any(hasattr(module, "bits") for module in model.modules()):
        raise UserError("adapter.type: full: quantised weights cannot be trained; use lora or dora")
    for part in [model] if cfg.layers == "all" else model.layers[slice(*cfg.layers)]:
        part.unfreeze()


def _add_layers(model: nn.Module, config: dict[str, Any], key: mx.array, ranks: Ranks) -> None:
    dora = config["fine_tune_type"] == "dora"
    try:
        linear_to_lora_layers(model, config["num_layers"], config["lora_parameters"], use_dora=dora)
    except ValueError as error:  # experts have no DoRA
        why = f"{one_line(error)} Take lora, or name adapter.targets without it"
        raise UserError(f"adapter.type: {config['fine_tune_type']}: {why}") from None
    fold(model)
    fold_magnitudes(model)
    if (dropout := config["lora_parameters"]["dropout"]) > 0:
        add_dropout(model, dropout, ranks.rank, ranks.size)
    fresh = tree_flatten(model.trainable_parameters())
    keys, dtype = mx.random.split(key, len(fresh)), dtype_of(model)
    shards = Shards(model, ranks)
    drawn = [(path, _redraw(path, array, k, shards)) for (path, array), k in zip(fresh, keys, strict=True)]
    # In the model's dtype, or every layer's inputs would be made float32 to meet them; the optimizer keeps float32.
    model.update(tree_unflatten([(path, a.astype(dtype) if "lora_" in path else a) for path, a in drawn]))


def _redraw(path: str, array: mx.array, key: mx.array, shards: Shards) -> mx.array:
    """A layer's A again, uniform in ± 1/√d as mlx-lm draws it, but from a key and not from global state."""
    if not path.endswith("lora_a"):
        return array
    shape = shards.shape(path, array)
    inputs = shape[0] if array.ndim == 2 else shape[-1]
    return shards.part_of(path, mx.random.uniform(-(inputs**-0.5), inputs**-0.5, shape, array.dtype, key=key))
