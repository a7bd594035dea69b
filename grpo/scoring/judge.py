"""A judge: the model in training, as it was at the start of the run, grades completions. No server, no second model.

The judge gets one question per completion. One forward pass gives the probabilities of the answers; nothing is
decoded. The score is p(Yes), as for a generative verifier (arXiv 2408.15240), or the expected rating if the labels are
ratings (arXiv 2303.16634).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from statistics import fmean
from typing import Any

import mlx.core as mx

from grpo.backend.hub import one_line
from grpo.backend.maths import logsumexp
from grpo.config import JudgeConfig, RewardConfig
from grpo.config.judge import judge_of
from grpo.data.rendering import rendered_ids
from grpo.data.rows import is_null
from grpo.errors import UserError, closest
from grpo.model.adapters import JUDGE, POLICY
from grpo.model.batched import in_batches
from grpo.model.mlxlm import TokenizerWrapper
from grpo.model.policy import Policy
from grpo.plugins import locate_reward
from grpo.scoring.grader import Inline
from grpo.scoring.names import check_metric

SELF = "the judge is the model of a run, so it grades only in `grpo train` and `grpo eval`"


class Judge:
    """Scores texts by the answers of the policy's model, in the adapter state `JUDGE`, to a question about each."""

    def __init__(self, name: str, cfg: JudgeConfig) -> None:
        """Raises UserError if the judge's name collides with metrics of the run."""
        self.name, self.cfg, self._metric = name, cfg, f"{name}/label_mass"
        try:
            check_metric(self._metric)
        except ValueError:
            raise UserError(
                f"reward {name!r}: the judge logs the metric {self._metric}, but {name}/… are metrics of the run: give "
                "the judge another name (name: ...)"
            ) from None
        self._policy: Policy | None = None

    def bind(self, policy: Policy, tokenizer: TokenizerWrapper) -> None:
        """Judge with a copy of the current adapter of `policy`, so that later training does not change the judge.

        Raises UserError if two labels begin with the same token.
        """
        self._policy, self._tokenizer = policy, tokenizer
        if JUDGE not in policy.adapters.names:
            policy.adapters.copy(POLICY, JUDGE)
        self._longest = self.cfg.max_length or getattr(policy.model.args, "max_position_embeddings", None) or math.inf
        firsts = {label: _first(tokenizer, label) for label in self.cfg.labels}
        for label, token in firsts.items():
            if token is None or list(firsts.values()).count(token) > 1:
                raise UserError(
                    f"reward {self.name!r}: kwargs.labels: {label!r} is empty, or begins with the token of another "
                    "label. The judge reads only the first token of an answer, so all labels must differ in their "
                    "first token"
                )
        self._labels = mx.array([token for token in firsts.values() if token is not None])
        self._worth = mx.array(list(self.cfg.labels.values()))

    def __call__(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        log_metric: Callable[[str, float], None],
        **columns: Sequence[Any],
    ) -> list[float | Exception | None]:
        """A score per completion; None if a column in the question is null, an exception if the question is too long.

        Logs `NAME/label_mass`: the probability that the answer begins with one of the labels, averaged over
        completions.
        """
        if self._policy is None:
            raise UserError(SELF)
        named = {**columns, "prompt": prompts, "completion": completions}
        values = [{name: named[name][place] for name in self.cfg.columns} for place in range(len(completions))]
        read = [self._read(named_values) for named_values in values]
        rows = [ids for ids in read if isinstance(ids, list)]
        self._masses: list[float] = []
        with self._policy.use(JUDGE):
            scores = iter(in_batches(rows, self.cfg.batch_tokens, self._of))
        if self._masses:
            log_metric(self._metric, fmean(self._masses))
        return [next(scores) if isinstance(ids, list) else ids for ids in read]

    def _read(self, values: dict[str, Any]) -> list[int] | Exception | None:
        """The token ids of the question, None if a column in it is null, or the reason why it cannot be asked."""
        if any(is_null(value) for value in values.values()):
            return None
        question = self.cfg.prompt.format_map({name: str(value) for name, value in values.items()})
        question = question.encode(errors="replace").decode()
        try:
            ids = self._ids(question)
        except Exception as error:  # the template is the model's own code
            return ValueError(f"the model's chat template raised an error on the judge's question: {one_line(error)}")
        if len(ids) > self._longest:
            return ValueError(
                f"the judge's question has {len(ids):,} tokens, but the judge reads at most {self._longest:,} "
                "(kwargs.max_length, or the model's number of positions)"
            )
        return ids

    def _ids(self, question: str) -> list[int]:
        if not self._tokenizer.has_chat_template:
            before = "" if self.cfg.system is None else f"{self.cfg.system}\n\n"
            return list(self._tokenizer.encode(before + question))
        system = [] if self.cfg.system is None else [{"role": "system", "content": self.cfg.system}]
        messages = [*system, {"role": "user", "content": question}]
        return rendered_ids(self._tokenizer, messages, (), self.cfg.chat_template_kwargs)

    def _of(self, tokens: mx.array, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scores of one batch of questions: `tokens` is int32 [B, T], padded on the right."""
        assert self._policy is not None
        logits = self._policy.next_logits(tokens, mx.array([len(row) - 1 for row in rows]))
        chosen = logits[:, self._labels]
        scores: Any = (mx.softmax(chosen, axis=-1) * self._worth).sum(axis=-1)
        masses: Any = mx.exp(logsumexp(chosen) - logsumexp(logits))
        mx.eval(scores, masses)
        self._masses += masses.tolist()
        return [float(score) for score in scores.tolist()]


class Judged(Inline):
    """A judge as a reward of the recipe."""

    def __init__(self, config: RewardConfig, system: str | None = None) -> None:
        name = config.name or locate_reward(config.use).name
        self.judge = Judge(name, judge_of(config.kwargs))
        super().__init__(name, self.judge, {}, "step", "text", system)

    def problem(self, columns: Collection[str]) -> str | None:
        """Why the judge cannot grade a dataset with these columns; None if it can."""
        there = {*columns, "prompt", "completion"}
        if missing := [name for name in self.judge.cfg.columns if name not in there]:
            meant = f" (did you mean {{{close}}}?)" if (close := closest(missing[0], there)) else ""
            return f"kwargs.prompt uses {{{missing[0]}}}, but the dataset has no such column{meant}"
        return None


def _first(tokenizer: TokenizerWrapper, label: str) -> int | None:
    """The first token of a label; None for a label without tokens."""
    ids = list(tokenizer.encode(label, add_special_tokens=False))
    return int(ids[0]) if ids else None
