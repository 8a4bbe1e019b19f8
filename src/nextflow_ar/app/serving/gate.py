"""What every request passes first: its id, key, size and pace, and the line that is logged of it.

A body is read here, whole, before anything else sees the request: after the key is checked, within limits of bytes and
time, and within a budget for all bodies together. So a hostile sender meets this file and nothing behind it.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import time
import uuid
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nextflow_ar.app.serving.errors import ApiError, as_api_error, draining
from nextflow_ar.app.serving.metrics import Metrics
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.app.serving.worker import Worker

log = logging.getLogger("nextflow_ar.serving")
_ID = re.compile(r"[A-Za-z0-9_.:-]{1,64}")
GUARDED = "/v1/"
"""Paths below this need a key and pass the limits; health, figures and pages do not."""


class ClientGone(Exception):
    """Nobody waits for the answer any more."""


@dataclass(eq=False)
class _Visit:
    """What is known of one request."""

    id: str
    method: str
    path: str
    host: str
    began: float
    client: str = ""
    status: int = 0
    sent: int = 0
    received: int = 0


class Gate:
    """ASGI middleware around the whole app."""

    def __init__(self, app: ASGIApp, settings: ServerSettings, worker: Worker, metrics: Metrics) -> None:
        self.app, self.settings, self.worker, self.metrics = app, settings, worker, metrics
        self.keys = [_digest(key.encode()) for key in settings.keys]
        self.buffered = 0
        self.inside = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """ASGI."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else f"req_{uuid.uuid4().hex}"
        host = scope["client"][0] if scope.get("client") else "?"
        visit = _Visit(name, scope["method"], scope["path"], host, time.perf_counter())
        self.inside += 1
        try:
            await self._serve(scope, headers, receive, self._marked(send, visit), visit)
        finally:
            self.inside -= 1
            self._tell(visit, scope)

    async def _serve(
        self, scope: Scope, headers: Headers, receive: Receive, send: Send, visit: _Visit
    ) -> None:
        held = 0
        try:
            if visit.path.startswith(GUARDED):
                visit.client = self._admitted(headers, visit)
                scope.setdefault("state", {})["client"] = visit.client
                scope["state"]["request_id"] = visit.id
                held = self._reserved(headers)
                receive, visit.received = await self._whole(receive, held)
            await self.app(scope, receive, send)
        except (ClientGone, asyncio.CancelledError) as error:
            visit.status = visit.status or 499
            if isinstance(error, asyncio.CancelledError):
                raise
        except Exception as error:
            answer = as_api_error(error)
            if answer.status >= 500 and not isinstance(error, ApiError):
                log.exception("a request failed", extra={"request_id": visit.id})
            if visit.status:  # the answer has begun: it can only be broken off
                raise
            await answer.response()(scope, receive, send)
        finally:
            self.buffered -= held

    def _admitted(self, headers: Headers, visit: _Visit) -> str:
        """Who asks: a key's mark, or an address where no keys are set. Raises ApiError."""
        client = visit.host
        if self.keys:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            digest = _digest(key.strip().encode("latin-1")) if scheme.lower() == "bearer" else b""
            # Every key is compared, each in constant time: how long it takes tells nothing.
            if not sum(hmac.compare_digest(digest, known) for known in self.keys):
                raise ApiError(
                    401, "give a valid API key: Authorization: Bearer KEY", code="invalid_api_key",
                    headers={"www-authenticate": "Bearer", "connection": "close"},
                )  # fmt: skip
            client = "key-" + digest.hex()[:8]
        if self.worker.draining:
            raise draining()
        if self.inside > self.settings.max_connections:
            raise _full("too many requests are open")
        return client

    def _reserved(self, headers: Headers) -> int:
        """Take a body's bytes out of the budget. Raises ApiError 413, 411 for nonsense, or 503."""
        told = headers.get("content-length")
        if told is None and "transfer-encoding" not in headers:
            return 0
        if told is not None and not (told.isascii() and told.isdigit() and len(told) < 20):
            raise ApiError(400, "Content-Length is no number", headers={"connection": "close"})
        need = self.settings.max_body if told is None else int(told)
        if need > self.settings.max_body:
            raise _too_large(self.settings.max_body)
        if self.buffered + need > self.settings.max_buffered:
            raise _full("too many bodies are being read")
        self.buffered += need
        return need

    async def _whole(self, receive: Receive, limit: int) -> tuple[Receive, int]:
        """The body, read to its end, as a ``receive`` that gives it at once. Raises ApiError 408 or 413, or ClientGone."""
        parts, size = [], 0
        try:
            async with asyncio.timeout(self.settings.body_timeout):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise ClientGone
                    parts.append(message.get("body", b""))
                    size += len(parts[-1])
                    if size > limit:
                        raise _too_large(self.settings.max_body)
                    if not message.get("more_body", False):
                        break
        except TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self.settings.body_timeout:g} seconds",
                code="request_timeout", headers={"connection": "close"},
            ) from None  # fmt: skip
        body: list[bytes] = [b"".join(parts)]

        async def given() -> Message:
            if body:
                return {"type": "http.request", "body": body.pop(), "more_body": False}
            return await receive()

        return given, size

    def _marked(self, send: Send, visit: _Visit) -> Send:
        """``send`` with our headers on the answer; counts what goes out."""

        async def marked(message: Message) -> None:
            if message["type"] == "http.response.start":
                visit.status = message["status"]
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = visit.id
                headers["x-content-type-options"] = "nosniff"
                headers["openai-processing-ms"] = str(round((time.perf_counter() - visit.began) * 1000))
            elif message["type"] == "http.response.body":
                visit.sent += len(message.get("body", b""))
            await send(message)

        return marked

    def _tell(self, visit: _Visit, scope: Scope) -> None:
        route = getattr(scope.get("route"), "path", "other")
        method = visit.method if visit.method in ("GET", "POST", "HEAD", "OPTIONS") else "other"
        seconds = time.perf_counter() - visit.began
        self.metrics.answered += 1
        self.metrics.requests.labels(route, method, str(visit.status)).inc()
        self.metrics.seconds.labels(route).observe(seconds)
        log.info(
            "request",
            extra={
                "request_id": visit.id, "method": method, "route": route, "status": visit.status,
                "seconds": round(seconds, 4), "bytes_in": visit.received, "bytes_out": visit.sent,
                "client": visit.client or visit.host,
            },
        )  # fmt: skip


class JsonLines(logging.Formatter):
    """Log records as one JSON object a line."""

    _plain = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName", "color_message"}

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        told = {
            "time": self.formatTime(record),
            "level": record.levelname.lower(),
            "event": record.getMessage(),
        }
        told |= {k: v for k, v in vars(record).items() if k not in self._plain}
        if record.exc_info:
            told["error"] = self.formatException(record.exc_info)
        return json.dumps(told, default=str)


def _digest(key: bytes) -> bytes:
    """Of one length whatever the key's, so that comparing tells nothing of that either."""
    return hashlib.sha256(key).digest()


def _too_large(limit: int) -> ApiError:
    return ApiError(
        413,
        f"the body is larger than {limit} bytes",
        code="request_too_large",
        headers={"connection": "close"},
    )


def _full(what: str) -> ApiError:
    return ApiError(
        503, f"{what}: try again soon", kind="server_error", code="overloaded", retry_after=1,
        headers={"connection": "close"},
    )  # fmt: skip
