"""Which completions stand behind one another in a line, and how many lines go through the model at once."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_Ids = tuple[int, ...]

SHORTEST = 16
"""Lines have room for completions of so many tokens in the mean. It bounds how many rows a micro-batch has."""


def filled(rows: Sequence[tuple[_Ids, int]], width: int) -> list[list[int]]:
    """Rows, as prompts and completions' lengths, in lines of `width` places: positions in `rows`, line by line.

    Groups are taken from the largest to the smallest. Each goes to the line where it leaves the fewest places free, as
    many of its completions as there is room for, and what is left of it to the next. A line holds the prompt once.
    """
    groups: dict[_Ids, list[tuple[int, int]]] = {}
    for number, (prompt, length) in enumerate(rows):
        groups.setdefault(prompt, []).append((length, number))
    lines: list[tuple[int, list[int]]] = []  # places that are free, and rows
    for prompt, members in sorted(groups.items(), key=lambda group: -_places(*group)):
        before, waiting = len(prompt) - 1, sorted(members, reverse=True)
        while waiting:
            shortest = waiting[-1][0]
            open_lines = [n for n, (free, held) in enumerate(lines) if _takes(free - before, held, shortest, width)]
            free_after = {
                n: _put(waiting, lines[n][0] - before, _most(width) - len(lines[n][1]))[0] for n in open_lines
            }
            if not open_lines:
                lines.append((width, []))
            best = min(open_lines, key=lambda n: free_after[n]) if open_lines else len(lines) - 1
            free, held = lines[best]
            free, taken, waiting = _put(waiting, free - before, _most(width) - len(held))
            lines[best] = free, held + taken
    return [held for _, held in lines]


def _places(prompt: _Ids, members: Iterable[tuple[int, int]]) -> int:
    return len(prompt) - 1 + sum(length for length, _ in members)


def _most(width: int) -> int:
    """Completions of a line, at most."""
    return max(1, width // SHORTEST)


def _takes(free: int, held: Sequence[int], shortest: int, width: int) -> bool:
    return free >= shortest and len(held) < _most(width)


def _put(waiting: Sequence[tuple[int, int]], free: int, most: int) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Take completions, the longest first, as long as there is room: what stays free, those taken, and those left."""
    taken: list[int] = []
    left: list[tuple[int, int]] = []
    for length, number in waiting:
        if length <= free and len(taken) < most:
            free -= length
            taken.append(number)
        else:
            left.append((length, number))
    return free, taken, left


def most_lines(tokens: int, width: int) -> int:
    """The lines of the largest micro-batch of so many tokens: a power of two."""
    return 1 << (max(1, tokens // width).bit_length() - 1)


def portions(count: int, most: int, each: float) -> list[int]:
    """`count` lines in portions that are powers of two up to `most`, itself one; the largest first.

    So there are few shapes. The last portion may hold fewer lines. A portion costs as much as `each` lines beside its
    own: a few large ones with lines left empty may cost less than many that are full.
    """
    sizes = [1 << power for power in range(most.bit_length())]
    whole = max(0, count // most - 1)
    cheapest: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for lines in range(1, count - whole * most + 1):
        ways = ((size, cheapest[max(0, lines - size)]) for size in sizes if size < 2 * lines)
        cheapest.append(min((size + each + cost, (size, *rest)) for size, (cost, rest) in ways))
    return [most] * whole + sorted(cheapest[-1][1], reverse=True)
