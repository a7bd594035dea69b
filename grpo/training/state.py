"""The state of training: the arrays and counts that a trainer needs to resume."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from grpo.errors import UserError
from grpo.model.adapters import REFERENCE
from grpo.model.joined import Joined

Arrays = Mapping[str, mx.array]

OLDER = "older_groups"
"""Key of the arrays of groups that `rollout.reuse` keeps: absent if there are none, and of any size."""
AHEAD = "groups_ahead"
"""Key of the arrays of groups that were sampled for the next step (`ranks`): absent if there are none, of any size."""
OF_GROUPS = frozenset({OLDER, AHEAD})
"""Keys of arrays that hold groups, not trained values."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """The state of training.

    arrays  by file and path, in the dtypes of training: `adapters`, the `optimizer`'s step and moments, kept groups
    counts  data for JSON: the cursor of the `tasks`, the `scorer`'s records of failures, counters of updates
    """

    arrays: Mapping[str, Arrays]
    counts: Mapping[str, Any]

    def without_groups(self) -> TrainerState:
        """The state without kept groups."""
        return TrainerState({key: arrays for key, arrays in self.arrays.items() if key not in OF_GROUPS}, self.counts)

    def finish(self) -> None:
        """Read the arrays that other processes wait for. See `Joined`."""
        for arrays in self.arrays.values():
            if isinstance(arrays, Joined):
                arrays.finish()

    def check_fits(self, other: TrainerState) -> None:
        """Raise UserError if this state does not fit the trainer that `other` is a state of.

        It may lack the reference: a run that did not use the reference never moved it from its start.
        """
        for name, arrays in other.arrays.items():
            if name in OF_GROUPS or (name == REFERENCE and name not in self.arrays):
                continue
            shapes = {path: array.shape for path, array in self.arrays.get(name, {}).items()}
            if shapes != {path: array.shape for path, array in arrays.items()}:
                raise UserError(
                    f"resume: the checkpoint's file {name} has other arrays or shapes than this recipe needs"
                )
