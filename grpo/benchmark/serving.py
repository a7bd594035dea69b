"""`grpo bench serve`: the endpoint's speed as clients see it, the generator without a server, and mlx-lm's server."""

from __future__ import annotations

import json
import random
import socket
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from grpo.backend.imports import extra
from grpo.backend.random import derive_key
from grpo.benchmark.models import vocabulary_of, write_model
from grpo.benchmark.process import Peer
from grpo.benchmark.protocol import Measurement, Side, Values, alternate
from grpo.benchmark.setting import Setting
from grpo.config import ModelConfig
from grpo.errors import RunError, UserError
from grpo.generation.generator import Generator, Request
from grpo.generation.sampling import Sampling
from grpo.model.load import load, model_folder
from grpo.serving.service import ServingLimits
from grpo.serving.speaker import Speaker

ALONE, SERVED, STREAMED, PEER = "generator alone", "grpo serve", "grpo serve, streamed", "mlx_lm.server"
MOST = ServingLimits().requests
"""Maximum number of simultaneous clients of a server."""
PATIENCE = 120.0
"""Seconds to wait for a server's start."""
Bodies = Sequence[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class Load:
    """The simultaneous requests of `clients`: one chat of one message per client, a new message at every turn."""

    speaker: Speaker
    clients: int
    prompt_length: int
    completion_length: int

    def messages(self, turn: int) -> list[list[dict[str, str]]]:
        """The messages of each client: about `prompt_length` tokens, the chat template's tokens included."""
        template = len(self.ids([{"role": "user", "content": ""}]))
        return [
            [{"role": "user", "content": self._digits(turn, client, max(1, self.prompt_length - template))}]
            for client in range(self.clients)
        ]

    def bodies(self, turn: int, streamed: bool = False) -> Bodies:
        """The request bodies of a turn."""
        how: dict[str, Any] = {"max_tokens": self.completion_length, "temperature": 1.0}
        if streamed:
            how |= {"stream": True, "stream_options": {"include_usage": True}}
        return [{"messages": messages, **how} for messages in self.messages(turn)]

    def ids(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        """The token ids to which the endpoint renders messages."""
        return self.speaker.prompt_of(self.speaker.voice((), None), messages).ids

    def _digits(self, turn: int, client: int, tokens: int) -> str:
        draw = random.Random(f"{turn} {client}")
        text = "".join(draw.choice("0123456789") for _ in range(4 * tokens))
        return self.speaker.text(self.speaker.tokenizer.encode(text, add_special_tokens=False)[:tokens])


def numbers_of(text: str) -> list[int]:
    """Numbers of clients, separated by commas. Raises UserError for other text."""
    found = text.split(",")
    if not all(number.strip().isdecimal() and 0 < int(number) <= MOST for number in found):
        raise UserError(f"--clients {text}: expected numbers from 1 to {MOST}, such as 1,8,64")
    return [int(number) for number in found]


def serving_costs(setting: Setting, clients: Sequence[int], peer: bool) -> Iterator[Measurement]:
    """Tokens per second for each number of clients: of the generator without a server, of the endpoint (whole and
    streamed), and with `peer` of mlx-lm's server. Each server runs in its own process, as users start it.

    Raises UserError if the extra `serve` is not installed, and for a model without a chat template.
    """
    with extra("serve", "grpo bench serve"):
        from grpo.serving import server as _  # noqa: F401  fails before a minute of measurements
    with ExitStack() as opened:
        folder = opened.enter_context(_model_of(setting))
        model, tokenizer = load(ModelConfig(name=str(folder)))
        if not tokenizer.has_chat_template:
            raise UserError(f"{setting.name} has no chat template, which the clients' chats need: choose another model")
        most, known, vocabulary = max(clients), len(tokenizer.get_vocab()), vocabulary_of(model)
        if known > vocabulary:
            raise UserError(
                f"{setting.name} has {vocabulary} tokens, but its tokenizer has {known}: choose a larger shape"
            )
        speaker = Speaker(tokenizer, vocabulary, None)
        asks = {SERVED: opened.enter_context(_asking(SERVED, _grpo(folder, most)))}
        asks[STREAMED] = asks[SERVED]
        if peer:
            asks[PEER] = opened.enter_context(_asking(PEER, _mlx_lm(folder, most)))
        generator = Generator(model, tokenizer, most)
        for number in clients:
            load_of = Load(speaker, number, setting.prompt_length, setting.completion_length)
            sides = [_alone(generator, load_of), *(_side(name, ask, load_of) for name, ask in asks.items())]
            case = f"{number} client{'s' * (number > 1)}, {setting.prompt_length}+{setting.completion_length}"
            yield from alternate(f"{case}, {setting.name}", sides, setting.runs)


@contextmanager
def _model_of(setting: Setting) -> Iterator[Path]:
    """The model's folder."""
    if setting.model:
        yield model_folder(ModelConfig(name=setting.model))
        return
    with tempfile.TemporaryDirectory() as name:
        write_model(setting, folder := Path(name, "model"))
        _give_words(folder)
        yield folder


def _give_words(folder: Path) -> None:
    """Give every token of a model with random weights a word. Its small tokenizer has only the first tokens, so answers
    would have almost no text."""
    tokenizer, config = (json.loads((folder / name).read_text()) for name in ("tokenizer.json", "config.json"))
    words = tokenizer["model"]["vocab"]
    missing = range(max(words.values()) + 1, config["vocab_size"])
    words |= {
        "Ġ" + "".join(string.ascii_lowercase[number // 26**k % 26] for k in range(4)): number for number in missing
    }
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


def _alone(generator: Generator, asked: Load) -> Side:
    """The side of the generator without a server, with the tokens of the same prompts."""
    turns, sampling = count(), Sampling(max_tokens=asked.completion_length)

    def run() -> Values:
        turn = next(turns)
        requests = [Request(asked.ids(messages)) for messages in asked.messages(turn)]
        start = time.perf_counter()
        found = generator.generate(requests, sampling, derive_key(turn, "draw"), logprobs=False)
        tokens = sum(len(trajectory.token_ids) for (trajectory,) in found)
        return {"tok/s": tokens / (time.perf_counter() - start)}

    return Side(ALONE, run)


def _side(name: str, ask: Callable[[Bodies], Values], asked: Load) -> Side:
    """The side of a server with simultaneous requests from all clients."""
    turns = count()

    def run() -> Values:
        turn = next(turns)
        found = ask(asked.bodies(turn, streamed=name == STREAMED))
        if found["prompt tokens"] != (wanted := sum(len(asked.ids(messages)) for messages in asked.messages(turn))):
            raise RunError(f"{name} has read {found['prompt tokens']:g} prompt tokens instead of {wanted}")
        return {"tok/s": found["tokens"] / found["s"]}

    return Side(name, run)


@contextmanager
def _asking(name: str, command: Sequence[str]) -> Iterator[Callable[[Bodies], Values]]:
    """Start a server process, and give a function that sends bodies to it and returns the clients' measurements. The
    port is appended to the command."""
    with closing(socket.create_server(("127.0.0.1", 0))) as free:
        port = str(free.getsockname()[1])
    with tempfile.TemporaryFile("w+") as said:
        server = subprocess.Popen([*command, port], stdout=said, stderr=said)
        try:
            _await(name, server, int(port))
            with Peer(
                f"clients of {name}", [sys.executable, "-m", "grpo.benchmark.clients", "127.0.0.1", port]
            ) as peer:
                yield lambda bodies: peer.answer(json.dumps(bodies))
        finally:
            server.terminate()
            server.wait()


def _await(name: str, server: subprocess.Popen[bytes], port: int) -> None:
    until = time.monotonic() + PATIENCE
    while server.poll() is None and time.monotonic() < until:
        with suppress(OSError), closing(socket.create_connection(("127.0.0.1", port), 1.0)):
            return
        time.sleep(0.1)
    raise RunError(f"{name} has not started: {' '.join(map(str, server.args))}")  # type: ignore[arg-type]


def _grpo(folder: Path, clients: int) -> list[str]:
    begin = "import sys; from grpo.cli import main; sys.argv[0] = 'grpo'; main()"
    return [sys.executable, "-c", begin, "serve", str(folder), "--slots", str(clients), "--port"]


def _mlx_lm(folder: Path, clients: int) -> list[str]:
    """The command of mlx-lm's server with its best settings: the BLAS that grpo loads, all clients in one batch."""
    begin = "import grpo; from mlx_lm.server import main; main()"
    at_once = ["--decode-concurrency", str(clients), "--prompt-concurrency", str(clients)]
    return [sys.executable, "-c", begin, "--model", str(folder), *at_once, "--log-level", "ERROR", "--port"]
