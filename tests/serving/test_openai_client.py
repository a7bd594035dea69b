"""OpenAI's own client, over a socket: tool calls at once and streamed, and a conversation that goes on with them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
pytest.importorskip("openai")

import openai
from environments.families import TOOLS, tokenizer_of
from listening import listening
from saying import Base, Says

from grpo.generation.sampling import Sampling
from grpo.serving.service import Service
from grpo.serving.speaker import Speaker

QUESTION = {"role": "user", "content": "Sun in Paris and in Rome?"}
CALL = '<tool_call>\n{{"name": "weather", "arguments": {{"city": "{}"}}}}\n</tool_call>'
BOTH = f"{CALL.format('Paris')}\n{CALL.format('Rome')}<|im_end|>"


@contextmanager
def client_of(text: str) -> Iterator[tuple[Any, Says]]:
    """A client of an endpoint whose model says this text, and what is asked of the model."""
    tokenizer = tokenizer_of("qwen2.5")
    says = Says(tokenizer, text)
    speaker = Speaker(tokenizer, max(tokenizer.get_vocab().values()) + 1, 4096)
    service = Service(says, speaker, Base(), Sampling(1.0, 400))  # type: ignore[arg-type]
    with (
        listening(service, key="abc") as there,
        openai.OpenAI(base_url=f"{there.url}/v1", api_key="abc", max_retries=0) as client,
    ):
        yield client, says


def streamed(stream: Any) -> dict[str, Any]:
    """An assistant's message, put together from a stream as OpenAI's documentation does."""
    message: dict[str, Any] = {"role": "assistant", "content": None, "tool_calls": []}
    for chunk in stream:
        for choice in chunk.choices:
            message["content"] = (message["content"] or "") + (choice.delta.content or "") or None
            for call in choice.delta.tool_calls or []:
                calls = message["tool_calls"]
                if call.index == len(calls):
                    calls.append({"id": call.id, "type": call.type, "function": {"name": "", "arguments": ""}})
                calls[call.index]["function"]["name"] += call.function.name or ""
                calls[call.index]["function"]["arguments"] += call.function.arguments or ""
            message["finish_reason"] = choice.finish_reason
    return message


@pytest.mark.parametrize("stream", [False, True])
def test_tools_are_called_and_the_conversation_goes_on_with_their_results(stream: bool) -> None:
    with client_of(BOTH) as (client, _):
        answer = client.chat.completions.create(model="base", messages=[QUESTION], tools=TOOLS, stream=stream)
        if stream:
            message = streamed(answer)
        else:
            choice = answer.choices[0]
            message = {**choice.message.model_dump(), "finish_reason": choice.finish_reason}
    assert message.pop("finish_reason") == "tool_calls"
    assert message["content"] is None
    calls = message["tool_calls"]
    assert [json.loads(call["function"]["arguments"]) for call in calls] == [{"city": "Paris"}, {"city": "Rome"}]
    assert {call["function"]["name"] for call in calls} == {"weather"}
    assert len({call["id"] for call in calls}) == 2
    results = [{"role": "tool", "tool_call_id": call["id"], "content": "sunny"} for call in calls]
    with client_of("Yes.<|im_end|>") as (client, says):
        said = client.chat.completions.create(model="base", messages=[QUESTION, message, *results], tools=TOOLS)
    assert said.choices[0].message.content == "Yes."
    prompt = says.tokenizer.decode(list(says.asks[0].prompt_ids))
    turns = prompt.split("<|im_start|>")
    assert turns[-3].removeprefix("assistant\n").strip() == BOTH  # as the model said it
    assert turns[-2].count("sunny") == 2


def test_several_answers_are_streamed_with_their_tokens() -> None:
    with client_of("Yes, naïve.<|im_end|>") as (client, says):
        asked = {"model": "base", "messages": [QUESTION], "n": 2, "logprobs": True, "stream": True}
        more = {"stream_options": {"include_usage": True}, "extra_body": {"return_token_ids": True}}
        *chunks, last = client.chat.completions.create(**asked, **more)
    for index in range(2):
        mine = [choice for chunk in chunks for choice in chunk.choices if choice.index == index]
        assert "".join(choice.delta.content or "" for choice in mine) == "Yes, naïve."
        assert [token for choice in mine for token in getattr(choice, "token_ids", None) or []] == says.ids
        told = [one.logprob for choice in mine if choice.logprobs for one in choice.logprobs.content]
        assert told == [-0.5 * place for place in range(len(says.ids))]
    assert chunks[0].prompt_token_ids == list(says.asks[0].prompt_ids)
    assert last.usage.completion_tokens == 2 * len(says.ids)


def test_refusals_are_the_errors_that_its_users_know() -> None:
    with client_of("Yes.<|im_end|>") as (client, _):
        asked = {"model": "base", "messages": [QUESTION]}
        for changes, error, code in (
            ({"model": "other"}, openai.NotFoundError, "model_not_found"),
            ({"max_tokens": 5000}, openai.BadRequestError, "context_length_exceeded"),
            ({"tools": TOOLS, "tool_choice": "required"}, openai.BadRequestError, "unsupported_value"),
        ):
            with pytest.raises(error) as refused:
                client.chat.completions.create(**{**asked, **changes})
            assert refused.value.code == code
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key="ab").chat.completions.create(**asked)
