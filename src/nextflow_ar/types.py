"""The nouns that every floor shares: segments of a document, an image as codes, and the engine's events.

A :class:`Document` is the only input of the model: text and images in order, each marked as context or as supervised
response. Every task (drawing, captioning, editing, stories) is a Document and nothing else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from nextflow_ar.scales import ScaleSchedule

if TYPE_CHECKING:
    import torch
    from PIL import Image as PILImage


@dataclass(frozen=True)
class Frame:
    """Where a picture lies on the canvas that its codes cover, so that fitting can be undone.

    ``box``: (top, left, bottom, right) in pixels of the canvas. ``size``: (height, width) of that part in the picture.
    """

    box: tuple[int, int, int, int]
    size: tuple[int, int]


@dataclass(frozen=True, eq=False)
class Codes:
    """One image as codes, scale by scale.

    ``target``: (T,) int64, the codes to predict. ``input``: (T,) int64, the codes fed back; equal to ``target`` unless
    self-correction sampled them (paper section 3.4). Both are ordered by scale, then row-major. ``frame``: how a picture
    of any size was fitted, None when it was of the schedule's size or never a picture.
    """

    schedule: ScaleSchedule
    target: torch.Tensor
    input: torch.Tensor
    frame: Frame | None = None

    def __post_init__(self) -> None:
        for name in ("target", "input"):
            shape = tuple(getattr(self, name).shape)
            if shape != (self.schedule.num_tokens,):
                raise ValueError(
                    f"codes.{name} has shape {shape}, the schedule needs ({self.schedule.num_tokens},)"
                )

    @classmethod
    def plain(cls, schedule: ScaleSchedule, indices: torch.Tensor, frame: Frame | None = None) -> Codes:
        """Codes whose inputs equal their targets."""
        return cls(schedule, indices, indices, frame)

    def scale(self, k: int) -> torch.Tensor:
        """Target codes of scale ``k`` (0-based), shape (h_k * w_k,)."""
        return self.target[self.schedule.offsets[k] : self.schedule.offsets[k + 1]]


@dataclass(frozen=True)
class Text:
    """A run of text. ``supervised``: its tokens (and the end marker after it) carry loss."""

    text: str
    supervised: bool = False


@dataclass(frozen=True, eq=False)
class Image:
    """An image segment. ``supervised``: its codes carry loss. ``begun``: that it begins is learnt, if not its codes.

    ``scales``: lay out only the first so many scales (None: all). Such a prefix trains the coarse scales at a fraction
    of the cost; it must end its document, since nothing can follow an unfinished image.
    """

    codes: Codes
    supervised: bool = False
    scales: int | None = None
    begun: bool = False

    def __post_init__(self) -> None:
        if self.scales is not None and not 1 <= self.scales <= len(self.codes.schedule):
            raise ValueError(f"this image has 1 to {len(self.codes.schedule)} scales, got {self.scales}")


@dataclass(frozen=True)
class Mark:
    """A special token such as ``<|im_start|>``, by name. ``supervised``: the place before it learns to predict it."""

    token: str
    supervised: bool = False


Segment = Text | Image | Mark


@dataclass(frozen=True, eq=False)
class Document:
    """Segments in reading order."""

    segments: tuple[Segment, ...]

    @classmethod
    def text_to_image(
        cls, prompt: str, codes: Codes, *, thought: str | None = None, scales: int | None = None
    ) -> Document:
        """A prompt as context and the image it describes as the response.

        ``thought``: text written between the two, part of the response (paper section 4, chain of thought).
        ``scales``: lay out the image's first so many scales only.
        """
        between = () if thought is None else (Text(thought, supervised=True),)
        return cls((Text(prompt), *between, Image(codes, supervised=True, scales=scales)))

    @classmethod
    def text_to_text(cls, prompt: str, response: str) -> Document:
        """A prompt as context and a text as the response."""
        return cls((Text(prompt), Text(response, supervised=True)))

    @classmethod
    def image_to_text(cls, codes: Codes, caption: str, *, image_supervised: bool = False) -> Document:
        """An image as context (or, unconditionally, as response too) and its caption as the response."""
        return cls((Image(codes, supervised=image_supervised), Text(caption, supervised=True)))


@dataclass(frozen=True)
class TextDelta:
    """New text of row ``row``."""

    row: int
    text: str


@dataclass(frozen=True)
class Planned:
    """The plan in words of the picture that row ``row`` begins; it is not part of what the row says."""

    row: int
    text: str


@dataclass(frozen=True, eq=False)
class ScaleReady:
    """Scale ``scale`` (0-based) of ``num_scales`` is sampled for row ``row``.

    ``codes``: (T_so_far,) int64, all codes of the image up to and including this scale.
    """

    row: int
    scale: int
    num_scales: int
    codes: torch.Tensor


@dataclass(frozen=True, eq=False)
class ImageReady:
    """Row ``row`` has all codes of its image; ``image`` is set by the pipeline, the engine leaves it None."""

    row: int
    codes: Codes
    image: PILImage.Image | None = None


@dataclass(frozen=True)
class Done:
    """Row ``row`` has ended. ``reason``: "stop" (end marker or picture complete) or "length". ``written``: text tokens that
    it wrote.
    """

    row: int
    reason: str
    written: int = field(default=0, compare=False)


Event = TextDelta | Planned | ScaleReady | ImageReady | Done
