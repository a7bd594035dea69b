"""Measures the prompts of a dataset: all are rendered once, and the result is cached for the next start."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path

from grpo.backend.cache import cache_folder
from grpo.data.fingerprint import fingerprint
from grpo.data.prompts import PromptRenderer
from grpo.data.rows import Rows
from grpo.data.stream import all_too_long

MOST_ROWS, MOST_TOKENS = 50_000, 20_000_000
"""Most rows and tokens that are rendered at startup, once, in about 20 seconds. For more text, memory is planned by
`max_prompt_length`."""
VERSION = 2
"""Increase this when the same rows and settings give different prompts."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of all prompts: `longest` and `shortest` in tokens, of the prompts that fit, and the number of rows that
    are dropped because the prompt is too long or null."""

    rows: int
    longest: int
    shortest: int
    too_long: int
    null: int


def measure_lengths(rows: Rows, renderer: PromptRenderer) -> Lengths | None:
    """The lengths of all prompts, or None if there are more than `MOST_ROWS` rows or `MOST_TOKENS` tokens.

    Raises UserError for a row that `PromptRenderer.task` rejects, and if no prompt fits. Results are stored in the
    cache folder, by the contents of the rows, the tokenizer and the settings.
    """
    if len(rows) > MOST_ROWS:
        return None
    kept = _place(rows, renderer)
    if kept is not None and kept.is_file():
        try:
            return _read(kept)
        except (OSError, ValueError, TypeError):
            log.debug("%s is damaged: measuring again", kept)
    found = _measured(rows, renderer)
    if kept is not None:
        _write(kept, found)
    return found


def _measured(rows: Rows, renderer: PromptRenderer) -> Lengths | None:
    shortest, longest, too_long, null, tokens = renderer.cfg.max_prompt_length, 0, 0, 0, 0
    for index in range(len(rows)):
        task = renderer.task(index, rows[index])
        if task is None:
            null += 1
            continue
        tokens += len(task.prompt_ids)
        if tokens > MOST_TOKENS:
            return None
        if renderer.fits(task):
            longest, shortest = max(longest, len(task.prompt_ids)), min(shortest, len(task.prompt_ids))
        else:
            too_long += 1
    if longest == 0:
        raise all_too_long(renderer)
    return Lengths(len(rows), longest, shortest, too_long, null)


def _place(rows: Rows, renderer: PromptRenderer) -> Path | None:
    """The cache file for these lengths; None for a tokenizer that cannot be identified."""
    tokenizer = renderer.identity
    if tokenizer is None:
        return None
    cfg = renderer.cfg
    settings = cfg.prompt, cfg.system, cfg.chat_template, cfg.continue_final_message, cfg.max_prompt_length
    template_arguments = cfg.chat_template_kwargs, renderer.tools
    parts = VERSION, fingerprint(rows), tokenizer, renderer.vocabulary, settings, template_arguments
    digest = hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:24]
    return cache_folder() / "lengths" / f"{digest}.json"


def _read(path: Path) -> Lengths | None:
    found = json.loads(path.read_text(encoding="utf-8"))
    return None if found is None else Lengths(**found)


def _write(path: Path, found: Lengths | None) -> None:
    """Write the lengths atomically. If the file cannot be written, the next start measures again."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, aside = tempfile.mkstemp(dir=path.parent)
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(found and asdict(found), file)
        os.replace(aside, path)
    except OSError as error:
        log.debug("the lengths of prompts could not be stored in %s: %s", path, error)
