"""Attention in tiles as small as tests are."""

import pytest

from grpo.model import attention, tiles


def shrink_tiles(monkeypatch: pytest.MonkeyPatch, widest: int, scores: int, kept: bool) -> None:
    """Tiles of 4 to `widest` tokens, and so many `scores` at a time; weights are kept for the backward pass, or not."""
    monkeypatch.setattr(tiles, "NARROWEST", 4)
    monkeypatch.setattr(tiles, "WIDEST", {False: widest})
    monkeypatch.setattr(tiles, "SCORES", {False: scores})
    monkeypatch.setattr(attention, "KEPT", 2**22 if kept else 0)
