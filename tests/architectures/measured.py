"""What an architecture does when it is taken through everything: a run, its adapter, decoding, gradients, exports."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any
from unittest.mock import patch

import mlx.core as mx
import mlx.nn as nn
from environments.conversing import Host, Numbers
from mlx.utils import tree_flatten

from grpo.config import AdapterConfig, ModelConfig
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import Adapters, load_adapter, routers
from grpo.model.load import load
from grpo.model.policy import Policy
from grpo.planning import planner
from grpo.planning.footprint import Footprint
from grpo.recipes import load_recipe
from grpo.rollout import RolloutEngine
from grpo.runs.folder import newest_checkpoint
from grpo.runs.loop import Loop
from grpo.runs.prepare import prepare
from grpo.runs.resume import context, find_start, plan_of
from grpo.runs.revisions import revisions_of
from grpo.runs.signals import StopRequest
from grpo.telemetry.jsonl import JsonlLogger
from grpo.tools.export import Format, export
from grpo.types import Task

PROMPTS = [[5, 6, 7, 8, 9], [11], list(range(20, 40))]
TOKENS = mx.array([[1, 5, 9, 3, 7, 2, 8, 4, 6, 10, 12, 11]])
KEY = mx.random.key(7)
NO_FOOTPRINT = Footprint(fixed=0, token=0.0, pair=0.0, logits=0, chunk=1024, shares=True, checkpointing=True)
RECIPE = """
output_dir: {run}
model: {{name: {folder}, quantize: {bits}}}
adapter: {{rank: 4}}
data: {{source: {rows}, prompt: "{{question}}"}}
rollout: {{prompts_per_step: 2, num_generations: 4, max_completion_length: 8}}
rewards: [{{use: "{reward}:reward", isolation: inline}}]
loss: {{beta: 0.05}}
optim: {{steps: 1, learning_rate: 0.05, micro_batch_tokens: 256, gradient_checkpointing: true}}
"""
REWARD = """
def reward(completion_ids, **columns):
    return [sum(token % 2 for token in ids) / len(ids) for ids in completion_ids]
"""


@contextmanager
def untried() -> Iterator[None]:
    """Let a plan be made without gradients and prompts that are tried: they take longer than all the rest."""
    seen = {"_tried": lambda *_: None, "_entering": lambda *_: None}
    with patch.object(planner, "measure_footprint", return_value=NO_FOOTPRINT), patch.multiple(planner.Planner, **seen):
        yield


def train(model: Path, bits: int | None, run: Path, *overrides: str) -> Path:
    """One step of a run of this model, as `grpo train` does it. Returns its checkpoint."""
    beside = run.parent
    if not (beside / "odd.py").exists():
        (beside / "rows.jsonl").write_text('{"question": "What is 2+2?"}\n{"question": "Why?"}\n')
        (beside / "odd.py").write_text(REWARD)
    recipe = beside / f"{run.name}.yaml"
    places = {"folder": model, "run": run, "rows": beside / "rows.jsonl", "reward": beside / "odd.py"}
    recipe.write_text(RECIPE.format(**places, bits=bits or "null"))
    cfg = load_recipe(recipe, overrides)
    start = find_start(cfg)
    with untried():
        prepared = prepare(start.planned)
    trainer = prepared.trainer
    state = start.load(trainer)
    with closing(trainer.scorer), start.folder() as folder:
        written = context(
            cfg, trainer.policy.adapters.config, plan_of(trainer), revisions_of(trainer.cfg), prepared.rows
        )
        Loop(
            trainer,
            folder,
            written,
            JsonlLogger(folder).log,
            StopRequest(),
            state,
            start.checkpoint,
            prepared.evaluator,
        ).run()
    return newest_checkpoint(run)


class Measured:
    """A trained model of one architecture, in `folder`, quantised to `bits` or as it is. What is asked is computed."""

    def __init__(self, folder: Path, bits: int | None) -> None:
        self.folder, self.bits = folder, bits
        self.run = folder.with_name(f"{folder.name}-run-{bits}")
        self.checkpoint = train(folder, bits, self.run)
        self.model, self.tokenizer = load(ModelConfig(name=str(folder), quantize=bits))
        self.base = self.logits(self.model)
        self.adapters = Adapters(self.model, AdapterConfig(rank=4), mx.random.key(0))
        self.adapters.load(self.checkpoint)
        self.policy = Policy(self.model, self.adapters, 0.9)
        self.generator = Generator(self.model, self.tokenizer, slots=3)

    @staticmethod
    def logits(model: nn.Module) -> mx.array:
        logits: mx.array = model(TOKENS).astype(mx.float32)
        mx.eval(logits)
        return logits

    @cached_property
    def decoding(self) -> str:
        return self.generator.decoding.description

    @cached_property
    def decoding_gap(self) -> float:
        """The largest difference of a decoded token's logprob from teacher forcing's, with slots taken twice."""
        groups = self.generator.generate([Request(ids, 2) for ids in PROMPTS], Sampling(0.9, 12), KEY)
        gaps = []
        for prompt, group in zip(PROMPTS, groups, strict=True):
            for done in group:
                ids = mx.array([done.token_ids])
                forced, _ = self.policy.logprobs(mx.array([[*prompt, *done.token_ids]]), mx.array([len(prompt)]), ids)
                gaps.append(mx.abs(forced[0] - mx.array(done.behaviour)).max())
        return worst(gaps)

    @cached_property
    def conversation_gap(self) -> float:
        """The same of conversations: rows with prompts of their own, which are told something after each turn, leave
        their slots, and lose what they have kept for want of memory."""
        host = Host("messages", reset=lambda seat, *_: " 70 71" * seat.number, step=lambda *_: "72 73 74")
        stops = frozenset(range(80))
        conversations = Conversations({"": Table(host, Numbers(ends=stops), ConversationLimits(max_turns=4))}, 0, 99)
        generator = Generator(self.model, self.tokenizer, slots=3)
        generator.stop_ids, generator.kept_bytes = stops, 10_000
        tasks = [Task(place, "30 31", (11, 30, 31), {}) for place in range(2)]
        groups = RolloutEngine(generator, Sampling(0.9, 30), conversations).rollout(tasks, 3, 0.9, KEY)
        assert sum(len(row.trajectory.conversation.turn_rewards) for group in groups for row in group.rollouts) > 9
        gaps = []
        for group in groups:
            for row in (rollout.trajectory for rollout in group.rollouts):
                ids, prompt = mx.array([row.token_ids]), group.task.prompt_ids
                forced, _ = self.policy.logprobs(mx.array([[*prompt, *row.token_ids]]), mx.array([len(prompt)]), ids)
                gaps.append((mx.abs(forced[0] - mx.array(row.behaviour)) * mx.array(row.trained)).max())
        return worst(gaps)

    @cached_property
    def greedy(self) -> bool:
        """Whether greedy tokens are those of the model's plain forward pass."""
        groups = self.generator.generate([Request(ids) for ids in PROMPTS], Sampling(0.0, 12), KEY, logprobs=False)
        found = []
        for prompt, (done,) in zip(PROMPTS, groups, strict=True):
            logits = self.model(mx.array([[*prompt, *done.token_ids]]))[0, len(prompt) - 1 : -1]
            found.append(logits.argmax(axis=-1).tolist() == list(done.token_ids))
        return all(found)

    @cached_property
    def not_shared(self) -> str | None:
        """Why prompts are not shared in training, if they are not."""
        return None if self.policy.share_prompts else self.policy.slow[0].rpartition(": ")[2]

    @cached_property
    def sharing_gap(self) -> float:
        """The difference in loss and gradient that sharing prompts makes, relative to the largest number."""
        return self._difference(lambda policy: setattr(policy, "share_prompts", True))

    @cached_property
    def checkpointing_gap(self) -> float:
        """The difference that gradient checkpointing makes."""
        return self._difference(lambda policy: setattr(policy, "gradient_checkpointing", True))

    @cached_property
    def split_gap(self) -> float:
        """The difference that going through the model row by row makes. (Experts see few tokens at once then.)"""
        together = self._gradient(range(6))
        alone = [self._gradient([row]) for row in range(6)]
        return difference(together, {path: sum(one[path] for one in alone) for path in together})

    def _difference(self, change: Any) -> float:
        policy, former = self.policy, (self.policy.share_prompts, self.policy.gradient_checkpointing)
        policy.share_prompts = policy.gradient_checkpointing = False
        try:
            plain = self._gradient(range(6))
            change(policy)
            return difference(plain, self._gradient(range(6)))
        finally:
            policy.share_prompts, policy.gradient_checkpointing = former

    def _gradient(self, rows: Sequence[int]) -> dict[str, mx.array]:
        """Of some rows of a ragged batch: the gradient by path, and the loss under the name `loss`."""
        prompts = mx.random.randint(1, 100, (4, 14), key=mx.random.key(1))
        lengths = mx.array([14, 4, 6, 1])  # the last is no row's
        index, chosen = mx.array([0, 0, 1, 2, 2, 2]), mx.array(list(rows))
        completions = mx.random.randint(1, 100, (6, 12), key=mx.random.key(2))
        weights = mx.random.normal((6, 12), key=mx.random.key(3))
        weights = weights * (mx.arange(12)[None] < mx.array([12, 2, 9, 1, 12, 11])[:, None])

        def loss(_: nn.Module) -> mx.array:
            logprobs, entropy = self.policy.group_logprobs(prompts, lengths, index[chosen], completions[chosen], True)
            return ((logprobs + 0.1 * entropy) * weights[chosen]).sum()

        with self.policy.training():
            value, gradient = nn.value_and_grad(self.model, loss)(self.model)
        mx.eval(value, gradient)
        return {"loss": value, **dict(tree_flatten(gradient))}

    @cached_property
    def adapted(self) -> set[str]:
        """The layers that have an adapter, by their path in a block."""
        return {_in_block(path) for path in self.adapters.state()}

    @cached_property
    def routers(self) -> set[str]:
        return routers(self.model)

    @cached_property
    def experts(self) -> set[str]:
        """The adapted layers that hold experts."""
        return {_in_block(path) for path, array in self.adapters.state().items() if array.ndim == 3}

    @cached_property
    def has_experts(self) -> bool:
        return any("Switch" in type(module).__name__ for module in self.model.modules())

    @cached_property
    def trains(self) -> bool:
        """Whether it decodes, trains and is fused as it should."""
        return self.decoding_gap < 1e-4 and self.greedy and not self.still and self.fused_gap < 1e-4

    @cached_property
    def still(self) -> list[str]:
        """The layers whose update is still zero after the step."""
        state = self.adapters.state()
        return [path for path in state if path.endswith("lora_b") and not (state[path] != 0).any().item()]

    @cached_property
    def reference_gap(self) -> float:
        """How far the reference is from the base, and after it the policy from what it was before."""
        policy = self.logits(self.model)
        with self.policy.use("reference"):
            reference = self.logits(self.model)
        return worst([mx.abs(reference - self.base).max(), mx.abs(self.logits(self.model) - policy).max()])

    @cached_property
    def moved(self) -> float:
        """What the adapter changes of the logits."""
        return worst([mx.abs(self.logits(self.model) - self.base).max()])

    def exported(self, form: Format) -> Path:
        folder = self.run / f"export-{form}"
        return folder if folder.exists() else export(self.run, form).folder

    @cached_property
    def mlx_gap(self) -> float:
        """The difference of the base with the exported adapter, as mlx-lm loads it, in logits."""
        model, _ = load(ModelConfig(name=str(self.folder), quantize=self.bits))
        load_adapter(model, self.exported("mlx"))
        return self._gap(model)

    @cached_property
    def fused_gap(self) -> float:
        """The same of the fused model, loaded again."""
        return self._gap(load(ModelConfig(name=str(self.exported("fused"))))[0])

    def _gap(self, model: nn.Module) -> float:
        return worst([mx.abs(self.logits(model) - self.logits(self.model)).max()])

    @cached_property
    def no_peft(self) -> str | None:
        """Why PEFT cannot have the adapter, if it cannot."""
        try:
            self.exported("peft")
        except UserError as error:
            return str(error)
        return None


def _in_block(path: str) -> str:
    """Of an adapter's array, its layer's path in a block."""
    return path.partition(".layers.")[2].partition(".")[2].rpartition(".")[0]


def worst(gaps: Sequence[mx.array]) -> float:
    """The largest, or NaN if one is."""
    largest: Any = mx.stack(list(gaps)).max().item()
    return float(largest)


def difference(one: dict[str, mx.array], other: dict[str, mx.array]) -> float:
    """The largest difference, relative to the largest number of all."""
    largest = worst([mx.abs(array).max() for array in one.values()])
    return worst([mx.abs(one[path] - other[path]).max() for path in one]) / largest
