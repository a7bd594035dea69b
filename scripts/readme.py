"""The README for package indexes, where relative links and images lead nowhere. Hatchling calls this when it builds.

With a URL named Source in pyproject.toml, links lead there. Without one they become plain text and images are left out.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """Gives the package's metadata its README."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": published(text, source)}


def published(text: str, source: str | None) -> str:
    """The text with links that work anywhere. `source` is the address of the repository's files, if there is one."""
    relative = r"\[([^\[\]]*)\]\((?![a-z]+:)([^)]+)\)"
    if source is not None:
        return re.sub(rf"(!?){relative}", rf"\1[\2]({source.rstrip('/')}/\3)", text)
    return re.sub(relative, r"\1", re.sub(rf"!{relative}\n+", "", text))
