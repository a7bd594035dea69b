"""What an environment's author gets wrong: which environment, on which row, what is wrong and what to do."""

from __future__ import annotations

import asyncio
import re

import mlx.core as mx
import pytest

from grpo.environments.mistakes import EnvironmentMistake
from grpo.errors import RunError, UserError
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Task


class Told:
    """Extends each row, which is kept or not, by what it is made with."""

    def __init__(self, said, keep: bool = True) -> None:
        self.said, self.keep = said, keep

    async def rollout(self, task, sampler):
        rows = sampler.begin(task.prompt_ids, sampler.n, keep=self.keep)
        return await sampler.gather(*(self.play(row, sampler) for row in rows))

    async def play(self, row, sampler):
        await sampler.ended(row)
        return await sampler.extend(row, self.said)


class Texts:
    async def rollout(self, task, sampler):
        return [answer.text for answer in await sampler.sample(task.prompt_ids, sampler.n)]


class Nothing:
    async def rollout(self, task, sampler):
        await sampler.sample(task.prompt_ids, sampler.n)


class Plain:
    def rollout(self, task, sampler):
        return []


class Sleeps:
    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    async def rollout(self, task, sampler):
        await asyncio.sleep(self.seconds)


class SleepsEach(Sleeps):
    async def rollout(self, task, sampler):
        return await sampler.gather(asyncio.sleep(self.seconds), asyncio.sleep(self.seconds))


class Listed:
    async def rollout(self, task, sampler):
        return await sampler.gather([])


class Called:
    async def rollout(self, task, sampler):
        return await sampler.outside(lambda: 4)


class Early:
    async def rollout(self, task, sampler):
        (row,) = sampler.begin(task.prompt_ids, 1, keep=True)
        return await sampler.extend(row, [5])


ENCODE = "`extend` takes token ids: sampler.tokenizer.encode(text, add_special_tokens=False)"
WRONG = [
    (Told(" Sure?"), f"it extends a row with the text ' Sure?', but {ENCODE}"),
    (Told(["Sure"]), f"it extends a row with ['Sure'], but {ENCODE}"),
    (Told(None), f"it extends a row with None, but {ENCODE}"),
    (Told([5], keep=False), "a row that was not kept: start it with sampler.begin(task.prompt_ids, n, keep=True)"),
    (Told([5] * 99), "must still be sampled: 99 more tokens do not fit, at most 58 do (row.room)"),
    (Early(), "this row is still queued or decoding, so it cannot be extended"),
    (Texts(), "`rollout` returned a str among its trajectories: it must return a list of trajectories"),
    (Nothing(), "`rollout` returned None: it must return a list of trajectories"),
    (Plain(), "`rollout` returned a list, which cannot be awaited: write `async def rollout(self, task, sampler)`"),
    (Sleeps(0), "it awaits None: an environment can only await what its sampler provides"),
    (Sleeps(1), "run code that needs asyncio, or takes time, in a thread"),
    (SleepsEach(1), "wait for it with `await sampler.outside(executor.submit(...))` (no running event loop)"),
    (Listed(), "`gather` takes coroutines, as in `gather(*list)`, but got []"),
    (Called(), "`outside` takes a future, as returned by executor.submit(...), but got <function"),
]


def rolled(toy, environment, every: int = 1):
    """Two rows. Each `every`th token of the vocabulary stops: if all do, turns have one token each."""
    sampling = Sampling(1.0, 60, stop_ids=tuple(range(0, len(toy.tokenizer), every)))
    task = Task(3, "Why?", tuple(toy.tokenizer.encode("Why?")), {})
    return RolloutEngine(toy.generator, sampling, environment).rollout([task], 2, 1.0, mx.random.key(7))


@pytest.mark.filterwarnings("ignore:coroutine .* was never awaited")
@pytest.mark.parametrize(
    ("environment", "said"), WRONG, ids=lambda value: value[:40] if isinstance(value, str) else type(value).__name__
)
def test_a_mistake_says_where_it_is_and_what_to_do(make_policy, environment, said: str) -> None:
    with pytest.raises(RunError, match=re.escape(said)) as error:
        rolled(make_policy(), environment)
    assert str(error.value).startswith(f"environment {type(environment).__name__}, row 3 of data: ")


class Careful(Told):
    """Catches what its sampler refuses."""

    async def play(self, row, sampler):
        answer = await sampler.ended(row)
        try:
            return await sampler.extend(row, self.said)
        except EnvironmentMistake:
            return answer


def test_an_environment_may_catch_a_refusal(make_policy) -> None:
    (group,) = rolled(make_policy(), Careful([5] * 99))
    assert [rollout.trajectory.trained.count(False) for rollout in group.rollouts] == [0, 0]


class Last(Told):
    """Notes the text of each row's last turn."""

    async def play(self, row, sampler):
        first = await sampler.ended(row)
        assert sampler.turn_text(row) == first.text
        both = await sampler.extend(row, self.said)
        begin = len(first.token_ids) + len(self.said)
        assert sampler.turn_text(row) == sampler.tokenizer.decode(both.token_ids[begin:-1], skip_special_tokens=True)
        assert both.text == sampler.tokenizer.decode(both.token_ids[:-1], skip_special_tokens=True)
        assert len(both.token_ids) > begin + 1
        return both


def test_an_environment_can_read_the_last_turn_alone(make_policy) -> None:
    (group,) = rolled(make_policy(), Last([5, 6]), every=7)
    assert [rollout.trajectory.trained.count(False) for rollout in group.rollouts] == [2, 2]


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        (Texts, r"Texts is a class: pass an instance, Texts\(\)"),
        (object(), "object has no method rollout"),
    ],
)
def test_what_is_no_environment_is_refused_before_anything_is_sampled(make_policy, environment, said: str) -> None:
    with pytest.raises(UserError, match=said):
        RolloutEngine(make_policy().generator, Sampling(1.0, 12), environment)
