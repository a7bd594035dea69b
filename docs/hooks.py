"""MkDocs' hooks: pages that are not files of docs/pages, and links as the site has them."""

from __future__ import annotations

import sys
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

sys.path.insert(0, str(Path(__file__).parent))
import manual

_made: dict[str, str] = {}


def on_files(files: Files, config: MkDocsConfig) -> Files:
    _made.clear()
    _made.update(manual.pages())
    for place, text in _made.items():
        if files.get_file_from_path(place) is None:
            shown = InclusionLevel.NOT_IN_NAV if place.startswith("source/") else InclusionLevel.UNDEFINED
            files.append(File.generated(config, place, content=text, inclusion=shown))
    for at in manual.copied():
        files.append(File.generated(config, manual.place_of(at), abs_src_path=str(manual.ROOT / at)))
    return files


def on_page_read_source(page: Page, config: MkDocsConfig) -> str | None:  # noqa: ARG001
    return _made.get(page.file.src_uri)
