"""Long rows in lines of their own are planned by a line through two of them, where the model can be measured."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import pytest
from conftest import make_model

from grpo.config import AdapterConfig
from grpo.model import rowwise
from grpo.model.adapters import Adapters
from grpo.model.policy import Policy
from grpo.planning import footprint as footprints
from grpo.planning.footprint import Footprint, measure_body, measure_footprint
from grpo.planning.planner import Planner
from grpo.training.packing import Shape


def alone(width: int) -> Shape:
    return Shape(1, width, 1, width, lines=1, width=width, alone=True)


def test_the_line_is_of_rows_alone() -> None:
    measured = Footprint(7, 10.0, 0.0, 0, 1, True, True, alone=(100.0, 3.0))
    assert measured.bytes(alone(50)) == 7 + 100 + 150
    assert replace(measured, gathered=11).bytes(alone(50)) == 11 + measured.bytes(alone(50))  # a layer is whole then
    assert measured.bytes(Shape(1, 25, 1, 25)) == measured.bytes(Shape(1, 50, 1, 50, 1, 50)) == 7 + 500


def test_a_longer_row_takes_what_the_line_says(monkeypatch: pytest.MonkeyPatch) -> None:
    """A third of what short rows would make of it: the inside of the feed-forward part is there for a tile."""
    monkeypatch.setitem(rowwise.NUMBERS, False, 256 * 2000)
    monkeypatch.setattr(footprints, "LONG_ROWS", (1280, 1792))
    monkeypatch.setattr("grpo.backend.cuda.available", lambda: True)
    model = make_model("tied", intermediate_size=768, num_hidden_layers=2, max_position_embeddings=8192)
    policy = Policy(model, Adapters(model, AdapterConfig(rank=8), mx.random.key(0)), 1.0)
    found = measure_footprint(policy, True)
    assert measure_footprint(policy, False).alone is None
    assert measure_footprint(policy, True, memory=mx.get_active_memory()).alone is None  # too little to measure them
    assert found.alone is not None
    (peak,) = measure_body(policy, True, [alone(2560)])
    constant, each = found.alone
    assert constant + each * 2560 == pytest.approx(peak, rel=0.1)
    assert each < 0.5 * found.token


def test_what_the_line_says_is_not_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    planner = object.__new__(Planner)
    planner.policy = type("AnyPolicy", (), {})()  # type: ignore[assignment]
    planner._footprint = lambda _: Footprint(0, 1.0, 0.0, 0, 1, True, True, alone=(1.0, 1.0))  # type: ignore[assignment]
    assert planner._tried(True, alone(9000), 100) is None
