"""``POST /v1/images/generations`` and ``/v1/images/edits``, whole or streamed as the pictures sharpen."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from pydantic import ValidationError
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException

from nextflow_ar.app.serving import media
from nextflow_ar.app.serving.errors import as_api_error, bad, dumps
from nextflow_ar.app.serving.orders import Order, Thought
from nextflow_ar.app.serving.schemas import EditBody, ImageBody
from nextflow_ar.app.serving.service import EventStream, Read, Service, client_of, too_slow
from nextflow_ar.app.serving.worker import Stream
from nextflow_ar.generation.engine import ImageRequest
from nextflow_ar.types import ImageReady, ScaleReady

_FILES = ("image", "image[]", "mask")


def image_routes(service: Service) -> APIRouter:
    """The routes."""
    router = APIRouter()

    @router.post("/v1/images/generations")
    async def generations(request: Request) -> Response:
        """Draw pictures from words."""
        body = ImageBody.model_validate_json(await request.body())
        service.desk.checked(body)
        stream, read = await service.begin(partial(service.desk.images, body), client_of(request))
        return await _answer(service, request, body, stream, read, "image_generation")

    @router.post("/v1/images/edits")
    async def edits(request: Request) -> Response:
        """Change pictures by an instruction, or draw anew what a mask marks."""
        body, files, mask = await _form(request, service.settings.max_inputs)
        service.desk.checked(body)
        made = partial(service.desk.edits, body, files, mask)
        stream, read = await service.begin(made, client_of(request))
        return await _answer(service, request, body, stream, read, "image_edit")

    return router


async def _form(request: Request, most: int) -> tuple[EditBody, list[bytes], bytes | None]:
    """Fields and files of a multipart body. Raises ApiError or ValidationError."""
    if not request.headers.get("content-type", "").lower().startswith("multipart/form-data"):
        raise bad("the body is a multipart form", code="invalid_content_type")
    fields: dict[str, Any] = {}
    files: list[bytes] = []
    mask: bytes | None = None
    try:
        async with request.form(max_files=most + 1, max_fields=64) as form:
            for name, value in form.multi_items():
                if isinstance(value, UploadFile):
                    if name not in _FILES:
                        raise bad(f"Unknown file: '{name[:80]}'.", name[:80], "unknown_parameter")
                    data = await value.read()
                    mask, files = (data, files) if name == "mask" else (mask, [*files, data])
                elif name in _FILES:
                    raise bad(f"{name}: has to be a file", name, "invalid_value")
                elif name in fields:
                    raise bad(f"{name[:80]}: given twice", name[:80], "invalid_value")
                else:
                    fields[name] = value
    except HTTPException as error:
        raise bad(f"the form cannot be read: {str(error.detail)[:200]}", code="invalid_form") from None
    except (ValidationError, ValueError, KeyError, LookupError):
        raise bad("the form cannot be read", code="invalid_form") from None
    return EditBody.model_validate(fields), files, mask


async def _answer(
    service: Service, request: Request, body: ImageBody, stream: Stream, read: Read, kind: str
) -> Response:
    if body.stream:
        lines = _events(service, body, stream, read, kind)
        return EventStream(lines, stream, service.settings.timeout)
    found = await service.answered(request, stream, _whole(service, body, stream, read))
    return Response(dumps(found), media_type="application/json")


async def _finished(
    service: Service, body: ImageBody, order: Order, codes: Any, upto: int | None = None
) -> str:
    """A picture in base64, decoded beside the engine; ``upto``: from so many scales."""

    def work() -> str:
        pipeline = service.pipeline
        if upto is None:
            picture = pipeline.finished(order.request, codes)
            request = order.request
            if not isinstance(request, ImageRequest) or (request.forced is None and request.original is None):
                pipeline.remember(picture, codes)  # what is put together of two has other codes
        else:
            assert order.schedule is not None
            picture = pipeline.preview(order.schedule, codes, upto)
        return media.encoded(picture, body.output_format or "png", body.output_compression)

    return await service.aside(work)


async def _whole(service: Service, body: ImageBody, stream: Stream, read: Read) -> dict[str, Any]:
    data: list[dict[str, Any]] = [{"seed": order.seed} for order in stream.orders]
    thought = 0
    async for index, news in stream:
        if isinstance(news, Thought):
            data[index]["thought"] = news.text
            thought += news.tokens
        elif isinstance(news, ImageReady):
            data[index]["b64_json"] = await _finished(service, body, stream.orders[index], news.codes)
            service.metrics.pictures.inc()
    return {
        "created": int(time.time()),
        "data": [{"b64_json": one.pop("b64_json"), **one} for one in data],
        "background": "opaque",
        "output_format": body.output_format or "png",
        "size": _size(service, stream.orders[0]),
        "usage": _usage(service, read, len(data), stream, thought),
    }


async def _events(
    service: Service, body: ImageBody, stream: Stream, read: Read, kind: str
) -> AsyncIterator[str]:
    """Server-sent events: partial pictures, and one ``completed`` for each picture."""
    common = {
        "created_at": int(time.time()),
        "size": _size(service, stream.orders[0]),
        "quality": "auto",
        "background": "opaque",
        "output_format": body.output_format or "png",
    }
    shown = [0] * len(stream.orders)
    thoughts: dict[int, Thought] = {}
    end = time.monotonic() + service.settings.timeout
    try:
        async for index, news in stream:
            order = stream.orders[index]
            if time.monotonic() > end:
                raise too_slow(service.settings.timeout)
            if isinstance(news, Thought):
                thoughts[index] = news
            elif isinstance(news, ScaleReady):
                picture = await _finished(service, body, order, news.codes, news.scale + 1)
                told = {"b64_json": picture, "partial_image_index": shown[index], "index": index, **common}
                shown[index] += 1
                service.metrics.previews.inc()
                yield event(f"{kind}.partial_image", told)
            elif isinstance(news, ImageReady):
                told = {
                    "b64_json": await _finished(service, body, order, news.codes),
                    "index": index,
                    **common,
                }
                told |= {"seed": order.seed}
                tokens = 0
                if index in thoughts:
                    told["thought"], tokens = thoughts[index].text, thoughts[index].tokens
                service.metrics.pictures.inc()
                told["usage"] = _usage(service, read, 1, stream, tokens)
                yield event(f"{kind}.completed", told)
    except Exception as error:
        yield "event: error\ndata: " + dumps(as_api_error(error).body()) + "\n\n"


def event(name: str, told: dict[str, Any]) -> str:
    """One server-sent event."""
    return f"event: {name}\ndata: {dumps({'type': name, **told})}\n\n"


def _size(service: Service, order: Order) -> str:
    assert order.schedule is not None
    height, width = order.schedule.image_size(service.pipeline.image_tokenizer.config.downsample)
    return f"{width}x{height}"


def _usage(service: Service, read: Read, pictures: int, stream: Stream, thought: int) -> dict[str, Any]:
    schedule = stream.orders[0].schedule
    assert schedule is not None
    drawn = schedule.num_tokens * pictures
    service.metrics.used("out", thought, drawn)
    return {
        "input_tokens": read.text + read.image,
        "input_tokens_details": {"text_tokens": read.text, "image_tokens": read.image},
        "output_tokens": drawn + thought,
        "output_tokens_details": {"text_tokens": thought, "image_tokens": drawn},
        "total_tokens": read.text + read.image + drawn + thought,
    }
