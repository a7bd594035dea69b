"""`grpo serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model as in recipes.")],
    adapter: Annotated[
        Path | None, typer.Option(help="An adapter's folder. Default: the newest checkpoint of the run.")
    ] = None,
    host: Annotated[str, typer.Option(help="Where to listen. Other machines are let in with --api-key.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0: any that is free.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(envvar="GRPO_API_KEY", help="What clients must send. A command line can be read by others."),
    ] = None,
    slots: Annotated[
        int | None, typer.Option(min=1, max=4096, help="Completions decoded at once. Default: the run's, or 64.")
    ] = None,
    max_length: Annotated[
        int | None, typer.Option(min=2, help="Tokens of prompt and answer together. Default: the model's limit.")
    ] = None,
    max_requests: Annotated[
        int, typer.Option(min=1, help="Requests under way at once, waiting ones included; more get a 429.")
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Seconds for an answer.")] = 600.0,
    drain: Annotated[float, typer.Option(min=0.0, help="Seconds for requests under way when it is to end.")] = 60.0,
) -> None:
    """Serve a run's adapters, or a model, to OpenAI clients.

    /v1/models, /v1/chat/completions, /v1/completions and /inference/v1/generate, decoded by the trainer's own
    generator: the same tokens for the same seed. `model` in a request is base, RUN (the newest checkpoint when this
    began) or RUN@STEP. With return_token_ids and logprobs an answer has the token ids, and fp32 logprobs at the
    sampling temperature. What a request leaves out is sampled as in the run's training. SIGTERM and Ctrl-C let requests
    under way be answered first, and the exit code is 0; while the model loads they end it at once, with 130 or 143.
    Needs pip install 'grpo-mlx[serve]'.
    """
    from grpo.serving.service import ServingLimits
    from grpo.tools.serve import Serving
    from grpo.tools.serve import serve as begin

    limits = ServingLimits(requests=max_requests, seconds=timeout)
    how = Serving(host, port, api_key, slots, max_length, drain, limits)
    begin(target, adapter, how, lambda line: print(line, flush=True))
