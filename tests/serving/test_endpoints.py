"""The endpoints over ASGI: the trainer's tokens and logprobs, in OpenAI's forms."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from serving import served

from grpo.config import ModelConfig
from grpo.data.rendering import rendered_ids
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.load import load
from grpo.types import Trajectory

QUESTION = [{"role": "user", "content": "What is 3+3?"}]


@pytest.fixture(scope="module")
def client(toy_folder: Path) -> Iterator[Any]:
    with served(toy_folder) as found:
        yield found


@pytest.fixture(scope="module")
def trainer(toy_folder: Path) -> Any:
    """What the trainer samples, and its tokenizer."""
    model, tokenizer = load(ModelConfig(name=str(toy_folder)))
    generator = Generator(model, tokenizer, 8)

    def sampled(prompt: list[int], sampling: Sampling, n: int, seed: int) -> list[Trajectory]:
        return generator.generate([Request(prompt, n, seed)], sampling, mx.random.key(0))[0]

    sampled.tokenizer = tokenizer  # type: ignore[attr-defined]
    return sampled


def events(text: str) -> list[dict[str, Any]]:
    """What a stream holds before [DONE]."""
    lines = text.split("\n\n")
    assert lines[-2:] == ["data: [DONE]", ""]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-2]]


def test_models(client: Any) -> None:
    (model,) = client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"], model["max_model_len"]) == ("base", "model", 512)
    assert client.get("/v1/models/base").json() == model
    refused = client.get("/v1/models/bas")
    assert refused.status_code == 404
    assert "Did you mean 'base'?" in refused.json()["error"]["message"]


def test_a_chat_has_the_trainers_tokens_logprobs_and_text(client: Any, trainer: Any) -> None:
    body = {"model": "base", "messages": QUESTION, "seed": 5, "n": 3, "max_tokens": 10, "temperature": 0.9}
    found = client.post("/v1/chat/completions", json={**body, "logprobs": True, "return_token_ids": True}).json()
    prompt = rendered_ids(trainer.tokenizer, QUESTION, (), {})
    expected = trainer(prompt, Sampling(0.9, 10), 3, 5)
    assert found["prompt_token_ids"] == prompt
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2]
    for choice, one in zip(found["choices"], expected, strict=True):
        assert choice["token_ids"] == list(one.token_ids)
        assert [token["logprob"] for token in choice["logprobs"]["content"]] == pytest.approx(one.behaviour, abs=1e-5)
        assert choice["message"]["content"] == one.text
        assert choice["finish_reason"] == one.finish_reason
    tokens = sum(len(one.token_ids) for one in expected)
    assert found["usage"] == {
        "prompt_tokens": len(prompt),
        "completion_tokens": tokens,
        "total_tokens": len(prompt) + tokens,
    }
    plain = client.post("/v1/chat/completions", json=body).json()
    assert "prompt_token_ids" not in plain
    assert all("token_ids" not in choice and choice["logprobs"] is None for choice in plain["choices"])
    assert [choice["message"] for choice in plain["choices"]] == [choice["message"] for choice in found["choices"]]


def test_without_a_seed_answers_differ(client: Any) -> None:
    body = {"messages": QUESTION, "max_tokens": 16}
    texts = {
        client.post("/v1/chat/completions", json=body).json()["choices"][0]["message"]["content"] for _ in range(3)
    }
    assert len(texts) == 3


def test_completions_of_several_prompts(client: Any, trainer: Any) -> None:
    body = {"prompt": ["What is", "4+4"], "seed": 7, "n": 2, "max_tokens": 6, "logprobs": 0, "return_token_ids": True}
    found = client.post("/v1/completions", json=body).json()
    prompts = [trainer.tokenizer.encode(text) for text in body["prompt"]]
    expected = [one for prompt in prompts for one in trainer(prompt, Sampling(1.0, 6), 2, 7)]
    assert [choice["index"] for choice in found["choices"]] == [0, 1, 2, 3]
    for choice, one in zip(found["choices"], expected, strict=True):
        assert choice["token_ids"] == list(one.token_ids)
        assert choice["logprobs"]["token_logprobs"] == pytest.approx(one.behaviour, abs=1e-5)
        assert choice["text"] == one.text
    assert [choice["prompt_token_ids"] for choice in found["choices"]] == [prompts[0]] * 2 + [prompts[1]] * 2
    ids = {**body, "prompt": prompts}
    again = client.post("/v1/completions", json=ids).json()
    assert [choice["token_ids"] for choice in again["choices"]] == [choice["token_ids"] for choice in found["choices"]]
    one = client.post("/v1/completions", json={**body, "prompt": prompts[0]}).json()
    assert [choice["token_ids"] for choice in one["choices"]] == [list(row.token_ids) for row in expected[:2]]


def test_tokens_in_tokens_out(client: Any, trainer: Any) -> None:
    params = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8, "logprobs": 1, "skip_special_tokens": False, "seed": 3}
    body = {"model": "base", "token_ids": [5, 6, 7], "sampling_params": {**params, "stop_token_ids": [20, 21]}}
    found = client.post("/inference/v1/generate", json=body, headers={"X-Session-ID": "a"}).json()
    (one,) = trainer([5, 6, 7], Sampling(1.0, 8, stop_ids=(20, 21)), 1, 3)
    (choice,) = found["choices"]
    assert found["prompt_token_ids"] == [5, 6, 7]
    assert choice["token_ids"] == list(one.token_ids)
    assert choice["finish_reason"] == one.finish_reason
    told = choice["logprobs"]["content"]
    assert [token["token"] for token in told] == [f"token_id:{token}" for token in one.token_ids]
    assert [token["logprob"] for token in told] == pytest.approx(one.behaviour, abs=1e-5)


@pytest.mark.parametrize("stop", [None, "e"])
def test_a_streamed_chat_adds_up_to_the_whole(client: Any, stop: str | None) -> None:
    body = {"messages": QUESTION, "seed": 1, "n": 4, "max_tokens": 24, "logprobs": True, "return_token_ids": True}
    if stop is not None:
        body["stop"] = [stop]
    whole = client.post("/v1/chat/completions", json=body).json()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    response = client.post("/v1/chat/completions", json={**body, **options})
    assert response.headers["content-type"].startswith("text/event-stream")
    *chunks, last = events(response.text)
    assert last["choices"] == []
    assert last["usage"] == whole["usage"]
    assert chunks[0]["prompt_token_ids"] == whole["prompt_token_ids"]
    assert {chunk["id"] for chunk in chunks} == {last["id"]}
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert own[0]["delta"] == {"role": "assistant", "content": ""}
        assert "".join(one["delta"].get("content", "") for one in own) == choice["message"]["content"]
        assert [token for one in own for token in one.get("token_ids", [])] == choice["token_ids"]
        logprobs = [token for one in own if one["logprobs"] for token in one["logprobs"]["content"]]
        assert logprobs == choice["logprobs"]["content"]
        assert [one["finish_reason"] for one in own if one["finish_reason"]] == [choice["finish_reason"]]
    assert len(chunks) > 8  # and not all at once
    if stop is not None:
        assert "stop" in {choice["finish_reason"] for choice in whole["choices"]}
        assert all(stop not in choice["message"]["content"] for choice in whole["choices"])


def test_a_streamed_completion_adds_up_to_the_whole(client: Any) -> None:
    body = {"prompt": ["What", "is"], "seed": 2, "max_tokens": 12, "logprobs": 0, "return_token_ids": True}
    whole = client.post("/v1/completions", json=body).json()
    chunks = events(client.post("/v1/completions", json={**body, "stream": True}).text)
    for choice in whole["choices"]:
        own = [one for chunk in chunks for one in chunk["choices"] if one["index"] == choice["index"]]
        assert "".join(one["text"] for one in own) == choice["text"]
        assert own[0]["prompt_token_ids"] == choice["prompt_token_ids"]
        for key in ("tokens", "token_logprobs", "text_offset"):
            told = [value for one in own if one["logprobs"] for value in one["logprobs"][key]]
            assert told == choice["logprobs"][key]


def test_defaults_are_the_servers_and_a_request_can_change_each(toy_folder: Path, trainer: Any) -> None:
    defaults = Sampling(0.5, 7, top_k=5, stop_ids=(20,))
    prompt = [5, 6, 7]
    asked: list[tuple[dict[str, Any], Sampling]] = [
        ({}, defaults),
        ({"temperature": 0}, Sampling(0.0, 7, stop_ids=(20,))),
        ({"top_k": -1, "max_tokens": 9}, Sampling(0.5, 9, stop_ids=(20,))),
        ({"stop_token_ids": [], "min_p": 0.1, "top_p": 0.8}, Sampling(0.5, 7, top_k=5, min_p=0.1, top_p=0.8)),
        ({"repetition_penalty": 1.5, "min_tokens": 5}, Sampling(0.5, 7, 5, 5, repetition_penalty=1.5, stop_ids=(20,))),
    ]
    with served(toy_folder, defaults=defaults) as client:
        for settings, sampling in asked:
            body = {"prompt": prompt, "seed": 4, "return_token_ids": True, **settings}
            (choice,) = client.post("/v1/completions", json=body).json()["choices"]
            assert choice["token_ids"] == list(trainer(prompt, sampling, 1, 4)[0].token_ids)


def test_greedy_answers_are_the_models_own(toy_folder: Path, trainer: Any) -> None:
    prompt = [5, 6, 7]
    own, other = (trainer(prompt, Sampling(0.0, 12, repetition_penalty=p), 1, 0)[0].token_ids for p in (1.0, 5.0))
    assert own != other
    with served(toy_folder, defaults=Sampling(1.0, 12, repetition_penalty=5.0)) as client:
        for settings, expected in (({}, own), ({"repetition_penalty": 5.0}, other)):
            body = {"prompt": prompt, "temperature": 0, "return_token_ids": True, **settings}
            (choice,) = client.post("/v1/completions", json=body).json()["choices"]
            assert choice["token_ids"] == list(expected)


def test_an_answer_ends_where_the_context_does(client: Any) -> None:
    prompt = [5] * 505
    found = client.post("/v1/completions", json={"prompt": prompt}).json()
    assert found["usage"]["completion_tokens"] <= 7
    refused = client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 8})
    assert refused.status_code == 400
    assert refused.json()["error"]["code"] == "context_length_exceeded"
    assert client.post("/v1/completions", json={"prompt": prompt, "max_tokens": 7}).status_code == 200
