"""What a turn says: calls as each family writes them, what is no call, and thinking."""

from __future__ import annotations

from dataclasses import replace

import pytest
from families import FAMILIES, TOOLS, made, tokenizer_of
from hypothesis import given, settings
from hypothesis import strategies as st
from test_families import PARIS, TIME, call, encoded, said

from grpo.environments.chat import Chat
from grpo.environments.thinking import Thinking
from grpo.environments.toolcalls import FORMATS

ANY = '<tool_call>{"name": "a", "arguments": {}}</tool_call>'
A = call("a")


def parsed(family: str, text: str) -> dict:
    return Chat.of(tokenizer_of(family), TOOLS).parse(encoded(tokenizer_of(family), text))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        # What is around calls is what is said.
        (f"  One.\n{ANY} and\n{ANY} done.\n", said("One.\n and\n done.", A, A)),
        # A name that nobody knows is a call; arguments may be left out, or be JSON in a string.
        (
            '<tool_call>{"name": "no such tool", "arguments": {"x": null}}</tool_call>',
            said("", call("no such tool", x=None)),
        ),
        ('<tool_call>{"name": "a"}</tool_call>', said("", A)),
        ('<tool_call>{"name": "a", "arguments": null}</tool_call>', said("", A)),
        ('<tool_call>{"name": "a", "arguments": "{\\"x\\": 1}"}</tool_call>', said("", call("a", x=1))),
        ('<tool_call>{"name": "a", "parameters": {"x": 1}}</tool_call>', said("", call("a", x=1))),
        # An argument may hold the mark that closes a call.
        (
            '<tool_call>{"name": "a", "arguments": {"x": "</tool_call>"}}</tool_call>.',
            said(".", call("a", x="</tool_call>")),
        ),
        # A call that cannot be parsed is text, and the others are calls.
        (f'<tool_call>{{"name": a}}</tool_call>\n{ANY}', said('<tool_call>{"name": a}</tool_call>', A)),
        (f"<tool_call>{ANY}", said("<tool_call>", A)),
        *(
            (text, said(text))
            for text in (
                "",
                " Yes.\n",
                "<tool_call>",
                "</tool_call>",
                '<tool_call>{"name": "a", "arguments": {}}',
                "<tool_call></tool_call>",
                "<tool_call>[]</tool_call>",
                "<tool_call>{}</tool_call>",
                "<tool_call>1</tool_call>",
                "<tool_call>null</tool_call>",
                '<tool_call>{"name": "", "arguments": {}}</tool_call>',
                '<tool_call>{"name": 3, "arguments": {}}</tool_call>',
                '<tool_call>{"name": "a", "arguments": [1]}</tool_call>',
                '<tool_call>{"name": "a", "arguments": "x"}</tool_call>',
                '<tool_call>{"name": "a", "arguments": {"x": 1}</tool_call>',
                '<tool_call>{"name": "a", "arguments": {}} {"name": "b"}</tool_call>',
            )
        ),
    ],
)
def test_calls_in_json(text: str, message: dict) -> None:
    assert parsed("qwen2.5", text + "<|im_end|>") == message


@pytest.mark.parametrize(
    ("family", "text", "message"),
    [
        ("llama3.1", '{"name": "a", "parameters": {"x": "é"}}', said("", call("a", x="é"))),
        ("llama3.1", 'Look: <|python_tag|>{"name": "a", "parameters": {}}', said("Look:", A)),
        ("llama3.1", '{"name": "a", "parameters": {}} \n {"name": "b", "parameters": {}};', said("", A, call("b"))),
        ("llama3.1", "[a.b(x=[1, {'y': None}])]", said("", call("a.b", x=[1, {"y": None}]))),
        *(
            ("llama3.1", text, said(text))
            for text in (
                '{"name": "a"}',  # JSON, but no call
                '{"name": "a", "parameters": {}} or so',
                '{"name": "a", "parameters": {}}{"x": 1, "parameters": {}}',
                'I say {"name": "a", "parameters": {}}',
                "[a(1)]",
                "[a(x=y)]",
                "[a(**x)]",
                "[a(x={1, 2})]",
                "[1, 2]",
                "[]",
                "[" * 300,
                r"[a(x='\d')",
            )
        ),
        ("mistral", '[TOOL_CALLS] [{"name": "a", "arguments": {}}', said(' [{"name": "a", "arguments": {}}')),
        ("mistral", '[TOOL_CALLS]a[ARGS]{}[TOOL_CALLS]b[ARGS]{"x": 1}', said("", A, call("b", x=1))),
        ("gpt-oss", "<|channel|>final<|message|>Yes.", said("Yes.")),
        ("gpt-oss", "Yes.", said("Yes.")),
        ("gpt-oss", "<|channel|>commentary to=functions.a<|message|>{x}<|call|>", said("{x}")),
        ("gpt-oss", "<|channel|>analysis<|message|>Hm", said("", thought="Hm")),
        (
            "gpt-oss",
            "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>commentary<|message|>I look.<|end|>"
            "<|start|>assistant<|channel|>commentary to=a <|constrain|>json<|message|>{}",
            said("I look.", A, thought="Hm"),
        ),
        ("glm-4", "\n<think>Hm</think>\nYes.", said("Yes.", thought="Hm")),
    ],
)
def test_calls_as_other_families_write_them(family: str, text: str, message: dict) -> None:
    assert parsed(family, text) == message


def test_a_call_in_unfinished_or_finished_thinking_is_none() -> None:
    assert parsed("qwen3", f"<think>\n{TIME}") == said("", thought=TIME)
    assert parsed("qwen3", f"<think>{TIME}</think>{PARIS}") == said("", call("weather", city="Paris"), thought=TIME)
    assert parsed("qwen3", f"{PARIS} <think>") == said("<think>", call("weather", city="Paris"))


def test_channels_are_read_without_tools_too() -> None:
    tokenizer = tokenizer_of("gpt-oss")
    turn = "<|channel|>analysis<|message|>Hm<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>"
    assert Chat.of(tokenizer, answers=True).parse(encoded(tokenizer, turn)) == said("Yes.", thought="Hm")


def test_special_tokens_are_no_part_of_what_is_said() -> None:
    assert parsed("qwen3", "<think>a</think>b<|im_start|>c<|im_end|>") == said("bc", thought="a")
    assert parsed("qwen2.5", f"b<|im_start|>{ANY}") == said("b", A)
    assert parsed("qwen2.5", "b<|im_start|>c") == said("bc")


def test_python_says_nothing_of_its_style(recwarn: pytest.WarningsRecorder) -> None:
    assert parsed("llama3.1", r"[a(x='\d')]") == said("", call("a", x=r"\d"))
    assert not recwarn.list


@pytest.mark.parametrize(
    ("text", "opened", "parts"),
    [
        ("a", False, (None, "a")),
        ("a", True, ("a", "")),
        ("<t>a", False, ("a", "")),
        ("\n<t>\na\n</t>\n\nb\n", False, ("a", "b\n")),
        ("a</t>b", True, ("a", "b")),
        ("<t>a</t>b", True, ("a", "b")),
        ("a</t>b", False, ("a", "b")),
        ("b <t>a</t>c", False, ("a", "b c")),
        ("b <t>a", False, (None, "b <t>a")),
        ("<t></t>b</t>", False, ("", "b</t>")),
    ],
)
def test_thinking_and_the_rest(text: str, opened: bool, parts: tuple) -> None:
    assert Thinking("<t>", "</t>", opened).split(text) == parts


def test_marks_that_mlx_lm_does_not_name_are_found() -> None:
    base = FAMILIES["qwen2.5"]
    tokenizer = made(replace(base, added=(*base.added, "[THINK]", "[/THINK]")))
    assert Chat.of(tokenizer).parse(encoded(tokenizer, "[THINK]a[/THINK]b")) == said("b", thought="a")


MARKS = sorted({text for family in FAMILIES.values() for text in (*family.special, *family.added)})
PIECES = st.sampled_from(
    [
        *MARKS,
        "{",
        "}",
        "[",
        "]",
        '"',
        ":",
        ",",
        "(",
        ")",
        "=",
        "\\",
        "\n",
        "a",
        "1",
        "é",
        "<",
        ">",
        '"name"',
        '"arguments"',
        "{}",
    ]
)


@given(st.lists(PIECES, max_size=25).map("".join), st.sampled_from([name for name in FAMILIES if name != "plain"]))
@settings(max_examples=150, deadline=None)
def test_whatever_is_sampled_is_a_message(text: str, family: str) -> None:
    tokenizer = tokenizer_of(family)
    chat = CHATS.setdefault(family, Chat.of(tokenizer, () if family in ("gemma", "phi-4", "phi-4-mini") else TOOLS))
    message = chat.parse(encoded(tokenizer, text))
    assert message["role"] == "assistant"
    assert isinstance(message["content"], str)
    for one in FORMATS:
        assert isinstance(one.read(text, TOOLS).content, str)


CHATS: dict[str, Chat] = {}


def test_any_tokens_are_a_message() -> None:
    for family in ("qwen3", "mistral", "gpt-oss"):
        tokenizer = tokenizer_of(family)
        chat = Chat.of(tokenizer, TOOLS)
        for turn in ([], [len(tokenizer) + 5], list(range(len(tokenizer))), list(tokenizer.eos_token_ids)):
            assert chat.parse(turn)["role"] == "assistant"
