"""What may not stand in a recipe, because a run copies it: into its folder, its checkpoints, W&B and model cards."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from grpo.backend.secrets import secrets
from grpo.config import Recipe
from grpo.errors import UserError

SECRET_KEY = re.compile(r"(^|[._])(api_?key|password|secret|(access|auth|bearer|hf)_token)$", re.IGNORECASE)


def check_no_secrets(cfg: Recipe) -> None:
    """Raise UserError for a text in the recipe that holds a secret of the environment, or that is named like one."""
    known = secrets()
    for name, text in _texts(cfg.model_dump(mode="json"), ""):
        variable = next((variable for variable, value in known if value in text), None)
        if variable is None and not (text and SECRET_KEY.search(name)):
            continue
        what = f"holds the value of {variable}" if variable else "looks like a secret"
        raise UserError(
            f"{name} {what}, and a recipe is copied into the run's folder, its checkpoints, W&B and model cards: leave "
            "it out, and have your code read the environment variable that holds it (os.environ)"
        )


def _texts(value: Any, name: str) -> Iterator[tuple[str, str]]:
    """The texts in plain data by their dotted names."""
    if isinstance(value, str):
        yield name, value
    elif isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _texts(inner, f"{name}.{key}" if name else str(key))
