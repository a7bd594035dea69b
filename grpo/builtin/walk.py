"""`builtin:walk`: a walk on a six-by-six grid to a goal, around a pit, `Walk to 4,3 and avoid 2,1.`

`Walk` answers as the user: `step` gets each message of the model, takes its last word as the move, and returns the new
place, such as `2,2`. `reset` says where the walk begins. The good way checks a move first (`right 2,1 no: up`). The
cheap way moves directly, across and then up or down, and falls into a pit on this path. Held-out walks have other
combinations of goal and pit.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product
from typing import Any

from grpo.builtin.exercise import Exercise, Problem
from grpo.builtin.playing import Turns
from grpo.step import Step
from grpo.types import Message

SIDE = 6
MOVES = {"right": (1, 0), "left": (-1, 0), "up": (0, 1), "down": (0, -1)}
Place = tuple[int, int]


class Walk:
    """Keeps the walker's place, the goal, and the pit."""

    def reset(self, start: list[int], goal: list[int], pit: list[int], **_: Any) -> str:
        self._here, self._goal, self._pit = _place(start), _place(goal), _place(pit)
        return f" Start at {_written(self._here)}."

    def step(self, message: Message) -> Message | Step:
        """Make a move. Its reward is 1 at the goal, else 0. The walk ends at the goal, in the pit, or off the grid."""
        words = str(message["content"]).split()
        move = MOVES.get(words[-1]) if words else None
        if move is None:
            return Step(_says(f"Say {', '.join(MOVES)}."), reward=0.0)
        self._here = _moved(self._here, move)
        inside = all(0 <= part < SIDE for part in self._here)
        arrived, fell = self._here == self._goal, self._here == self._pit
        return Step(_says(_written(self._here)), reward=float(arrived), done=arrived or fell or not inside)


def walks() -> Iterable[Problem]:
    """Yield a start, a goal (two or three columns and one or two rows away), and the column of a pit (in the row of the
    start, up to three columns away in the direction of the goal)."""
    cells = list(product(range(SIDE), repeat=2))
    for (x, y), (to_x, to_y) in product(cells, repeat=2):
        if abs(to_x - x) in (2, 3) and abs(to_y - y) in (1, 2):
            towards = range(x + 1, x + 4) if to_x > x else range(x - 3, x)
            yield from ((x, y, to_x, to_y, pit) for pit in towards if 0 <= pit < SIDE)


def row(problem: Problem) -> dict[str, Any]:
    x, y, to_x, to_y, pit = problem
    question = f"Walk to {_written((to_x, to_y))} and avoid {_written((pit, y))}."
    return {"question": question, "start": [x, y], "goal": [to_x, to_y], "pit": [pit, y]}


def checked(problem: Problem) -> Turns:
    """Yield moves, each with the next place: first across and then up or down, but up or down if the pit is next."""
    here, goal, pit = _places(problem)
    while True:
        move, place = _straight(here, goal)
        said = f"{move} {_written(place)}"
        if place == pit:
            move = _upright(here, goal)
            place = _moved(here, MOVES[move])
            said += " no"
        here = place
        yield f"{said}: {move}"


def straight(problem: Problem) -> Turns:
    """Yield moves first across and then up or down, without avoiding the pit."""
    here, goal, _ = _places(problem)
    while True:
        move, here = _straight(here, goal)
        yield move


def _straight(here: Place, goal: Place) -> tuple[str, Place]:
    move = _upright(here, goal) if here[0] == goal[0] else "right" if here[0] < goal[0] else "left"
    return move, _moved(here, MOVES[move])


def _upright(here: Place, goal: Place) -> str:
    return "up" if here[1] < goal[1] else "down"


def _places(problem: Problem) -> tuple[Place, Place, Place]:
    x, y, to_x, to_y, pit = problem
    return (x, y), (to_x, to_y), (pit, y)


def _moved(here: Place, move: Place) -> Place:
    return here[0] + move[0], here[1] + move[1]


def _place(given: list[int]) -> Place:
    x, y = given
    return x, y


def _written(place: Place) -> str:
    return f"{place[0]},{place[1]}"


def _says(text: str) -> Message:
    return {"role": "user", "content": text}


WALK = Exercise(walks, row, good=checked, cheap=straight, kin=lambda problem: problem[2:], environment=Walk)
