"""`grpo bench speculate`: the gain of speculation by the number of accepted drafts per step.

Tokens of random weights cannot be predicted. The drafts are the tokens that the same rows sampled before; after the
wanted number of accepted drafts, they are replaced with wrong ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from statistics import fmean

from grpo.backend.device import on_gpu
from grpo.benchmark.forced import sample
from grpo.benchmark.models import model_for, vocabulary_of
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.rollout import requests_of, timed, untold
from grpo.benchmark.setting import Setting
from grpo.errors import RunError, UserError
from grpo.generation.rows import Row
from grpo.generation.sampling import Sampling
from grpo.generation.slots import WIDTHS

TokenRows = Sequence[Sequence[int]]


class KnownDrafts:
    """A `Speculation` with `accepted` accepted drafts at every step, if rows sample the same tokens as before.

    With `accepted` 0, every draft is wrong.
    """

    def __init__(self, accepted: int, vocabulary: int, width: int | None = None) -> None:
        self.accepted, self._vocabulary = accepted, vocabulary
        self.most = WIDTHS[-1]
        self.fed = width or next(width for width in WIDTHS if width > accepted)
        self.turns = self.taken = 0
        self._truth: dict[Row, Sequence[int]] = {}

    def know(self, rows: Sequence[Row], truth: TokenRows) -> None:
        """Set the tokens that these rows will sample, and reset the counts."""
        self._truth, self.turns, self.taken = dict(zip(rows, truth, strict=True)), 0, 0

    @property
    def mean(self) -> float:
        """Mean number of drafts that a row accepted per wide step."""
        return self.taken / self.turns - 1 if self.turns else 0.0

    def width(self, rows: Sequence[Row | None]) -> int:  # noqa: ARG002  the same for all
        return self.fed

    def propose(self, rows: Sequence[Row | None], width: int) -> list[list[int]]:
        return [[] if row is None else self._drafts(row)[: width - 1] for row in rows]

    def stepped(self, rows: Sequence[Row | None], width: int, taken: Sequence[int], seconds: float) -> None:  # noqa: ARG002
        if width > 1:
            self.turns += sum(row is not None for row in rows)
            self.taken += sum(taken)

    def ended(self, row: Row) -> None:
        """Do nothing: the drafts are known in advance."""

    def _drafts(self, row: Row) -> list[int]:
        truth, begin = self._truth.get(row, ()), len(row.token_ids)
        good = list(truth[begin : begin + self.accepted])
        right = truth[begin + len(good)] if begin + len(good) < len(truth) else 0
        wrong = (right + 1) % self._vocabulary
        return [*good, *[wrong] * (self.fed - 1 - len(good))]


def counts(text: str) -> list[int]:
    """Numbers of accepted drafts, separated by commas. Raises UserError for a number that exceeds the widest step."""
    most = WIDTHS[-1] - 1
    found = text.split(",")
    if not all(number.strip().isdecimal() and int(number) <= most for number in found):
        raise UserError(f"--accepted {text}: expected numbers from 0 to {most}, such as 1,2,4")
    return [int(number) for number in found]


def speculation_gains(setting: Setting, accepted: Sequence[int]) -> list[Measurement]:
    """Decoding without speculation, and with each number of accepted drafts per step.

    Measures tokens per second, the actual mean number of accepted drafts per step, and the fraction of rows with the
    same tokens as in plain decoding. Raises RunError if a row differs on a CPU, and if no step was wide.
    """
    bench = _Bench(setting)
    plain = bench.sample(None, ())
    return alternate(f"speculation, {setting}", bench.sides(accepted, plain), setting.runs)


class _Bench:
    def __init__(self, setting: Setting) -> None:
        self._model = model_for(setting)
        self._generator, self._requests = untold(self._model, setting.at_once), requests_of(setting, self._model)
        self._sampling, self._lengths = Sampling(max_tokens=setting.completion_length), setting.completion_lengths
        self._wide: dict[int, TokenRows] = {}

    def sides(self, accepted: Sequence[int], plain: TokenRows) -> Iterator[Side]:
        yield Side("plain", lambda: self._measured(None, plain, plain))
        for count in accepted:
            drafts = KnownDrafts(count, vocabulary_of(self._model))
            truth = self._truth(drafts, plain)
            yield Side(f"{count} accepted", partial(self._measured, drafts, truth, plain))

    def sample(self, drafts: KnownDrafts | None, truth: TokenRows) -> list[list[int]]:
        """The sampled tokens of every row; `drafts` proposes the tokens of `truth`."""
        self._generator.speculation = drafts
        know = None if drafts is None else lambda rows: drafts.know(rows, truth)
        rows = sample(self._generator, self._requests, self._lengths, self._sampling, logprobs=True, queued=know)
        return [list(row.token_ids) for row in rows]

    def _truth(self, drafts: KnownDrafts, plain: TokenRows) -> TokenRows:
        """The tokens that steps of this width sample. On a GPU, rounding makes them differ from narrow steps."""
        if not on_gpu():
            return plain
        if drafts.fed not in self._wide:
            self._wide[drafts.fed] = self.sample(KnownDrafts(0, vocabulary_of(self._model), drafts.fed), plain)
        return self._wide[drafts.fed]

    def _measured(self, drafts: KnownDrafts | None, truth: TokenRows, plain: TokenRows) -> Values:
        drawn: list[list[int]] = []
        values = timed(lambda: drawn.extend(self.sample(drafts, truth)), sum(self._lengths))
        same = fmean(mine == theirs for mine, theirs in zip(drawn, plain, strict=True))
        if drafts is not None and not drafts.turns:
            raise RunError(f"this model decodes one token at a time: {self._generator.decoding.description}")
        if same < 1 and not on_gpu():
            raise RunError(f"{100 * (1 - same):.1f} % of the rows have other tokens with speculation than without")
        return {**values, "accepted": drafts.mean if drafts else 0.0, "same rows": same}
