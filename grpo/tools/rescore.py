"""Applies a new or changed reward to a run's stored completions, to show what would have changed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from statistics import correlation, fmean

from rich.table import Table

from grpo.config import RewardConfig
from grpo.environments.shown import transcript
from grpo.errors import UserError
from grpo.recipes import load_recipe
from grpo.runs.checkpoint import RECIPE
from grpo.runs.completions import read_completions, stored_steps
from grpo.runs.folder import COMPLETIONS, check_is_run
from grpo.runs.sections import only_of, text_system
from grpo.scoring.applying import ALL, Applying
from grpo.scoring.hosted import NoEnvironmentsError
from grpo.scoring.judge import SELF
from grpo.scoring.scorer import Scorer
from grpo.types import Group, Rollout

TOTAL = "reward"
"""The name of the weighted sum of a run's rewards, as a score to compare with."""


@dataclass(frozen=True, slots=True)
class Rescored:
    """One completion with its stored score and its new score."""

    step: int
    text: str
    before: float | None
    now: float | None
    failure: str | None


@dataclass(frozen=True, slots=True)
class Rescoring:
    """Every stored completion of a run under the new reward.

    `against` is the stored score to compare with; `other_best` is the number of `groups` whose best completion changes.
    """

    against: str
    completions: list[Rescored]
    groups: int
    other_best: int

    def lines(self, examples: int) -> list[str]:
        """Return lines with the totals, and then the `examples` completions whose score changes most."""
        both = [(c.before, c.now) for c in self.completions if c.before is not None and c.now is not None]
        changed = [c for c in self.completions if c.before != c.now]
        failed = [c for c in self.completions if c.failure is not None]
        lines = [
            f"{len(changed)} of {len(self.completions)} completions get a different score; {len(failed)} failures; "
            f"correlation {_correlation(both)}",
            f"{self.other_best} of {self.groups} groups would have a different best completion",
        ]
        most = sorted(changed, key=lambda c: -abs((c.now or 0.0) - (c.before or 0.0)))[:examples]
        lines += [f"step {c.step}: {_number(c.before)} -> {_number(c.now)}  {c.text[:160]!r}" for c in most]
        return lines + ([f"first failure: {failed[0].failure}"] if failed else [])


def rescore(run: Path, config: RewardConfig, against: str | None) -> Rescoring:
    """Call a reward on every stored completion of `run`.

    `against` is the stored score to compare with: by default the score of the same name, or else the weighted sum. A
    reward with the name of one of the run's rewards is called only on the completions that the run's reward scored.
    Raises UserError for a folder without stored completions, and for a reward that cannot be loaded or called.
    """
    check_is_run(run)
    paths = stored_steps(run / COMPLETIONS)
    if not paths:
        raise UserError(f"{run}: the run has stored no completions (see log.completions in its recipe)")
    cfg = load_recipe(run / RECIPE)
    with closing(_scorer(config, text_system(cfg))) as scorer:
        (name,) = scorer.rewards
        own, checked = Applying(only_of(cfg)), set[str]()
        completions: list[Rescored] = []
        groups = other_best = 0
        for path in paths:
            step, groups_of_step = read_completions(path)
            stored = [group for group in groups_of_step if not group.replayed]  # replayed groups are in an earlier file
            applies = own if stored and name in stored[0].rollouts[0].scores else ALL
            stored = [stored[place] for place in applies.groups(name, stored)]
            if not stored:
                continue
            column = _column(stored, name, against)
            for task in (group.task for group in stored):
                if task.source not in checked:
                    scorer.check(list(task.columns), task.source)
                    checked.add(task.source)
            for before, now in zip(stored, scorer.score(stored), strict=True):
                pairs = [
                    _rescored(step, a, b, column, name) for a, b in zip(before.rollouts, now.rollouts, strict=True)
                ]
                completions += pairs
                groups += 1
                other_best += _best([c.before for c in pairs]).isdisjoint(_best([c.now for c in pairs]))
    if not completions:
        raise UserError(f"{run}: {name!r} scores none of the tasks whose completions the run has stored")
    return Rescoring(column, completions, groups, other_best)


def _scorer(config: RewardConfig, system: str | None) -> Scorer:
    if config.judges:
        raise UserError(SELF)
    try:
        return Scorer.of([config], system=system)
    except NoEnvironmentsError as error:
        raise UserError(
            f"reward {config.use!r} takes `environments`, but the environments of stored conversations no longer exist,"
            " so it cannot score them again"
        ) from error


def rescore_table(result: Rescoring) -> Table:
    """Return a table of the mean scores per step, stored and new."""
    table = Table()
    for heading in ("step", f"{result.against}, as stored", "now", "scored", "changed"):
        table.add_column(heading, justify="right")
    for step, rows in _by_step(result.completions):
        table.add_row(
            str(step),
            _mean([c.before for c in rows]),
            _mean([c.now for c in rows]),
            f"{sum(c.now is not None for c in rows)} of {len(rows)}",
            str(sum(c.before != c.now for c in rows)),
        )
    return table


def _column(groups: Sequence[Group], name: str, against: str | None) -> str:
    known = [*groups[0].rollouts[0].scores, TOTAL]
    if against is not None and against not in known:
        raise UserError(f"--against {against}: this run stored {', '.join(known)}")
    return against or (name if name in known else TOTAL)


def _rescored(step: int, before: Rollout, now: Rollout, column: str, name: str) -> Rescored:
    stored = before.reward if column == TOTAL else before.scores.get(column)
    failure = now.failures.get(name)
    return Rescored(step, transcript(before), stored, now.scores[name], None if failure is None else str(failure))


def _best(scores: Sequence[float | None]) -> set[int]:
    """Return the indices of the best scores; all indices if there is no score, so that nothing counts as changed."""
    known = [score for score in scores if score is not None]
    return {i for i, score in enumerate(scores) if not known or score == max(known)}


def _by_step(completions: Sequence[Rescored]) -> Iterator[tuple[int, list[Rescored]]]:
    for step in dict.fromkeys(c.step for c in completions):
        yield step, [c for c in completions if c.step == step]


def _mean(scores: Sequence[float | None]) -> str:
    known = [score for score in scores if score is not None]
    return f"{fmean(known):.4f}" if known else "none"


def _number(score: float | None) -> str:
    return "none" if score is None else f"{score:g}"


def _correlation(pairs: Sequence[tuple[float, float]]) -> str:
    """Return Pearson's correlation as text, or why it is undefined."""
    if len(pairs) < 2 or any(len(set(side)) < 2 for side in zip(*pairs, strict=True)):
        return "undefined (a side is constant)"
    before, now = zip(*pairs, strict=True)
    return f"{correlation(before, now):.3f}"
