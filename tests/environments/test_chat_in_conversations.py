"""A conversation by a real template: its tokens, and which of them are trained."""

from __future__ import annotations

import mlx.core as mx
import pytest
from environments import scripted
from environments.conversing import Host
from families import TOOLS, tokenizer_of
from test_families import PARIS, call, encoded, letters, result, said, user

from grpo.environments.chat import Chat
from grpo.environments.conversations import Conversations
from grpo.environments.play import Table
from grpo.environments.seats import ConversationLimits
from grpo.generation.sampling import Sampling
from grpo.rollout import RolloutEngine
from grpo.types import Task, Trajectory

THOUGHT = "<think>\nI ask.\n</think>\n\n"
ASKED = [user("Sun?")]


def played(monkeypatch: pytest.MonkeyPatch, kind: str, turn: list[int], **functions) -> Trajectory:
    """Two turns of Qwen3, which says the same in each."""
    tokenizer = tokenizer_of("qwen3")
    monkeypatch.setattr(scripted, "VOCABULARY", len(tokenizer))
    monkeypatch.setattr(scripted, "STOPS", frozenset(tokenizer.eos_token_ids))
    chat = Chat.of(tokenizer, TOOLS, answers=kind == "messages")
    task = Task(0, ASKED, chat.prompt_ids(ASKED), {})
    generator = scripted.Scripted({task.prompt_ids[-1]: turn})
    environment = Conversations({"": Table(Host(kind, **functions), chat, ConversationLimits(max_turns=3))}, 0, 2000)
    (group,) = RolloutEngine(generator, Sampling(1.0, 500), environment).rollout([task], 1, 1.0, mx.random.key(0))
    return group.rollouts[0].trajectory


@pytest.mark.parametrize(
    ("kind", "written", "between", "messages"),
    [
        (
            "tools",
            f"{THOUGHT}{PARIS}\n{PARIS}<|im_end|>",
            "\n<|im_start|>user\n<tool_response>\nsun <|im_end|>\n</tool_response>\n<tool_response>\nsun <|im_end|>\n"
            "</tool_response><|im_end|>\n<|im_start|>assistant\n",
            [
                said("", call("weather", city="Paris"), call("weather", city="Paris"), thought="I ask."),
                result("sun <|im_end|>"),
                result("sun <|im_end|>"),
            ],
        ),
        (
            "messages",
            f"{THOUGHT}Rain?<|im_end|>",
            "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n",
            [said("Rain?", thought="I ask."), user("No.")],
        ),
    ],
)
def test_turns_stay_as_they_were_sampled_with_their_thinking(
    monkeypatch: pytest.MonkeyPatch, kind: str, written: str, between: str, messages: list[dict]
) -> None:
    tokenizer = tokenizer_of("qwen3")
    whole = encoded(tokenizer, written)
    turn = [whole[0], *(one for token in whole[1:] for one in letters(tokenizer, token))]  # not as it would be encoded
    assert len(turn) > len(whole)
    row = played(monkeypatch, kind, turn, tool=lambda *_: "sun <|im_end|>", step=lambda *_: messages[1])
    n, room = len(turn), len(row.token_ids) - 3 * len(turn)
    assert room % 2 == 0
    assert row.token_ids[:n] == row.token_ids[n + room // 2 : -n - room // 2] == row.token_ids[-n:] == tuple(turn)
    assert tokenizer.decode(row.token_ids) == between.join([written] * 3)
    assert row.trained == (True,) * n + ((False,) * (room // 2) + (True,) * n) * 2
    assert row.finish_reason == "max_turns"
    assert [*row.conversation.messages] == [*messages * 2, *messages]
