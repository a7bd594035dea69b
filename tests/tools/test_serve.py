"""`grpo serve`: a run's adapters by name, and a server that ends as it should."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import pytest

from grpo.backend.imports import extra
from grpo.config import ModelConfig
from grpo.errors import UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.adapters import load_adapter
from grpo.model.load import load
from grpo.serving.asks import Ask
from grpo.serving.decoder import DecodingLoop, DecodingThread
from grpo.serving.refusals import Refusal
from grpo.serving.service import Service
from grpo.tools.generate import find_answering
from grpo.tools.serve import Serving, _guard, _Loading, adapters_of, served_models


@pytest.fixture
def run(recipe: Path, run_cli: Any) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    ran = run_cli("train", recipe, "checkpoint.every=1", "optim.learning_rate=0.1", "rollout.stop_token_ids=[7]")
    assert ran.code == 0, ran.err
    return Path("runs/toy")


def test_a_run_is_served_by_its_name_and_its_steps(run: Path, toy_folder: Path) -> None:
    found = find_answering(str(run), None, base=False)
    models = served_models(found)
    assert models.names() == ["toy", str(toy_folder), "toy@2", "base", "toy@1"]
    assert [models.find(name) for name in ("toy", "toy@1", "base", str(toy_folder))] == [
        "toy@2",
        "toy@1",
        "base",
        "base",
    ]
    assert [models.find(name) for name in ("toy@3", "toy@", "other", "")] == [None] * 4
    assert models.folder("base") is None
    shutil.copytree(run / "checkpoints/step-000001", run / "checkpoints/step-000000")
    assert models.names()[-2:] == ["toy@1", "toy@0"]
    folders = [models.folder(name) for name in ("toy@2", "toy@1")]
    assert folders == [Path(f"runs/toy/checkpoints/step-00000{step}").resolve() for step in (2, 1)]
    (run / "checkpoints/step-000001/adapters.safetensors").write_bytes(b"damaged")
    with pytest.raises(UserError, match="changed since it was written"):
        models.folder("toy@1")


def test_a_model_is_called_as_it_was_asked_for(run: Path) -> None:
    found = find_answering(str(run), None, base=False)
    decoder, speaker = SimpleNamespace(), SimpleNamespace(longest=None)
    service = Service(decoder, speaker, served_models(found), Sampling(1.0, 4))  # type: ignore[arg-type]
    for name in ("toy", "toy@1", "base"):
        assert service.model(name)["id"] == name
        assert service.model(name) in service.models()["data"]
    with pytest.raises(Refusal, match=r"no model 'gpt-4o'\. Use model='toy' or '.*'\. /v1/models lists all models\.$"):
        service.model("gpt-4o")
    service.close()


def answered(decoder: DecodingLoop, ask: Ask) -> list[int]:
    done, pieces = threading.Event(), []

    def tell(told: Any) -> None:
        pieces.extend(told)
        done.set()

    decoder.submit(ask, tell)
    assert done.wait(60)
    return list(pieces[0].token_ids)


def test_each_name_answers_as_its_adapter_does(run: Path, toy_folder: Path) -> None:
    found = find_answering(str(run), None, base=False)
    models, asked = served_models(found), Ask("", (5, 6, 7), Sampling(1.0, 12), 1, 3, logprobs=False)
    loading, answers = _Loading(found, models, Serving(slots=2)), {}
    with DecodingThread(loading) as decoder:
        for name in ("toy@1", "base", "toy@2", "toy@1"):
            answers[name] = answered(decoder, replace(asked, model=name))
    assert loading.defaults.stop_ids == (7,)
    assert loading.defaults.max_tokens == 8
    for name, adapter in {"base": None, "toy@1": 1, "toy@2": 2}.items():
        model, tokenizer = load(ModelConfig(name=str(toy_folder)))
        if adapter is not None:
            load_adapter(model, run / f"checkpoints/step-00000{adapter}")
        ((one,),) = Generator(model, tokenizer, 2).generate(
            [Request(asked.prompt_ids, 1, 3)], asked.sampling, mx.random.key(0), logprobs=False
        )
        assert answers[name] == list(one.token_ids)
    assert len(set(map(tuple, answers.values()))) == 3


def test_a_model_has_one_name_and_an_adapter_of_its_own_has_its_folders(run: Path, toy_folder: Path) -> None:
    name = str(toy_folder)
    models = served_models(find_answering(name, None, base=False))
    assert models.names() == ["base", name]
    assert models.find("base") == name
    assert _Loading(find_answering(name, None, base=False), models, Serving()).defaults == Sampling(1.0, 512)
    assert models.folder(name) is None
    kept = Path("kept")
    (run / "checkpoints/step-000002").rename(kept)
    models = served_models(find_answering(name, kept, base=False))
    assert models.names() == [name, "kept", "base"]
    model, _ = load(ModelConfig(name=name))
    assert set(adapters_of(model, kept).read(kept)) == set(mx.load(str(kept / "adapters.safetensors")))


def test_other_machines_need_a_key() -> None:
    assert _guard(Serving()).hosts
    assert _guard(Serving(host="0.0.0.0", key="k")).hosts is None
    for key in (None, ""):
        with pytest.raises(UserError, match=r"--host 0\.0\.0\.0 lets other machines in"):
            _guard(Serving(host="0.0.0.0", key=key))


def test_a_missing_extra_is_named() -> None:
    with (
        pytest.raises(UserError, match=r"serve needs nosuchpackage.*pip install .*\[serve\]'"),
        extra("serve", "serve"),
    ):
        import nosuchpackage  # noqa: F401
    with pytest.raises(ModuleNotFoundError), extra("serve", "serve"):
        import grpo.nosuchmodule  # noqa: F401


def test_a_folder_without_an_adapter_is_found_out_before_a_model_is_loaded(
    toy_folder: Path, run_cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("serve", "generate"):
        monkeypatch.setattr(f"grpo.tools.{name}.load", lambda *_: pytest.fail("loaded"))
    for command in (["serve", toy_folder, "--port", "0"], ["generate", toy_folder, "hi"]):
        ran = run_cli(*command, "--adapter", "nowhere")
        assert (ran.code, ran.err) == (2, "grpo: adapter nowhere: there is no such folder\n")


def test_an_adapter_that_does_not_fit_ends_it_with_2_however_often(run: Path, toy_folder: Path) -> None:
    """The model is loaded by then, in a thread of its own."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    folder = run / "checkpoints/step-000001"
    wrong = {"model.layers.0.self_attn.q_proj.lora_a": mx.ones((3, 2))}
    mx.save_safetensors(str(folder / "adapters.safetensors"), wrong)
    command = [sys.executable, "-c", MAIN, "serve", str(toy_folder), "--port", "0", "--adapter", str(folder)]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (ran.returncode, ran.stderr.count("\n")) == (2, 1), ran.stderr


def test_a_run_at_a_step_is_for_clients_to_ask_for(run: Path, run_cli: Any) -> None:
    ran = run_cli("serve", f"{run}@3")
    said = "runs/toy@3: clients choose the step: serve runs/toy, and request model toy@3"
    assert (ran.code, ran.err) == (2, f"grpo: {said}\n")


MAIN = "import sys; from grpo.cli import main; sys.argv[0] = 'grpo'; main()"


@contextmanager
def serving(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`grpo serve` in a process of its own, and its URL."""
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    command = [sys.executable, "-c", MAIN, "serve", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = next((line for line in process.stdout if line.startswith("serving at ")), None)
        assert line, process.communicate()[1]
        yield process, line.removeprefix("serving at ").strip()
    finally:
        process.kill()
        process.wait()


def post(url: str, body: dict[str, Any], key: str | None = None) -> Any:
    headers = {"Content-Type": "application/json", **({"Authorization": f"Bearer {key}"} if key else {})}
    return urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers), timeout=60)


@pytest.mark.slow
def test_sigterm_lets_a_request_be_answered_first(toy_folder: Path) -> None:
    with serving(str(toy_folder), "--api-key", "abc") as (process, url):
        body = {"prompt": "a", "max_tokens": 3000, "stream": True, "stop_token_ids": []}
        answer = post(f"{url}/completions", body, "abc")
        first = answer.readline()
        process.send_signal(signal.SIGTERM)
        rest = answer.read().decode()
        assert first.startswith(b"data: ")
        assert rest.endswith("data: [DONE]\n\n")
        assert process.wait(30) == 0
        assert process.stderr is not None
        assert process.stderr.read() == ""


LOADS_LONG = """
import time
import grpo.tools.serve as serving

def loads(*_):
    print("loading", flush=True)
    time.sleep(60)

serving.load = loads
"""


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_the_model_loads_ends_it_at_once(toy_folder: Path, number: signal.Signals) -> None:
    pytest.importorskip("uvicorn", reason="the extra `serve` is not installed")
    process = subprocess.Popen(
        [sys.executable, "-c", LOADS_LONG + MAIN, "serve", "--port", "0", str(toy_folder)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "loading\n"
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert (process.returncode, said) == (128 + number, "grpo: stopped immediately\n")


@pytest.mark.slow
def test_openais_own_client(run: Path) -> None:
    openai = pytest.importorskip("openai")
    with serving(str(run), "--api-key", "abc", "--max-length", "256") as (process, url):
        client = openai.OpenAI(base_url=url, api_key="abc")
        assert [model.id for model in client.models.list()][:1] == ["toy"]
        messages = [{"role": "user", "content": "What is 3+3?"}]
        asked = {"messages": messages, "seed": 3, "max_tokens": 6, "logprobs": True}
        answers = {}
        for model in ("toy", "toy@1", "base"):
            whole = client.chat.completions.create(model=model, **asked, extra_body={"return_token_ids": True})
            answers[model] = whole.choices[0].message.content
            assert (
                len(whole.choices[0].logprobs.content)
                == len(whole.choices[0].token_ids)
                == whole.usage.completion_tokens
            )
            stream = client.chat.completions.create(model=model, stream=True, **asked)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == answers[model]
        assert len(set(answers.values())) == 3
        with pytest.raises(openai.NotFoundError, match="there is no model 'toy@9'"):
            client.chat.completions.create(model="toy@9", **asked)
        with pytest.raises(openai.BadRequestError) as refused:
            client.chat.completions.create(model="toy", messages=messages, max_tokens=400)
        assert refused.value.code == "context_length_exceeded"
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=url, api_key="ab").models.list()
        process.send_signal(signal.SIGINT)
        assert process.wait(30) == 0
