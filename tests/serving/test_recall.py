"""Sessions' histories are kept as keys and values: the next turn computes what is new, and has the same tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from serving import decoding
from test_decoder import ASK, Told, adapters, answered, compared, trained  # noqa: F401

from grpo.generation.engine import Engine
from grpo.generation.rows import Computed, Row, SharedPrompt
from grpo.generation.sampling import Sampling
from grpo.generation.stopping import Stopping
from grpo.serving.asks import Ask
from grpo.serving.decoder import DecodingLoop
from grpo.serving.recall import MOST_OF_A_SESSION, Recall
from grpo.serving.refusals import Refusal

SAID = replace(ASK, session="s", n=1)


def computed(*ids: int, nbytes: int = 10, cuts: bool = True) -> Computed:
    return Computed(ids, None, nbytes, object, cuts)


def ask(*ids: int, session: str | None = "s", model: str = "base") -> Ask:
    return Ask(model, ids, Sampling(1.0, 4), 1, 0, False, session=session)


def ended(recall: Recall, asked: Ask, found: Computed) -> None:
    stopping = Stopping(asked.sampling, frozenset(), str)
    row = Row(SharedPrompt(asked.prompt_ids), key=mx.zeros(2, mx.uint32), stopping=stopping)
    recall.expect(asked, row)
    recall.collect()
    assert recall.find(asked) is None or row.computed is None
    row.computed = found
    recall.collect()
    assert row.computed is None  # or a row would hold what was dropped


def test_what_saves_most_is_found_of_the_same_session_and_adapter_alone() -> None:
    recall = Recall(100)
    ended(recall, ask(1, 2), computed(1, 2, 3))
    ended(recall, ask(1, 2), longest := computed(1, 2, 4, 5))
    assert recall.find(ask(1, 2, 4, 5, 6)) is longest
    assert recall.find(ask(1, 2, 4, 5, 6, session="t")) is None
    assert recall.find(ask(1, 2, 4, 5, 6, model="one")) is None
    assert recall.find(ask(1, 2, 4, 5, 6, session=None)) is None
    assert recall.find(ask(9, 2, 4)) is None
    assert recall.find(ask(1)) is None  # its only token is fed when decoding begins


def test_a_state_that_cannot_be_cut_is_found_for_what_holds_it_whole() -> None:
    recall = Recall(100)
    ended(recall, ask(1, 2), computed(1, 2, 3, 4, 5, cuts=False))
    ended(recall, ask(1, 2), short := computed(1, 2, 9, cuts=False))
    assert recall.find(ask(1, 2, 9, 4)) is short
    assert recall.find(ask(1, 2, 3, 4, 6)) is None


def test_what_goes_on_takes_the_place_of_its_beginning() -> None:
    recall = Recall(100)
    ended(recall, ask(1), computed(1, 2))
    ended(recall, ask(1, 2, 3), computed(1, 2, 3, 4))
    assert recall.nbytes == 10
    for end in range(10, 10 + MOST_OF_A_SESSION):
        ended(recall, ask(1), computed(1, end))
    assert recall.nbytes == 10 * MOST_OF_A_SESSION
    assert recall.find(ask(1, 2, 3, 4, 5)) is not None
    assert recall.find(ask(1, 2, 3, 4, 5)).usable((1, 2, 3, 4, 5)) == 1  # type: ignore[union-attr]


def test_the_session_unused_for_longest_goes_first_where_bytes_run_out() -> None:
    recall = Recall(30)
    for name in ("a", "b", "c"):
        ended(recall, ask(1, session=name), computed(1, 2))
    assert recall.find(ask(1, 2, 3, session="a"))
    ended(recall, ask(1, session="d"), computed(1, 2))
    found = [name for name in ("a", "b", "c", "d") if recall.find(ask(1, 2, 3, session=name))]
    assert (found, recall.nbytes) == (["a", "c", "d"], 30)
    ended(recall, ask(1, session="e"), computed(1, 2, nbytes=31))  # more than there may be
    assert (recall.find(ask(1, 2, 3, session="e")), recall.nbytes) == (None, 0)
    ended(recall, ask(1), computed(1, 2))
    recall.clear()
    assert (recall.find(ask(1, 2, 3)), recall.nbytes) == (None, 0)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """For each request, how many tokens of its prompt were known."""
    found: list[int] = []
    submit = Engine.submit

    def watched(self: Engine, submission: Any) -> Any:
        found.append(submission.known.usable(submission.prompt_ids) if submission.known else 0)
        return submit(self, submission)

    monkeypatch.setattr(Engine, "submit", watched)
    return found


def talked(decoder: DecodingLoop, turns: int, model: str = "base", session: str | None = "s") -> list[Any]:
    """A talk of so many turns: each request, and what it was answered."""
    asked, said = replace(SAID, model=model, session=session), []
    for turn in range(turns):
        said.append((asked, answered(decoder, asked)))
        (ids, _, _) = said[-1][1][0]
        asked = replace(asked, prompt_ids=(*asked.prompt_ids, *ids, 30, 31 + turn), seed=asked.seed + 1)
    return said


def checked(folder: Path, said: Sequence[Any], adapter: dict[str, mx.array] | None = None) -> None:
    for asked, rows in said:
        compared(rows, trained(folder, asked, adapter))


def test_the_next_turn_of_a_session_computes_what_is_new(toy_folder: Path, known: list[int]) -> None:
    with decoding(toy_folder) as (decoder, _):
        said = talked(decoder, 4)
        alone = talked(decoder, 2, session=None)
    prompts = [len(asked.prompt_ids) for asked, _ in said]
    assert known[0] == 0
    assert all(length - 5 <= saved < length for length, saved in zip(prompts[1:], known[1:4], strict=True))
    assert known[4:] == [0, 0]
    checked(toy_folder, said)
    checked(toy_folder, alone)


def test_each_adapter_has_keys_and_values_of_its_own(
    toy_folder: Path,
    adapters: dict[str, Path],  # noqa: F811
    known: list[int],
) -> None:
    with decoding(toy_folder, adapters) as (decoder, _):
        one = talked(decoder, 2, "one")
        two = [(again := replace(one[1][0], model="two"), answered(decoder, again))]
        more = talked(decoder, 1, "base")
        back = [(one[1][0], answered(decoder, one[1][0]))]
    states = {name: dict(mx.load(str(folder / "adapters.safetensors"))) for name, folder in adapters.items()}
    assert known[2:4] == [0, 0]
    assert known[4] > 0
    for said, state in ((one, states["one"]), (two, states["two"]), (more, None), (back, states["one"])):
        checked(toy_folder, said, state)


def test_sessions_beside_one_another_go_on_each_from_its_own(toy_folder: Path, known: list[int]) -> None:
    said: list[Any] = []
    asked = [replace(SAID, session=str(n), seed=n, prompt_ids=(*SAID.prompt_ids, 40 + n), n=2) for n in range(6)]
    with decoding(toy_folder, slots=4) as (decoder, _):
        for _ in range(2):
            told = [Told() for _ in asked]
            for one, heard in zip(asked, told, strict=True):
                decoder.submit(one, heard)
            found = [heard.rows(2) for heard in told]
            said += zip(asked, found, strict=True)
            asked = [  # each goes on from its second choice
                replace(one, prompt_ids=(*one.prompt_ids, *rows[1][0], 50))
                for one, rows in zip(asked, found, strict=True)
            ]
    saved = [len(one.prompt_ids) - tokens for (one, _), tokens in zip(said, known, strict=True)]
    assert saved[:6] == [len(SAID.prompt_ids) + 1] * 6
    assert max(saved[6:]) <= 3  # the last token of the answer may not have been fed, nor what follows it
    checked(toy_folder, said)


def test_too_little_room_keeps_nothing_and_changes_no_token(toy_folder: Path, known: list[int]) -> None:
    with decoding(toy_folder) as (decoder, _):
        decoder._recall.most_bytes = 100
        said = talked(decoder, 3)
    assert known == [0, 0, 0]
    checked(toy_folder, said)


def test_after_an_error_nothing_is_gone_on_from(
    toy_folder: Path, known: list[int], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    step, fails = Engine.step, list[RuntimeError]()

    def broken(self: Engine) -> Any:
        if fails:
            raise fails.pop()
        return step(self)

    monkeypatch.setattr(Engine, "step", broken)
    with decoding(toy_folder) as (decoder, _):
        (asked, _), (follows, _) = talked(decoder, 2)
        fails.append(RuntimeError("the model broke"))
        told = Told()
        decoder.submit(asked, told)
        assert isinstance(told.queue.get(timeout=60), Refusal)
        compared(answered(decoder, follows), trained(toy_folder, follows))
        assert (known[-1], len(decoder._recall._ended)) == (0, 0)
    assert "the model broke" in caplog.text
