"""Tests a reward function: first its cases, then a fuzz of unusual completions.

A case is a dictionary with `completion`, the expected `score`, and `kwargs` for the function; every other key is a
column of the dataset. `casefile` says where cases are written. If cases need a resource, such as a server, the file
defines a context manager `case_kwargs()` that yields further arguments.
"""

from __future__ import annotations

import json
import math
import re
import sys
import zlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from grpo.errors import UserError
from grpo.plugins import Located, model_in
from grpo.scoring.arguments import GIVEN
from grpo.scoring.forms import as_messages
from grpo.scoring.grader import ScoringRequest
from grpo.scoring.process import WorkerTerms
from grpo.scoring.trying import SHORT, cases_of, grader_of

TOGETHER = 4
"""Number of fuzz completions passed in one call: a wrong number of scores usually shows only with several."""
EXACT, CLOSE = 1e-9, 0.01
"""Absolute tolerance for a case's score: for a function, and for a model, whose last digits depend on its dtype."""
OUR_KEYS = ("completion", "score", "kwargs")


@dataclass(frozen=True, slots=True)
class Tried:
    """One completion and its score. `wrong` describes the failure or the wrong score, if any."""

    completion: Any
    score: float | None
    seconds: float
    wrong: str | None


@dataclass(frozen=True, slots=True)
class Report:
    """The results of testing a reward; `cases` are in the order of the file. `together` describes what went wrong in a
    call with several completions, as a run makes it, if anything."""

    cases: list[Tried]
    fuzz: list[Tried]
    together: str | None = None

    @property
    def all_none(self) -> bool:
        """Whether the reward returned None for every completion without a failure: a run would learn nothing."""
        results = [*self.cases, *self.fuzz]
        return bool(results) and all(tried.score is None and tried.wrong is None for tried in results)

    @property
    def wrong(self) -> list[Tried]:
        return [tried for tried in [*self.cases, *self.fuzz] if tried.wrong is not None]


@dataclass(frozen=True, slots=True)
class Trial:
    """How to test a reward: its arguments, its worker's terms, and its cases.

    `kwargs` are for the fuzz, and for cases that lack a required argument. `columns` are for the fuzz, and for cases
    that lack these columns. `chat`: completions and prompts are messages. `cases`: a file of cases that replaces the
    reward's own cases.
    """

    kwargs: Mapping[str, Any]
    terms: WorkerTerms
    columns: Mapping[str, Any] = field(default_factory=dict)
    chat: bool = False
    cases: str | None = None
    fuzz: bool = True


def try_out(located: Located, trial: Trial) -> Report:
    """Run the cases, then the fuzz with the columns of the first case, one completion per call.

    Raises UserError for a function that cannot be loaded or called with these arguments, and for a trial without cases
    and without the fuzz.
    """
    with cases_of(located, trial.terms, trial.cases) as (found, case_kwargs):
        cases = [_whole(case, case_kwargs, trial) for case in found]
        if not cases and not trial.fuzz:
            raise UserError(f"reward {located.name!r} has no cases, so without the fuzz there is nothing to test")
        by_place: dict[int, Tried] = {}
        for places in _by_kwargs(cases):
            by_place |= zip(places, _tried(located, [cases[at] for at in places], trial), strict=True)
        first: dict[str, Any] = cases[0] if cases else {"completion": "", "kwargs": case_kwargs, **trial.columns}
        first = {**first, "kwargs": {**first["kwargs"], **trial.kwargs}}
        most = SHORT if model_in(located.where) else sys.maxsize
        texts = [text for text in fuzz_texts() if len(text) <= most] if trial.fuzz else []
        fuzz = [{**first, "completion": _in_form(text, first, trial), "completion_ids": _ids(text)} for text in texts]
        fuzzed = _called(located, fuzz, trial.terms, None) if fuzz else []
        can_tell = fuzz and all(tried.wrong is None for tried in fuzzed[:TOGETHER])
        together = _wrong_together(located, fuzz[:TOGETHER], trial.terms) if can_tell else None
    return Report([by_place[at] for at in range(len(cases))], fuzzed, together)


def fuzz_texts() -> Iterator[str]:
    """Yield empty, huge, foreign-language and hostile completions."""
    yield from (
        "",
        " ",
        "\n\n\n",
        "\x00",
        "\ufeff",
        "NaN",
        "None",
        "-",
        "%s %n {} {0} \\",
        "'\"`;--<!--",
        "a\u0301\u202e\u200b",
    )
    yield from ("🤖🏳️‍🌈" * 50, "مرحبا 七 שלום", "\ud800 lone", "\\", "\\boxed{", "\\boxed{}}", "\\boxed{\\boxed{1}}")
    yield from ("#### ", "#### 1e999", "####" * 1000, "1/0", "\\frac{1}{0}", "\\boxed{\\frac{0}{0}}", "0" * 5000 + ".1")
    yield from ("\\boxed{10^{10^{10^{10}}}}", "9" * 20_000, "\\boxed{" + "9" * 5000 + "!}", "(" * 5000, "{" * 5000)
    yield from ("[" * 50_000, "\\sqrt{" * 300 + "2" + "}" * 300, "1+" * 3000 + "1", "a" * 1_000_000, "word " * 50_000)
    yield from ("<think>" * 1000, "</think>", "<answer></answer>", "```" * 999, "```python\nwhile True: pass\n```")
    yield from ("```python\nraise SystemExit\n```", '{"a": ' * 2000, "(a+)+$" * 20, "a" * 40 + "!", "x = " * 1000)


def _tried(located: Located, cases: list[dict[str, Any]], trial: Trial) -> list[Tried]:
    scores = [case["score"] for case in cases]
    try:
        return _called(located, cases, trial.terms, scores)
    except UserError:
        if not trial.kwargs:
            raise
    given = [{**case, "kwargs": {**trial.kwargs, **case["kwargs"]}} for case in cases]
    return _called(located, given, trial.terms, scores)


def _called(
    located: Located, cases: Sequence[Mapping[str, Any]], terms: WorkerTerms, expected: Sequence[float | None] | None
) -> list[Tried]:
    """The results of `cases`, which share their kwargs, with one call per case."""
    with grader_of(located, cases[0]["kwargs"], terms, "completion") as grader:
        names = _columns_of(cases)
        if grader.takes_environments:
            raise UserError(
                f"reward {located.name!r} takes `environments`, so it needs real conversations and cannot be tested on "
                "cases: test it in a run of one step (grpo train RECIPE optim.steps=1)"
            )
        if problem := grader.problem(names):
            raise UserError(f"reward {located.name!r}: {problem}. {_cases_advice(problem, names, expected is None)}")
        request = _request(cases, names, [1] * len(cases))
        answers = grader.score(request)
    tried = []
    for place, (_, answer) in enumerate(answers):
        score, wrong = answer.values[0], answer.failures.get(0)
        if wrong is not None:
            wrong = f"{answer.kind}: {wrong}"
        elif expected is not None and not _same(score, expected[place], CLOSE if model_in(located.where) else EXACT):
            wrong = f"expected {expected[place]}, got {score}"
        tried.append(Tried(request.columns["completions"][place], score, answer.seconds, wrong))
    return tried


def _wrong_together(located: Located, cases: Sequence[Mapping[str, Any]], terms: WorkerTerms) -> str | None:
    """The error of one call with all of `cases`, as a run makes it; None if some completion was scored.

    The cases share their kwargs and form one group. A reward that takes one completion per call is not tested.
    """
    with grader_of(located, cases[0]["kwargs"], terms) as grader:
        if grader.calls == "completion":
            return None
        ((_, answer),) = grader.score(_request(cases, _columns_of(cases), [len(cases)]))
    return f"{answer.kind}: {answer.failures[0]}" if len(answer.failures) == len(cases) else None


def _columns_of(cases: Sequence[Mapping[str, Any]]) -> set[str]:
    return {name for case in cases for name in case} - set(OUR_KEYS)


def _request(cases: Sequence[Mapping[str, Any]], names: Collection[str], sizes: list[int]) -> ScoringRequest:
    """The scoring request for the cases, with the columns `names`, in groups of `sizes`."""
    columns: dict[str, list[Any]] = {
        "prompts": ["?" if isinstance(case.get("completion", ""), str) else _MESSAGES for case in cases],
        "completions": [case.get("completion", "") for case in cases],
        "completion_ids": [_ids(str(case.get("completion", ""))) for case in cases],
    }
    columns |= {name: [case.get(name) for case in cases] for name in names}
    return ScoringRequest(columns, sizes, {"global_step": 0, "max_steps": 1})


def _cases_advice(problem: str, columns: Collection[str], no_cases: bool) -> str:
    """A sentence on how to provide the columns that the function misses."""
    if not no_cases:
        return f"Its cases have the columns {', '.join(sorted(columns))}" if columns else "Its cases have no columns"
    wanted = re.findall(r"'(\w+)'", problem.partition(";")[0]) or ["answer"]
    form = ", ".join(f'"{name}": "7"' for name in wanted)
    return (
        f"Columns such as {wanted[0]} come from cases, and the reward has none. Write cases in its file, or in a file "
        f'for --cases: CASES = [{{"completion": "It is 7.", {form}, "score": 1.0}}]. For the fuzz alone, '
        f"--column {wanted[0]}=7 is enough"
    )


_MESSAGES = [{"role": "user", "content": "?"}]


def _whole(case: Any, given: Mapping[str, Any], trial: Trial) -> dict[str, Any]:
    """A case with all its arguments and columns, in the form that the trial uses. Raises UserError for an invalid
    case."""
    if not isinstance(case, dict) or not isinstance(case.get("kwargs", {}), dict):
        raise UserError(
            f"CASES: a case is a dictionary of completion, score, kwargs (a dictionary) and columns, not {case!r:.80}"
        )
    if not isinstance(case.get("score", ""), int | float | None):
        raise UserError(f"CASES: {case!r:.80} needs a score: a number, or None")
    if trial.chat and "completion" in case:
        case = {**case, "completion": as_messages(case["completion"], "assistant")}
    return {**trial.columns, **case, "kwargs": {**given, **case.get("kwargs", {})}}


def _by_kwargs(cases: Sequence[dict[str, Any]]) -> list[list[int]]:
    """The indices of the cases, grouped by equal kwargs and columns: one loaded function can answer each group."""
    alike: dict[str, list[int]] = {}
    for place, case in enumerate(cases):
        columns = sorted(set(case) - set(OUR_KEYS) - set(GIVEN))
        alike.setdefault(json.dumps([case["kwargs"], columns], sort_keys=True, default=str), []).append(place)
    return list(alike.values())


def _ids(text: str) -> list[int]:
    """Token ids without a tokenizer: one token per word, at least one token."""
    return [zlib.crc32(word.encode(errors="replace")) % 1000 for word in text.split()[:10_000]] or [0]


def _in_form(text: str, like: Mapping[str, Any], trial: Trial) -> Any:
    is_text = isinstance(like.get("completion", ""), str) and not trial.chat
    return text if is_text else as_messages(text, "assistant")


def _same(score: float | None, expected: float | None, tolerance: float) -> bool:
    if score is None or expected is None:
        return score is expected
    return math.isclose(score, expected, rel_tol=1e-6, abs_tol=tolerance)
