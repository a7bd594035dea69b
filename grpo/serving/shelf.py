"""The adapters of one model: which of them it computes with, by name."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from grpo.errors import UserError
from grpo.model.adapters import Adapters

MOST_KEPT = 8
"""Adapters that stay in memory; the one unused for longest goes first."""


class Models(Protocol):
    """What can be asked for, by name."""

    def names(self) -> list[str]:
        """All names that `/v1/models` lists; the first is what answers where no name is given."""
        ...

    def find(self, name: str) -> str | None:
        """The name of what `name` means, which may be an alias; None where there is no such model."""
        ...

    def folder(self, name: str) -> Path | None:
        """The adapter's folder of what `find` gave; None for no adapter. Raises UserError if it is damaged."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyModels:
    """See `Models`. The policy of a run in training, by that name, and by its recipe's `name` for the model."""

    name: str

    def names(self) -> list[str]:
        return list(dict.fromkeys(["policy", self.name]))

    def find(self, name: str) -> str | None:
        return "policy" if name in self.names() else None

    def folder(self, name: str) -> Path | None:
        raise UserError(f"{name} is the model in training: no other adapter can be put in its place")


class Shelf:
    """Switches a model's adapters. Nothing may decode meanwhile: keys and values belong to the adapter they came from.

    The model's own state at the start, when B is zero, is the one without an adapter.
    """

    def __init__(self, adapters: Adapters, models: Models, most: int = MOST_KEPT) -> None:
        self._adapters, self._models, self._most = adapters, models, most
        self._base = adapters.active
        self._kept: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Compute with this adapter inside the block. Raises UserError for one that cannot be loaded."""
        with self._adapters.use(self._state(name)):
            yield

    def _state(self, name: str) -> str:
        """The name of the state that has this adapter's arrays, which are loaded if they are not there."""
        if name in self._kept:
            self._kept.move_to_end(name)
            return _state_of(name)
        folder = self._models.folder(name)
        if folder is None:
            return self._base
        self._adapters.add(_state_of(name), self._adapters.read(folder, "serve it"))
        self._kept[name] = None
        if len(self._kept) > self._most:
            self._adapters.drop(_state_of(self._kept.popitem(last=False)[0]))
        return _state_of(name)


def _state_of(name: str) -> str:
    """Never the name of a state of training."""
    return f"served {name}"
