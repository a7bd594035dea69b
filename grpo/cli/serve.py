"""`grpo serve`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def serve(
    target: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A run's folder, or a model as in recipes.")],
    adapter: Annotated[
        Path | None, typer.Option(help="Folder of an adapter. Default: the newest checkpoint of the run.")
    ] = None,
    host: Annotated[
        str, typer.Option(help="Address to listen on. Other machines are allowed only with --api-key.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port to listen on. 0: any free port.")] = 8000,
    api_key: Annotated[
        str | None,
        typer.Option(
            envvar="GRPO_API_KEY",
            help="Key that clients must send. Other users of the machine can see keys on the command line.",
        ),
    ] = None,
    slots: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=4096,
            help="Number of completions that decode simultaneously. Default: the run's setting; for a model, 64.",
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(min=2, help="Maximum number of tokens of prompt and answer together. Default: the model's limit."),
    ] = None,
    max_requests: Annotated[
        int,
        typer.Option(
            min=1, help="Maximum number of open requests, waiting requests included. Further requests get a 429."
        ),
    ] = 256,
    timeout: Annotated[float, typer.Option(min=0.1, help="Maximum number of seconds for an answer.")] = 600.0,
    drain: Annotated[
        float, typer.Option(min=0.0, help="Seconds to finish open requests after SIGTERM or Ctrl-C.")
    ] = 60.0,
) -> None:
    """Serve a run's adapters, or a model, to OpenAI clients.

    The endpoints are /v1/models, /v1/chat/completions, /v1/completions and /inference/v1/generate. The trainer's own
    generator decodes: the same seed gives the same tokens. `model` in a request is base, RUN (the newest checkpoint
    when the server started) or RUN@STEP. With return_token_ids and logprobs, an answer has the token ids, and fp32
    logprobs at the sampling temperature. For settings that a request leaves out, the settings of the run's training
    apply. After SIGTERM or Ctrl-C, the server finishes open requests and exits with 0. While the model loads, these
    signals stop it immediately, with 143 or 130. Needs pip install 'grpo-mlx[serve]'.
    """
    from grpo.serving.service import ServingLimits
    from grpo.tools.serve import Serving
    from grpo.tools.serve import serve as begin

    limits = ServingLimits(requests=max_requests, seconds=timeout)
    how = Serving(host, port, api_key, slots, max_length, drain, limits)
    begin(target, adapter, how, lambda line: print(line, flush=True))
