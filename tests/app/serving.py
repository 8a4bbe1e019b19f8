"""A running server for tests: uvicorn in a thread, on a port of its own."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
import openai

from nextflow_ar.app.serving.app import Server, create_app, make_server
from nextflow_ar.app.serving.service import Service
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation.engines import Engines
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle


class Running:
    """The server, its address, and its inside."""

    def __init__(self, server: Server, url: str) -> None:
        self.server, self.url = server, url
        self.service: Service = server.service
        self.host, self.port = url.removeprefix("http://").split(":")[0], int(url.rsplit(":", 1)[1])

    def client(self, key: str = "none", **given: object) -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=self.url + "/v1", api_key=key, max_retries=0, **given)  # type: ignore[arg-type]

    def http(self) -> httpx.Client:
        """A plain client."""
        return httpx.Client(base_url=self.url, timeout=60)

    def until_idle(self, seconds: float = 20) -> None:
        """Wait until nothing is in work."""
        end = time.monotonic() + seconds
        while self.service.worker.open and time.monotonic() < end:
            time.sleep(0.01)
        assert self.service.worker.open == 0


@contextmanager
def running(
    pipeline: NextFlowPipeline | Bundle,
    settings: ServerSettings | None = None,
    engines: Engines | None = None,
) -> Iterator[Running]:
    """A server that is up until the block ends."""
    if isinstance(pipeline, Bundle):
        pipeline = NextFlowPipeline(pipeline)
    app = create_app(pipeline, settings or ServerSettings(name="tiny", grace=5), engines)
    server = make_server(app, "127.0.0.1", 0)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve()), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not server.started and thread.is_alive() and time.monotonic() < end:
        time.sleep(0.01)
    assert server.started
    port = server.servers[0].sockets[0].getsockname()[1]
    try:
        yield Running(server, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(timeout=30)
        assert not thread.is_alive()
