"""Errors in OpenAI's shape: ``{"error": {"message", "type", "param", "code"}}``, for whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.exceptions import HTTPException

from nextflow_ar.generation.engine import ContextError, QueueFull
from nextflow_ar.generation.pipeline import RequestError
from nextflow_ar.generation.sampling import SettingError
from nextflow_ar.tokenizer.pictures import PictureError

ASKED_WRONGLY = (ContextError, RequestError, SettingError, PictureError)
"""Errors of lower floors whose line is meant for whoever asked."""


class ApiError(Exception):
    """An answer that is an error. ``kind`` is OpenAI's ``type``, ``retry_after`` whole seconds."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        retry_after: int | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.kind, self.code, self.param = status, message, kind, code, param
        self.headers = dict(headers or {})
        if retry_after is not None:
            self.headers["retry-after"] = str(retry_after)

    def body(self) -> dict[str, Any]:
        """What the client reads."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
            }
        }

    def response(self) -> Response:
        """As an HTTP answer."""
        return Response(dumps(self.body()), self.status, self.headers, "application/json")


class Draining(RuntimeError):
    """The server is about to stop: nothing new is taken on."""


class Broken(RuntimeError):
    """The work itself failed: no fault of whoever asked."""


def dumps(value: Any) -> str:
    """JSON in plain ASCII, so that even half a surrogate pair in an echoed text can be sent."""
    return json.dumps(value, separators=(",", ":"))


def bad(message: str, param: str | None = None, code: str | None = None) -> ApiError:
    """400: the request cannot be meant."""
    return ApiError(400, message, param=param, code=code)


def draining() -> ApiError:
    """503: about to stop."""
    return ApiError(
        503, "the server is shutting down: try again soon", kind="server_error", code="shutting_down",
        retry_after=5, headers={"connection": "close"},
    )  # fmt: skip


def as_api_error(error: BaseException) -> ApiError:
    """Any error as an answer. What is not foreseen becomes a 500 that tells nothing of the inside."""
    if isinstance(error, ApiError):
        return error
    if isinstance(error, ContextError):
        return bad(_line(error), code="context_length_exceeded")
    if isinstance(error, ASKED_WRONGLY):
        return bad(_line(error))
    if isinstance(error, ValidationError):
        return from_validation(error)
    if isinstance(error, Draining):
        return draining()
    if isinstance(error, QueueFull):
        return ApiError(429, _line(error), kind="rate_limit_error", code="queue_full", retry_after=1)
    if isinstance(error, HTTPException):
        return _from_http(error)
    return ApiError(500, "the server failed at this request", kind="server_error", code="internal_error")


def from_validation(error: ValidationError) -> ApiError:
    """400 that names the first field that is wrong. Nothing that was sent is repeated."""
    found = error.errors(include_url=False, include_context=False, include_input=False)
    first = found[0]
    where = ".".join(str(part) for part in first["loc"]) or None
    if first["type"] == "extra_forbidden":
        return bad(f"Unknown parameter: '{_short(where)}'.", _short(where), "unknown_parameter")
    if first["type"] == "missing":
        return bad(f"Missing required parameter: '{where}'.", where, "missing_required_parameter")
    if first["type"] == "json_invalid":
        return bad("the body is no valid JSON", code="invalid_json")
    message = first["msg"].removeprefix("Value error, ")
    return bad(f"{_short(where)}: {message}" if where else message, _short(where), "invalid_value")


def _from_http(error: HTTPException) -> ApiError:
    told = {
        404: ("there is nothing at this address", "not_found"),
        405: ("this address does not take that method", "method_not_allowed"),
    }
    message, code = told.get(error.status_code, (str(error.detail), None))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    return ApiError(error.status_code, message, kind=kind, code=code, headers=error.headers)


def _line(error: BaseException) -> str:
    return " ".join(str(error).split())[:500]


def _short(name: str | None) -> str | None:
    return name if name is None or len(name) <= 80 else name[:77] + "..."


def install(app: FastAPI) -> None:
    """Let ``app`` answer its own errors, 404 and 405 among them, in this shape."""

    async def answer(_: Request, error: Exception) -> Response:
        return as_api_error(error).response()

    for kind in (ApiError, HTTPException, ValidationError, Draining, QueueFull, *ASKED_WRONGLY):
        app.add_exception_handler(kind, answer)
