"""A source of a run's tasks before the first step: its rows, its prompts, their lengths, and notes for the plan."""

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
from grpo.plugins import SESSION
from grpo.runs.drawing import chosen_note
from grpo.runs.partners import Partners
from grpo.scoring.scorer import Scorer
from grpo.types import Task


@dataclass(frozen=True, slots=True)
class Feed:
    """The rows of a source, and the renderer that turns them into tasks."""

    name: str
    rows: Rows | Streamed
    renderer: PromptRenderer

    def first(self, n: int, most: int | None = None) -> list[Task]:
        """The first `n` tasks in the order of the rows. Streamed rows may give fewer: only the first `most` are read.

        Raises UserError if there are no tasks.
        """
        if isinstance(self.rows, Streamed):
            return first_streamed(self.rows, self.renderer, n, most)
        return first_tasks(self.rows, self.renderer, n)

    def lengths(self) -> Lengths | None:
        """The lengths of the prompts; None if the rows are streamed or too much text to measure.

        Raises UserError as `measure_lengths` does.
        """
        return None if isinstance(self.rows, Streamed) else measure_lengths(self.rows, self.renderer)

    def stream(self, seed: int) -> TaskStream | WindowStream:
        """An endless stream of the source's tasks."""
        if isinstance(self.rows, Streamed):
            return WindowStream(self.rows, self.renderer, seed)
        return TaskStream(self.rows, self.renderer, seed)

    def notes(self, lengths: Lengths | None, partners: Partners) -> list[str]:
        """Notes on the prompt length that the plan assumes, and on rows that are left out."""
        cfg, name, rows = self.renderer.cfg, self.name, self.rows
        limit = f"{name}.max_prompt_length ({cfg.max_prompt_length:,} tokens)"
        prompts = "prompts" if name == "data" else f"prompts of {name}"
        if isinstance(rows, Streamed):
            order = f"shuffled in windows of {cfg.window:,}" if cfg.shuffle else "used in their order"
            return [f"{prompts}: planned for {limit}, because rows are streamed; they are {order}"]
        chosen = chosen_note(cfg, len(rows), name)
        if lengths is None:
            many = f"{prompts}: planned for {limit}, because {len(rows):,} rows are too much text to measure at startup"
            return [*chosen, many, *filter(None, [self.null_prompts()])]
        where, total = f"data {cfg.label}, {cfg.split}", f"{lengths.rows:,} rows"
        why = "agents write their own prompts" if partners.are_agents else "an environment's reset may lengthen them"
        added = f"; planned for {limit}, because {why}" if partners.resets else ""
        notes = [*chosen, f"{prompts}: at most {lengths.longest:,} tokens, measured over all {total}{added}"]
        if lengths.too_long:
            notes.append(f"{where}: {lengths.too_long:,} of {total} are longer than {limit} and are left out")
        if lengths.null:
            notes.append(f"{where}: {lengths.null:,} of {total} have a null prompt and are left out")
        return notes

    def null_prompts(self) -> str | None:
        """A note on rows with a null prompt; None if there are none, or if the rows are streamed (not counted)."""
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
    settings. The settings of Python objects do not tell one object from another."""
    first, second = (feed.renderer.cfg for feed in (one, other))
    names = ("source", "use", "kwargs", "config", "revision", "split")
    is_object = (first.use or "").startswith(f"{SESSION}:")
    if not is_object and all(getattr(first, name) == getattr(second, name) for name in names):
        return True
    if isinstance(one.rows, Streamed) or isinstance(other.rows, Streamed) or len(one.rows) != len(other.rows):
        return False
    return fingerprint(one.rows) == fingerprint(other.rows)


def first_of(feeds: Sequence[Feed], n: int, scorer: Scorer, partners: Partners) -> list[Task]:
    """The first `n` tasks of all sources, one from each source in turn.

    Raises UserError if a source has no tasks, and for rewards and environments that cannot be called with its columns.
    """
    first = [feed.first(n, feed.renderer.cfg.window) for feed in feeds]
    for feed, tasks in zip(feeds, first, strict=True):
        scorer.check(tasks[0].columns, feed.name)
        partners.check(feed.name, tasks)
    return [task for task in chain.from_iterable(zip_longest(*first)) if task is not None][:n]


def lengths_of(feeds: Sequence[Feed], ranks: Ranks) -> list[Lengths | None]:
    """The prompt lengths of each source. They must be the same in all processes, or it is an error."""
    lengths = [feed.lengths() for feed in feeds]
    for feed, measured in zip(feeds, lengths, strict=True):
        ranks.check_same(f"the prompts of {feed.name}", measured)
    return lengths


def longest_of(feeds: Sequence[Feed], lengths: Sequence[Lengths | None], partners: Partners) -> tuple[int, int]:
    """Tokens of the longest prompt to train on, and how many of them a completion may not share with its group.

    The longest prompt counts as `max_prompt_length` if lengths are unknown, or if environments' `reset` may lengthen
    prompts or agents write them. With agents, nothing is shared; with `reset`, the length of the shortest prompt is.
    """
    limits = [feed.renderer.cfg.max_prompt_length for feed in feeds]
    found = zip(limits, lengths, strict=True)
    longest = max(limit if known is None or partners.resets else known.longest for limit, known in found)
    shortest = min(known.shortest if known and not partners.are_agents else 0 for known in lengths)
    return longest, longest - shortest if partners.resets else 0
