"""What the door's functions say of an argument that is of another kind than theirs, before they use it."""

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
"""Names that other libraries, or a recipe, have for arguments of the door."""
REMARKS = {"scale": " PEFT's alpha is scale × rank."}


def kind_of(value: Any) -> str:
    """A value's type, for a message: "a str", "an int"."""
    name = type(value).__name__
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def unknown_setting(said_by: str, name: str, known: Iterable[str], beside: Iterable[str] = ()) -> UserError:
    """The error for a setting that does not exist. `known` are those that do, `beside` the function's own arguments."""
    known = sorted(known)
    meant = OTHER_NAMES.get(name)
    if meant in {*known, *beside}:
        hint = f" Did you mean {meant!r}?{REMARKS.get(str(meant), '')}"
    else:
        hint = did_you_mean(name, [*known, *beside])
    return UserError(f"{said_by}: unknown setting {name}; there is {', '.join(known)}.{hint}")


def unknown_argument(said_by: str, name: str, signature: Signature, trls: Mapping[str, str]) -> UserError:
    """The error for an argument that is not in a signature. `trls` are TRL's names, and what they are called there."""
    there = f"{said_by}: there is no argument {name!r}"
    if name in trls:
        return UserError(f"{there}: TRL's {name} is {trls[name]} here, as {said_by}(..., {trls[name]}=...)")
    if (found := answer(name)) is not None:
        return UserError(f"{there}: {found.sentence(name)} A recipe has such settings: grpo.recipe(...)")
    known = [one.name for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
    return UserError(f"{there}; there is {', '.join(known)}.{did_you_mean(name, known)}")


def whole_number(value: Any, what: str) -> int:
    """The value as an int. Raises UserError for what is no whole number."""
    try:
        return operator.index(value)
    except TypeError:
        raise UserError(f"{what}: expected a whole number, got {value!r}") from None


def groups_of(groups: Any, said_by: str) -> list[Group]:
    """The groups as a list. Raises UserError for one group alone, and for what holds anything else."""
    if isinstance(groups, Group):
        raise UserError(f"{said_by}: expected a list of groups, got one group: write [group]")
    return _listed(groups, Group, f"{said_by}: expected the groups that policy.sample gives")


def batches_of(batches: Any, said_by: str) -> list[Batch]:
    """One batch, or several, as a list. Raises UserError for anything else."""
    if isinstance(batches, Batch):
        return [batches]
    return _listed(batches, Batch, f"{said_by}: expected the batches that grpo.batches gives")


def _listed(values: Any, kind: type, expected: str) -> list[Any]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise UserError(f"{expected}, got {kind_of(values)}")
    found = list(values)
    if odd := [value for value in found if not isinstance(value, kind)]:
        raise UserError(f"{expected}, got a list with {kind_of(odd[0])}{_next_call(odd[0])}")
    return found


def _next_call(value: Any) -> str:
    return ": grpo.batches(groups) makes batches of groups" if isinstance(value, Group) else ""
