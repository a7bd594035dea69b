"""Conversations of the families of models, byte by byte: prompts, what stands between turns, and what turns say."""

# ruff: noqa: E501  texts read best by their lines
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass

import pytest
from families import FAMILIES, TOOLS, tokenizer_of

from grpo.environments.chat import Chat
from grpo.types import Message

WEATHER, NOW = (json.dumps(tool, ensure_ascii=False) for tool in TOOLS)


def call(name: str, **arguments) -> dict:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def result(content: str, name: str = "weather") -> Message:
    return {"role": "tool", "name": name, "content": content}


def said(content: str, *calls: dict, thought: str | None = None) -> Message:
    message = {"role": "assistant", "content": content}
    if thought is not None:
        message["reasoning_content"] = thought
    return {**message, "tool_calls": list(calls)} if calls else message


def user(content: str) -> Message:
    return {"role": "user", "content": content}


@dataclass(frozen=True)
class Turn:
    """What the model samples, what that says, the messages that follow, and the text that stands there then."""

    sampled: str
    said: Message
    then: Sequence[Message] = ()
    suffix: str | None = None


@dataclass(frozen=True)
class Script:
    family: str
    messages: Sequence[Message]
    prompt: str
    turns: Sequence[Turn]
    tools: bool = True
    answers: bool = False
    kwargs: dict | None = None


QWEN_TOOLS = f"<|im_start|>system\n# Tools\n<tools>\n{WEATHER}\n{NOW}\n</tools><|im_end|>\n"
PARIS = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
TIME = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'
QWEN_TWO = (
    "\n<|im_start|>user\n<tool_response>\nsun ☀\n</tool_response>\n<tool_response>\n\n</tool_response><|im_end|>\n"
    "<|im_start|>assistant\n"
)

SCRIPTS = {
    "qwen2.5, tools": Script(
        "qwen2.5",
        [{"role": "system", "content": "Be brief."}, user("Sun?")],
        QWEN_TOOLS.replace("# Tools", "Be brief.\n\n# Tools")
        + "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n",
        [
            Turn(
                PARIS + "<|im_end|>",
                said("", call("weather", city="Paris")),
                [result("naïve 東京\n")],
                "\n<|im_start|>user\n<tool_response>\nnaïve 東京\n\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            ),
            Turn(
                f"I look.\n{PARIS}\n{TIME}<|im_end|>",
                said("I look.", call("weather", city="Paris"), call("now")),
                [result("sun ☀"), result("", "now")],
                QWEN_TWO,
            ),
            Turn("\n\nYes.<|im_end|>", said("\n\nYes.")),
        ],
    ),
    "qwen2.5, a user": Script(
        "qwen2.5",
        [user("Guess.")],
        "<|im_start|>user\nGuess.<|im_end|>\n<|im_start|>assistant\n",
        [
            Turn(
                "5<|im_end|>",
                said("5"),
                [user("\nHigher.")],
                "\n<|im_start|>user\n\nHigher.<|im_end|>\n<|im_start|>assistant\n",
            ),
            Turn("8 🌦<|im_end|>", said("8 🌦"), [user("")], "\n<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\n"),
        ],
        tools=False,
        answers=True,
    ),
    "qwen3, tools": Script(
        "qwen3",
        [user("Sun?")],
        QWEN_TOOLS + "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n",
        [
            Turn(
                f"<think>\nI ask.\n</think>\n\n{PARIS}\n{TIME}<|im_end|>",
                said("", call("weather", city="Paris"), call("now"), thought="I ask."),
                [result("sun ☀"), result("", "now")],
                QWEN_TWO,
            ),
            Turn(
                "<think>\n\n</think>\n\nYes.<|im_end|>",
                said("Yes.", thought=""),
                [user("Why?")],
                "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
            ),
            Turn("<think>\nHm.<|im_end|>", said("", thought="Hm.")),
        ],
        answers=True,
    ),
    "qwen3, not thinking": Script(
        "qwen3",
        [user("Guess.")],
        "<|im_start|>user\nGuess.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
        [
            Turn(
                "5<|im_end|>",
                said("5"),
                [user("No.")],
                "\n<|im_start|>user\nNo.<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
            ),
        ],
        tools=False,
        answers=True,
        kwargs={"enable_thinking": False},
    ),
    "qwen3-thinking": Script(
        "qwen3-thinking",
        [user("Sun?")],
        QWEN_TOOLS + "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n<think>\n",
        [
            Turn(
                f"I could write {TIME}\n</think>\n\n{PARIS}<|im_end|>",
                said("", call("weather", city="Paris"), thought=f"I could write {TIME}"),
                [result("sun")],
                "\n<|im_start|>user\n<tool_response>\nsun\n</tool_response><|im_end|>\n<|im_start|>assistant\n<think>\n",
            ),
            Turn(
                "So.\n</think>\n\nYes.<|im_end|>",
                said("Yes.", thought="So."),
                [user("Why?")],
                "\n<|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n<think>\n",
            ),
            Turn(f"Hm {TIME}<|im_end|>", said("", thought=f"Hm {TIME}")),
        ],
        answers=True,
    ),
    "llama3.1": Script(
        "llama3.1",
        [{"role": "system", "content": "Be brief."}, user(" Sun? ")],
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nEnvironment: ipython\nBe brief.<|eot_id|>"
        f"<|start_header_id|>user<|end_header_id|>\n\n{WEATHER}\n\n{NOW}\n\nSun?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        [
            Turn(
                '{"name": "weather", "parameters": {"city": "Paris", "days": 2}}<|eot_id|>',
                said("", call("weather", city="Paris", days=2)),
                [result('"sun"\n')],
                '<|start_header_id|>ipython<|end_header_id|>\n\n"\\"sun\\"\\n"<|eot_id|>'
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            Turn(
                '<|python_tag|>{"name": "now", "parameters": {}}; {"name": "weather", "parameters": {"city": "Rome"}}<|eot_id|>',
                said("", call("now"), call("weather", city="Rome")),
                [result("9", "now"), result("rain")],
                '<|start_header_id|>ipython<|end_header_id|>\n\n"9"<|eot_id|>'
                '<|start_header_id|>ipython<|end_header_id|>\n\n"rain"<|eot_id|>'
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            Turn(
                "[weather(city='Paris', days=-1), now()]<|eot_id|>",
                said("", call("weather", city="Paris", days=-1), call("now")),
                [result("9", "now")],
                '<|start_header_id|>ipython<|end_header_id|>\n\n"9"<|eot_id|>'
                "<|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
            Turn(
                "Yes.<|eot_id|>",
                said("Yes."),
                [user("Why? ")],
                "<|start_header_id|>user<|end_header_id|>\n\nWhy?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
            ),
        ],
        answers=True,
    ),
    "mistral, tools": Script(
        "mistral",
        [user("Sun?")],
        f"<s>[AVAILABLE_TOOLS] [{WEATHER}, {NOW}][/AVAILABLE_TOOLS][INST] Sun?[/INST]",
        [
            Turn(
                '[TOOL_CALLS] [{"name": "weather", "arguments": {"city": "Paris"}, "id": "abcdefghi"}, '
                '{"name": "now", "arguments": {}, "id": "jklmnopqr"}]</s>',
                said("", call("weather", city="Paris") | {"id": "abcdefghi"}, call("now") | {"id": "jklmnopqr"}),
                [result("sun"), result("9", "now")],
                '[TOOL_RESULTS] {"content": sun, "call_id": "abcdefghi"}[/TOOL_RESULTS]'
                '[TOOL_RESULTS] {"content": 9, "call_id": "jklmnopqr"}[/TOOL_RESULTS]',
            ),
            Turn(
                '[TOOL_CALLS] [{"name": "now", "arguments": {}}]</s>',
                said("", call("now")),
                [result("", "now")],
                '[TOOL_RESULTS] {"content": , "call_id": "call00000"}[/TOOL_RESULTS]',
            ),
        ],
    ),
    "mistral, a user": Script(
        "mistral",
        [user("Guess.")],
        "<s>[INST] Guess.[/INST]",
        [Turn("5</s>", said("5"), [user("naïve 東京")], "[INST] naïve 東京[/INST]")],
        tools=False,
        answers=True,
    ),
    "chatml on sentencepiece": Script(
        "chatml on sentencepiece",
        [user("Sun?")],
        QWEN_TOOLS + "<|im_start|>user\nSun?<|im_end|>\n<|im_start|>assistant\n",
        [
            Turn(
                PARIS + "<|im_end|>",
                said("", call("weather", city="Paris")),
                [result("naïve 東京")],
                "\n<|im_start|>user\n<tool_response>\nnaïve 東京\n</tool_response><|im_end|>\n<|im_start|>assistant\n",
            ),
        ],
    ),
    "gemma": Script(
        "gemma",
        [user("Guess.")],
        "<bos><start_of_turn>user\nGuess.<end_of_turn>\n<start_of_turn>model\n",
        [
            Turn(
                "5\n<end_of_turn>",
                said("5\n"),
                [user(" No.\n")],
                "\n<start_of_turn>user\nNo.<end_of_turn>\n<start_of_turn>model\n",
            )
        ],
        tools=False,
        answers=True,
    ),
    "glm-4": Script(
        "glm-4",
        [user("Sun?")],
        f"[gMASK]<sop><|system|>\n<tools>\n{WEATHER}\n{NOW}\n</tools><|user|>\nSun?<|assistant|>",
        [
            Turn(
                "\n<think>I ask.</think>\n<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>7</arg_value>\n"
                "<arg_key>days</arg_key>\n<arg_value>7</arg_value>\n</tool_call>\n<tool_call>now\n</tool_call><|observation|>",
                said("", call("weather", city="7", days=7), call("now"), thought="I ask."),
                [result("sun"), result("", "now")],
                "\n<tool_response>\nsun\n</tool_response>\n<tool_response>\n\n</tool_response><|assistant|>",
            ),
            Turn("\n<think></think>\nYes.<|user|>", said("Yes.", thought=""), [user("Why?")], "\nWhy?<|assistant|>"),
        ],
        answers=True,
    ),
    "phi-4": Script(
        "phi-4",
        [user("Guess.")],
        "<|im_start|>user<|im_sep|>Guess.<|im_end|><|im_start|>assistant<|im_sep|>",
        [
            Turn(
                "5<|im_end|>",
                said("5"),
                [user("No.")],
                "<|im_start|>user<|im_sep|>No.<|im_end|><|im_start|>assistant<|im_sep|>",
            )
        ],
        tools=False,
        answers=True,
    ),
    "phi-4-mini": Script(
        "phi-4-mini",
        [user("Guess.")],
        "<|user|>Guess.<|end|><|assistant|>",
        [Turn("5<|end|>", said("5"), [user("No.")], "<|user|>No.<|end|><|assistant|>")],
        tools=False,
        answers=True,
    ),
    "gpt-oss": Script(
        "gpt-oss",
        [user("Sun?")],
        "<|start|>system<|message|>Reasoning: low\n# Valid channels: analysis, commentary, final.<|end|>"
        "<|start|>developer<|message|># Tools\nnamespace functions {\n// The weather of a city.\ntype weather = () => any;\n"
        "// The time.\ntype now = () => any;\n}<|end|><|start|>user<|message|>Sun?<|end|><|start|>assistant",
        [
            Turn(
                "<|channel|>analysis<|message|>I ask.<|end|><|start|>assistant<|channel|>commentary to=functions.weather "
                '<|constrain|>json<|message|>{"city": "Paris"}<|call|>',
                said("", call("weather", city="Paris"), thought="I ask."),
                [result('a "sun"\n')],
                '<|start|>functions.weather to=assistant<|channel|>commentary<|message|>"a \\"sun\\"\\n"<|end|><|start|>assistant',
            ),
            Turn(
                " to=functions.now<|channel|>commentary json<|message|>{}<|call|>",
                said("", call("now")),
                [result("", "now")],
                '<|start|>functions.now to=assistant<|channel|>commentary<|message|>""<|end|><|start|>assistant',
            ),
            Turn(
                "<|channel|>analysis<|message|>So.<|end|><|start|>assistant<|channel|>final<|message|>Yes.<|return|>",
                said("Yes.", thought="So."),
                [user("Why?")],
                "<|start|>user<|message|>Why?<|end|><|start|>assistant",
            ),
        ],
        answers=True,
    ),
}


def chat_of(script: Script) -> Chat:
    tools = TOOLS if script.tools else ()
    return Chat.of(tokenizer_of(script.family), tools, script.kwargs, answers=script.answers)


def encoded(tokenizer, text: str) -> list[int]:
    return list(tokenizer.encode(text, add_special_tokens=False))


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_prompt_turns_and_what_stands_between_them(script: Script) -> None:
    tokenizer, chat = tokenizer_of(script.family), chat_of(script)
    text, ids = script.prompt, list(chat.prompt_ids(script.messages))
    assert tokenizer.decode(ids) == tokenizer.decode(encoded(tokenizer, script.prompt))
    assert ids == encoded(tokenizer, script.prompt)
    for turn in script.turns:
        sampled = encoded(tokenizer, turn.sampled)
        assert chat.parse(sampled) == turn.said
        if turn.suffix is None:
            break
        suffix = chat.suffix_ids(sampled, turn.then)
        assert suffix is not None
        text += turn.sampled + turn.suffix
        ids += [*sampled, *suffix]
        assert tokenizer.decode(ids) == tokenizer.decode(encoded(tokenizer, text))
        assert list(suffix) == encoded(tokenizer, text)[-len(suffix) :]  # nothing merges over the end of a turn


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_bytes_of_a_suffix(script: Script) -> None:
    tokenizer, chat = tokenizer_of(script.family), chat_of(script)
    for turn in script.turns:
        if turn.suffix is None or FAMILIES[script.family].sentencepiece:  # which drops a blank that begins a text
            continue
        suffix = chat.suffix_ids(encoded(tokenizer, turn.sampled), turn.then)
        assert tokenizer.decode(suffix).encode() == turn.suffix.encode()


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_turn_that_ended_otherwise_has_no_suffix(script: Script) -> None:
    tokenizer, chat = tokenizer_of(script.family), chat_of(script)
    for turn in script.turns:
        sampled = encoded(tokenizer, turn.sampled)
        if turn.suffix is not None:
            assert chat.suffix_ids(sampled, turn.then) is not None
            for other in {*tokenizer.eos_token_ids} - {sampled[-1]}:
                assert chat.suffix_ids([*sampled[:-1], other], turn.then) is None
            assert chat.suffix_ids(sampled[:-1], turn.then) is None
            assert chat.suffix_ids([], turn.then) is None


@pytest.mark.parametrize("script", SCRIPTS.values(), ids=SCRIPTS)
def test_a_turn_in_other_tokens_is_followed_by_the_same(script: Script) -> None:
    """A model may sample other tokens than its tokenizer makes of the text."""
    tokenizer, chat = tokenizer_of(script.family), chat_of(script)
    if FAMILIES[script.family].sentencepiece:
        return
    for turn in script.turns:
        sampled = encoded(tokenizer, turn.sampled)
        split = [one for token in sampled for one in letters(tokenizer, token)]
        assert chat.parse(split) == turn.said
        assert turn.suffix is None or chat.suffix_ids(split, turn.then) == chat.suffix_ids(sampled, turn.then)
    assert len(split) >= len(sampled)


def letters(tokenizer, token: int) -> list[int]:
    """A token as tokens of single bytes, but for added ones."""
    if token in tokenizer.added_tokens_decoder:
        return [token]
    return [tokenizer.convert_tokens_to_ids(letter) for letter in tokenizer.convert_ids_to_tokens(token)]
