"""Switches between the adapters of one model, by name."""

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
"""Number of adapters that stay in memory; the least recently used is dropped first."""


class Models(Protocol):
    """The models that clients can request, by name."""

    def names(self) -> list[str]:
        """All names that `/v1/models` lists. The first is the default, for requests without a name."""
        ...

    def find(self, name: str) -> str | None:
        """The canonical name for `name`, which may be an alias; None if there is no such model."""
        ...

    def folder(self, name: str) -> Path | None:
        """The adapter folder for a name that `find` returned; None: no adapter. Raises UserError if it is damaged."""
        ...


@dataclass(frozen=True, slots=True)
class PolicyModels:
    """See `Models`. The policy of a training run, under the name `policy` and under the recipe's `model.name`."""

    name: str

    def names(self) -> list[str]:
        return list(dict.fromkeys(["policy", self.name]))

    def find(self, name: str) -> str | None:
        return "policy" if name in self.names() else None

    def folder(self, name: str) -> Path | None:
        raise UserError(f"{name} is the model in training: it cannot be served with another adapter")


class Shelf:
    """Switches a model's adapters. No rows may decode at that time: keys and values are valid only for one adapter.

    The model's state at the start, with B zero, serves as the model without an adapter.
    """

    def __init__(self, adapters: Adapters, models: Models, most: int = MOST_KEPT) -> None:
        self._adapters, self._models, self._most = adapters, models, most
        self._base = adapters.active
        self._kept: OrderedDict[str, None] = OrderedDict()

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Use this adapter inside the block. Raises UserError if it cannot be loaded."""
        with self._adapters.use(self._state(name)):
            yield

    def _state(self, name: str) -> str:
        """The name of the adapter state for this name. Loads the adapter if it is not in memory."""
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
    """The name of the adapter state. It never equals the name of a state that training uses."""
    return f"served {name}"
