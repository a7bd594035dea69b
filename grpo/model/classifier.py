"""Sequence classifiers with one label, such as reward models: mlx-lm's model without its head, and a matrix `score`.

Scores are those of transformers' `…ForSequenceClassification`: the matrix, without a bias, is applied to the hidden
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
    """The matrix `[1, D]`. It is not a linear layer, so that nothing quantizes it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = mx.zeros((1, width))


class Classifier:
    """A model that computes one score per sequence of tokens."""

    def __init__(self, model: nn.Module) -> None:
        """`model` is an instance of the class that `classes` returns."""
        self.model = model
        self.vocabulary: int = model.args.vocab_size
        self.positions: int | None = getattr(model.args, "max_position_embeddings", None)
        self.padding: int | None = None

    def scores(self, rows: Sequence[Sequence[int]], most: int) -> list[float]:
        """The score of each row of token ids. No row may be empty.

        A batch has at most `most` tokens, padding included, or else one row.
        """
        return in_batches(rows, most, self._of)

    def _of(self, tokens: mx.array, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scores of one batch."""
        last = mx.array([self._last(row) for row in rows])
        hidden = self.model.model(tokens, cache=None)
        at_last = mx.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0]
        scores: Any = at_last.astype(mx.float32) @ self.model.score.weight.astype(mx.float32).T
        return [float(score) for (score,) in scores.tolist()]

    def _last(self, row: Sequence[int]) -> int:
        """The index of the last token that is not the padding token. As in transformers, padding may be anywhere."""
        places = (place for place in reversed(range(len(row))) if row[place] != self.padding)
        return next(places, 0)


def load_classifier(cfg: ModelConfig) -> tuple[Classifier, TokenizerWrapper]:
    """A frozen classifier with weights in `cfg.dtype`, and its tokenizer.

    Raises UserError as `grpo.model.load.load` does, and for a model that is not a classifier with one label, or whose
    tokenizer has no chat template.
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
            f"model {cfg.name}: its tokenizer has no chat template, which a reward model needs to format a "
            "conversation: copy the model's folder, add a chat_template.jinja, and name the copy"
        )
    classifier = Classifier(model)
    classifier.padding = config.get("pad_token_id")
    if (highest := max(tokenizer.get_vocab().values())) >= classifier.vocabulary:
        raise UserError(
            f"model {cfg.name}: its tokenizer has a token {highest}, but the model's vocabulary has only "
            f"{classifier.vocabulary:,} tokens: the tokenizer belongs to another model"
        )
    return classifier, tokenizer


def check_labels(config: Mapping[str, Any], name: str) -> None:
    """Raise UserError for a config that is not of a sequence classifier with one label."""
    kinds = [str(kind) for kind in config.get("architectures") or ()]
    if kinds and not any(kind.endswith(KIND) for kind in kinds):
        raise UserError(
            f"model {name}: is a {kinds[0]}, but a reward model must be a sequence classifier (…{KIND}): a model that "
            "outputs a score instead of tokens"
        )
    labels = config.get("num_labels") or len(config.get("id2label") or (0,))
    if labels != 1:
        raise UserError(f"model {name}: has {labels} labels, but a reward model has one label: the score")


@cache
def _class_of(base: Any) -> Any:
    """mlx-lm's class of a model, with the matrix `score` instead of a head."""

    class WithScore(base):  # type: ignore[misc]
        def __init__(self, args: Any) -> None:
            super().__init__(args)
            if not isinstance(self.get("model"), nn.Module):
                raise ValueError(f"the architecture {args.model_type} has no module named model for its body")
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
    """The class of the classifier that a config describes, and the class of its arguments."""
    base, arguments = model_classes(config)
    made: type[nn.Module] = _class_of(base)  # type: ignore[arg-type]  # a class is hashable
    return made, arguments


def new_classifier(config: Mapping[str, Any]) -> nn.Module:
    """The classifier that a config describes, with weights that are not yet evaluated.

    Raises ValueError for an architecture that mlx-lm does not know, or that cannot be a classifier.
    """
    model_class, arguments = classes(config)
    return model_class(arguments.from_dict(dict(config)))


def _check_score(cfg: ModelConfig, folder: Path) -> None:
    """Raise UserError for weights without a score, or with several. Only the headers of the files are read."""
    try:
        files: list[Any] = [mx.load(str(file)) for file in sorted(folder.glob("model*.safetensors"))]
    except Exception as error:  # a damaged file can make MLX raise anything
        raise UserError(f"model {cfg.name}: {one_line(error)} (in {folder})") from error
    found = [arrays[SCORE].shape for arrays in files if SCORE in arrays]
    if not found:
        raise UserError(
            f"model {cfg.name}: its weights have no {SCORE}: it is not a reward model, or stores its score under "
            "another name, which grpo does not read"
        )
    if found[0][0] != 1:
        raise UserError(f"model {cfg.name}: has {found[0][0]} labels, but a reward model has one label: the score")
