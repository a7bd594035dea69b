"""Conversations for people: what was said and called, and what the model learned from."""

from dataclasses import replace

from grpo.environments.shown import LONGEST_ARGUMENT, asked, told, transcript
from grpo.types import Conversation, Failure, Rollout, Task, Trajectory

QUESTION = {"role": "user", "content": "How far is it?"}
CALL = {"type": "function", "function": {"name": "search", "arguments": {"query": "Rom", "k": 2}}}
TALK = Conversation(
    "Atlas",
    ({"role": "system", "content": "Look it up."}, {"role": "user", "content": "How far is it? Ask from Rome."}),
    (
        {"role": "assistant", "content": "Let me see. ", "tool_calls": [CALL, {"function": {"name": "now"}}]},
        {"role": "tool", "name": "search", "content": [{"type": "text", "text": "5 km"}, {"type": "image"}]},
        {"role": "tool", "name": "now", "content": "noon"},
        {"role": "assistant", "content": "5 km."},
        {"role": "user", "content": "Thanks!"},
    ),
    turn_rewards=(None, 0.5),
    outcome=1.0,
    calls=2,
)
TRAJECTORY = replace(Trajectory.sampled((5, 6), None, "all of it", "done"), conversation=TALK)
TASK = Task(0, [QUESTION], (1,), {})


def test_a_conversation_line_by_line() -> None:
    assert transcript(Rollout(TRAJECTORY, turn_advantages=(-0.25, 0.75))).splitlines() == [
        "model: Let me see.",
        '→ search(query="Rom", k=2)',
        "→ now()",
        "  (advantage -0.250)",
        "← search: 5 km[image]",
        "← now: noon",
        "model: 5 km.",
        "  (reward 0.5, advantage +0.750)",
        "← user: Thanks!",
        "(done, rewarded 1)",
    ]


def test_what_is_trained_are_the_model_s_own_words() -> None:
    assert [said.who for said in told(Rollout(TRAJECTORY)) if said.trained] == ["model", "model"]


def test_a_single_answer_is_its_text() -> None:
    rollout = Rollout(Trajectory.sampled((5,), None, " four\n", "stop"))
    assert transcript(rollout) == " four\n"
    assert asked(TASK, rollout.trajectory) == "How far is it?"


def test_the_prompt_is_what_the_model_saw() -> None:
    assert asked(TASK, TRAJECTORY) == "How far is it? Ask from Rome."


def test_how_it_ended() -> None:
    def last(reason: str, **changed) -> str:
        talk = replace(TALK, **{"outcome": None, **changed})
        return transcript(Rollout(replace(TRAJECTORY, finish_reason=reason, conversation=talk))).splitlines()[-1]

    assert last("stop") == "← user: Thanks!"
    assert last("stop", outcome=0.0) == "(rewarded 0)"
    assert last("max_turns") == "(ended by max_turns)"
    assert last("failed", failure=Failure("timeout", "step took longer than 2 s")) == (
        "the conversation failed: timeout: step took longer than 2 s"
    )


def test_odd_calls_are_shown_too() -> None:
    def call(function: dict) -> str:
        message = {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}
        talk = replace(TALK, messages=(message,), turn_rewards=(), outcome=None)
        return transcript(Rollout(replace(TRAJECTORY, finish_reason="stop", conversation=talk)))

    assert call({"name": "f", "arguments": "not JSON"}) == "→ f(not JSON)"
    assert call({"name": "f", "arguments": {"a": "x" * 999}}) == f'→ f(a="{"x" * (LONGEST_ARGUMENT - 2)}…)'
