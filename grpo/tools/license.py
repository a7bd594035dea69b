"""The license of a base model, from its model card."""

from __future__ import annotations

from pathlib import Path

import yaml

from grpo.config import ModelConfig
from grpo.model.load import is_local

KEYS = ("license", "license_name", "license_link")
"""Keys of a model card's front matter. A license without a short name on the Hub is `other`, with `license_name`."""


def license_of(cfg: ModelConfig) -> dict[str, str]:
    """Return the license in a model's card, by the keys of the front matter; empty if it is unknown.

    The card is read from the model's folder, or from the Hub's cache, where it is since the model was downloaded. This
    makes no network request.
    """
    card = _card(cfg)
    try:
        said = yaml.safe_load(_front_matter(card.read_text(encoding="utf-8"))) if card is not None else None
    except (OSError, ValueError, yaml.YAMLError, RecursionError):  # the card cannot be read
        return {}
    found = {key: said[key] for key in KEYS if isinstance(said.get(key), str)} if isinstance(said, dict) else {}
    if not found.get("license_link", "https://").startswith("https://"):
        del found["license_link"]  # a relative link points to a file of the base model, which the export does not have
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
    """Return the YAML between the first two lines of `---`; empty if the text does not begin with such a line."""
    first, *lines = text.splitlines() or [""]
    return "\n".join(lines[: lines.index("---")]) if first == "---" and "---" in lines else ""
