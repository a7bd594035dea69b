"""A source of a run's tasks before the first step: its rows, its prompts and their lengths, and what to say of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest

from grpo.backend.ranks import Ranks
from grpo.data.fingerprint import fingerprint
from grpo.data.lengths import Lengths, measure_lengths
from grpo.data.prompts import PromptRenderer
from grpo.data.rows import Rows, rows_with_null
from grpo.data.stream import TaskStream, first_tasks
from grpo.data.streaming import Streamed, WindowStream, first_streamed
from grpo.runs.drawing import chosen_note
from grpo.runs.partners import Partners
from grpo.scoring.scorer import Scorer
from grpo.types import Task


@dataclass(frozen=True, slots=True)
class Feed:
    """The rows of a source, and what makes tasks of them."""

    name: str
    rows: Rows | Streamed
    renderer: PromptRenderer

    def first(self, n: int, most: int | None = None) -> list[Task]:
        """The first `n` tasks in the rows' own order; of streamed rows fewer where the first `most` have no more.
        Raises UserError where there are none."""
        if isinstance(self.rows, Streamed):
            return first_streamed(self.rows, self.renderer, n, most)
        return first_tasks(self.rows, self.renderer, n)

    def lengths(self) -> Lengths | None:
        """How long its prompts are; None where that is too much to measure. Raises UserError as `measure_lengths`."""
        return None if isinstance(self.rows, Streamed) else measure_lengths(self.rows, self.renderer)

    def stream(self, seed: int) -> TaskStream | WindowStream:
        """Its tasks without end."""
        if isinstance(self.rows, Streamed):
            return WindowStream(self.rows, self.renderer, seed)
        return TaskStream(self.rows, self.renderer, seed)

    def notes(self, lengths: Lengths | None, partners: Partners) -> list[str]:
        """How long the prompts are that the plan is made for, and the rows that are left out."""
        cfg, name, rows = self.renderer.cfg, self.name, self.rows
        limit = f"{name}.max_prompt_length ({cfg.max_prompt_length:,} tokens)"
        prompts = "prompts" if name == "data" else f"prompts of {name}"
        if isinstance(rows, Streamed):
            order = f"shuffled in windows of {cfg.window:,}" if cfg.shuffle else "taken in their own order"
            return [f"{prompts}: planned for {limit}, because rows are read as they come; they are {order}"]
        chosen = chosen_note(cfg, len(rows), name)
        if lengths is None:
            many = (
                f"{prompts}: planned for {limit}, because {len(rows):,} rows are too much text to measure at the start"
            )
            return [*chosen, many, *filter(None, [self.null_prompts()])]
        where, total = f"data {cfg.label}, {cfg.split}", f"{lengths.rows:,} rows"
        why = "an agent writes its own" if partners.are_agents else "an environment's reset may add to them"
        added = f"; planned for {limit}, because {why}" if partners.resets else ""
        notes = [*chosen, f"{prompts}: at most {lengths.longest:,} tokens, measured over all {total}{added}"]
        if lengths.too_long:
            notes.append(f"{where}: {lengths.too_long:,} of {total} are longer than {limit} and are left out")
        if lengths.null:
            notes.append(f"{where}: {lengths.null:,} of {total} have a null prompt and are left out")
        return notes

    def null_prompts(self) -> str | None:
        """What there is to say of rows without a prompt; of streamed rows nobody knows."""
        if isinstance(self.rows, Streamed):
            return None
        cfg, count = self.renderer.cfg, rows_with_null(self.rows, self.renderer.columns)
        if not count:
            return None
        return (
            f"data {cfg.label}, {cfg.split}: {count:,} of {len(self.rows):,} rows have a null prompt and are left out"
        )


def overlap_note(held_out: Feed, feeds: Sequence[Feed]) -> str | None:
    """What there is to say where the held-out rows are the rows of a source of tasks; None if they are not."""
    for feed in feeds:
        if _same_rows(held_out, feed):
            cfg = feed.renderer.cfg
            return (
                f"eval: its rows are the training rows ({cfg.label}, {cfg.split}), so the evaluation measures prompts "
                "that the model has trained on. For held-out prompts, name other rows (eval.source, eval.split)"
            )
    return None


def _same_rows(one: Feed, other: Feed) -> bool:
    """Whether two feeds have the same rows, by their settings or by the rows themselves; streamed rows only by
    settings."""
    first, second = (feed.renderer.cfg for feed in (one, other))
    names = ("source", "use", "kwargs", "config", "revision", "split")
    if all(getattr(first, name) == getattr(second, name) for name in names):
        return True
    if isinstance(one.rows, Streamed) or isinstance(other.rows, Streamed) or len(one.rows) != len(other.rows):
        return False
    return fingerprint(one.rows) == fingerprint(other.rows)


def first_of(feeds: Sequence[Feed], n: int, scorer: Scorer, partners: Partners) -> list[Task]:
    """The first `n` tasks of all sources, one of each in turn.

    Raises UserError where a source has none, and for rewards and environments that cannot be called with its columns.
    """
    first = [feed.first(n, feed.renderer.cfg.window) for feed in feeds]
    for feed, tasks in zip(feeds, first, strict=True):
        scorer.check(tasks[0].columns, feed.name)
        partners.check(feed.name, tasks)
    return [task for task in chain.from_iterable(zip_longest(*first)) if task is not None][:n]


def lengths_of(feeds: Sequence[Feed], ranks: Ranks) -> list[Lengths | None]:
    """How long the prompts of each source are: the same in all processes, or it is an error."""
    lengths = [feed.lengths() for feed in feeds]
    for feed, measured in zip(feeds, lengths, strict=True):
        ranks.check_same(f"the prompts of {feed.name}", measured)
    return lengths


def longest_of(feeds: Sequence[Feed], lengths: Sequence[Lengths | None], partners: Partners) -> tuple[int, int]:
    """Tokens of the longest prompt that is trained on, and how many of them may be a row's own: of agents, all.

    The limit is taken where lengths are not known, or not to be relied on because environments' `reset` adds to
    prompts, or agents write them.
    """
    limits = [feed.renderer.cfg.max_prompt_length for feed in feeds]
    found = zip(limits, lengths, strict=True)
    longest = max(limit if known is None or partners.resets else known.longest for limit, known in found)
    shortest = min(known.shortest if known and not partners.are_agents else 0 for known in lengths)
    return longest, longest - shortest if partners.resets else 0
