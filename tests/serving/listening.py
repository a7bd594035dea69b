"""An application at a port of this machine, for clients that know nothing but a URL."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

import uvicorn

from grpo.serving.server import listening, url_of


@contextmanager
def at_a_port(app: Any) -> Iterator[str]:
    """Its base URL. It is served by a thread of its own."""
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="none", lifespan="on"))
    with closing(listening("127.0.0.1", 0)) as at:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [at]})
        thread.start()
        try:
            while not server.started:
                assert thread.is_alive(), "the server did not start"
                time.sleep(0.005)
            yield url_of(at)
        finally:
            server.should_exit = True
            thread.join(30)
            assert not thread.is_alive()
