"""A score from another model, behind an OpenAI-compatible endpoint, that reads the prompt and the completion."""

import asyncio
import contextlib
import hashlib
import json
import os
import random
import re
import string
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from grpo.scoring.text import as_text, texts

PAID = True  # calls cost money, so a dry run makes none

PROMPT = """Grade the answer to the question from 0 (useless) to 10 (perfect).

Question:
{prompt}

Answer:
{completion}

Think briefly, then end with a line `Score: N`."""
SCORE = r"(?i)score\s*[:=]\s*\**\s*(-?\d+(?:\.\d+)?)"


def reward(
    model: str,
    base_url: str = "https://api.openai.com/v1",
    prompt: str = PROMPT,
    pattern: str = SCORE,
    low: float = 0.0,
    high: float = 10.0,
    temperature: float = 0.0,
    max_tokens: int = 512,
    api_key_env: str = "OPENAI_API_KEY",
    concurrency: int = 8,
    retries: int = 4,
    request_timeout: float = 60.0,
    cache: str | None = "~/.cache/grpo/llm_judge",
) -> Callable[..., Any]:
    """The last number that `pattern` finds in the judge's answer, scaled from `low`..`high` to 0..1; None without one.

    `prompt` is a template over `{prompt}`, `{completion}` and the dataset's columns. The API key comes from the
    environment variable `api_key_env`, and is sent only to `base_url`. At most `concurrency` requests run at the same
    time. Requests that fail because of load or the connection are repeated up to `retries` times, with growing pauses.
    Answers are cached in the folder `cache` (null: no cache) by model and prompt. Set the reward's `timeout` high
    enough for all requests of a step.
    """
    if low >= high:
        raise ValueError("kwargs.low must be below kwargs.high")
    if concurrency < 1 or retries < 0:
        raise ValueError("kwargs: concurrency must be at least 1, and retries at least 0")
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"kwargs.pattern: {pattern!r} is not a regular expression: {error}") from None
    if groups > 1:
        raise ValueError(f"kwargs.pattern: {pattern!r} has {groups} groups, but only one can contain the number")
    try:
        list(string.Formatter().parse(prompt))
    except ValueError as error:
        raise ValueError(f"kwargs.prompt: {error}; write {{{{ and }}}} for literal braces") from None
    judge = _Judge(model, base_url, temperature, max_tokens, api_key_env, retries, request_timeout, cache)

    async def score(
        prompts: list[Any], completions: list[Any], log_extra: Callable[[str, list[Any]], None], **columns: Any
    ) -> list[Any]:
        columns = {name: values for name, values in columns.items() if isinstance(values, list)}
        rows = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        questions = [
            prompt.format_map({**row, "prompt": as_text(question), "completion": text})
            for question, text, row in zip(prompts, texts(completions), rows or [{}] * len(prompts), strict=True)
        ]
        with ThreadPoolExecutor(concurrency) as threads:
            loop = asyncio.get_running_loop()
            asking = [loop.run_in_executor(threads, judge.ask, question) for question in questions]
            answers = await asyncio.gather(*asking, return_exceptions=True)
        log_extra("llm_judge", [str(answer) for answer in answers])
        return [a if isinstance(a, BaseException) else _number(a, pattern, low, high) for a in answers]

    return score


class _Judge:
    """Answers questions, from the cache or from the endpoint."""

    def __init__(
        self,
        model: str,
        base_url: str,
        temperature: float,
        max_tokens: int,
        api_key_env: str,
        retries: int,
        request_timeout: float,
        cache: str | None,
    ) -> None:
        self._url = base_url.rstrip("/") + "/chat/completions"
        self._settings = {"model": model, "temperature": temperature, "max_tokens": max_tokens}
        self._headers = {"Content-Type": "application/json"}
        if key := _key(api_key_env):
            self._headers["Authorization"] = f"Bearer {key}"
        self._retries, self._timeout = retries, request_timeout
        self._cache = Path(cache).expanduser() if cache else None

    def ask(self, question: str) -> str:
        """The judge's answer. Raises RuntimeError if the request fails."""
        body = json.dumps({**self._settings, "messages": [{"role": "user", "content": question}]}, sort_keys=True)
        kept = self._kept(body)
        if kept is not None and kept.is_file():
            return kept.read_text(encoding="utf-8")
        for attempt in range(self._retries + 1):
            try:
                answer = self._post(body)
            except (OSError, ValueError, KeyError) as error:
                if attempt == self._retries or not _passing(error):
                    raise RuntimeError(f"{self._url}: {_said(error)}") from None
                time.sleep(min(30.0, 2.0**attempt / 2) * (1 + random.random()))
            else:
                self._keep(kept, answer)
                return answer
        raise AssertionError

    def _post(self, body: str) -> str:
        request = urllib.request.Request(self._url, body.encode(), self._headers)
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=self._timeout) as response:
            return str(json.load(response)["choices"][0]["message"]["content"] or "")

    def _kept(self, body: str) -> Path | None:
        name = hashlib.sha256(f"{self._url}\n{body}".encode()).hexdigest()
        return self._cache / name[:2] / name if self._cache else None

    def _keep(self, path: Path | None, answer: str) -> None:
        if path is None:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        aside = path.with_suffix(f".{os.getpid()}-{random.randrange(1 << 32)}")
        aside.write_text(answer, encoding="utf-8")
        aside.replace(path)


def _key(variable: str) -> str:
    """The API key, without surrounding white space such as a line break. The check matters because an HTTP error about
    an invalid header would show the header."""
    key = os.environ.get(variable, "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ValueError(f"the environment variable {variable} is not an API key: it has invalid characters")
    return key


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses redirects, so that the key goes only to `base_url`."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _passing(error: Exception) -> bool:
    """Whether a repeated request may succeed: after load, gateway and connection errors, but not after a refusal."""
    if isinstance(error, urllib.error.HTTPError):
        return error.code in (408, 409, 429) or error.code >= 500
    return True


def _said(error: Exception) -> str:
    """The error as text, without any part of the request."""
    if isinstance(error, urllib.error.HTTPError):
        return f"HTTP {error.code} {error.reason}"
    return f"{type(error).__name__}: {error}"


def _number(answer: str, pattern: str, low: float, high: float) -> float | None:
    found = re.findall(pattern, answer)
    if not found:
        return None
    return min(1.0, max(0.0, (float(found[-1]) - low) / (high - low)))


@contextlib.contextmanager
def case_kwargs() -> Iterator[dict[str, Any]]:
    """The arguments for the cases: a local judge that answers with the text that the completion dictates."""
    import threading
    from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            said = request["messages"][-1]["content"].partition("JUDGE SAYS ")[2].partition("\n")[0]
            body = json.dumps({"choices": [{"message": {"content": said}}]}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield {"model": "case", "base_url": f"http://127.0.0.1:{server.server_port}/v1", "cache": None}
        server.shutdown()


CASES = [
    {"completion": "JUDGE SAYS Good. Score: 8", "score": 0.8},
    {"completion": "JUDGE SAYS Score: 3, no: **Score:** 4, no: Score: 5", "score": 0.5},
    {"completion": "JUDGE SAYS Score: 99", "score": 1.0},
    {"completion": "JUDGE SAYS I would rather not", "score": None},
    {"completion": "", "score": None},
]
