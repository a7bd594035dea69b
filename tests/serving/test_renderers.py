"""The training client of verifiers (its package `renderers`), where it is installed."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

pytest.importorskip("starlette", reason="the extra `serve` is not installed")
pytest.importorskip("renderers", reason="verifiers' renderers are not installed")
pytest.importorskip("openai")

from serving import Folders, decoding

from grpo.config import ModelConfig
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.load import load
from grpo.serving.app import application
from grpo.serving.guard import Guard
from grpo.serving.service import Service
from grpo.serving.speaker import Speaker


def test_its_turns_are_the_trainers(toy_folder: Path) -> None:
    import httpx2
    import openai
    from renderers import create_renderer
    from renderers.base import load_tokenizer
    from renderers.client import generate

    renderer = create_renderer(load_tokenizer(str(toy_folder)))
    messages = [{"role": "user", "content": "What is 3+3?"}]
    asked = {"temperature": 0.8, "max_tokens": 12, "seed": 5, "routed_experts_prompt_start": 0}

    async def turn(app: Any) -> dict[str, Any]:
        client = openai.AsyncOpenAI(
            base_url="http://localhost/v1",
            api_key="k",
            http_client=httpx2.AsyncClient(transport=httpx2.ASGITransport(app)),
        )
        found: dict[str, Any] = await generate(
            client=client,
            renderer=renderer,
            messages=messages,
            model="base",
            sampling_params=asked,
            cache_salt="1",
            extra_headers={"X-Session-ID": "s"},
        )
        return found

    with decoding(toy_folder) as (decoder, tokenizer):
        speaker = Speaker(tokenizer, len(tokenizer.get_vocab()), 512)
        service = Service(decoder, speaker, Folders({}), Sampling(1.0, 16))
        found = asyncio.run(turn(application(service, Guard())))
        service.close()
    model, tokenizer = load(ModelConfig(name=str(toy_folder)))
    request, sampling = (
        Request(found["prompt_ids"], 1, 5),
        Sampling(0.8, 12, stop_ids=tuple(renderer.get_stop_token_ids())),
    )
    ((one,),) = Generator(model, tokenizer, 8).generate([request], sampling, mx.random.key(0))
    assert found["completion_ids"] == list(one.token_ids)
    assert found["completion_logprobs"] == pytest.approx(one.behaviour, abs=1e-5)
    assert found["finish_reason"] == one.finish_reason
