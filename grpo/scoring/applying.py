"""Which rewards score which tasks: all of them, unless a source of tasks names its own."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from grpo.errors import UserError, did_you_mean
from grpo.types import Group


@dataclass(frozen=True, slots=True)
class Applying:
    """`only` has the names of the rewards that score the tasks of a source, by the source's name. Those of a source
    that is not in it are scored by all."""

    only: Mapping[str, Collection[str]] = field(default_factory=dict)

    def __call__(self, reward: str, source: str) -> bool:
        """Whether a reward scores the tasks of a source."""
        return source not in self.only or reward in self.only[source]

    def groups(self, reward: str, groups: Sequence[Group]) -> list[int]:
        """The places of the groups that a reward scores."""
        return [place for place, group in enumerate(groups) if self(reward, group.task.source)]

    def check(self, rewards: Collection[str]) -> None:
        """Raise UserError for a name that no reward has."""
        for source, names in self.only.items():
            for name in names:
                if name not in rewards:
                    raise UserError(
                        f"data.sources, {source!r}: the recipe has no reward {name!r}; there is {', '.join(rewards)}."
                        f"{did_you_mean(name, rewards)}"
                    )


ALL = Applying()
"""Every reward scores every task."""
