"""Checks of arguments to the Python API, with errors that say what to pass instead."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from inspect import Signature
from typing import Any

from grpo.errors import UserError, did_you_mean
from grpo.trl import answer
from grpo.types import Batch, Group

OTHER_NAMES = {
    "max_new_tokens": "max_tokens",
    "max_completion_length": "max_tokens",
    "num_generations": "n",
    "num_return_sequences": "n",
    "seed": "key",
    "alpha": "scale",
    "lora_alpha": "scale",
    "r": "rank",
    "target_modules": "targets",
    "lora_dropout": "dropout",
}
"""Our arguments by their names in other libraries or in a recipe."""
REMARKS = {"scale": " PEFT's alpha is scale × rank."}


def kind_of(value: Any) -> str:
    """Return a value's type for a message: "a str", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def unknown_setting(said_by: str, name: str, known: Iterable[str], beside: Iterable[str] = ()) -> UserError:
    """Return the error for a setting that does not exist. `known` are the existing settings, `beside` the function's
    other arguments."""
    known = sorted(known)
    meant = OTHER_NAMES.get(name)
    if meant in {*known, *beside}:
        hint = f" Did you mean {meant!r}?{REMARKS.get(str(meant), '')}"
    else:
        hint = did_you_mean(name, [*known, *beside])
    return UserError(f"{said_by}: unknown setting {name}; the settings are {', '.join(known)}.{hint}")


def unknown_argument(said_by: str, name: str, signature: Signature, trls: Mapping[str, str]) -> UserError:
    """Return the error for an argument that is not in a signature. `trls` maps TRL's names to ours."""
    there = f"{said_by}: there is no argument {name!r}"
    if name in trls:
        return UserError(f"{there}: TRL's {name} is {trls[name]} here: {said_by}(..., {trls[name]}=...)")
    if (found := answer(name)) is not None:
        return UserError(f"{there}: {found.sentence(name)} Set it in the recipe: grpo.recipe(...)")
    known = [one.name for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    return UserError(f"{there}; the arguments are {', '.join(known)}.{did_you_mean(name, known)}")


def whole_number(value: Any, what: str) -> int:
    """Return the value as an int. Raises UserError for other values than whole numbers."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{what}: expected a whole number, got {value!r}") from None


def groups_of(groups: Any, said_by: str) -> list[Group]:
    """Return the groups as a list. Raises UserError for a single group, and for anything except groups."""
    if isinstance(groups, Group):
        raise UserError(f"{said_by}: expected a list of groups, got one group: write [group]")
    return _listed(groups, Group, f"{said_by}: expected groups from policy.sample")


def batches_of(batches: Any, said_by: str) -> list[Batch]:
    """Return one or several batches as a list. Raises UserError for anything else."""
    if isinstance(batches, Batch):
        return [batches]
    return _listed(batches, Batch, f"{said_by}: expected batches from grpo.batches")


def _listed(values: Any, kind: type, expected: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{expected}, got {kind_of(values)}")
    found = list(values)
    if odd := [value for value in found if not isinstance(value, kind)]:
        raise UserError(f"{expected}, got a list with {kind_of(odd[0])}{_next_call(odd[0])}")
    return found


def _next_call(value: Any) -> str:
    return ": grpo.batches(groups) makes batches of groups" if isinstance(value, Group) else ""
