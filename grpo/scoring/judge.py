"""The model that is trained judges completions, as it was when the run began: no server, and no second model.

It is asked about each completion, and the probabilities of the answers are read from one forward pass; nothing is
decoded. A generative verifier's score is p(Yes) (arXiv 2408.15240); with ratings as labels it is the expected rating
(arXiv 2303.16634).
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

SELF = "the judge is the model of a run: it grades in `grpo train` and `grpo eval`, and there is none here"


class Judge:
    """Scores texts by what the policy's model, in its state `JUDGE`, answers when it is asked about them."""

    def __init__(self, name: str, cfg: JudgeConfig) -> None:
        """Raises UserError for a name that the run's own metrics go by."""
        self.name, self.cfg, self._metric = name, cfg, f"{name}/label_mass"
        try:
            check_metric(self._metric)
        except ValueError:
            raise UserError(
                f"reward {name!r}: a judge tells the metric {self._metric}, and the run's own metrics are called "
                f"{name}/…: give it another name (name: ...)"
            ) from None
        self._policy: Policy | None = None

    def bind(self, policy: Policy, tokenizer: TokenizerWrapper) -> None:
        """Judge by the model of `policy` as it is now, whatever becomes of the policy.

        Raises UserError for labels that the first token does not tell apart.
        """
        self._policy, self._tokenizer = policy, tokenizer
        if JUDGE not in policy.adapters.names:
            policy.adapters.copy(POLICY, JUDGE)
        self._longest = self.cfg.max_length or getattr(policy.model.args, "max_position_embeddings", None) or math.inf
        firsts = {label: _first(tokenizer, label) for label in self.cfg.labels}
        for label, token in firsts.items():
            if token is None or list(firsts.values()).count(token) > 1:
                raise UserError(
                    f"reward {self.name!r}: kwargs.labels: {label!r} begins with no token of its own. The answer is "
                    "read from its first token, so labels must differ there"
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
        """A score for each; None where a column that the question names is null, and an exception for what is too long.

        Logs `NAME/label_mass`, the probability that the answer begins as one of the labels, mean over completions.
        """
        if self._policy is None:
            raise UserError(SELF)
        named = {**columns, "prompt": prompts, "completion": completions}
        values = [{name: named[name][place] for name in self.cfg.columns} for place in range(len(completions))]
        read = [self._read(one) for one in values]
        rows = [ids for ids in read if isinstance(ids, list)]
        self._masses: list[float] = []
        with self._policy.use(JUDGE):
            scores = iter(in_batches(rows, self.cfg.batch_tokens, self._of))
        if self._masses:
            log_metric(self._metric, fmean(self._masses))
        return [next(scores) if isinstance(ids, list) else ids for ids in read]

    def _read(self, values: dict[str, Any]) -> list[int] | Exception | None:
        """The token ids of the question, None where there is none to ask, or why it cannot be asked."""
        if any(is_null(value) for value in values.values()):
            return None
        asked = self.cfg.prompt.format_map({name: str(value) for name, value in values.items()})
        asked = asked.encode(errors="replace").decode()
        try:
            ids = self._ids(asked)
        except Exception as error:  # the template is the model's own code
            return ValueError(f"the model's chat template refuses the judge's question: {one_line(error)}")
        if len(ids) > self._longest:
            return ValueError(
                f"the judge's question has {len(ids):,} tokens, and it reads {self._longest:,} at most "
                "(kwargs.max_length, or the model's positions)"
            )
        return ids

    def _ids(self, asked: str) -> list[int]:
        if not self._tokenizer.has_chat_template:
            before = "" if self.cfg.system is None else f"{self.cfg.system}\n\n"
            return list(self._tokenizer.encode(before + asked))
        system = [] if self.cfg.system is None else [{"role": "system", "content": self.cfg.system}]
        messages = [*system, {"role": "user", "content": asked}]
        return rendered_ids(self._tokenizer, messages, (), self.cfg.chat_template_kwargs)

    def _of(self, tokens: mx.array, rows: Sequence[Sequence[int]]) -> list[float]:
        """The scores of questions that go through together."""
        assert self._policy is not None
        logits = self._policy.next_logits(tokens, mx.array([len(row) - 1 for row in rows]))
        chosen = logits[:, self._labels]
        scores: Any = (mx.softmax(chosen, axis=-1) * self._worth).sum(axis=-1)
        masses: Any = mx.exp(logsumexp(chosen) - logsumexp(logits))
        mx.eval(scores, masses)
        self._masses += masses.tolist()
        return [float(score) for score in scores.tolist()]


class Judged(Inline):
    """A judge among the rewards."""

    def __init__(self, config: RewardConfig, system: str | None = None) -> None:
        name = config.name or locate_reward(config.use).name
        self.judge = Judge(name, judge_of(config.kwargs))
        super().__init__(name, self.judge, {}, "step", "text", system)

    def problem(self, columns: Collection[str]) -> str | None:
        """Why it could not be asked of a dataset with these columns; None if it can be."""
        there = {*columns, "prompt", "completion"}
        if missing := [name for name in self.judge.cfg.columns if name not in there]:
            meant = f" (did you mean {{{close}}}?)" if (close := closest(missing[0], there)) else ""
            return f"kwargs.prompt names {{{missing[0]}}}, and the dataset has no such column{meant}"
        return None


def _first(tokenizer: TokenizerWrapper, label: str) -> int | None:
    """The first token of an answer; None for a label without tokens."""
    ids = list(tokenizer.encode(label, add_special_tokens=False))
    return int(ids[0]) if ids else None
