"""The ASGI application, and uvicorn with manners: clients that dawdle are left, work is finished before the end."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import uvicorn
from fastapi import APIRouter, FastAPI
from fastapi.responses import Response
from starlette.middleware.cors import CORSMiddleware
from uvicorn.protocols.http.h11_impl import H11Protocol

from nextflow_ar.app.serving.chat import chat_routes
from nextflow_ar.app.serving.description import described
from nextflow_ar.app.serving.errors import ApiError, bad, dumps, install
from nextflow_ar.app.serving.gate import Gate
from nextflow_ar.app.serving.images import image_routes
from nextflow_ar.app.serving.metrics import CONTENT_TYPE
from nextflow_ar.app.serving.service import Service
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation.engines import Engines
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.tidying import trimming


def create_app(
    pipeline: NextFlowPipeline, settings: ServerSettings, engines: Engines | None = None
) -> FastAPI:
    """The application around a loaded pipeline; ``app.state.service`` is what its routes share. ``engines``: processes that
    work in place of the pipeline's engine; the application ends them.
    """
    service = Service(pipeline, settings, engines)

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        service.worker.start()
        tidy = asyncio.create_task(trimming(lambda: service.metrics.answered))
        yield
        tidy.cancel()
        await service.worker.drain(settings.grace)
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="NextFlow-AR", version="1", lifespan=life, docs_url=None, redoc_url=None, redirect_slashes=False
    )
    app.state.service = service
    install(app)
    for routes in (_plain_routes(service), image_routes(service), chat_routes(service)):
        app.include_router(routes)
    app.add_middleware(Gate, settings=settings, worker=service.worker, metrics=service.metrics)  # pyright: ignore[reportArgumentType]
    if settings.origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(settings.origins), allow_methods=["GET", "POST"],
            allow_headers=["authorization", "content-type", "x-request-id"], expose_headers=["x-request-id"],
        )  # fmt: skip
    app.openapi = lambda: described(app)  # type: ignore[method-assign]
    return app


def _plain_routes(service: Service) -> APIRouter:
    router = APIRouter()
    card = {"id": service.settings.name, "object": "model", "created": 0, "owned_by": "nextflow-ar"}

    def answer(told: Any, status: int = 200) -> Response:
        return Response(dumps(told), status, media_type="application/json")

    @router.get("/v1/models")
    async def models() -> Response:
        """The one model that is served."""
        return answer({"object": "list", "data": [card]})

    @router.get("/v1/models/{model:path}")
    async def model(model: str) -> Response:
        """That model by name."""
        if model != service.settings.name:
            raise ApiError(404, "there is no such model", code="model_not_found", param="model")
        return answer(card)

    @router.get("/health")
    async def health() -> Response:
        """Whether requests are taken: 200, or 503 before the end and after a failure."""
        worker = service.worker
        state = "draining" if worker.draining else "ok" if worker.alive else "failed"
        told = {
            "status": state,
            "model": service.settings.name,
            "open": worker.open,
            "working": worker.working,
        }
        return answer(told, 200 if state == "ok" else 503)

    @router.get("/metrics")
    async def metrics() -> Response:
        """Figures for Prometheus."""
        return Response(service.metrics.page(), headers={"content-type": CONTENT_TYPE})

    return router


class Patient(H11Protocol):
    """HTTP with an end to patience: a connection that sends no whole request head within some seconds is closed."""

    header_timeout = 15.0
    most = 1024
    _late: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Asyncio's; connections beyond the limit are closed at once."""
        super().connection_made(transport)
        if len(self.connections) > self.most:
            transport.close()
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Asyncio's."""
        super().data_received(data)
        self._wait()

    def connection_lost(self, exc: Exception | None) -> None:
        """Asyncio's."""
        self._stop()
        super().connection_lost(exc)

    def on_response_complete(self) -> None:
        """Uvicorn's: its own timer for idle connections takes over."""
        super().on_response_complete()
        self._stop()

    def send_400_response(self, msg: str) -> None:
        """Uvicorn's, for what is no HTTP: in OpenAI's shape."""
        answer = bad(msg, code="invalid_http").response()
        head = f"HTTP/1.1 400 Bad Request\r\ncontent-type: application/json\r\ncontent-length: {len(answer.body)}"
        self.transport.write(head.encode() + b"\r\nconnection: close\r\n\r\n" + bytes(answer.body))
        self.transport.close()

    def _wait(self) -> None:
        busy = self.cycle is not None and not self.cycle.response_complete
        if busy:
            self._stop()
        elif self._late is None:
            self._late = self.loop.call_later(self.header_timeout, self.transport.close)

    def _stop(self) -> None:
        if self._late is not None:
            self._late.cancel()
            self._late = None


class Server(uvicorn.Server):
    """Uvicorn that, told to stop, first lets running work finish within the grace period."""

    def __init__(self, config: uvicorn.Config, service: Service) -> None:
        super().__init__(config)
        self.service = service

    def handle_exit(self, sig: int, frame: Any) -> None:
        """A second signal ends at once. The signal is not raised again afterwards: a clean end has exit status 0."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Uvicorn's."""
        ending = asyncio.create_task(self.service.worker.drain(self.service.settings.grace))
        try:
            await super().shutdown(sockets)
        finally:
            ending.cancel()


def make_server(
    app: FastAPI,
    host: str,
    port: int,
    *,
    socket_path: str | None = None,
    config: dict[str, Any] | None = None,
) -> Server:
    """A server for an app of :func:`create_app`; ``config``: further settings of uvicorn."""
    service: Service = app.state.service
    settings = service.settings
    protocol = type(
        "Patient", (Patient,), {"header_timeout": settings.header_timeout, "most": settings.max_connections}
    )
    given = uvicorn.Config(
        app, host=host, port=port, uds=socket_path, http=protocol, ws="none", access_log=False, log_config=None,
        server_header=False, timeout_graceful_shutdown=int(settings.grace) + 10, **(config or {}),
    )  # fmt: skip
    return Server(given, service)
