"""Makes the README for package indexes, where relative links and images do not work. Hatchling calls it in a build.

If pyproject.toml has a URL named Source, links point there. Otherwise links become plain text and images are removed.
"""

from __future__ import annotations

import re
from pathlib import Path

from hatchling.metadata.plugin.interface import MetadataHookInterface


class CustomMetadataHook(MetadataHookInterface):
    """Adds the README to the package's metadata."""

    def update(self, metadata: dict) -> None:
        text = (Path(self.root) / "README.md").read_text(encoding="utf-8")
        source = metadata.get("urls", {}).get("Source")
        metadata["readme"] = {"content-type": "text/markdown", "text": published(text, source)}


def published(text: str, source: str | None) -> str:
    """The text with links that work on any site. `source` is the address of the repository's files, if there is one."""
    relative = r"\[([^\[\]]*)\]\((?![a-z]+:)([^)]+)\)"
    if source is not None:
        return re.sub(rf"(!?){relative}", rf"\1[\2]({source.rstrip('/')}/\3)", text)
    return re.sub(relative, r"\1", re.sub(rf"!{relative}\n+", "", text))
