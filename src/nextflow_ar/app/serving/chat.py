"""``POST /v1/chat/completions``: texts and pictures in, texts and pictures out.

An answer's words are ``message.content``; its pictures are ``message.images``, each with the ``offset`` in characters at
which it stands between the words. Streamed, words come as ``delta.content`` and pictures as ``delta.images``. What the
model planned before a picture is ``reasoning_content`` in both, as other servers call it.
"""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from nextflow_ar.app.serving import media
from nextflow_ar.app.serving.errors import as_api_error, dumps
from nextflow_ar.app.serving.fetch import Fetcher
from nextflow_ar.app.serving.orders import Finished
from nextflow_ar.app.serving.schemas import ChatBody
from nextflow_ar.app.serving.service import EventStream, Read, Service, client_of, too_slow
from nextflow_ar.app.serving.worker import Stream
from nextflow_ar.types import Codes, ImageReady, Planned, TextDelta


@dataclass(eq=False)
class Answer:
    """One choice as it grows. What may be the begin of a stop text is held back."""

    stops: tuple[str, ...]
    said: str = ""
    held: str = ""
    plans: list[str] = field(default_factory=list)
    images: list[dict[str, Any]] = field(default_factory=list)
    reason: str | None = None
    tokens: int = 0

    def heard(self, text: str) -> str:
        """The new words that can be shown now."""
        whole = self.held + text
        cut = min((at for at in (whole.find(stop) for stop in self.stops) if at >= 0), default=-1)
        if cut >= 0:
            self.reason, shown, self.held = "stop", whole[:cut], ""
        else:
            keep = max((_overlap(whole, stop) for stop in self.stops), default=0)
            shown, self.held = whole[: len(whole) - keep], whole[len(whole) - keep :]
        self.said += shown
        return shown

    def ended(self, news: Finished) -> str:
        """The rest of the words."""
        rest, self.held = self.held, ""
        self.said += rest
        self.reason, self.tokens = self.reason or news.reason, news.text_tokens
        return rest

    def drawn(self, url: str) -> dict[str, Any]:
        """A new picture behind what is said."""
        image = {
            "type": "image_url",
            "image_url": {"url": url},
            "index": len(self.images),
            "offset": len(self.said),
        }
        self.images.append(image)
        return image


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of ``text`` that begins ``stop``."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)


def chat_routes(service: Service) -> APIRouter:
    """The route."""
    router = APIRouter()
    settings = service.settings
    fetcher = Fetcher(settings.max_body, settings.fetch_timeout)

    @router.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        """Answer a conversation in words and pictures."""
        body = ChatBody.model_validate_json(await request.body())
        service.desk.checked(body)
        wanted = service.desk.addresses(body)
        got = await asyncio.gather(*(fetcher.get(url, param) for url, param in wanted.items()))
        made = partial(_orders, service, body, dict(zip(wanted, got, strict=True)))
        stream, read = await service.begin(made, client_of(request))
        told = Told(service, body, stream, read)
        if body.stream:
            return EventStream(told.chunks(), stream, settings.timeout)
        found = await service.answered(request, stream, told.whole())
        return Response(dumps(found), media_type="application/json")

    return router


def _orders(service: Service, body: ChatBody, fetched: dict[str, bytes]) -> list[Any]:
    return service.desk.chat(body, service.desk.turns(body, fetched))


class Told:
    """An answer to one request, all its choices."""

    def __init__(self, service: Service, body: ChatBody, stream: Stream, read: Read) -> None:
        self.service, self.body, self.stream, self.read = service, body, stream, read
        self.answers = [Answer(body.stops) for _ in stream.orders]
        self.common = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "created": int(time.time()),
            "model": service.settings.name,
        }

    async def _parts(self) -> AsyncIterator[tuple[int, dict[str, Any]]]:
        """(choice, what is new of it) as OpenAI's ``delta``."""
        async for index, news in self.stream:
            answer = self.answers[index]
            if isinstance(news, Finished):
                rest = answer.ended(news)
                if rest:
                    yield index, {"content": rest}
            elif answer.reason is not None:
                continue  # a stop text was met
            elif isinstance(news, TextDelta):
                text = answer.heard(news.text)
                if text:
                    yield index, {"content": text}
                if answer.reason is not None and all(a.reason is not None for a in self.answers):
                    self.stream.cancel()  # nothing more is wanted
                    return
            elif isinstance(news, Planned):
                answer.plans.append(news.text)
                yield index, {"reasoning_content": news.text + "\n"}
            elif isinstance(news, ImageReady):
                url = await self.service.aside(self._url, news.codes)
                rest, answer.held = answer.held, ""
                answer.said += rest
                image = answer.drawn(url)
                self.service.metrics.pictures.inc()
                yield index, {"images": [image], **({"content": rest} if rest else {})}

    def _url(self, codes: Codes) -> str:
        picture = self.service.pipeline.decode(codes)
        self.service.pipeline.remember(picture, codes)
        return media.data_url(picture)

    async def whole(self) -> dict[str, Any]:
        """The answer at once."""
        async for _ in self._parts():
            pass
        choices = [
            {
                "index": i,
                "message": {
                    "role": "assistant",
                    "content": answer.said,
                    "refusal": None,
                    **({"reasoning_content": "\n".join(answer.plans)} if answer.plans else {}),
                    **({"images": answer.images} if answer.images else {}),
                },
                "logprobs": None,
                "finish_reason": answer.reason or "stop",
            }
            for i, answer in enumerate(self.answers)
        ]
        return {"object": "chat.completion", **self.common, "choices": choices, "usage": self._usage()}

    async def chunks(self) -> AsyncIterator[str]:
        """The answer as server-sent events."""
        end = time.monotonic() + self.service.settings.timeout
        try:
            for index in range(len(self.answers)):
                yield self._chunk(index, {"role": "assistant", "content": ""})
            async for index, delta in self._parts():
                if time.monotonic() > end:
                    raise too_slow(self.service.settings.timeout)
                yield self._chunk(index, delta)
            for index, answer in enumerate(self.answers):
                yield self._chunk(index, {}, answer.reason or "stop")
            usage = self._usage()
            if self.body.stream_options is not None and self.body.stream_options.include_usage:
                yield _line({"object": "chat.completion.chunk", **self.common, "choices": [], "usage": usage})
            yield "data: [DONE]\n\n"
        except Exception as error:
            yield _line(as_api_error(error).body())

    def _chunk(self, index: int, delta: dict[str, Any], reason: str | None = None) -> str:
        choice = {"index": index, "delta": delta, "logprobs": None, "finish_reason": reason}
        return _line({"object": "chat.completion.chunk", **self.common, "choices": [choice]})

    def _usage(self) -> dict[str, Any]:
        schedule = self.stream.orders[0].schedule
        drawn = sum(len(a.images) for a in self.answers) * (schedule.num_tokens if schedule else 0)
        said = sum(a.tokens for a in self.answers)
        self.service.metrics.used("out", said, drawn)
        read = self.read.text + self.read.image
        return {
            "prompt_tokens": read,
            "completion_tokens": said + drawn,
            "total_tokens": read + said + drawn,
            "prompt_tokens_details": {"text_tokens": self.read.text, "image_tokens": self.read.image},
            "completion_tokens_details": {"text_tokens": said, "image_tokens": drawn},
        }


def _line(told: dict[str, Any]) -> str:
    return f"data: {dumps(told)}\n\n"
