"""What the engine is asked for: an image, a text, or whatever the model writes, text and images in turn."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from jaxtyping import UInt8

from nextflow_ar.generation.forcing import Forced
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import reference_of
from nextflow_ar.sequence.vocab import END_OF_TEXT, TURN_END
from nextflow_ar.types import Document


class ContextError(ValueError):
    """A request does not fit the model's context: one line with both lengths."""


class QueueFull(RuntimeError):
    """Too many requests wait already: one line with the limit."""


@dataclass(frozen=True, eq=False)
class ImageRequest:
    """Draw an image after ``document``. ``unconditional``: the document that guidance contrasts with. ``forced``: codes
    that it has to have. ``original``: (H, W, 3) uint8 of the picture that is changed, if its pixels are to stay where its
    codes do. Raises ValueError where those are of another schedule, or nothing is there to be changed, and SettingError
    where the settings are of another number of scales.
    """

    document: Document
    schedule: ScaleSchedule
    seed: int
    settings: SamplingSettings
    unconditional: Document = field(default_factory=lambda: Document(()))
    forced: Forced | None = None
    original: UInt8[np.ndarray, "H W 3"] | None = None

    def __post_init__(self) -> None:
        self.settings.check(len(self.schedule))
        if self.original is not None and (
            self.forced is not None or reference_of(self.document, self.schedule) is None
        ):
            raise ValueError("an original is the picture before the one that is drawn, which is not forced")
        if self.forced is not None and self.forced.codes.schedule != self.schedule:
            raise ValueError("forced codes are of the schedule that is drawn")


@dataclass(frozen=True, eq=False)
class TextRequest:
    """Write text after ``document`` until a token of ``ends``: ``min_tokens`` to ``max_tokens`` tokens.

    ``unconditional``: the document that guidance contrasts with (the question without its picture, say); none without it.
    ``plans``: whether an image is to be drawn behind it. Raises SettingError where the settings have a value for each
    of several scales.
    """

    document: Document
    max_tokens: int
    seed: int
    settings: SamplingSettings
    ends: tuple[str, ...] = (END_OF_TEXT,)
    min_tokens: int = 0
    unconditional: Document | None = None
    plans: bool = False

    def __post_init__(self) -> None:
        self.settings.check(1)

    @property
    def guided(self) -> bool:
        """Whether it takes a second track."""
        return self.unconditional is not None and self.settings.at(0, 1)[0] != 1.0


@dataclass(frozen=True, eq=False)
class WriteRequest:
    """Write after ``document`` what the model will: text, and an image wherever it begins one (``<boi>``), until a token of
    ``ends``.

    At most ``max_tokens`` text tokens (0: images alone, one behind the other, all ``max_images``) and ``max_images`` images
    of ``schedule``; where no image is left, none can begin. ``last_image_ends``: stop behind the last of them.
    ``thoughts``: most tokens of the plan before each image, which is not part of the text (see
    :mod:`~nextflow_ar.generation.spoken`); behind so many its image begins. 0: a plan is text like any other.
    ``settings`` are the text's, ``thought_settings`` the plans' (None: the text's), ``image_settings`` the images'. Raises
    ValueError where nothing may be written, and SettingError where settings have another number of values than text, or
    the images that may be drawn, take.
    """

    document: Document
    max_tokens: int
    max_images: int
    schedule: ScaleSchedule
    seed: int
    settings: SamplingSettings
    image_settings: SamplingSettings
    ends: tuple[str, ...] = (END_OF_TEXT, TURN_END)
    unconditional: Document = field(default_factory=lambda: Document(()))
    last_image_ends: bool = False
    thoughts: int = 0
    thought_settings: SamplingSettings | None = None

    def __post_init__(self) -> None:
        if self.max_tokens < 1 and self.max_images < 1:
            raise ValueError("a request to write allows at least one token or one image")
        for words in (self.settings, self.thought_settings):
            if words is not None:
                words.check(1)
        if self.max_images:
            self.image_settings.check(len(self.schedule))


Request = ImageRequest | TextRequest | WriteRequest
