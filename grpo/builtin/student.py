"""A small Qwen3 that has learned a built-in task badly, so that GRPO can improve it.

Its training data answers questions mostly in the good way at first, and mostly in the cheap way later. So the student
usually answers in the cheap way, which is sometimes right, and occasionally in the good way, which is nearly always
right. It is trained with supervised steps only; the same settings make the same model.
"""

from __future__ import annotations

import json
import random
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from grpo.builtin.exercise import Exercise, Manner, Problem
from grpo.builtin.tasks import TASKS
from grpo.builtin.template import END, PAD, START, parts, template

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn
    from tokenizers import Tokenizer

TELL_EVERY = 300
"""Number of training steps between two progress lines."""

Lesson = tuple[list[int], list[int]]
"""Token ids of a conversation, and a mask: 1 for tokens of the model's turns, 0 for other tokens."""

NewModel = Callable[[Mapping[str, Any]], "nn.Module"]
"""Creates the model that a `config.json` describes, with random weights: `grpo.model.mlxlm.new_model`."""


@dataclass(frozen=True, slots=True)
class Student:
    """The settings of a student. `good_first` and `good_last` are the shares of good answers at the start and end."""

    task: str = "builtin:arithmetic"
    seed: int = 0
    hidden: int = 64
    layers: int = 2
    steps: int = 1200
    batch: int = 16
    learning_rate: float = 5e-3
    warmup: int = 30
    vocabulary: int = 320
    good_first: float = 0.95
    good_last: float = 0.3

    def good_share(self, step: int) -> float:
        progress = min(1.0, step / (0.7 * self.steps))
        return self.good_first + (self.good_last - self.good_first) * progress


def make(settings: Student, folder: Path, new_model: NewModel) -> None:
    """Train a student and write it to `folder` in the Hub's layout."""
    import mlx.core as mx
    from mlx.utils import tree_flatten

    tokenizer = _tokenizer(settings)
    config = _config(settings, tokenizer)
    mx.random.seed(settings.seed)
    model = new_model(config)
    _train(model, settings, tokenizer)
    _write_tokenizer(tokenizer, TASKS[settings.task], folder)
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    mx.save_safetensors(
        str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())), metadata={"format": "mlx"}
    )


def _config(settings: Student, tokenizer: Tokenizer) -> dict[str, Any]:
    return {
        "architectures": ["Qwen3ForCausalLM"],
        "model_type": "qwen3",
        "hidden_size": settings.hidden,
        "num_hidden_layers": settings.layers,
        "intermediate_size": 3 * settings.hidden,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": settings.hidden // 4,
        "rms_norm_eps": 1e-6,
        "vocab_size": tokenizer.get_vocab_size(),
        "max_position_embeddings": 4096,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "hidden_act": "silu",
        "torch_dtype": "float32",
        "eos_token_id": tokenizer.token_to_id(END),
    }


def _tokenizer(settings: Student) -> Tokenizer:
    """Train a byte-level BPE tokenizer on the task's text. Each digit is one token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

    task = TASKS[settings.task]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    learnt = [task.conversation(one, task.good) for one in task.problems("train")[:500]]
    texts = ["".join(parts(task, messages)).replace(START, "").replace(END, "") for messages in learnt]
    trainer = trainers.BpeTrainer(
        vocab_size=settings.vocabulary,
        special_tokens=[AddedToken(text, special=True) for text in (PAD, START, END)],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def write_tokenizer(folder: Path) -> None:
    """Write only the tokenizer of a student with default settings, in Hub layout."""
    _write_tokenizer(_tokenizer(Student()), TASKS[Student().task], folder)


def _write_tokenizer(tokenizer: Tokenizer, task: Exercise, folder: Path) -> None:
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": PAD,
        "model_max_length": 4096,
        "clean_up_tokenization_spaces": False,
        "chat_template": template(task),
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2))


def _train(model: nn.Module, settings: Student, tokenizer: Tokenizer) -> None:
    import mlx.core as mx
    import mlx.nn as nn
    import mlx.optimizers as optim

    peak, warmup = settings.learning_rate, settings.warmup
    falling = optim.cosine_decay(peak, settings.steps - warmup, 0.02 * peak)
    rate = optim.join_schedules([optim.linear_schedule(1e-6, peak, warmup), falling], [warmup])
    optimizer = optim.AdamW(learning_rate=rate, betas=[0.9, 0.95])
    loss_and_grad = nn.value_and_grad(model, _loss)
    for step, lessons in enumerate(_lessons(settings, tokenizer)):
        if step and step % TELL_EVERY == 0:
            print(f"step {step} of {settings.steps}", file=sys.stderr)
        _, gradient = loss_and_grad(model, [_arrays(rows) for rows in lessons])
        gradient, _ = optim.clip_grad_norm(gradient, 1.0)
        optimizer.update(model, gradient)
        mx.eval(model.parameters(), optimizer.state)


def _lessons(settings: Student, tokenizer: Tokenizer) -> Iterator[list[list[Lesson]]]:
    """Yield the conversations of each step. Good and cheap answers are separate, because their lengths differ."""
    draw, task = random.Random(settings.seed), TASKS[settings.task]
    everything = task.problems("train")
    for step in range(1, settings.steps + 1):
        problems = draw.sample(everything, settings.batch)
        cut = sum(draw.random() < settings.good_share(step) for _ in problems)
        ways = ((problems[:cut], task.good), (problems[cut:], task.cheap))
        yield [[lesson(tokenizer, task, one, way) for one in mine] for mine, way in ways if mine]


def lesson(tokenizer: Tokenizer, task: Exercise, problem: Problem, way: Manner) -> Lesson:
    """Return a conversation that answers a problem in one way, tokenized as a run samples and appends tokens."""
    ids: list[int] = []
    said: list[int] = []
    for place, part in enumerate(parts(task, task.conversation(problem, way))):
        encoded = tokenizer.encode(part).ids
        ids += encoded
        said += [place % 2] * len(encoded)
    return ids, said


def _arrays(rows: list[Lesson]) -> tuple[mx.array, mx.array]:
    """Return token ids `[B, L]`, padded on the right, and a mask `[B, L - 1]` of the targets in the model's turns."""
    import mlx.core as mx

    length = max(len(ids) for ids, _ in rows)
    padded = [ids + [0] * (length - len(ids)) for ids, _ in rows]
    mask = [said[1:] + [0] * (length - len(said)) for _, said in rows]
    return mx.array(padded), mx.array(mask, dtype=mx.float32)


def _loss(model: nn.Module, parts: list[tuple[mx.array, mx.array]]) -> mx.array:
    """Return the cross-entropy, averaged over all tokens of the model's turns."""
    import mlx.core as mx
    import mlx.nn as nn

    total, count = mx.array(0.0), mx.array(0.0)
    for ids, mask in parts:
        losses = nn.losses.cross_entropy(model(ids[:, :-1]), ids[:, 1:])
        total, count = total + (losses * mask).sum(), count + mask.sum()
    return total / count
