"""What training changes: the arrays and counts that a trainer needs to go on."""

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
"""The arrays of what `rollout.reuse` keeps: absent while nothing is kept, and of any size."""
AHEAD = "groups_ahead"
"""The arrays of what was sampled for the next step (`ranks`): absent where nothing was, and of any size."""
OF_GROUPS = frozenset({OLDER, AHEAD})
"""The arrays that hold groups, and nothing that trains."""


@dataclass(frozen=True, slots=True)
class TrainerState:
    """What training changes.

    `arrays` by file and path, in the dtypes they train in: `adapters`, the `optimizer`'s step and moments, and groups
    that are kept. `counts` is what rooms count, as JSON holds it: the `tasks`' cursor, and what the
    `scorer` has seen of failures.
    """

    arrays: Mapping[str, Arrays]
    counts: Mapping[str, Any]

    def without_groups(self) -> TrainerState:
        """The same without groups that are kept."""
        return TrainerState({key: arrays for key, arrays in self.arrays.items() if key not in OF_GROUPS}, self.counts)

    def finish(self) -> None:
        """Read the arrays that other processes wait for. See `Joined`."""
        for arrays in self.arrays.values():
            if isinstance(arrays, Joined):
                arrays.finish()

    def check_fits(self, other: TrainerState) -> None:
        """Raise UserError if this is not a state of the trainer that `other` is a state of.

        It may lack the reference: a run that never asked for it has not moved it, so it is what it was at the start.
        """
        for name, arrays in other.arrays.items():
            if name in OF_GROUPS or (name == REFERENCE and name not in self.arrays):
                continue
            shapes = {path: array.shape for path, array in self.arrays.get(name, {}).items()}
            if shapes != {path: array.shape for path, array in arrays.items()}:
                raise UserError(f"resume: the checkpoint's {name}: other arrays or shapes than this recipe's")
