"""Toy models, a stand-in for the Hub, and ways to run commands. Nothing here needs a network."""

from __future__ import annotations

import os

# Tests run in as many processes as there are cores. More threads than cores wait for each other by spinning: making the
# quickstart's student takes three times the processor time. Read when the BLAS is loaded, here and in what tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# isort: split

import cores  # before any thread starts

# isort: split

import grpo  # noqa: F401  before mlx, so that the BLAS is in place

# isort: split

import functools
import gc
import importlib
import json
import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import pytest
import typer.main
from hub.layouts import gsm8k, sharded_model
from hub.server import Hub
from measuring import checked_once, entering_once, once
from thinning import thin

from grpo.backend.device import setup
from grpo.builtin import models
from grpo.builtin.student import Student, make
from grpo.cli import main
from grpo.config import AdapterConfig, ModelConfig
from grpo.door import opening
from grpo.generation.generator import Generator
from grpo.model.adapters import Adapters
from grpo.model.load import load
from grpo.model.mlxlm import new_model
from grpo.model.policy import Policy
from grpo.planning import planner, rehearsal

setup()


@pytest.fixture(scope="session")
def cache(request: pytest.FixtureRequest) -> Path:
    """Keeps made students from one run of the tests to the next."""
    return request.config.cache.mkdir("grpo")


@pytest.fixture(scope="session")
def lengths_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("lengths")


@pytest.fixture(autouse=True)
def _lengths_of_this_session(lengths_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is known of prompts from former sessions, when the code was another."""
    monkeypatch.setattr("grpo.data.lengths.cache_folder", lambda: lengths_folder)


@pytest.fixture(scope="session")
def found_by_planners() -> dict[object, object]:
    return {}


@pytest.fixture(autouse=True)
def measured_once(
    request: pytest.FixtureRequest, found_by_planners: dict[object, object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run is planned by what was measured of the same policy earlier in this session. See `measuring`.

    Where planning is tested, every plan measures for itself.
    """
    if "planning" in request.path.parts:
        return
    monkeypatch.setattr(rehearsal, "MOST_WORK", 3e9)  # what takes longer is reckoned
    for measure in ("measure_footprint", "rehearsed"):
        monkeypatch.setattr(planner, measure, once(getattr(planner, measure), found_by_planners))
    monkeypatch.setattr(planner.Planner, "_entering", entering_once(found_by_planners))
    monkeypatch.setattr(opening, "check_parity", checked_once(found_by_planners))


@pytest.fixture(scope="session", autouse=True)
def _commands_made_once() -> Iterator[None]:
    """Typer reads the signatures of all commands anew for each call of its app: a sixth of a toy run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(typer.main, "get_command", functools.cache(typer.main.get_command))
        yield


@pytest.fixture(scope="module", autouse=True)
def _cores_to_measure_memory(request: pytest.FixtureRequest) -> Iterator[None]:
    """What is held at once depends on how far one thread is ahead of another: tests of peaks have all cores."""
    with cores.all_of_them() if "peak" in request.path.read_text() else nullcontext():
        yield


@pytest.fixture(scope="session", autouse=True)
def _no_power_fails() -> Iterator[None]:
    """Nothing waits for the disk in this process: a run writes a dozen files that it would wait for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda _: None)
        yield


def pytest_configure() -> None:
    """Let the collector not run while tests are imported and collected: none of it is garbage."""
    gc.disable()


def pytest_collection_finish() -> None:
    """Let the collector leave alone what was imported: every run collects, which took longer than its steps."""
    gc.enable()
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)  # before slow tests are left out
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The longest test first: several cores then end together. Then the tests of settings, whose runs one process
    makes once; at the end several processes would share these tests and make the same runs."""
    thin(items)
    first = "test_a_short_quickstart_learns", "test_settings_matter.py"
    items.sort(key=lambda item: next((place for place, name in enumerate(first) if name in item.nodeid), len(first)))


@pytest.fixture(scope="session")
def toy_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A two-layer Qwen3 that has learnt next to nothing, in the layout of the Hub, with a chat template."""
    folder = tmp_path_factory.mktemp("toy")
    make(Student(steps=2, warmup=1), folder, new_model)
    return folder


@pytest.fixture
def student(tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the arithmetic student, which is made in a second here and has learned next to nothing, with the
    working directory in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GRPO_CACHE", str(tmp_path_factory.getbasetemp() / "students"))
    monkeypatch.setitem(models.MODELS, "builtin:arithmetic-student", Student(steps=2, warmup=1))
    return "builtin:arithmetic-student"


@pytest.fixture
def toy(toy_folder: Path):
    """A fresh toy model and its tokenizer."""
    return load(ModelConfig(name=str(toy_folder)))


@pytest.fixture(scope="session")
def qwen3_folder(toy_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy model as the Hub has Qwen3: in shards of bfloat16, with its index and defaults of sampling."""
    return sharded_model(toy_folder, tmp_path_factory.mktemp("hub") / "qwen3")


@pytest.fixture(scope="session")
def gsm8k_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few questions as the Hub has GSM8K: configs main and socratic, splits train and test."""
    return gsm8k(tmp_path_factory.mktemp("hub") / "gsm8k")


@pytest.fixture
def hub(tmp_path: Path, qwen3_folder: Path, gsm8k_folder: Path) -> Iterator[Hub]:
    """A Hub on this machine with Qwen/Qwen3-0.6B and openai/gsm8k in it, both small. See `hub.server.Hub`."""
    hub = Hub(tmp_path / "hf")
    hub.add_model("Qwen/Qwen3-0.6B", qwen3_folder)
    hub.add_dataset("openai/gsm8k", gsm8k_folder)
    yield hub
    hub.stop()


COMMON = {
    "hidden_size": 64,
    "num_hidden_layers": 3,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "vocab_size": 128,
    "max_position_embeddings": 512,
    "rope_theta": 1e4,
    "tie_word_embeddings": True,
}
ZOO: dict[str, tuple[str, dict]] = {
    "tied": ("qwen3", {}),
    "untied": ("qwen3", {"tie_word_embeddings": False}),
    "dense": ("llama", {"num_key_value_heads": 4}),
    "llama": ("llama", {}),
    "quantised": ("qwen3", {}),
    "moe": (
        "qwen3_moe",
        {
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "moe_intermediate_size": 32,
            "norm_topk_prob": True,
        },
    ),
    "gemma2": ("gemma2", {"final_logit_softcapping": 3.0}),
    "gemma3_text": ("gemma3_text", {"sliding_window": 5, "sliding_window_pattern": 2}),
    "cohere": ("cohere", {"logit_scale": 0.5, "layer_norm_eps": 1e-5}),
    "granite": (
        "granite",
        {
            "logits_scaling": 4.0,
            "attention_multiplier": 0.3,
            "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5,
            "attention_bias": False,
            "mlp_bias": False,
        },
    ),
}
"""Small models with random weights: the architecture in mlx-lm, and what differs from COMMON."""


def make_model(kind: str, **changes):
    architecture, args = ZOO[kind]
    module = importlib.import_module(f"mlx_lm.models.{architecture}")
    mx.random.seed(0)
    config = {**COMMON, "model_type": architecture, **args, **changes}
    model = module.Model(module.ModelArgs.from_dict(config))
    if kind == "quantised":
        nn.quantize(model, 64, 4)
    model.freeze()
    mx.eval(model.parameters())
    return model


@pytest.fixture
def zoo():
    """Makes a small model of an architecture, by its name in ZOO."""
    return make_model


@dataclass
class Toy:
    policy: Policy
    generator: Generator
    tokenizer: object


@pytest.fixture
def make_policy(toy_folder: Path) -> Callable[..., Toy]:
    """Makes a policy over a fresh toy model. `trained`: with an adapter that changes what the model does."""

    def build(temperature: float = 1.0, trained: bool = True, slots: int = 64) -> Toy:
        model, tokenizer = load(ModelConfig(name=str(toy_folder)))
        adapters = Adapters(model, AdapterConfig(rank=4), mx.random.key(0))
        if trained:
            adapters.load_state(shaken(adapters.state()))
        return Toy(Policy(model, adapters, temperature), Generator(model, tokenizer, slots), tokenizer)

    return build


def shaken(state: dict[str, mx.array]) -> dict[str, mx.array]:
    """A state with every array drawn anew, so that B is not zero."""
    keys = mx.random.split(mx.random.key(1), len(state))
    return {
        path: 0.05 * mx.random.normal(array.shape, key=key)
        for (path, array), key in zip(state.items(), keys, strict=True)
    }


@dataclass
class Ran:
    code: int
    out: str
    err: str


@pytest.fixture
def run_cli(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    """Runs `grpo ARGS` in this process: exit code, standard output and standard error."""

    def run(*args: object) -> Ran:
        monkeypatch.setattr(sys, "argv", ["grpo", *map(str, args)])
        capfd.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0 if stop.code is None else 1
        captured = capfd.readouterr()
        return Ran(code, captured.out, captured.err)

    return run


@pytest.fixture
def recipe(tmp_path: Path, toy_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recipe of two quick steps over a file of four questions, with the working directory in a fresh folder."""
    monkeypatch.chdir(tmp_path)
    return write_recipe(tmp_path, toy_folder)


def write_recipe(folder: Path, toy_folder: Path) -> Path:
    """Write the recipe `recipe` into a folder, with its rows and its reward."""
    rows = [{"question": f"What is {i}+{i}?", "answer": str(2 * i)} for i in range(1, 5)]
    (folder / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "digits.py").write_text(
        "def reward(completions, **columns):\n    return [sum(c.isdigit() for c in text) / 8 for text in completions]\n"
    )
    path = folder / "toy.yaml"
    path.write_text(
        f"""
model: {{name: {toy_folder}}}
data: {{source: train.jsonl, prompt: "{{question}}"}}
rollout: {{prompts_per_step: 2, num_generations: 4, max_completion_length: 8}}
rewards: [{{use: "digits.py:reward"}}]
optim: {{steps: 2, learning_rate: 1e-3}}
""".lstrip()
    )
    return path
