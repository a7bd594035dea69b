"""Packs completions into lines, and decides how many lines go through the model together."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

_Ids = tuple[int, ...]

SHORTEST = 16
"""A line of width W holds at most W / SHORTEST completions. This limits the number of rows in a micro-batch."""


def filled(rows: Sequence[tuple[_Ids, int]], width: int) -> list[list[int]]:
    """Pack rows, given as prompt and completion length, into lines of `width` tokens: positions in `rows` per line.

    Groups are placed from the largest to the smallest. A group goes into the line where it leaves the fewest free
    places; completions that do not fit go into the next such line. A line holds a prompt once for its completions.
    """
    groups: dict[_Ids, list[tuple[int, int]]] = {}
    for number, (prompt, length) in enumerate(rows):
        groups.setdefault(prompt, []).append((length, number))
    lines: list[tuple[int, list[int]]] = []  # number of free places, and rows
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
    """The maximum number of completions in a line."""
    return max(1, width // SHORTEST)


def _takes(free: int, held: Sequence[int], shortest: int, width: int) -> bool:
    return free >= shortest and len(held) < _most(width)


def _put(waiting: Sequence[tuple[int, int]], free: int, most: int) -> tuple[int, list[int], list[tuple[int, int]]]:
    """Place completions, longest first, while there is room. Returns the free places, the placed and the remaining."""
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
    """The number of lines in the largest micro-batch of `tokens` tokens: a power of two."""
    return 1 << (max(1, tokens // width).bit_length() - 1)


def portions(count: int, most: int, each: float) -> list[int]:
    """Split `count` lines into portions of sizes that are powers of two up to `most`, largest first.

    `most` is a power of two. Powers of two keep the number of shapes small. The last portion may hold fewer lines than
    its size. A portion costs as much as its lines plus `each` lines: a few large portions with empty lines may cost
    less than many full ones.
    """
    sizes = [1 << power for power in range(most.bit_length())]
    whole = max(0, count // most - 1)
    cheapest: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for lines in range(1, count - whole * most + 1):
        ways = ((size, cheapest[max(0, lines - size)]) for size in sizes if size < 2 * lines)
        cheapest.append(min((size + each + cost, (size, *rest)) for size, (cost, rest) in ways))
    return [most] * whole + sorted(cheapest[-1][1], reverse=True)
