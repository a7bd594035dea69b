"""`grpo report`: one or several runs as a self-contained HTML file."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from grpo.telemetry.page.data import page_data
from grpo.telemetry.page.text import as_json
from grpo.telemetry.recorded import RecordedRun

ASSETS = Path(__file__).with_name("page")
PLOTTING = "uplot-1.6.32"
"""The folder of the plotting library: this version of uPlot, unmodified from npm."""


def report(runs: Sequence[RecordedRun]) -> str:
    """The page about runs, as HTML."""
    return page(page_data(runs))


def page(data: dict[str, Any], live: str | None = None, seconds: float = 2.0) -> str:
    """The page that shows `data` (from `page_data`), as self-contained HTML.

    `live` is the address of the same data as JSON, relative to the page, such as `data.json`. With it, the page fetches
    the data immediately and then every `seconds` seconds until no run is running, and shows the changes.
    """
    parts = {
        "title": escape(str(data.get("title", "GRPO"))),
        "style": _asset(f"{PLOTTING}/uPlot.min.css") + _asset("style.css"),
        "license": _asset(f"{PLOTTING}/LICENSE"),
        "plotting": _asset(f"{PLOTTING}/uPlot.iife.min.js"),
        "script": "\n".join(map(_asset, ("logic.js", "plots.js", "completions.js", "main.js"))),
        "live": "" if live is None else escape(live),
        "seconds": f"{seconds:g}",
        "data": as_json(data),
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], _asset("index.html"))


def _asset(name: str) -> str:
    return (ASSETS / name).read_text(encoding="utf-8")
