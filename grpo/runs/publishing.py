"""Keeps secrets out of recipes: a run copies its recipe into its folder, its checkpoints, W&B and model cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from grpo.backend.secrets import secrets
from grpo.config import Recipe
from grpo.errors import UserError

SECRET_KEY = re.compile(r"(^|[._])(api_?key|password|secret|(access|auth|bearer|hf)_token)$", re.IGNORECASE)


def check_no_secrets(cfg: Recipe) -> None:
    """Raise UserError for a text in the recipe that contains the value of a secret environment variable, or whose key
    looks like the name of a secret."""
    known = secrets()
    for name, text in _texts(cfg.model_dump(mode="json"), ""):
        variable = next((variable for variable, value in known if value in text), None)
        if variable is None and not (text and SECRET_KEY.search(name)):
            continue
        what = f"contains the value of {variable}" if variable else "looks like a secret"
        raise UserError(
            f"{name} {what}, but the recipe is copied into the run's folder, its checkpoints, W&B and model cards: "
            "remove the secret, and let your code read it from an environment variable (os.environ)"
        )


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield the dotted name and the value of each text in plain data."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
