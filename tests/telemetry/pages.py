"""What is in a report's page."""

import json
import re
from typing import Any


def data_in(page: str) -> dict[str, Any]:
    """The data of a page, as a browser finds it: the text of its block, up to the first end tag."""
    (block,) = re.findall(r'<script type="application/json" id="data">(.*?)</script', page, re.DOTALL)
    data: dict[str, Any] = json.loads(block)
    return data


def plots_in(data: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The plots by section and title."""
    return {(plot["section"], plot["title"]): plot for plot in data["plots"]}


def rows_in(data: dict[str, Any], run: int = 0) -> list[dict[str, Any]]:
    """The completions of a run, each with its prompt's messages and its task in the place of their numbers."""
    told = data["runs"][run]["completions"]
    return [
        row | {"prompt": told["prompts"][row["prompt"]], "task": told["tasks"][row["task"]]} for row in told["rows"]
    ]
