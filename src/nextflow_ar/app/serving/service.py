"""What the routes share: the pipeline, the worker, threads for pictures, and the figures."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, TypeVar

from fastapi import Request
from fastapi.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from nextflow_ar.app.serving.desk import Desk
from nextflow_ar.app.serving.errors import ApiError
from nextflow_ar.app.serving.gate import ClientGone
from nextflow_ar.app.serving.metrics import Metrics
from nextflow_ar.app.serving.orders import Order
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.app.serving.worker import Stream, Worker
from nextflow_ar.generation.engines import Engines
from nextflow_ar.generation.jobs import Job
from nextflow_ar.generation.pipeline import NextFlowPipeline

T = TypeVar("T")
PICTURE_THREADS = 2
"""Pictures opened, encoded or decoded at once: bounds memory as much as it helps speed."""


@dataclass(frozen=True)
class Read:
    """Tokens of what was given."""

    text: int
    image: int


class Service:
    """One loaded pipeline behind a server. ``engines``: processes that work in place of its engine."""

    def __init__(
        self, pipeline: NextFlowPipeline, settings: ServerSettings, engines: Engines | None = None
    ) -> None:
        self.pipeline, self.settings = pipeline, settings
        self.metrics = Metrics()
        self.worker = Worker(pipeline.engine, settings.max_open, self.metrics, engines)
        self.desk = Desk(pipeline, settings)
        self.pool = ThreadPoolExecutor(PICTURE_THREADS, "nextflow-ar-pictures")
        self.metrics.watch("orders_open", "Pictures and texts in work or waiting.", lambda: self.worker.open)
        self.metrics.watch("orders_working", "Pictures and texts in work.", lambda: self.worker.working)
        self._watch_kept(pipeline)

    def _watch_kept(self, pipeline: NextFlowPipeline) -> None:
        rounds, count = self.worker.rounds, self.metrics.watch_count
        count("prefix_hits", "Parts of prefixes that were found kept.", lambda: rounds.figures.hits)
        count("prefix_reused_tokens", "Tokens of prefixes taken from there.", lambda: rounds.figures.reused)
        count("prefix_fed_tokens", "Tokens of prefixes that were computed.", lambda: rounds.figures.fed)
        count("pictures_known", "Given pictures whose codes were known.", lambda: pipeline.pictures.hits)
        self.metrics.watch("prefix_bytes", "Memory of kept prefixes.", lambda: rounds.figures.used)

    async def aside(self, work: Callable[..., T], *given: Any) -> T:
        """Run something slow in one of the threads."""
        return await asyncio.get_running_loop().run_in_executor(self.pool, work, *given)

    async def begin(self, made: Callable[[], list[Order]], client: str) -> tuple[Stream, Read]:
        """Make orders and hand them in. Raises ApiError, QueueFull and what says that something was asked wrongly."""
        if self.worker.open >= self.settings.max_open:  # spare the work of reading pictures
            raise self.busy()

        def prepared() -> tuple[list[Order], list[Job], Read]:
            orders = made()
            jobs = [self.worker.prepare(order) for order in orders]
            return orders, jobs, _read(jobs)

        orders, jobs, read = await self.aside(prepared)
        if self.worker.open + len(orders) > self.settings.max_open:
            raise self.busy()
        stream = self.worker.submit(orders, jobs, client)
        self.metrics.used("in", read.text, read.image)
        return stream, read

    def busy(self) -> ApiError:
        """429, and when to come back."""
        return ApiError(
            429, f"the queue is full ({self.settings.max_open} pictures and texts are in work or waiting)",
            kind="rate_limit_error", code="queue_full", retry_after=self.worker.retry_after,
        )  # fmt: skip

    async def answered(self, request: Request, stream: Stream, work: Coroutine[Any, Any, T]) -> T:
        """What ``work`` makes of a stream. Raises ClientGone when nobody waits any more, ApiError 504 when it takes too
        long; the orders are dropped then.
        """
        task = asyncio.ensure_future(work)
        gone = asyncio.ensure_future(_gone(request.receive))
        try:
            seconds = self.settings.timeout
            await asyncio.wait({task, gone}, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            if gone.done():
                raise ClientGone
            raise too_slow(seconds)
        finally:
            stream.cancel()
            for each in (task, gone):
                each.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    def close(self) -> None:
        """End the threads."""
        self.worker.close()
        self.pool.shutdown(wait=False, cancel_futures=True)


class EventStream(StreamingResponse):
    """Server-sent events of a stream of orders, which are dropped when the answer ends, however it ends."""

    def __init__(self, lines: Any, stream: Stream, seconds: float) -> None:
        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(lines, media_type="text/event-stream", headers=headers)
        self.stream, self.seconds = stream, seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI. A client that does not read for too long is left."""
        try:
            async with asyncio.timeout(self.seconds + 5):
                await super().__call__(scope, receive, send)
        except TimeoutError:
            raise ClientGone from None
        finally:
            self.stream.cancel()


def too_slow(seconds: float) -> ApiError:
    """504."""
    return ApiError(504, f"not done within {seconds:g} seconds", kind="server_error", code="timeout")


def client_of(request: Request) -> str:
    """Who asks, as the gate found."""
    return str(getattr(request.state, "client", "?"))


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _read(jobs: Sequence[Job]) -> Read:
    places = sum(len(job.prefix) for job in jobs[:1])
    image = sum(int((job.prefix.tokens < 0).sum()) for job in jobs[:1])
    return Read(places - image, image)
