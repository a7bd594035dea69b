"""2048 for a model with tools, and a reward that asks the environment: written for TRL, and for nothing else."""

import random


class Game2048:
    def __init__(self):
        self.board = None

    def reset(self, board_seed: int, size: int = 3, **kwargs) -> str:
        self.draw = random.Random(board_seed)
        self.size, self.score, self.moves = size, 0, 0
        self.board = [[0] * size for _ in range(size)]
        self._add()
        self._add()
        return "\n" + self._view()

    def move(self, direction: str) -> str:
        """
        Slides all tiles in one direction. Equal tiles that meet merge.

        Args:
            direction: One of "left", "right", "up" and "down".

        Returns:
            The board after the move.
        """
        if direction not in ("left", "right", "up", "down"):
            raise ValueError(f"No such direction: {direction}")
        if self.moves == 3:
            raise ValueError("Game over.")
        self.moves += 1
        lines = self.board if direction in ("left", "right") else [list(line) for line in zip(*self.board, strict=True)]
        back = direction in ("right", "down")
        slid = [self._slide(line[::-1])[::-1] if back else self._slide(line) for line in lines]
        self.board = slid if direction in ("left", "right") else [list(line) for line in zip(*slid, strict=True)]
        self._add()
        return self._view()

    async def undo(self, steps: int, reason: str | None = None) -> int:
        """
        Would take moves back. It is not allowed here.

        Args:
            steps: How many moves.
            reason: Why.
        """
        return -steps

    def get_reward(self) -> float:
        return self.score / 4

    def _slide(self, line):
        tiles = [tile for tile in line if tile]
        slid = []
        while tiles:
            tile = tiles.pop(0)
            if tiles and tiles[0] == tile:
                tile += tiles.pop(0)
                self.score += tile
            slid.append(tile)
        return slid + [0] * (len(line) - len(slid))

    def _add(self):
        empty = [(y, x) for y, line in enumerate(self.board) for x, tile in enumerate(line) if not tile]
        if empty:
            y, x = self.draw.choice(empty)
            self.board[y][x] = 2

    def _view(self):
        return "\n".join(" ".join(map(str, line)) for line in self.board)


class Diary:
    """Keeps what it is told, for a reward to read. It has no reward of its own."""

    def reset(self, **kwargs):
        self.notes = []
        self.row = sorted(kwargs)

    def note(self, text: str, stars: int = 1) -> str:
        """
        Writes a note.

        Args:
            text: The note.
            stars: How much it matters.
        """
        self.notes.append((text, stars))
        return f"note {len(self.notes)}"

    def columns(self) -> dict:
        """Says what the row has."""
        return {"columns": self.row}

    def page(self) -> list:
        """Shows the page."""
        return [{"type": "text", "text": f"{len(self.notes)} notes"}]

    def words(self) -> list:
        """Lists what was noted."""
        return [text for text, _ in self.notes]


def add(a: int, b: int = 1) -> int:
    """
    Adds two numbers.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def written(completions, environments, wanted, **kwargs):
    """How many notes were wanted and written; None where there is no diary."""
    return [
        len({text for text, _ in environment.notes} & set(words)) / len(words)
        if hasattr(environment, "notes")
        else None
        for environment, words in zip(environments, wanted, strict=True)
    ]


def turns(completions, **kwargs):
    """How often the model spoke."""
    return [float(sum(message["role"] == "assistant" for message in completion)) for completion in completions]
