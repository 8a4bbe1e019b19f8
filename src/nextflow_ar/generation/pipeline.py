"""What users import: one object that loads a checkpoint and draws, describes and reconstructs."""

from __future__ import annotations

import importlib.resources
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.engine import Engine, ImageRequest, TextRequest
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle, load_bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.vocab import BOI, END_OF_TEXT
from nextflow_ar.storage import find_folder
from nextflow_ar.tokenizer.pictures import fit_picture, to_rgb
from nextflow_ar.types import Codes, Document, Event, Image, ImageReady, Text, TextDelta

Picture = PILImage.Image | np.ndarray
BUNDLED = ("nano",)
THOUGHT_TOKENS = 96
THOUGHT_SETTINGS = SamplingSettings(top_p=0.9)


class RequestError(ValueError):
    """A request that cannot be answered: one line that says what is accepted."""


def resolve_model(name: str | Path) -> Path:
    """Folder of a bundled model, a local checkpoint folder, or a Hub id (downloaded).

    Raises RequestError for an unknown name, StorageError when a download fails.
    """
    if str(name) in BUNDLED:
        return Path(str(importlib.resources.files("nextflow_ar") / "checkpoints" / str(name)))
    found = find_folder(name)
    if found is not None:
        return found
    raise RequestError(
        f"unknown model {str(name)!r}: {', '.join(BUNDLED)}, a checkpoint folder or a Hub id OWNER/NAME"
    )


def best_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the device computes in it, fp32 elsewhere."""
    if device.type == "cpu":
        checks = (
            "_is_avx512_bf16_supported",
            "_is_amx_tile_supported",
        )  # private: absent in some torch versions
        fast = any(getattr(torch.cpu, name, lambda: False)() for name in checks)
        return torch.bfloat16 if fast else torch.float32
    return torch.bfloat16


def fold_seed(seed: int, row: int) -> int:
    """Seed of picture ``row`` of a call with ``seed``: row 0 keeps the seed itself."""
    return seed if row == 0 else (seed * 1_000_003 + row * 7_919 + 1) % (2**63)


class NextFlowPipeline:
    """A loaded checkpoint and its engine. Methods are re-entrant; nothing is kept between calls."""

    def __init__(self, bundle: Bundle, max_rows: int = 64) -> None:
        self.bundle = bundle
        self.engine = Engine(bundle, max_rows)
        self.image_tokenizer = bundle.image_tokenizer
        self.thinks = bool(bundle.generation.get("think", False))
        self.defaults = SamplingSettings(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in bundle.generation.items()
                if k in SamplingSettings.__dataclass_fields__
            }
        )

    @classmethod
    def from_pretrained(
        cls, name: str | Path = "nano", device: torch.device | str = "cpu", dtype: torch.dtype | None = None
    ) -> NextFlowPipeline:
        """Load "nano" (bundled), a checkpoint folder or a Hub id. ``dtype``: of the transformer (None: the fastest).

        Raises StorageError, one line, for an unknown model or a missing or damaged file.
        """
        device = torch.device(device)
        return cls(load_bundle(resolve_model(name), device, dtype or best_dtype(device)))

    def schedule_for(self, size: tuple[int, int] | None = None) -> ScaleSchedule:
        """Schedule of a (width, height) in pixels; None: the largest square. Raises RequestError for other sizes."""
        tokenizer = self.image_tokenizer
        if size is None:
            return ScaleSchedule.square(tokenizer.config.num_scales)
        try:
            schedule = tokenizer.schedule_for(size[1], size[0])
            if len(schedule) > tokenizer.config.num_scales:
                raise ValueError
            return schedule
        except ValueError:
            side = ScaleSchedule.square(tokenizer.config.num_scales).image_size(tokenizer.config.downsample)
            raise RequestError(
                f"no scale schedule covers {size[0]}x{size[1]} pixels; this model draws up to {side[1]}x{side[0]} and "
                f"the sizes of its coarser scales ({', '.join(self._sizes())})"
            ) from None

    def _sizes(self) -> list[str]:
        config = self.image_tokenizer.config
        sides = [
            ScaleSchedule.square(k).image_size(config.downsample)[0] for k in range(4, config.num_scales + 1)
        ]
        return [f"{side}x{side}" for side in sides]

    def requests(
        self,
        prompts: Sequence[str],
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
    ) -> list[ImageRequest]:
        """One engine request per prompt. Raises RequestError for an empty prompt."""
        if any(not prompt.strip() for prompt in prompts):
            raise RequestError(
                "the prompt is empty: say what to draw, such as 'a red circle on a blue background'"
            )
        schedule, chosen = self.schedule_for(size), settings or self.defaults
        return [
            ImageRequest(Document((Text(prompt.strip()),)), schedule, seed, chosen)
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]

    def think(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The requests with a plan in words behind each prompt, written by the model (chain of thought)."""
        ends = (END_OF_TEXT, BOI)  # a thought ends where the image begins
        asked = [TextRequest(r.document, THOUGHT_TOKENS, r.seed, THOUGHT_SETTINGS, ends) for r in requests]
        thoughts = [""] * len(requests)
        for event in self.engine.texts(asked):
            if isinstance(event, TextDelta):
                thoughts[event.row] += event.text
        return [
            replace(r, document=Document((*r.document.segments, Text(thought))))
            for r, thought in zip(requests, thoughts, strict=True)
        ]

    def stream(self, requests: Sequence[ImageRequest], *, think: bool | None = None) -> Iterator[Event]:
        """The engine's events; ImageReady carries the finished picture.

        ``think``: let the model plan in words first (None: as the checkpoint says); the plan comes as one TextDelta per
        row before the first scale.
        """
        if self.thinks if think is None else think:
            requests = self.think(requests)
            for row, request in enumerate(requests):
                thought = request.document.segments[-1]
                assert isinstance(thought, Text)
                yield TextDelta(row, thought.text)
        for event in self.engine.images(requests):
            if isinstance(event, ImageReady):
                event = ImageReady(event.row, event.codes, self.decode(event.codes))
            yield event

    @torch.inference_mode()
    def decode(self, codes: Codes, upto_scale: int | None = None) -> PILImage.Image:
        """Picture of codes; ``upto_scale``: from the first so many scales only (a preview)."""
        indices = codes.target[None].to(self.engine.device)
        pixels = self.image_tokenizer.decode_bytes(indices, codes.schedule, upto_scale)
        return PILImage.fromarray(pixels[0].cpu().numpy())

    def preview(self, schedule: ScaleSchedule, codes: torch.Tensor, scales: int) -> PILImage.Image:
        """Picture of an unfinished image: the first ``scales`` scales of ``codes`` (T_so_far,)."""
        full = torch.zeros(schedule.num_tokens, dtype=torch.long)
        full[: len(codes)] = codes
        return self.decode(Codes.plain(schedule, full), scales)

    def generate(
        self,
        prompts: str | Sequence[str],
        *,
        n: int = 1,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
        think: bool | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """Draw ``n`` pictures per prompt, all in one batch; prompt by prompt in order.

        Picture j of every prompt has the seed ``fold_seed(seed, j)``: the same prompt, seed and settings give the same
        picture bit for bit, whatever else is drawn beside it. Raises RequestError or ContextError for a bad prompt.
        """
        texts = [prompts] if isinstance(prompts, str) else list(prompts)
        pairs = [(text, fold_seed(seed, j)) for text in texts for j in range(n)]
        requests = self.requests([text for text, _ in pairs], [s for _, s in pairs], settings, size)
        found: dict[int, PILImage.Image] = {}
        for event in self.stream(requests, think=think):
            if on_event is not None:
                on_event(event)
            if isinstance(event, ImageReady) and event.image is not None:
                found[event.row] = event.image
        return [found[i] for i in range(len(requests))]

    def fit(self, picture: Picture) -> np.ndarray:
        """A picture cropped and scaled to the tokenizer's schedule of the nearest aspect ratio, (H, W, 3) uint8."""
        image = picture if isinstance(picture, PILImage.Image) else PILImage.fromarray(picture)
        config = self.image_tokenizer.config
        height, width = ScaleSchedule.square(config.num_scales).image_size(config.downsample)
        return fit_picture(to_rgb(image), height, width)

    @torch.inference_mode()
    def encode(self, picture: Picture) -> Codes:
        """Codes of a picture, cropped and scaled to fit."""
        pixels = torch.from_numpy(self.fit(picture).copy()).to(self.engine.device)
        found = self.image_tokenizer.encode_bytes(pixels[None])
        schedule = self.image_tokenizer.schedule_for(pixels.shape[0], pixels.shape[1])
        return Codes.plain(schedule, found.target[0].cpu())

    def describe(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        question: str | None = None,
        max_tokens: int = 64,
        seed: int = 0,
        settings: SamplingSettings | None = None,
    ) -> list[str]:
        """A caption (or an answer to ``question``) for every picture; greedy unless ``settings`` say otherwise."""
        several = [pictures] if isinstance(pictures, PILImage.Image | np.ndarray) else list(pictures)
        chosen = settings or SamplingSettings(temperature=0.0)
        asked = (Text(question.strip()),) if question and question.strip() else ()
        requests = [
            TextRequest(Document((Image(self.encode(picture)), *asked)), max_tokens, seed, chosen)
            for picture in several
        ]
        texts = [""] * len(requests)
        for event in self.engine.texts(requests):
            if isinstance(event, TextDelta):
                texts[event.row] += event.text
        return [text.strip() for text in texts]

    def reconstruct(self, picture: Picture) -> PILImage.Image:
        """A picture through the image tokenizer and back, at the tokenizer's size."""
        return self.decode(self.encode(picture))
