"""What is refused, and how: an error each, and the rest is served."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")

from serving import served

from grpo.serving.app import ENDPOINTS
from grpo.serving.guard import Guard
from grpo.serving.service import ServingLimits

CHAT, COMPLETIONS, GENERATE = "/v1/chat/completions", "/v1/completions", "/inference/v1/generate"
ENDPOINTS_GET = ("/health", "/v1/models")
ASKED = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {}}}}


@pytest.fixture(scope="module")
def client(toy_folder: Path) -> Iterator[Any]:
    with served(toy_folder) as found:
        yield found


@pytest.mark.parametrize(
    ("path", "changes", "param", "said"),
    [
        (CHAT, {"messages": None}, "messages", ""),
        (CHAT, {"messages": []}, "messages", "messages: expected at least 1 item, got none"),
        (CHAT, {"messages": ["hi"]}, "messages.0", ""),
        (CHAT, {"messages": [{"role": "robot", "content": "hi"}]}, "messages.0.role", "'robot' is not one of system"),
        (CHAT, {"messages": [{"role": "user"}]}, "messages.0.content", "needs content"),
        (CHAT, {"messages": [{"role": "user", "content": 3}]}, "messages.0.content", "expected text"),
        (CHAT, {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}, "messages", "only text"),
        (CHAT, {"messages": [{"role": "assistant", "tool_calls": [3]}]}, "messages.0.tool_calls", "expected a list"),
        (CHAT, {"temperature": "hot"}, "temperature", "valid number"),
        (CHAT, {"temperature": 1e-9}, "temperature", "at least 0.01"),
        (CHAT, {"temperature": -1}, "temperature", "greater than or equal to 0"),
        (CHAT, {"temprature": 1}, "temprature", "Did you mean 'temperature'?"),
        (CHAT, {"top_p": 0}, "top_p", ""),
        (CHAT, {"max_tokens": 0}, "max_tokens", ""),
        (CHAT, {"max_tokens": 10_000}, "max_tokens", "512"),
        (CHAT, {"n": 0}, "n", ""),
        (CHAT, {"n": 1000}, "n", ""),
        (CHAT, {"seed": 2**70}, "seed", ""),
        (CHAT, {"stop": [""]}, "stop", ""),
        (CHAT, {"stop": ["a"] * 99}, "stop", ""),
        (CHAT, {"top_logprobs": 5}, "top_logprobs", "only the logprob of the sampled token"),
        (CHAT, {"presence_penalty": 0.5}, "presence_penalty", "repetition_penalty"),
        (CHAT, {"logit_bias": {"5": 1}}, "logit_bias", "leave it out"),
        (CHAT, {"response_format": {"type": "json_object"}}, "response_format.type", "cannot force answers into JSON"),
        (
            CHAT,
            {"response_format": {"type": "json_schema", "json_schema": {}}},
            "response_format",
            "or a schema: leave",
        ),
        (CHAT, {"tools": [TOOL], "tool_choice": "required"}, "tool_choice", "the model decides"),
        (CHAT, {"tools": [TOOL]}, "tools", "does not show tools to the model"),
        (CHAT, {"tools": [TOOL] * 129}, "tools", "expected at most 128 items, got 129"),
        (CHAT, {"tools": [{"type": "function"}]}, "tools.0.function", ""),
        (CHAT, {"tools": [{"type": "function", "function": {}}]}, "tools.0.function", "name: Field required"),
        (CHAT, {"tools": [{"type": "function", "function": {"name": "f", "strict": True}}]}, "tools.0", "cannot force"),
        (CHAT, {"stream_options": {"include_usage": True}}, "stream_options", "stream"),
        (CHAT, {"chat_template_kwargs": 3}, "chat_template_kwargs", ""),
        (CHAT, {"chat_template_kwargs": {"return_dict": True}}, "chat_template_kwargs.return_dict", "leave it out"),
        (CHAT, {"chat_template_kwargs": {"chat_template": "{{ 1 }}"}}, "chat_template_kwargs.chat_template", ""),
        (COMPLETIONS, {"messages": None}, "messages", ""),
        (COMPLETIONS, {"messages": ..., "prompt": []}, "prompt", ""),
        (COMPLETIONS, {"messages": ..., "prompt": ""}, "prompt", "no tokens"),
        (COMPLETIONS, {"messages": ..., "prompt": [10**6]}, "prompt", "does not exist: the model has"),
        (COMPLETIONS, {"messages": ..., "prompt": [-1]}, "prompt", ""),
        (COMPLETIONS, {"messages": ..., "prompt": [5] * 512}, "prompt", "leave no room"),
        (COMPLETIONS, {"messages": ..., "prompt": "hi", "echo": True}, "echo", ""),
        (COMPLETIONS, {"messages": ..., "prompt": "hi", "logprobs": 5}, "logprobs", ""),
        (GENERATE, {"messages": ..., "max_tokens": ..., "token_ids": []}, "token_ids", ""),
        (GENERATE, {"messages": ..., "max_tokens": ..., "token_ids": [5], "stream": True}, "stream", ""),
    ],
)
def test_a_mistake_is_named(client: Any, path: str, changes: dict[str, Any], param: str, said: str) -> None:
    body = {key: value for key, value in {**ASKED, **changes}.items() if value is not ...}
    refused = client.post(path, json=body)
    error = refused.json()["error"]
    assert refused.status_code == 400
    assert error["type"] == "invalid_request_error"
    assert str(error["param"]).startswith(param)
    assert said in error["message"]


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"3",
        b'{"messages": [' + b"[" * 5000,
        b"\xff\xfe",
        b'{"n": NaN}',
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
    ],
)
def test_what_is_no_json_object_is_refused(client: Any, body: bytes) -> None:
    refused = client.post(CHAT, content=body, headers={"content-type": "application/json"})
    assert refused.status_code == 400
    assert refused.json()["error"]["message"]


def test_a_field_of_openai_s_that_looks_similar_is_no_slip(client: Any) -> None:
    said = client.post(CHAT, json={**ASKED, "reasoning_effort": "low"}).json()["error"]["message"]
    assert said == "reasoning_effort: this server does not support this field: leave it out."


def test_an_environment_is_no_advice_for_a_client(client: Any) -> None:
    said = client.post(CHAT, json={**ASKED, "tools": [TOOL]}).json()["error"]["message"]
    assert said.endswith("GLM-4.5, or gpt-oss)")


def test_an_unknown_model_a_wrong_type_and_a_wrong_path(client: Any) -> None:
    unknown = client.post(CHAT, json={**ASKED, "model": "bsae"})
    assert unknown.status_code == 404
    assert unknown.json()["error"]["code"] == "model_not_found"
    assert "Did you mean 'base'?" in unknown.json()["error"]["message"]
    assert client.post(CHAT, content=json.dumps(ASKED), headers={"content-type": "text/plain"}).status_code == 415
    assert client.get(CHAT).status_code == 405
    nowhere = client.post("/v1/embeddings", json={}).json()["error"]
    assert nowhere["type"] == "not_found_error"
    assert "Not Found; the endpoints are GET /health, /v1/models and" in nowhere["message"]


def test_all_endpoints_are_named(client: Any) -> None:
    for path in (*ENDPOINTS_GET, CHAT, COMPLETIONS, GENERATE):
        assert path in ENDPOINTS
        assert client.get(path).status_code == (200 if path in ENDPOINTS_GET else 405)


def test_an_unknown_model_is_told_what_to_write(client: Any, toy_folder: Path) -> None:
    said = client.post(CHAT, json={**ASKED, "model": "gpt-4o"}).json()["error"]["message"]
    assert said == "there is no model 'gpt-4o'. Use model='base'."


def test_the_key_is_asked_for(toy_folder: Path) -> None:
    with served(toy_folder, guard=Guard("secret-key")) as client:
        assert client.get("/health").status_code == 200
        for headers in ({}, {"Authorization": "Bearer secret"}, {"Authorization": "secret-key"}):
            refused = client.get("/v1/models", headers=headers)
            assert refused.status_code == 401
            assert refused.json()["error"]["type"] == "authentication_error"
            assert "secret-key" not in refused.text
            wrong = headers.get("Authorization") == "Bearer secret"
            wanted = "wrong API key: use the key that the server" if wrong else "an API key is needed"
            assert wanted in refused.json()["error"]["message"]
        assert client.get("/v1/models", headers={"Authorization": "Bearer secret-key"}).status_code == 200


def test_a_key_may_have_any_letters(toy_folder: Path) -> None:
    with served(toy_folder, guard=Guard("schlüssel")) as client:
        for key, status in (("schlüssel", 200), ("schlussel", 401)):
            headers = {b"Authorization": f"Bearer {key}".encode()}
            assert client.get("/v1/models", headers=headers).status_code == status


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost:8000", 200), ("127.0.0.1", 200), ("[::1]:8000", 200), ("evil.example", 403), ("localhost.evil", 403)],
)
def test_on_loopback_no_other_name_is_answered(client: Any, host: str, status: int) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == status


def test_a_long_body_is_not_read(toy_folder: Path) -> None:
    with served(toy_folder, limits=ServingLimits(body_bytes=1000)) as client:
        refused = client.post(CHAT, json={"messages": [{"role": "user", "content": "x" * 2000}]})
        assert refused.status_code == 413
        assert client.post(CHAT, json=ASKED).status_code == 200


def test_more_requests_than_there_may_be_are_told_to_come_again(toy_folder: Path) -> None:
    with served(toy_folder, limits=ServingLimits(requests=2)) as client:
        body = {"prompt": ["a", "b", "c"], "max_tokens": 2}
        for stream in (False, True):
            refused = client.post(COMPLETIONS, json={**body, "stream": stream})
            assert refused.status_code == 429
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["type"] == "rate_limit_error"
        assert client.post(COMPLETIONS, json={**body, "prompt": ["a", "b"]}).status_code == 200


def test_an_answer_that_takes_too_long_is_given_up(toy_folder: Path) -> None:
    with served(toy_folder, limits=ServingLimits(seconds=0.0)) as client:
        for stream in (False, True):
            refused = client.post(CHAT, json={**ASKED, "stream": stream})
            assert refused.status_code == 504
            assert refused.json()["error"]["type"] == "timeout_error"
