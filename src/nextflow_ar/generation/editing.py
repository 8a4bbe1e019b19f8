"""Pictures changed: by an instruction, within a mask, or from some scale on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from PIL import Image as PILImage
from PIL import ImageOps

from nextflow_ar.generation.base import Loaded, Picture, RequestError, fold_seed, listed
from nextflow_ar.generation.documents import ARROW, part
from nextflow_ar.generation.engine import ImageRequest
from nextflow_ar.generation.forcing import Forced, first_scales, kept_cells
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.tokenizer.pictures import Fit, place, to_rgb, upright
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.types import Codes, Event

Mask = PILImage.Image | np.ndarray
"""What to redraw: white (from mid-grey up) or True. A Pillow image, (H, W) bool, or (H, W) or (H, W, 3) uint8."""


class Editing(Loaded):
    """What a loaded checkpoint does to pictures."""

    def edit_requests(
        self,
        pictures: Picture | Sequence[Picture],
        instruction: str,
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
        examples: Sequence[tuple[Picture, Picture]] = (),
    ) -> list[ImageRequest]:
        """One engine request per seed: examples (before, after), the pictures, the instruction, then the changed picture,
        of the last one's size. Raises RequestError without a picture, or with neither an instruction nor examples.
        """
        codes = [self.encode(picture) for picture in listed(pictures)]
        if not codes:
            raise RequestError("there is no picture to edit")
        if not instruction.strip() and not examples:
            raise RequestError(
                "the instruction is empty: say what to change, such as 'make the circle green'"
            )
        parts = []
        for before, after in examples:
            parts += [
                part("user", self.encode(before)),
                part("user", ARROW),
                part("user", self.encode(after)),
            ]
        parts += [part("user", each) for each in codes]
        if instruction.strip():
            parts.append(part("user", instruction))
        requests = [self.request(parts, codes[-1].schedule, seed, settings) for seed in seeds]
        return [self.sparing(request, listed(pictures)[-1]) for request in requests]

    def sparing(self, request: ImageRequest, picture: Picture) -> ImageRequest:
        """The request to change ``picture``, whose pixels stay where the change leaves it alone, if the model can copy."""
        if not self.bundle.layout.copies or isinstance(picture, Codes):
            return request
        return replace(request, original=self.fit(picture))

    def edit(
        self,
        pictures: Picture | Sequence[Picture],
        instruction: str,
        *,
        n: int = 1,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        think: bool | None = None,
        examples: Sequence[tuple[Picture, Picture]] = (),
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """Change a picture (or draw from several) as the instruction says; ``n`` pictures of the last one's size. Where a
        model with ``copies`` changes nothing, they have the last one's own pixels.

        ``examples``: pairs (before, after) of a change that the instruction need not name ("now this one"). ``think``:
        lay the new picture out in words first (None: as the checkpoint says). Raises RequestError or ContextError.
        """
        seeds = [fold_seed(seed, j) for j in range(n)]
        requests = self.edit_requests(pictures, instruction, seeds, settings, examples)
        return self.draw(requests, think=self.thinks_edits if think is None else think, on_event=on_event)

    def inpaint_requests(
        self,
        picture: Picture,
        mask: Mask,
        prompt: str,
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
    ) -> list[ImageRequest]:
        """One engine request per seed for :meth:`inpaint`. Raises RequestError for a mask that does not fit."""
        forced = self.keeping(picture, mask)
        parts = [part("user", prompt)] if prompt.strip() else []
        return [self.request(parts, forced.codes.schedule, seed, settings, forced) for seed in seeds]

    def inpaint(
        self,
        picture: Picture,
        mask: Mask,
        prompt: str = "",
        *,
        n: int = 1,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """Draw what the mask marks anew; everywhere else the picture is the tokenizer's reconstruction, to the pixel.

        ``mask``: as large as the picture; white or True is redrawn. ``prompt``: what the whole picture shows then.
        Raises RequestError for a mask of another size or one that marks nothing.
        """
        seeds = [fold_seed(seed, j) for j in range(n)]
        return self.draw(self.inpaint_requests(picture, mask, prompt, seeds, settings), on_event=on_event)

    @torch.inference_mode()
    def keeping(self, picture: Picture, mask: Mask) -> Forced:
        """What stays of a picture outside of a mask, for the engine. Raises RequestError as :meth:`inpaint`."""
        if isinstance(picture, Codes):
            picture = self.decode(picture)
        if isinstance(picture, PILImage.Image):
            picture = upright(picture)  # the mask lies over what is seen
        pixels = torch.from_numpy(self.fit(picture).copy())  # which looks whether it is a picture
        size = picture.size if isinstance(picture, PILImage.Image) else picture.shape[1::-1]
        white = _white(mask)
        if white.size != size:
            raise RequestError(
                f"the mask is {white.width}x{white.height} pixels, the picture {size[0]}x{size[1]}: "
                "they have to be of one size"
            )
        redrawn = _over(white, pixels.shape[0], pixels.shape[1], self.fitting)
        if not redrawn.any():
            raise RequestError("the mask marks nothing: paint white what is to be redrawn")
        codes = self.encode(picture)
        features = self.image_tokenizer.embed(to_unit(pixels.to(self.engine.device)[None]))[0]
        return Forced(codes, kept_cells(redrawn, codes.schedule), features, redrawn)

    def variation_requests(
        self,
        picture: Picture,
        from_scale: int,
        prompt: str,
        seeds: Sequence[int],
        settings: SamplingSettings | None = None,
    ) -> list[ImageRequest]:
        """One engine request per seed for :meth:`variations`. Raises RequestError for a scale that there is not."""
        codes = self.encode(picture)
        if not 1 <= from_scale <= len(codes.schedule):
            raise RequestError(f"from-scale is 1 to {len(codes.schedule)} for this picture, got {from_scale}")
        parts = [part("user", prompt)] if prompt.strip() else []
        forced = first_scales(codes, from_scale - 1)
        return [self.request(parts, codes.schedule, seed, settings, forced) for seed in seeds]

    def variations(
        self,
        picture: Picture,
        *,
        from_scale: int,
        prompt: str = "",
        n: int = 1,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """Pictures that share a picture's scales before ``from_scale`` (1-based); the rest is drawn anew.

        A small ``from_scale`` keeps the layout at most, a large one all but fine detail. ``prompt``: what the picture
        shows, if it is to stay that. Raises RequestError for a scale that there is not.
        """
        seeds = [fold_seed(seed, j) for j in range(n)]
        requests = self.variation_requests(picture, from_scale, prompt, seeds, settings)
        return self.draw(requests, on_event=on_event)


def _over(white: PILImage.Image, height: int, width: int, fit: Fit) -> np.ndarray:
    """(height, width) bool: a mask on the canvas of the picture that it lies over. A pixel that it touches is redrawn."""
    if fit == "crop":
        return np.asarray(ImageOps.fit(white, (width, height), PILImage.Resampling.BOX)) > 0
    top, left, bottom, right = place(white.convert("RGB"), height, width, fit)[1].box
    inner = np.asarray(white.resize((right - left, bottom - top), PILImage.Resampling.BOX)) > 0
    return np.pad(inner, ((top, height - bottom), (left, width - right)), mode="edge")


def _white(mask: Mask) -> PILImage.Image:
    """A mask as pixels of 0 and 255. Raises RequestError for an array that is none."""
    if isinstance(mask, np.ndarray):
        flat = mask.ndim == 2 and mask.dtype in (np.bool_, np.uint8)
        if not flat and not (mask.ndim == 3 and mask.shape[2] == 3 and mask.dtype == np.uint8):
            raise RequestError(
                f"a mask is (H, W) bool or uint8, or a picture; got {tuple(mask.shape)} {mask.dtype}"
            )
        mask = PILImage.fromarray(mask.astype(np.uint8) * 255 if mask.dtype == np.bool_ else mask)
    grey = np.asarray(to_rgb(upright(mask)).convert("L"))
    return PILImage.fromarray(np.where(grey >= 128, np.uint8(255), np.uint8(0)))
