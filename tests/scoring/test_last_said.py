"""How a line about a failure tells its completion from others."""

from dataclasses import replace

from grpo.scoring.text import last_said
from grpo.types import Conversation, Trajectory

ANSWER = Trajectory((5,), (True,), {}, "It is 3.", "stop")
ASKED = ({"role": "user", "content": "How  many?\nSay."},)


def test_the_last_thing_said_or_the_prompt() -> None:
    said = (("assistant", "Hm."), ("tool", "3"), ("assistant", ""))
    talk = Conversation("Game", ASKED, tuple({"role": role, "content": text} for role, text in said))
    assert last_said("?", ANSWER) == "after 'It is 3.'"
    assert last_said("?", replace(ANSWER, conversation=talk)) == "after '3'"
    assert last_said(list(ASKED), replace(ANSWER, conversation=replace(talk, messages=()))) == (
        "with the prompt 'How many? Say.'"
    )
    assert last_said("a" * 101, replace(ANSWER, text="")) == f"with the prompt '{'a' * 99}…'"
