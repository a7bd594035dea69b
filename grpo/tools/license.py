"""The license of a base model, as its own card says it."""

from __future__ import annotations

from pathlib import Path

import yaml

from grpo.config import ModelConfig
from grpo.model.load import is_local

KEYS = ("license", "license_name", "license_link")
"""What a model card's front matter says of it; a license that the Hub has no short name for is `other`, with a name."""


def license_of(cfg: ModelConfig) -> dict[str, str]:
    """What the card of a model says of its license, by the front matter's keys; nothing where that is not known.

    The card is the one beside the model's files: in its folder, or in the Hub's cache, which has it since the model was
    fetched. Nobody is asked.
    """
    card = _card(cfg)
    try:
        said = yaml.safe_load(_front_matter(card.read_text(encoding="utf-8"))) if card is not None else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # a card that cannot be read says nothing
        return {}
    found = {key: said[key] for key in KEYS if isinstance(said.get(key), str)} if isinstance(said, dict) else {}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]  # of a file beside the base, not beside what the card is for
    return found if "license" in found else {}


def _card(cfg: ModelConfig) -> Path | None:
    if cfg.name.startswith("builtin:"):
        return None
    if is_local(cfg):
        return Path(cfg.name).expanduser() / "README.md"
    from huggingface_hub import try_to_load_from_cache

    found: object = try_to_load_from_cache(cfg.name, "README.md", revision=cfg.revision)
    return Path(found) if isinstance(found, str) else None


def _front_matter(text: str) -> str:
    """The YAML between the first two lines of `---`; nothing where a text does not begin with one."""
    first, *lines = text.splitlines() or [""]
    return "\n".join(lines[: lines.index("---")]) if first == "---" and "---" in lines else ""
