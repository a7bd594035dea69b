"""Whole arrays of several processes' parts are written one at a time, in a file that MLX reads."""

from __future__ import annotations

from pathlib import Path

import mlx.core as mx
import pytest

from grpo.model.joined import NAMES, Joined, write_joined
from grpo.model.shards import Shards


class Doubled(Shards):
    """As if another process had the same again of arrays that are called `part…`."""

    def whole_of(self, path: str, array: mx.array) -> mx.array:
        return mx.concatenate([array, array]) if path.startswith("part") else array

    def shape(self, path: str, array: mx.array) -> tuple[int, ...]:
        return self.whole_of(path, array).shape


def test_what_is_written_is_what_mlx_reads(tmp_path: Path) -> None:
    parts = {
        f"{kind}.{dtype}".replace("mlx.core.", ""): mx.arange(6).reshape(2, 3).astype(dtype).T[:, :2]
        for dtype in NAMES
        for kind in ("part", "whole")
    }
    parts |= {"step": mx.array(7, mx.uint64), "none": mx.zeros((0, 3))}
    joined = Joined(Doubled(), parts)
    write_joined(tmp_path / "out.safetensors", joined)
    assert not joined.unread
    read = mx.load(str(tmp_path / "out.safetensors"))
    assert set(read) == set(parts)
    for path, array in parts.items():
        whole = Doubled().whole_of(path, array)
        assert (read[path].dtype, read[path].shape) == (whole.dtype, whole.shape)
        assert mx.array_equal(read[path], whole), path


def test_the_rest_is_read_where_writing_fails(tmp_path: Path) -> None:
    joined = Joined(Doubled(), {"part a": mx.zeros(2), "part b": mx.ones(2)})
    with pytest.raises(OSError, match="No such file"):
        write_joined(tmp_path / "nowhere" / "out.safetensors", joined)
    assert joined.unread == ["part a", "part b"]
    joined["part a"]
    joined.finish()
    assert joined.unread == []


def test_a_name_is_looked_up_without_an_exchange() -> None:
    joined = Joined(Doubled(), {"part a": mx.zeros(2)})
    assert "part a" in joined
    assert "part b" not in joined
    assert joined.unread == ["part a"]
