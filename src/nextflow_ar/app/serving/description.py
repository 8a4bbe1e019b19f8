"""The OpenAPI description: bodies are read and answers are written by hand, so both are described by hand."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from pydantic import BaseModel

from nextflow_ar.app.serving.schemas import ChatBody, EditBody, ImageBody

_BODIES: dict[str, tuple[str, type[BaseModel], str]] = {
    "/v1/images/generations": ("application/json", ImageBody, "Pictures"),
    "/v1/images/edits": ("multipart/form-data", EditBody, "Pictures"),
    "/v1/chat/completions": ("application/json", ChatBody, "Answer"),
}
_PLAIN = {"/v1/models": "Models", "/v1/models/{model}": "Model", "/health": "Health"}
_ERRORS = {
    "400": "What was asked wrongly, and which field.",
    "401": "The API key is missing or wrong.",
    "404": "No such model or address.",
    "408": "The body came too slowly.",
    "413": "The body is too large.",
    "429": "The queue is full; Retry-After says when to come back.",
    "500": "The server failed.",
    "503": "Overloaded, or about to stop; Retry-After says when to come back.",
    "504": "Not done in time.",
}


def _object(required: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"type": "object", "required": list(required), "properties": required | more}


_TEXT, _COUNT = {"type": "string"}, {"type": "integer", "minimum": 0}
_MAYBE = {"anyOf": [_TEXT, {"type": "null"}]}
_MODEL = _object({"id": _TEXT, "object": {"const": "model"}, "created": _COUNT, "owned_by": _TEXT})
_EVENT = {"type": "object", "required": ["data"], "properties": {"event": _TEXT, "data": _TEXT}}
"""One server-sent event; its data is JSON, or [DONE] behind the last of a chat."""
_ANSWERS: dict[str, dict[str, Any]] = {
    "Error": _object({"error": _object({"message": _TEXT, "type": _TEXT, "param": _MAYBE, "code": _MAYBE})}),
    "Model": _MODEL,
    "Models": _object({"object": {"const": "list"}, "data": {"type": "array", "items": _MODEL}}),
    "Health": _object(
        {"status": {"enum": ["ok", "draining", "failed"]}, "model": _TEXT, "open": _COUNT, "working": _COUNT}
    ),
    "Pictures": _object(
        {
            "created": _COUNT,
            "data": {
                "type": "array",
                "minItems": 1,
                "items": _object({"b64_json": _TEXT, "seed": _COUNT}, thought=_TEXT),
            },
            "size": _TEXT,
            "output_format": {"enum": ["png", "jpeg", "webp"]},
            "usage": _object({"input_tokens": _COUNT, "output_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
    "Answer": _object(
        {
            "id": _TEXT,
            "object": {"const": "chat.completion"},
            "created": _COUNT,
            "model": _TEXT,
            "choices": {
                "type": "array",
                "minItems": 1,
                "items": _object(
                    {
                        "index": _COUNT,
                        "message": _object(
                            {"role": {"const": "assistant"}, "content": _TEXT},
                            images={"type": "array", "items": {"type": "object"}},
                        ),
                        "finish_reason": {"enum": ["stop", "length"]},
                    }
                ),
            },
            "usage": _object({"prompt_tokens": _COUNT, "completion_tokens": _COUNT, "total_tokens": _COUNT}),
        }
    ),
}  # fmt: skip


def described(app: FastAPI) -> dict[str, Any]:
    """OpenAPI's description of ``app``, made once."""
    if app.openapi_schema is None:
        told = FastAPI.openapi(app)
        schemas = told.setdefault("components", {}).setdefault("schemas", {})
        schemas.clear()  # FastAPI's own shape of errors is not ours
        schemas |= _ANSWERS
        for path, name in _PLAIN.items():
            operation = told["paths"][path]["get"]
            operation["responses"] = {"200": _response("Answered.", name)} | _errors("401", "404", "503")
        told["paths"]["/health"]["get"]["responses"] = {
            "200": _response("Requests are taken.", "Health"),
            "503": _response("About to stop, or failed.", "Health"),
        }
        text = {"text/plain": {"schema": _TEXT}}
        told["paths"]["/metrics"]["get"]["responses"] = {"200": {"description": "Figures.", "content": text}}
        for path, (kind, model, answer) in _BODIES.items():
            schemas |= _body(told["paths"][path]["post"], kind, model, answer)
        app.openapi_schema = told
    return app.openapi_schema


def _body(operation: dict[str, Any], kind: str, model: type[BaseModel], answer: str) -> dict[str, Any]:
    """Write the body and the answers of an operation; returns the schemas that it needs."""
    schema = model.model_json_schema(ref_template="#/components/schemas/{model}")
    found = schema.pop("$defs", {})
    if kind == "multipart/form-data":
        file = {"type": "string", "format": "binary"}
        schema["properties"] |= {"image": {"type": "array", "items": file}, "mask": file}
        schema["required"] = [*schema["required"], "image"]
    refers = {"schema": {"$ref": f"#/components/schemas/{model.__name__}"}}
    operation["requestBody"] = {"required": True, "content": {kind: refers}}
    whole = _response("The answer; with stream, server-sent events.", answer)
    whole["content"]["text/event-stream"] = {"schema": _EVENT}
    operation["responses"] = {"200": whole} | _errors(*_ERRORS)
    return {**found, model.__name__: schema}


def _response(what: str, name: str) -> dict[str, Any]:
    content = {"application/json": {"schema": {"$ref": f"#/components/schemas/{name}"}}}
    return {"description": what, "content": content}


def _errors(*codes: str) -> dict[str, Any]:
    return {code: _response(_ERRORS[code], "Error") for code in codes}
