"""Whom the model talks to: settings that do nothing with them are refused, and prompts that they cannot begin with."""

from pathlib import Path

import pytest
from environments.looking import LOOK

from grpo.config import EnvironmentConfig, ToolConfig
from grpo.environments.describe import describe
from grpo.environments.seats import Description
from grpo.errors import UserError
from grpo.runs.given import NOTHING, Given
from grpo.runs.partners import described, invite
from grpo.types import Task

ROOMS = """
class Silent:
    def reset(self, question, **row):
        pass
    def get_reward(self):
        return 1.0

class Text:
    def step(self, text):
        return "No."

class Own:
    async def rollout(self, task, sampler):
        return await sampler.sample(task.prompt_ids, sampler.n)
"""


@pytest.fixture(autouse=True)
def rooms(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rooms.py").write_text(ROOMS + LOOK)


def config(name: str | None, **settings) -> EnvironmentConfig:
    return EnvironmentConfig(use=name and f"rooms.py:{name}", workers=1, **settings)


@pytest.mark.parametrize(
    ("settings", "tools", "said"),
    [
        ({"use": "rooms.py:Silent", "max_turns": 3}, (), "environment.max_turns does nothing: Silent offers no tools"),
        (
            {"use": "rooms.py:Text", "max_tool_calls": 3},
            (),
            "environment.max_tool_calls does nothing: Text offers no tools",
        ),
        ({"use": "rooms.py:Own", "timeout": 3.0}, (), "environment.timeout does nothing: its class makes trajectories"),
        ({"use": "rooms.py:Own"}, ("rooms.py:look",), "tools do nothing with environment.use: its class makes"),
        ({"use": "rooms.py:Nobody"}, (), "no class 'Nobody' in it"),
        ({}, ("calculater",), "there is no tool of that name. Did you mean 'calculator'"),
    ],
)
def test_what_does_nothing_is_refused(settings: dict, tools: tuple, said: str) -> None:
    own = EnvironmentConfig(**settings)
    with pytest.raises(UserError) as error:
        invite({"": own}, [ToolConfig(use=use) for use in tools], NOTHING, 1)
    assert said in str(error.value)


def test_tools_that_the_model_may_call_count_as_something_to_do() -> None:
    partners = invite(
        {"": config("Silent", max_turns=3, max_tool_calls=2)}, [ToolConfig(use="rooms.py:look")], NOTHING, 1
    )
    assert [tool["function"]["name"] for tool in partners.tools] == ["look"]
    partners.close()


def test_an_environment_that_samples_by_itself_is_made_here_and_is_alone() -> None:
    partners = invite({"": EnvironmentConfig(use="rooms.py:Own")}, [], NOTHING, 1)
    assert (type(partners.own).__name__, partners.hosts) == ("Own", {})
    with pytest.raises(UserError, match=r"environments\.b: its class makes.*the only environment of the run"):
        invite({"a": config("Text"), "b": config("Own")}, [], NOTHING, 1)


def test_methods_that_look_like_tools_beside_text_are_told_of() -> None:
    told = Description("Shop", "text", withheld=["price", "stock"])
    assert described(told) == (
        "environment Shop: it replies to the model; price, stock are not offered to the model, "
        "because the environment has step(text): step(message) offers tools too"
    )

    class Shop:
        def step(self, text):
            """Answer."""

        def price(self):
            """The price."""

        def helper(self): ...

    class Other:
        def step(self, message): ...

        def price(self):
            """The price."""

    assert [describe(None, one, [], {}).withheld for one in (Shop(), Other(), None)] == [["price"], [], ()]


def test_rows_say_which_environment_and_have_the_columns_that_it_needs() -> None:
    partners = invite({"quiet": config("Silent"), "loud": config("Text")}, [], NOTHING, 1)
    assert set(partners.tools) == {"quiet", "loud"}
    partners.check(
        "data", [Task(0, "?", (), {"environment": "loud"}), Task(1, "?", (), {"environment": "quiet", "question": ""})]
    )
    for columns, said in (
        (
            {"environment": "lout"},
            "environments: row 7 of data has 'lout' in the column 'environment', but the recipe's environments "
            "are quiet",
        ),
        ({}, "row 7 of data has None in the column 'environment'"),
        ({"environment": "quiet"}, "environment 'Silent': reset: missing a required argument: 'question'"),
    ):
        with pytest.raises(UserError) as error:
            partners.check("data", [Task(7, "?", (), columns)])
        assert said in str(error.value)
    partners.close()


def test_objects_live_in_this_process_and_settings_of_processes_do_nothing() -> None:
    class Mine:
        def step(self, text):
            return "No."

    given = Given({"__main__:Mine": Mine})
    with pytest.raises(UserError, match=r"environment\.sandbox does nothing for Python objects"):
        invite({"": EnvironmentConfig(use="__main__:Mine", sandbox=True)}, [], given, 1)
    partners = invite({"": EnvironmentConfig(use="__main__:Mine")}, [], given, 1)
    ((host, _),) = partners.hosts.values()
    assert (host.description.name, host.description.kind) == ("Mine", "text")
    partners.close()
