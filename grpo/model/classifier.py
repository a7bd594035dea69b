"""Sequence classifiers with one label, as reward models are: mlx-lm's model without its head, and a matrix `score`.

The same numbers as transformers' `…ForSequenceClassification`: the matrix, which has no bias, is applied to the hidden
state of a text's last token that is not padding.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from grpo.backend.hub import one_line
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.model.batched import in_batches
from grpo.model.load import check_files, model_folder, read, settled
from grpo.model.mlxlm import TokenizerWrapper, model_classes

SCORE = "score.weight"
KIND = "ForSequenceClassification"


class Score(nn.Module):  # type: ignore[misc]  # untyped
    """The matrix `[1, D]`. It is no linear layer, so that nothing quantises it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, width))


class Classifier:
    """A model that has one score for a text of tokens."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is of the class that `classes` makes."""
        self.model = model
        self.vocabulary: int = model.args.vocab_size
        self.positions: int | None = getattr(model.args, "max_position_embeddings", None)
        self.padding: int | None = None

    def scores(self, rows: Sequence[Sequence[int]], most: int) -> list[float]:
        """The score of each row of token ids, none of which is empty.

        At most `most` tokens go through the model at once, padding included, or else one row.
        """
        return in_batches(rows, most, self._of)

    def _of(self, tokens: mx.array, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scores of rows that go through together."""
        last = mx.array([self._last(row) for row in rows])
        hidden = self.model.model(tokens, cache=None)
        at_last = mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        scores: Any = at_last.astype(mx.float32) @ self.model.score.weight.astype(mx.float32).T
        return [float(score) for (score,) in scores.tolist()]

    def _last(self, row: Sequence[int]) -> int:
        """The place of the last token that is not the padding's: transformers looks for it so, wherever it stands."""
        places = (place for place in reversed(range(len(row))) if row[place] != self.padding)
        return next(places, 0)


def load_classifier(cfg: ModelConfig) -> tuple[Classifier, TokenizerWrapper]:
    """A classifier, its weights in `cfg.dtype` and frozen, and its tokenizer.

    Raises UserError for what `grpo.model.load.load` refuses, for a model that is no classifier of one label, and for a
    tokenizer without a chat template.
    """
    folder = model_folder(cfg)
    check_files(cfg, folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    check_labels(config, cfg.name)
    _check_score(cfg, folder)
    model, tokenizer = read(cfg, folder, classes)
    settled(model)
    if not tokenizer.has_chat_template:
        raise UserError(
            f"model {cfg.name}: its tokenizer has no chat template, and a reward model reads a conversation put "
            "together by its own: add a chat_template.jinja to a copy of the folder, and name that"
        )
    classifier = Classifier(model)
    classifier.padding = config.get("pad_token_id")
    if (highest := max(tokenizer.get_vocab().values())) >= classifier.vocabulary:
        raise UserError(
            f"model {cfg.name}: its tokenizer has token {highest}, and the model knows {classifier.vocabulary:,}: the "
            "tokenizer is another model's"
        )
    return classifier, tokenizer


def check_labels(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError for a config of something else than a sequence classifier of one label."""
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if kinds and not any(kind.endswith(KIND) for kind in kinds):
        raise UserError(
            f"model {name}: is a {kinds[0]}, and a reward model is a sequence classifier (…{KIND}): a model with a "
            "score in the place of a vocabulary"
        )
    labels = config.get("num_labels") or len(config.get("id2label") or (0,))
    if labels != 1:
        raise UserError(f"model {name}: has {labels} labels, and a reward model has one: the score itself")


@cache
def _class_of(base: Any) -> Any:
    """mlx-lm's class of a model, with the matrix `score` in the place of a head."""

    class WithScore(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if not isinstance(self.get("model"), nn.Module):
                raise ValueError(f"the architecture {args.model_type} keeps no body under the name model")
            self.pop("lm_head", None)
            self.score = Score(int(args.hidden_size))

        def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
            score = weights.pop(SCORE)
            if hasattr(super(), "sanitize"):
                weights = super().sanitize(weights)
            kept = {name: array for name, array in weights.items() if not name.startswith("lm_head.")}
            return {**kept, SCORE: score}

    return WithScore


def classes(config: Mapping[str, Any]) -> tuple[type[nn.Module], Any]:
    """The class of the classifier that a config describes, and that of its arguments."""
    base, arguments = model_classes(config)
    made: type[nn.Module] = _class_of(base)  # type: ignore[arg-type]  # a class is hashable
    return made, arguments


def new_classifier(config: Mapping[str, Any]) -> nn.Module:
    """The classifier that a config describes, its weights not yet computed.

    Raises ValueError for an architecture that mlx-lm does not know, or that cannot be a classifier.
    """
    model_class, arguments = classes(config)
    return model_class(arguments.from_dict(dict(config)))


def _check_score(cfg: ModelConfig, folder: Path) -> None:
    """Raise UserError for weights without one score a token. Only the heads of the files are read."""
    try:
        files: list[Any] = [mx.load(str(file)) for file in sorted(folder.glob("model*.safetensors"))]
    except Exception as error:  # whatever a damaged file makes MLX raise
        raise UserError(f"model {cfg.name}: {one_line(error)} (in {folder})") from error
    found = [arrays[SCORE].shape for arrays in files if SCORE in arrays]
    if not found:
        raise UserError(
            f"model {cfg.name}: there is no {SCORE} in its weights, so it has no score to give: it is no reward model, "
            "or keeps its score under another name, which is not read here"
        )
    if found[0][0] != 1:
        raise UserError(f"model {cfg.name}: has {found[0][0]} labels, and a reward model has one: the score itself")
