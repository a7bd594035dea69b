"""A search over a folder of text files, and questions that the files answer, for the recipe `search-files`.

The questions come from the files: a line with one missing word, which a search for the line's other words finds. Any
folder works, such as your notes: set `folder`. By default, it is the folder of the recipes.
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
    """One row per line that is long enough; every eighth line is for evaluation."""
    draw, rows = random.Random(0), {"train": [], "test": []}
    for number, (_, _, line) in enumerate(_lines(folder, pattern)):
        words = [word for word in re.findall(r"\b[A-Za-z]{5,}\b", line) if line.count(word) == 1]
        if len(words) >= 4:
            word = draw.choice(words)
            question = ASKED.format(line=line.replace(word, "____"))
            rows["test" if number % 8 == 0 else "train"].append({"prompt": question, "answer": word})
    return rows[split][:most]


class Files:
    """The tools: each public method is a tool. Each conversation has its own object."""

    def __init__(self, folder: str | None = None, pattern: str = "*.md"):
        self._lines = list(_lines(folder, pattern))  # read once, because an object serves many conversations

    def search(self, words: str) -> str:
        """
        Find lines that have all of some words, at most five of them.

        Args:
            words: Words that the line has, with spaces between them.
        """
        wanted = words.casefold().split()
        if not wanted:
            raise ValueError("no words to search for")
        found = [line for line in self._lines if all(word in line[2].casefold() for word in wanted)]
        shown = [f"{name}:{number}: {line[:300]}" for name, number, line in found[:5]]
        return "\n".join([*shown, *([f"({len(found) - 5} more)"] if len(found) > 5 else [])]) or "nothing"


def _lines(folder: str | None, pattern: str):
    """Yield the file's name, the number and the text of each line."""
    for path in sorted((Path(folder).expanduser() if folder else HERE).rglob(pattern)):
        for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
            if line.strip():
                yield path.name, number, line.strip()
