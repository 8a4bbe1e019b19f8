"""From what a client asks to the engine's orders: the one place that knows both languages."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

from PIL import Image as PILImage

from nextflow_ar.app.serving import media
from nextflow_ar.app.serving.errors import ApiError, bad
from nextflow_ar.app.serving.orders import Order, preview_scales
from nextflow_ar.app.serving.schemas import (
    SEEDS,
    ChatBody,
    EditBody,
    ImageBody,
    Message,
    PictureAddress,
    TextPart,
)
from nextflow_ar.app.serving.settings import ServerSettings
from nextflow_ar.generation.documents import part
from nextflow_ar.generation.engine import ContextError, ImageRequest, WriteRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline, fold_seed
from nextflow_ar.generation.sampling import SamplingSettings

CHAT_TOKENS, CHAT_PICTURES, LEAST_TOKENS = 256, 4, 16
"""Of an answer where nobody says how long it may be."""

Content = str | PILImage.Image
Turn = tuple[str, list[Content]]
"""Who says it ("system", "user" or "assistant"), and texts and pictures in order."""


@dataclass(frozen=True, eq=False)
class Desk:
    """Checks bodies against the server's limits and makes orders of them. Methods may be called in any thread.

    All raise ApiError, or an error of a lower floor that says what was asked wrongly.
    """

    pipeline: NextFlowPipeline
    settings: ServerSettings

    def checked(self, body: ImageBody | ChatBody) -> None:
        """What can be refused before any work: model, number, length of texts."""
        if body.model is not None and body.model != self.settings.name:
            raise ApiError(
                404, f"The model {_shown(body.model)} does not exist; this server has '{self.settings.name}'.",
                code="model_not_found", param="model",
            )  # fmt: skip
        if (body.n or 1) > self.settings.max_n:
            raise bad(f"n: at most {self.settings.max_n} are accepted", "n", "invalid_value")
        if isinstance(body, ImageBody):
            self._short(body.prompt, "prompt")
            self._short(body.negative_prompt or "", "negative_prompt")

    def _short(self, text: str, param: str) -> None:
        if len(text) > self.settings.max_text:
            raise bad(
                f"{param}: at most {self.settings.max_text} characters are accepted", param, "string_too_long"
            )

    def seeds(self, body: ImageBody | ChatBody) -> list[int]:
        """A seed for each picture or answer; one that nobody chose is told in the answer."""
        first = secrets.randbelow(SEEDS) if body.seed is None else body.seed
        return [fold_seed(first, j) for j in range(body.n or 1)]

    def images(self, body: ImageBody) -> list[Order]:
        """Orders of ``POST /v1/images/generations``."""
        seeds = self.seeds(body)
        settings = body.settings(self.pipeline.defaults)
        requests = self.pipeline.requests([body.prompt] * len(seeds), seeds, settings, body.sides)
        return self._orders(requests, body, think=self.pipeline.thinks)

    def edits(self, body: EditBody, files: Sequence[bytes], mask: bytes | None) -> list[Order]:
        """Orders of ``POST /v1/images/edits``: by an instruction, or within a mask."""
        most = self.settings.max_pixels
        if not files:
            raise bad("Missing required parameter: 'image'.", "image", "missing_required_parameter")
        if len(files) > self.settings.max_inputs:
            raise bad(
                f"image: at most {self.settings.max_inputs} pictures are accepted", "image", "invalid_value"
            )
        if mask is not None and len(files) > 1:
            raise bad("mask: goes with one picture", "mask", "invalid_value")
        pictures = [media.picture(data, "image", most) for data in files]
        seeds, settings = self.seeds(body), body.settings(self.pipeline.defaults)
        if mask is not None:
            area = media.mask(mask, "mask", most)
            requests = self.pipeline.inpaint_requests(pictures[0], area, body.prompt, seeds, settings)
        else:
            requests = self.pipeline.edit_requests(pictures, body.prompt, seeds, settings)
        self._kept_size(body, requests[0])
        return self._orders(requests, body, think=mask is None and self.pipeline.thinks_edits)

    def _kept_size(self, body: EditBody, request: ImageRequest) -> None:
        height, width = request.schedule.image_size(self.pipeline.image_tokenizer.config.downsample)
        if body.sides not in (None, (width, height)):
            raise bad(
                f"size: these pictures are edited at {width}x{height}; say auto", "size", "invalid_value"
            )

    def _orders(self, requests: Sequence[ImageRequest], body: ImageBody, *, think: bool) -> list[Order]:
        away = (body.negative_prompt or "").strip()
        if away:
            without = self.pipeline.manner.document([part("user", away)])
            requests = [replace(r, unconditional=without) for r in requests]
        shown = preview_scales(requests[0].schedule, (body.partial_images or 0) if body.stream else 0)
        if not (think if body.think is None else body.think):
            return [Order(request, previews=shown) for request in requests]
        return [
            Order(r, self.pipeline.thought_request(r), partial(self.pipeline.with_thought, r), shown)
            for r in requests
        ]

    def chat(self, body: ChatBody, turns: Sequence[Turn]) -> list[Order]:
        """Orders of ``POST /v1/chat/completions``; ``turns``: the messages with their pictures."""
        # As the library's own chat: the likeliest words, unless something else or several different answers are wanted.
        usual = SamplingSettings(temperature=1.0 if (body.n or 1) > 1 else 0.0)
        words = usual.changed(**body.values("temperature", "top_k", "top_p"))
        pictures = self.pipeline.defaults.changed(**body.values("guidance_scale"))
        messages = [{"role": role, "content": content} for role, content in turns]
        first, *others = self.seeds(body)
        request = self.pipeline.chat_requests(
            messages, max_tokens=self._tokens(body), max_pictures=self._pictures(body), seed=first,
            settings=pictures, text_settings=words, size=body.sides,
        )  # fmt: skip
        request = self._fitted(request, body)
        return [Order(request), *(Order(replace(request, seed=seed)) for seed in others)]

    def _tokens(self, body: ChatBody) -> int:
        asked = body.max_completion_tokens or body.max_tokens or CHAT_TOKENS
        return min(asked, self.settings.max_tokens)

    def _pictures(self, body: ChatBody) -> int:
        if body.modalities is not None and "image" not in body.modalities:
            return 0
        asked = CHAT_PICTURES if body.max_pictures is None else body.max_pictures
        if asked > self.settings.max_pictures:
            most = self.settings.max_pictures
            raise bad(f"max_pictures: at most {most} are accepted", "max_pictures", "invalid_value")
        return asked

    def _fitted(self, request: WriteRequest, body: ChatBody) -> WriteRequest:
        """Limits that nobody asked for give way to what the context holds, pictures first."""
        engine = self.pipeline.engine
        asked_tokens = (body.max_completion_tokens or body.max_tokens) is not None
        while True:
            try:
                engine.job(-1, request)
                return request
            except ContextError:
                if body.max_pictures is None and request.max_images > 0 and request.max_tokens > 0:
                    request = replace(request, max_images=request.max_images - 1)
                elif not asked_tokens and request.max_tokens > LEAST_TOKENS:
                    request = replace(request, max_tokens=request.max_tokens // 2)
                else:
                    raise

    def turns(self, body: ChatBody, fetched: Mapping[str, bytes]) -> list[Turn]:
        """The messages with their pictures opened; ``fetched``: what http addresses gave."""
        found: list[Turn] = []
        for i, message in enumerate(body.messages):
            role = "system" if message.role == "developer" else message.role
            content: list[Content] = []
            for what, param in pieces(message, f"messages.{i}"):
                if isinstance(what, str):
                    content.append(what)
                    continue
                data = fetched.get(what.url)
                if data is None:
                    data = media.from_data_url(what.url, param)
                content.append(media.picture(data, param, self.settings.max_pixels))
            if content:
                found.append((role, content))
        return found

    def addresses(self, body: ChatBody) -> dict[str, str]:
        """Addresses of pictures that have to be fetched, and the field that names each. Raises ApiError where they may not
        be, and for too many pictures or too much text.
        """
        found: dict[str, str] = {}
        shown = said = 0
        for i, message in enumerate(body.messages):
            for what, param in pieces(message, f"messages.{i}"):
                if isinstance(what, str):
                    said += len(what)
                    continue
                shown += 1
                if what.url[:5].lower() != "data:":
                    found[what.url] = param
        if said > self.settings.max_text:
            raise bad(
                f"messages: at most {self.settings.max_text} characters are accepted",
                "messages",
                "string_too_long",
            )
        if shown > self.settings.max_inputs:
            raise bad(
                f"messages: at most {self.settings.max_inputs} pictures are accepted",
                "messages",
                "invalid_value",
            )
        if found and not self.settings.fetch:
            raise bad(
                "this server fetches no addresses: send pictures as data URLs", next(iter(found.values())),
                "invalid_image_url",
            )  # fmt: skip
        return found


def pieces(message: Message, param: str) -> Iterator[tuple[str | PictureAddress, str]]:
    """Texts and addresses of a message in order, each with the field that it comes from.

    The pictures of an earlier answer stand between its words at their ``offset``.
    """
    if isinstance(message.content, list):
        for j, one in enumerate(message.content):
            at = f"{param}.content.{j}"
            yield (one.text, at) if isinstance(one, TextPart) else (one.image_url, f"{at}.image_url")
    text, done = message.content if isinstance(message.content, str) else "", 0
    for j, given in enumerate(message.images or ()):
        until = len(text) if given.offset is None else max(done, min(given.offset, len(text)))
        if until > done:
            yield text[done:until], f"{param}.content"
        done = until
        yield given.image_url, f"{param}.images.{j}.image_url"
    if text[done:]:
        yield text[done:], f"{param}.content"


def _shown(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:57] + "...")
