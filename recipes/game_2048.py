"""The game 2048 as an environment, and the dataset of its initial boards, for the recipe `qwen3-2048`.

It does not import grpo, and works unchanged with TRL's `environment_factory`.
"""

import random

GOAL = 64
WAYS = ("left", "right", "up", "down")
ASKED = (
    "We play 2048 on a board of four by four. Each move slides all tiles in one direction; two equal tiles that meet "
    f"become one of their sum, and a new tile appears. Call `move` until there is a tile of {GOAL}."
)


def boards(split: str) -> list[dict]:
    """One row per game: 4,096 for training, 128 others for evaluation."""
    first, many = (0, 4096) if split == "train" else (10_000, 128)
    return [{"prompt": [{"role": "user", "content": ASKED}], "board_seed": first + i} for i in range(many)]


class Game2048:
    """Each conversation has its own game. `move` is a tool, because it is a public method."""

    def reset(self, board_seed: int, **_) -> str:
        """Called before a conversation with all columns of the row. The returned text is added to the prompt."""
        self._draw = random.Random(board_seed)
        self._board = [[0] * 4 for _ in range(4)]
        self._add()
        self._add()
        return f"\n\n{self._shown()}"

    def move(self, direction: str) -> str:
        """
        Slide all tiles, and see the board.

        Args:
            direction: left, right, up or down.
        """
        if direction not in WAYS:  # the model reads the error, and the game continues
            raise ValueError(f"There is no direction {direction!r}: there are {', '.join(WAYS)}.")
        moved = self._moved(direction)
        if moved == self._board:
            raise ValueError(f"Nothing can slide {direction}. Try another direction.")
        self._board = moved
        self._add()
        if self._largest() >= GOAL:
            return f"{self._shown()}\n\nYou have won. Say so, and stop."
        if all(self._moved(way) == self._board for way in WAYS):
            return f"{self._shown()}\n\nNothing can slide any more. The game is over."
        return self._shown()

    def get_reward(self) -> float:
        """Called after the conversation: 1 if the goal's tile was reached, else the largest tile / the goal."""
        return min(1.0, self._largest() / GOAL)

    def _moved(self, direction: str) -> list[list[int]]:
        upright, backwards = direction in ("up", "down"), direction in ("right", "down")
        lines = _turned(self._board) if upright else self._board
        slid = [_slid(line[::-1])[::-1] if backwards else _slid(line) for line in lines]
        return _turned(slid) if upright else slid

    def _add(self) -> None:
        y, x = self._draw.choice([(y, x) for y in range(4) for x in range(4) if not self._board[y][x]])
        self._board[y][x] = 4 if self._draw.random() < 0.1 else 2

    def _largest(self) -> int:
        return max(max(line) for line in self._board)

    def _shown(self) -> str:
        return "\n".join(" ".join(str(tile or ".") for tile in line) for line in self._board)


def _slid(line: list[int]) -> list[int]:
    """A line after its tiles slide to the beginning."""
    tiles, slid = [tile for tile in line if tile], []
    while tiles:
        tile = tiles.pop(0)
        slid.append(tile + tiles.pop(0) if tiles and tiles[0] == tile else tile)
    return slid + [0] * (len(line) - len(slid))


def _turned(board: list[list[int]]) -> list[list[int]]:
    return [list(line) for line in zip(*board, strict=True)]
