"""The manual's pages as the site has them: docs/pages, the generated reference, and the files that pages link to.

Links are written from file to file, so that they also work where the repository is read.
"""

from __future__ import annotations

import posixpath
import re
import sys
import unicodedata
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from grpo.config.describe import settings

sys.path.insert(0, str(Path(__file__).parent))
from reference import anchor
from reference import pages as generated

ROOT = Path(__file__).parents[1]
PAGES = "docs/pages"
PLACES = {
    "recipes/README.md": "recipes/index.md",
    "recipes/LONG_COMPLETIONS.md": "recipes/long-completions.md",
    "scripts/benchmarks/RESULTS.md": "results/benchmarks.md",
    "scripts/benchmarks/LEARNING.md": "results/learning.md",
}
"""Pages that are kept elsewhere in the repository, and where the site has them."""
LANGUAGES = {".py": "python", ".yaml": "yaml", ".toml": "toml", "": "bash"}
AS_THEY_ARE = {".svg", ".png", ".ipynb", ".json"}
"""Suffixes of files that are copied unchanged."""

FENCED = r"(^ *(?:`{3,}|~{3,})[\s\S]*?^ *(?:`{3,}|~{3,}) *$)"
LINK = re.compile(r"(!?\[(?:[^\[\]]|\[[^\[\]]*\])*\]\()(<?)([^)\s>]+)(>?\))")


def pages() -> dict[str, str]:
    """Every page by its place in the site, links rewritten; what is linked to is there, too."""
    made = {}
    for place, (at, text) in gathered().items():
        written = (
            with_settings_linked(text, at) if place.count("/") < 2 and not place.startswith("reference/") else text
        )
        made[place] = rewritten(written, lambda link, at=at: in_site(at, link))
    return made


def with_settings_linked(text: str, at: str) -> str:
    """The text with each setting in code font (`loss.beta`, `loss.beta: 0.1`) a link to its place in the reference."""
    keys = {setting.key for setting in settings() if "." in setting.key}
    page = posixpath.relpath(f"{PAGES}/reference/settings.md", posixpath.dirname(at))

    def linked(found: re.Match[str]) -> str:
        key = re.split(r"[:=]", found[1])[0]
        return f"[{found[0]}]({page}#{anchor(key)})" if key in keys else found[0]

    parts = re.split(FENCED, text, flags=re.MULTILINE)
    parts[::2] = [
        "\n".join(
            line if line.startswith(("#", "title:")) else re.sub(r"(?<![\[`])`([^`\n]+)`(?![\]`])", linked, line)
            for line in part.split("\n")
        )
        for part in parts[::2]
    ]
    return "".join(parts)


def gathered() -> dict[str, tuple[str, str]]:
    """Every page by its place in the site: the file that it comes from, and the text of that file."""
    waiting = [str(path.relative_to(ROOT)) for path in sorted((ROOT / PAGES).rglob("*.md"))] + [*PLACES]
    found = {place: (f"{PAGES}/{place}", text) for place, text in generated().items()}
    known = {at for at, _ in found.values()} | {*waiting}
    while waiting:
        at = waiting.pop()
        text = text_of(at)
        found[place_of(at)] = at, text
        linked = {path for _, path, _ in links(at, text) if path} - known
        files = {path for path in linked if (ROOT / path).is_file() and Path(path).suffix not in AS_THEY_ARE}
        known |= files
        waiting += sorted(files)
    return found


def copied() -> set[str]:
    """The images and notebooks outside of docs/pages that pages show or link to."""
    linked = {path for at, text in gathered().values() for _, path, _ in links(at, text) if path}
    return {path for path in linked if Path(path).suffix in AS_THEY_ARE and not path.startswith(f"{PAGES}/")}


def text_of(at: str) -> str:
    """A page's text; code is shown as a page with a block of it."""
    text = (ROOT / at).read_text(encoding="utf-8")
    if at.endswith(".md"):
        return text
    fence = "`" * (3 + max((len(run) for run in re.findall(r"^`{3,}", text, re.MULTILINE)), default=0))
    head = "---\nsearch: {exclude: true}\n---\n"
    return f"{head}# `{at}`\n\n{fence}{LANGUAGES.get(Path(at).suffix, 'text')}\n{text.rstrip()}\n{fence}\n"


def place_of(at: str) -> str:
    """Where in the site a file of the repository is."""
    if at.startswith(f"{PAGES}/"):
        return at.removeprefix(f"{PAGES}/")
    if at in PLACES:
        return PLACES[at]
    suffix = Path(at).suffix
    return f"source/{at}" if suffix in AS_THEY_ARE or suffix == ".md" else f"source/{at}.md"


def in_site(at: str, link: str) -> str:
    """A link of the file `at`, as the page that is made of it has it."""
    path, anchor = resolved(at, link)
    if path is None or path == at:
        return link
    return posixpath.relpath(place_of(path), posixpath.dirname(place_of(at)) or ".") + anchor


def links(at: str, text: str) -> Iterator[tuple[str, str | None, str]]:
    """Each link of a page: its text in the page, the file that it names (None outside the project), and its anchor."""
    found: list[str] = []
    rewritten(text, lambda link: found.append(link) or link)
    for link in found:
        yield link, *resolved(at, link)


def resolved(at: str, link: str) -> tuple[str | None, str]:
    """The file that a link names, by its path in the repository, and the anchor with its `#`."""
    if re.match(r"[a-z][a-z0-9+.-]*:", link):
        return None, ""
    path, hash_, anchor = link.partition("#")
    whole = posixpath.normpath(posixpath.join(posixpath.dirname(at), path)) if path else at
    return whole, hash_ + anchor


@cache
def anchors(text: str) -> set[str]:
    """The ids of a page's headings, and those that it writes as HTML."""
    bare = re.sub(FENCED, "", text, flags=re.MULTILINE)
    found, seen = set(re.findall(r'\bid="([^"]+)"', bare)), dict[str, int]()
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", bare, re.MULTILINE):
        if given := re.search(r"\{#([^ }]+)\}$", heading):
            found.add(given[1])
            continue
        plain = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        ascii_ = unicodedata.normalize("NFKD", plain).encode("ascii", "ignore").decode()
        slug = re.sub(r"[-\s]+", "-", re.sub(r"[^\w\s-]", "", ascii_).strip().lower())
        count = seen[slug] = seen.get(slug, -1) + 1
        found.add(f"{slug}_{count}" if count else slug)
    return found


def dead_links(more: dict[str, str] | None = None) -> list[str]:
    """Links of any page to a file or heading that is not there. `more`: other files with links, by where they are."""
    texts = dict(gathered().values()) | (more or {})
    dead = []
    for at, text in texts.items():
        for link, path, place in links(at, text):
            if path is None:
                continue
            there = path in texts or (ROOT / path).is_file()
            if not there or (place and path in texts and place[1:] not in anchors(texts[path])):
                dead.append(f"{at}: {link}")
    return dead


def rewritten(text: str, change: Callable[[str], str]) -> str:
    """The text with each link's target changed; blocks of code and code in a line are left alone."""
    parts = re.split(rf"{FENCED[:-1]}|`+[^`\n]+`+)", text, flags=re.MULTILINE)
    joined, codes = "", []
    for n, part in enumerate(parts):
        if n % 2:
            codes.append(part)
            joined += f"\0{len(codes) - 1}\0"
        else:
            joined += part
    joined = LINK.sub(lambda found: f"{found[1]}{found[2]}{change(found[3])}{found[4]}", joined)
    return re.sub("\0(\\d+)\0", lambda found: codes[int(found[1])], joined)
