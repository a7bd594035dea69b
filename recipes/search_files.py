"""A search over a folder of text files, and questions about them that the files answer: what `search-files` trains on.

The questions are made of the files themselves: a line with one word left out. The word is found by a search for others
of the line. So any folder will do, such as your notes: `folder` says which. Without it they are the recipes' own.
"""

import random
import re
from pathlib import Path

HERE = Path(__file__).parent
ASKED = (
    "In one of my text files there is this line, with one word replaced by ____:\n\n{line}\n\n"
    "Search the files for the line, and write the missing word as <answer>word</answer>."
)


def questions(split: str, folder: str | None = None, pattern: str = "*.md", most: int = 2000) -> list[dict]:
    """A row for each line that is long enough, one in eight of them to measure by."""
    draw, rows = random.Random(0), {"train": [], "test": []}
    for number, (_, _, line) in enumerate(_lines(folder, pattern)):
        words = [word for word in re.findall(r"\b[A-Za-z]{5,}\b", line) if line.count(word) == 1]
        if len(words) >= 4:
            word = draw.choice(words)
            asked = ASKED.format(line=line.replace(word, "____"))
            rows["test" if number % 8 == 0 else "train"].append({"prompt": asked, "answer": word})
    return rows[split][:most]


class Files:
    """The tools: each public method is one. Each conversation has an object of its own."""

    def __init__(self, folder: str | None = None, pattern: str = "*.md"):
        self._lines = list(_lines(folder, pattern))  # read once: objects serve many conversations

    def search(self, words: str) -> str:
        """
        Find lines that have all of some words, at most five of them.

        Args:
            words: Words that the line has, with spaces between them.
        """
        wanted = words.casefold().split()
        if not wanted:
            raise ValueError("no words to search for")
        found = [one for one in self._lines if all(word in one[2].casefold() for word in wanted)]
        shown = [f"{name}:{number}: {line[:300]}" for name, number, line in found[:5]]
        return "\n".join([*shown, *([f"({len(found) - 5} more)"] if len(found) > 5 else [])]) or "nothing"


def _lines(folder: str | None, pattern: str):
    """Name, number and text of each line of the files."""
    for path in sorted((Path(folder).expanduser() if folder else HERE).rglob(pattern)):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                yield path.name, number, line.strip()
