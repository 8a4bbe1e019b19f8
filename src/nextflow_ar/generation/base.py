"""A loaded checkpoint: which model a name means, sizes, pictures to codes and back, and the events of requests.

``generation.json`` may say, beside sampling settings: ``think`` (plan in words before drawing), ``think_edits`` (the same
before a changed picture), ``think_told`` (plans before every picture of a conversation, a story or a film, which the model
writes by itself and which are no part of what it says), ``thought_temperature`` (of plans), ``dialogue`` (chat marks around
every turn), ``size`` (WIDTHxHEIGHT drawn where nobody says one), ``canvases`` (such sizes that the model draws and reads
beside it), ``fit`` ("crop" or "pad": how given pictures get onto them), ``caption`` (what is asked about a picture when
nobody asks), ``video`` (how frames are asked for, with {prompt} and {frames}) and ``next_frame`` (how one more is).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, Self, get_args

import numpy as np
import torch
from jaxtyping import UInt8
from PIL import Image as PILImage

from nextflow_ar.config import ImageTokenizerConfig
from nextflow_ar.generation.documents import Manner, Part, part
from nextflow_ar.generation.engine import Engine, ImageRequest, Request, TextRequest
from nextflow_ar.generation.forcing import Forced, composite, spared
from nextflow_ar.generation.kept import PICTURE_BYTES, KeptCodes, Store, picture_key
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import BUNDLED, Bundle, find_checkpoint, load_bundle
from nextflow_ar.precision import best_dtype
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.vocab import BOI
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import canvas_schedule
from nextflow_ar.tokenizer.pictures import Fit, as_picture, place, to_rgb, upright
from nextflow_ar.types import Codes, Document, Event, Image, ImageReady, Text, TextDelta

Picture = PILImage.Image | np.ndarray | Codes
"""A Pillow image, (H, W, 3) uint8, or codes, such as those of a picture that was drawn."""
OPTIONS = (
    "think",
    "think_edits",
    "think_told",
    "thought_temperature",
    "dialogue",
    "size",
    "canvases",
    "fit",
    "caption",
    "answer_guidance",
    "video",
    "next_frame",
)
"""Keys of ``generation.json`` beside the sampling settings."""
THOUGHT_TOKENS, TOLD_TOKENS = 96, 64
"""Most tokens of a thought before one picture, and of the plan before each of several."""
THOUGHT_SETTINGS = SamplingSettings(top_p=0.9)


class RequestError(ValueError):
    """A request that cannot be answered: one line that says what is accepted."""


def canvases_of(generation: Mapping[str, Any], config: ImageTokenizerConfig) -> list[ScaleSchedule]:
    """Schedules of the ``canvases`` among the keys of generation.json. Raises StorageError for one that is no size of the
    image tokenizer.
    """
    return [_named(config, "canvases", name) for name in generation.get("canvases", ())]


def default_of(generation: Mapping[str, Any], config: ImageTokenizerConfig) -> ScaleSchedule:
    """Schedule of what is drawn where nobody says a size: ``size`` of the keys of generation.json, or the square of the
    image tokenizer's own level. Raises StorageError as :func:`canvases_of`.
    """
    size = generation.get("size")
    return ScaleSchedule.square(config.num_scales) if size is None else _named(config, "size", size)


def _named(config: ImageTokenizerConfig, key: str, name: Any) -> ScaleSchedule:
    width, _, height = str(name).partition("x")
    try:
        return canvas_schedule(config, int(height), int(width))
    except ValueError:
        raise StorageError(f"generation.json: {key}: {name!r} is no size of this image tokenizer") from None


def fit_of(generation: Mapping[str, Any]) -> Fit:
    """How given pictures get onto their canvas, of the keys of generation.json. Raises StorageError."""
    found = generation.get("fit", "crop")
    if found not in get_args(Fit):
        raise StorageError(f"generation.json: fit is {' or '.join(get_args(Fit))}, got {found!r}")
    return found


def resolve_model(name: str | Path) -> Path:
    """Folder of a bundled model, a local checkpoint folder, or a Hub id (downloaded).

    Raises RequestError for an unknown name, StorageError when a download fails.
    """
    found = find_checkpoint(name)
    if found is None:
        raise RequestError(
            f"unknown model {str(name)!r}: {', '.join(BUNDLED)}, a checkpoint folder or a Hub id OWNER/NAME"
        )
    return found


def fold_seed(seed: int, row: int) -> int:
    """Seed of picture ``row`` of a call with ``seed``: row 0 keeps the seed itself."""
    return seed if row == 0 else (seed * 1_000_003 + row * 7_919 + 1) % (2**63)


class Loaded:
    """A loaded checkpoint and its engine. Methods are re-entrant.

    ``kept_bytes``: what may be kept between calls, for conversations that go on and pictures that are shown again: caches
    of prefixes (see :class:`Engine`) and codes of pictures. 0: nothing.
    """

    def __init__(self, bundle: Bundle, max_rows: int = 64, kept_bytes: int = 0) -> None:
        self.bundle = bundle
        self.engine = Engine(bundle, max_rows, kept_bytes)
        self.pictures: Store[KeptCodes] = Store(min(kept_bytes, PICTURE_BYTES))
        self.image_tokenizer = bundle.image_tokenizer
        self.thinks = bool(bundle.generation.get("think", False))
        self.thinks_edits = bool(bundle.generation.get("think_edits", False))
        self.told_thoughts = TOLD_TOKENS if bundle.generation.get("think_told", False) else 0
        warmth = float(bundle.generation.get("thought_temperature", THOUGHT_SETTINGS.temperature))
        self.thought_settings = THOUGHT_SETTINGS.changed(temperature=warmth)
        self.manner = Manner(bool(bundle.generation.get("dialogue", False)), bool(self.told_thoughts))
        self.default = default_of(bundle.generation, self.image_tokenizer.config)
        self.canvases = canvases_of(bundle.generation, self.image_tokenizer.config)
        self.fitting: Fit = fit_of(bundle.generation)
        self.defaults = SamplingSettings(
            **{
                k: tuple(v) if isinstance(v, list) else v
                for k, v in bundle.generation.items()
                if k in SamplingSettings.__dataclass_fields__
            }
        )

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = "nano",
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        kept_bytes: int = 0,
    ) -> Self:
        """Load "nano" (bundled), a checkpoint folder or a Hub id. ``dtype``: of the transformer (None: the fastest).
        ``kept_bytes``: see :class:`Loaded`.

        Raises StorageError, one line, for an unknown model or a missing or damaged file.
        """
        device = torch.device(device)
        bundle = load_bundle(resolve_model(name), device, dtype or best_dtype(device))
        return cls(bundle, kept_bytes=kept_bytes)

    def schedule_for(self, size: tuple[int, int] | None = None) -> ScaleSchedule:
        """Schedule of a (width, height) in pixels; None: the default. Raises RequestError for other sizes."""
        tokenizer = self.image_tokenizer
        if size is None:
            return self.default
        most = max(len(schedule) for schedule in (self.default, *self.canvases))
        try:
            schedule = tokenizer.schedule_for(size[1], size[0])
            if len(schedule) > most:
                raise ValueError
            return schedule
        except ValueError:
            height, width = ScaleSchedule.square(most).image_size(tokenizer.config.downsample)
            raise RequestError(
                f"no scale schedule covers {size[0]}x{size[1]} pixels; this model draws up to {width}x{height} and "
                f"the sizes of its coarser scales ({', '.join(self._sizes(most))})"
            ) from None

    def _sizes(self, most: int) -> list[str]:
        found = [
            ScaleSchedule.square(k).image_size(self.image_tokenizer.config.downsample)
            for k in range(4, most + 1)
        ]
        return [f"{width}x{height}" for height, width in found]

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
        schedule = self.schedule_for(size)
        pairs = zip(prompts, seeds, strict=True)
        return [self.request([part("user", p)], schedule, seed, settings) for p, seed in pairs]

    def request(
        self,
        parts: Sequence[Part],
        schedule: ScaleSchedule,
        seed: int,
        settings: SamplingSettings | None = None,
        forced: Forced | None = None,
    ) -> ImageRequest:
        """The engine's request for a picture that answers what was said and shown. Without any words or pictures there is
        nothing to guide towards.
        """
        chosen = settings or self.defaults
        if not parts:
            chosen = chosen.changed(guidance=1.0)
        document, without = self.manner.document(parts), self.manner.unconditional
        return ImageRequest(document, schedule, seed, chosen, without, forced)

    def thought_request(self, request: ImageRequest) -> TextRequest:
        """The engine's request for a plan in words behind a prompt."""
        ends = (*self.manner.ends, BOI)  # a thought ends where the image begins
        return TextRequest(
            request.document,
            THOUGHT_TOKENS,
            request.seed,
            self.thought_settings,
            ends,
            min_tokens=1,
            plans=True,
        )

    def with_thought(self, request: ImageRequest, thought: str) -> ImageRequest:
        """A request with the plan behind its prompt."""
        said = Text(thought, supervised=True)
        return replace(request, document=Document((*request.document.segments, said)))

    def think(self, requests: Sequence[ImageRequest]) -> list[ImageRequest]:
        """The requests with a plan in words behind each prompt, written by the model (chain of thought)."""
        thoughts = [""] * len(requests)
        for event in self.engine.texts([self.thought_request(request) for request in requests]):
            if isinstance(event, TextDelta):
                thoughts[event.row] += event.text
        return [self.with_thought(r, thought) for r, thought in zip(requests, thoughts, strict=True)]

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
                event = ImageReady(event.row, event.codes, self.finished(requests[event.row], event.codes))
            yield event

    def draw(
        self,
        requests: Sequence[ImageRequest],
        *,
        think: bool | None = False,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """The pictures of all requests, in order; ``on_event`` sees every event on the way."""
        found: dict[int, PILImage.Image] = {}
        for event in self.stream(requests, think=think):
            if on_event is not None:
                on_event(event)
            if isinstance(event, ImageReady) and event.image is not None:
                found[event.row] = event.image
        return [found[i] for i in range(len(requests))]

    def finished(self, request: Request, codes: Codes) -> PILImage.Image:
        """The picture of a request whose codes are drawn: what is forced to stay is the tokenizer's own reconstruction, and
        what a change left alone is the original itself.
        """
        forced = request.forced if isinstance(request, ImageRequest) else None
        if isinstance(request, ImageRequest) and request.original is not None:
            before = next(s.codes for s in reversed(request.document.segments) if isinstance(s, Image))
            return spared(self.image_tokenizer, codes, before, request.original)
        return self.decode(codes) if forced is None else composite(self.image_tokenizer, forced, codes)

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

    def canvas_for(self, height: int, width: int) -> ScaleSchedule:
        """Schedule that a picture of this size is read at: its own where the model draws that size on as many scales as its
        default or one of its canvases has; else, of those of the default number of scales, the canvas that an extraction
        would lay it on, or the nearest in aspect ratio where the model lacks that.
        """
        tokenizer, default = self.image_tokenizer, self.schedule_for()
        down, known = tokenizer.config.downsample, (default, *self.canvases)
        with suppress(ValueError):
            # On fewer scales than that an icon would be read from a handful of codes: it is enlarged.
            if len(own := tokenizer.schedule_for(height, width)) in set(map(len, known)):
                return own
        sizes = {s.image_size(down): s for s in known if len(s) == len(default)}
        with suppress(ValueError):  # beyond 1:4
            size = tokenizer.canvas_for(height, width, len(default)).image_size(down)
            if size in sizes:
                return sizes[size]
        ratios = {
            max(h * width / (w * height), w * height / (h * width)): s
            for (h, w), s in reversed(sizes.items())
        }
        return ratios[min(ratios)]

    def fit(self, picture: PILImage.Image | np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
        """A picture, turned upright as its EXIF orientation says, on the canvas that it is read at, (H, W, 3) uint8:
        cropped, or whole with its border repeated, as generation.json's ``fit`` says. Raises RequestError for what is none.
        """
        try:
            image = upright(picture) if isinstance(picture, PILImage.Image) else as_picture(picture)
        except ValueError as error:
            raise RequestError(str(error)) from None
        if 0 in image.size:
            raise RequestError(f"the picture is empty: {image.width}x{image.height} pixels")
        schedule = self.canvas_for(image.height, image.width)
        size = schedule.image_size(self.image_tokenizer.config.downsample)
        return place(to_rgb(image), *size, self.fitting)[0]

    @torch.inference_mode()
    def encode(self, picture: Picture) -> Codes:
        """Codes of a picture, fitted (:meth:`fit`); codes are what they are. Those of a picture that is known (it was read
        before, or :meth:`remember` was told) are not computed again.
        """
        if isinstance(picture, Codes):
            return picture
        fitted = self.fit(picture)
        key = picture_key(fitted) if self.pictures.budget else b""
        known = self.pictures.get(key) if self.pictures.budget else None
        if known is not None:
            return known.codes
        pixels = torch.from_numpy(fitted.copy()).to(self.engine.device)
        found = self.image_tokenizer.encode_bytes(pixels[None])
        schedule = self.image_tokenizer.schedule_for(pixels.shape[0], pixels.shape[1])
        codes = Codes.plain(schedule, found.target[0].cpu())
        self.pictures.put(key, KeptCodes(codes))
        return codes

    def remember(self, picture: PILImage.Image, codes: Codes) -> None:
        """Let a picture that was drawn have the very codes that it was drawn from when it is shown again."""
        self.pictures.put(picture_key(np.asarray(picture)), KeptCodes(codes))


def listed(pictures: Picture | Sequence[Picture]) -> list[Picture]:
    """One picture or several, as a list."""
    one = isinstance(pictures, PILImage.Image | np.ndarray | Codes)
    return [pictures] if one else list(pictures)
