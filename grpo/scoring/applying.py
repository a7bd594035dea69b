"""Decides which rewards score which tasks: every reward, unless a data source lists its own rewards."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from grpo.errors import UserError, did_you_mean
from grpo.types import Group


@dataclass(frozen=True, slots=True)
class Applying:
    """The rewards that score each data source.

    `only` maps a source's name to the names of its rewards. Every reward scores the tasks of a source that is not in
    `only`.
    """

    only: Mapping[str, Collection[str]] = field(default_factory=dict)

    def __call__(self, reward: str, source: str) -> bool:
        """Whether a reward scores the tasks of a source."""
        return source not in self.only or reward in self.only[source]

    def groups(self, reward: str, groups: Sequence[Group]) -> list[int]:
        """The indices of the groups that a reward scores."""
        return [place for place, group in enumerate(groups) if self(reward, group.task.source)]

    def check(self, rewards: Collection[str]) -> None:
        """Raise UserError if a source lists a reward that the recipe does not have."""
        for source, names in self.only.items():
            for name in names:
                if name not in rewards:
                    raise UserError(
                        f"data.sources, {source!r}: the recipe has no reward {name!r}. Its rewards: "
                        f"{', '.join(rewards)}.{did_you_mean(name, rewards)}"
                    )


ALL = Applying()
"""Every reward scores every task."""
