"""The built-in tasks of several turns: what their environments say, who wins, and what their students' lessons are."""

import json
from functools import cache
from itertools import pairwise
from pathlib import Path
from statistics import fmean

import pytest
from tokenizers import Tokenizer

from grpo.builtin.exercise import Exercise, Manner, Problem
from grpo.builtin.guess import GUESS, Guess
from grpo.builtin.models import MODELS
from grpo.builtin.playing import Turns
from grpo.builtin.shop import SHOP
from grpo.builtin.student import Student, lesson, make
from grpo.builtin.template import END
from grpo.builtin.walk import WALK, Walk
from grpo.config import Recipe
from grpo.environments.chat import Chat
from grpo.environments.making import make_host
from grpo.environments.seats import Host
from grpo.model.mlxlm import load_tokenizer, new_model
from grpo.plugins import bundled, find_reward
from grpo.recipes import load_recipe
from grpo.types import Message

WORLDS = {"guess": GUESS, "shop": SHOP, "walk": WALK}
WAYS = [(name, way) for name in WORLDS for way in ("good", "cheap")]


@cache
def recipe_of(name: str) -> Recipe:
    return load_recipe(bundled("recipes") / "learning" / f"{name}.yaml")


@pytest.fixture(params=WORLDS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def hosts():
    """Of each task the host that its recipe makes, in this process."""
    made = {}
    for name, task in WORLDS.items():
        cfg = recipe_of(name)
        made[name] = make_host(cfg.environment, cfg.tools, given=task.environment)
    yield made
    for host in made.values():
        host.close()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each task's student after two steps: its tokenizer is the whole student's."""
    made = {name: tmp_path_factory.mktemp(name) for name in WORLDS}
    for name, folder in made.items():
        make(Student(task=f"builtin:{name}", steps=2, warmup=1, hidden=16), folder, new_model)
    return made


def heard(host: Host, row: dict, said: list[Message]) -> tuple[list[Message], float | None]:
    """All that a run's conversation has when the model says these messages, and the environment's own reward for it."""
    (seat,) = host.seats(0, 1)
    opening = seat.reset({"prompt": row["question"], **row}, 0).result().value
    messages = [{"role": "user", "content": row["question"] + (opening or "")}]
    rewards: list[float | None] = []
    for message in said:
        messages.append(message)
        if calls := message.get("tool_calls"):
            for call in (call["function"] for call in calls):
                reply = seat.call(call["name"], call["arguments"]).result()
                messages.append({"role": "tool", "name": call["name"], "content": reply.value})
        elif host.description.kind != "tools":
            reply = seat.step(message).result()
            assert reply.done == (message is said[-1])
            rewards.append(reply.reward)
            messages += [] if reply.done else reply.value
    if host.description.rewards:
        rewards.append(seat.reward().result().value)
    seat.release()
    given = [reward for reward in rewards if reward is not None]
    return messages, sum(given) if given else None


def said_in(messages: list[Message]) -> list[Message]:
    return [message for message in messages if message["role"] == "assistant"]


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_run_hears_what_a_lesson_says(hosts, name: str, way: str) -> None:
    task = WORLDS[name]
    for problem in task.problems("test")[:40]:
        messages = task.conversation(problem, getattr(task, way))
        assert heard(hosts[name], task.row(problem), said_in(messages))[0] == messages


def score(host: Host, name: str, problem: Problem, way: Manner) -> float | None:
    """By the reward that the recipe evaluates with."""
    task, row = WORLDS[name], WORLDS[name].row(problem)
    messages = task.conversation(problem, way)
    if not recipe_of(name).rewards:
        return heard(host, row, said_in(messages))[1]
    reward = find_reward(recipe_of(name).rewards[0].use)[1]
    return reward(completions=[messages[1:]], answer=[row["answer"]])[0]


def test_the_good_way_wins_and_the_cheap_way_now_and_then(hosts, name: str) -> None:
    task = WORLDS[name]
    problems = task.problems("test")[:60]
    assert {score(hosts[name], name, one, task.good) for one in problems} == {1.0}
    cheap = [score(hosts[name], name, one, task.cheap) for one in problems]
    assert set(cheap) == {0.0, 1.0}
    assert 0.1 < fmean(cheap) < 0.4


def test_its_splits_do_not_overlap(name: str) -> None:
    task = WORLDS[name]
    train, test = task.problems("train"), task.problems("test")
    assert len(test) > 64
    assert len(train) > 5 * len(test)
    assert len(train) + len(test) == len(set(train) | set(test))
    assert not {task.kin(one) for one in train} & {task.kin(one) for one in test}


def test_several_turns_are_needed(name: str) -> None:
    task = WORLDS[name]
    turns = [len(said_in(task.conversation(one, task.good))) for one in task.problems("test")]
    assert fmean(turns) >= 3


def test_a_prompt_lists_the_tools_that_a_run_lists(hosts, name: str) -> None:
    listed = [tool["function"]["name"] for tool in hosts[name].description.tools]
    assert list(WORLDS[name].all_tools) == listed
    assert listed == (["calculator", "price"] if name == "shop" else [])


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_a_lesson_has_the_tokens_of_a_run_and_teaches_what_the_model_says(hosts, folders, name: str, way: str) -> None:
    task, folder = WORLDS[name], folders[name]
    encoder, tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json")), load_tokenizer(folder)
    host = hosts[name]
    chat = Chat.of(tokenizer, host.description.tools, answers=host.description.kind != "tools")
    for problem in task.problems("test")[:10]:
        messages = task.conversation(problem, getattr(task, way))
        ids, said = lesson(encoder, task, problem, getattr(task, way))
        turns = turns_of(ids, said)
        assert [chat.parse(turn) for turn in turns] == said_in(messages)
        assert all(turn[-1] == tokenizer.eos_token_id for turn in turns)
        assert ids == written(chat, messages, turns)
        assert len(ids) <= recipe_of(name).rollout.max_completion_length + len(chat.prompt_ids(messages[:1]))


def turns_of(ids: list[int], said: list[int]) -> list[list[int]]:
    """The runs of tokens that the model says."""
    turns: list[list[int]] = []
    for place, token in enumerate(ids):
        if said[place]:
            if not said[place - 1]:
                turns.append([])
            turns[-1].append(token)
    return turns


def written(chat: Chat, messages: list[Message], turns: list[list[int]]) -> list[int]:
    """The tokens of a run's conversation in which these turns were sampled."""
    ids = [*chat.prompt_ids(messages[:1]), *turns[0]]
    others: list[Message] = []
    later = pairwise(turns)
    for message in messages[2:]:
        if message["role"] != "assistant":
            others.append(message)
            continue
        before, turn = next(later)
        ids += [*chat.suffix_ids(before, others), *turn]
        others = []
    return ids


def test_its_recipe_names_its_environment_and_its_student(name: str) -> None:
    cfg, task = recipe_of(name), WORLDS[name]
    assert cfg.environment.use == f"{task.environment.__module__}:{task.environment.__name__}"
    assert MODELS[cfg.model.name].task == cfg.data.source == f"builtin:{name}"


def test_guess_by_hand() -> None:
    assert GUESS.row((12, 23)) == {"question": "Guess my number: 12 to 26.", "number": 23}
    assert contents(GUESS, (12, 23), GUESS.good) == [
        "Guess my number: 12 to 26.", "12 to 26: 19", "higher", "20 to 26: 23",
    ]  # fmt: skip
    assert contents(GUESS, (12, 13), GUESS.cheap) == ["Guess my number: 12 to 26.", "12", "higher", "13"]
    game = Guess()
    game.reset(number=13, question="")
    assert [game.step("5"), game.step("none"), game.step("1, 40"), game.get_reward()] == [
        "higher", "Say a number.", "lower", 0.0,
    ]  # fmt: skip
    assert game.step("9" * 5000).done, "the fourth guess is the last"
    game.reset(number=13)
    assert (game.step("is it 13").done, game.get_reward()) == (True, 1.0)


def test_walk_by_hand() -> None:
    problem = (4, 2, 2, 0, 2)  # from 4,2 to 2,0, and a pit at 2,2
    assert contents(WALK, problem, WALK.good) == [
        "Walk to 2,0 and avoid 2,2. Start at 4,2.", "left 3,2: left", "3,2", "left 2,2 no: down", "3,1",
        "left 2,1: left", "2,1", "down 2,0: down",
    ]  # fmt: skip
    assert contents(WALK, problem, WALK.cheap)[1:] == ["left", "3,2", "left"]  # into the pit
    walk = Walk()
    walk.reset(start=[5, 5], goal=[0, 0], pit=[4, 5])
    lost = walk.step({"role": "assistant", "content": "I fly"})
    assert (lost.result["content"], lost.reward, lost.done) == ("Say right, left, up, down.", 0.0, False)
    assert walk.step({"role": "assistant", "content": ""}).done is False
    assert walk.step({"role": "assistant", "content": "up"}).done, "off the grid"


def test_shop_by_hand() -> None:
    pens = (0, 4, 17)
    row = SHOP.row(pens)
    assert (row["question"], row["prices"]["pen"], row["answer"]) == ("What do 4 pens cost?", 17, "68")
    assert SHOP.row((2, 1, 17))["question"] == "What does 1 hat cost?"
    calls = [json.dumps(one["function"]) for message in SHOP.conversation(pens, SHOP.good) for one in calls_of(message)]
    assert calls == [
        '{"name": "price", "arguments": {"thing": "pen"}}',
        '{"name": "calculator", "arguments": {"expression": "4*17"}}',
    ]
    assert contents(SHOP, pens, SHOP.good)[-1] == "#### 68"
    assert contents(SHOP, pens, SHOP.cheap)[-1] == "#### 17"
    shop = SHOP.environment()
    shop.reset(**row)
    with pytest.raises(ValueError, match="pens is not sold here"):
        shop.price("pens")


def calls_of(message: Message) -> list[dict]:
    return message.get("tool_calls", [])


def contents(task: Exercise, problem: Problem, way: Manner) -> list[str]:
    return [message["content"] for message in task.conversation(problem, way)]


def test_a_turn_can_call_several_tools() -> None:
    def both(problem: Problem) -> Turns:
        calls = [
            {"type": "function", "function": {"name": "price", "arguments": {"thing": one}}} for one in ("pen", "cup")
        ]
        last = yield {"role": "assistant", "content": "", "tool_calls": calls}
        yield last

    messages = SHOP.conversation((0, 4, 17), both)
    assert [message["role"] for message in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[-1]["content"] == messages[-2]["content"] != messages[-3]["content"] == "17"
    assert END not in str(messages)
