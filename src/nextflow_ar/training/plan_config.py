"""The group ``plan`` of a recipe: what its data is taken to be before it is there."""

from __future__ import annotations

from dataclasses import dataclass

from pydantic import ConfigDict

from nextflow_ar.config import within
from nextflow_ar.scales import BASE_SIZES


@dataclass(frozen=True)
class DocumentPlan:
    """``samples`` documents of one kind: ``text`` tokens before every image (or in all, without images), ``images`` of the
    stage's scales. Of ``text_to_image``, the share ``inverted`` is captioning instead (paper section 3.3).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    samples: float
    text: int
    images: int = 1
    inverted: float = 0.0

    def __post_init__(self) -> None:
        within("above 0", samples=self.samples)
        within("at least 0", text=self.text, images=self.images, inverted=self.inverted)
        if self.inverted > 1 or self.text + self.images == 0:
            raise ValueError("inverted is a share from 0 to 1, and a document has text or images")


@dataclass(frozen=True)
class PlanConfig:
    """The group ``plan`` of a recipe: what its data is taken to be. ``documents``: by kind, ``text``, ``text_to_image``,
    ``image_to_text``, ``edit``, ``interleaved``. ``scales``: of every image, square. ``row``: places per GPU and micro
    step, packed; ``micro_steps``: per update, null: the rows of the recipe's sources, one at a time. ``checkpointing``:
    whether activations are computed again, null: as the recipe trains. ``chunked_head``: true is how it trains; false tells
    what all logits at once would take. ``paper_tokens``: what the paper says of the stage, for the table.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    scales: int
    row: int
    documents: dict[str, DocumentPlan]
    micro_steps: int | None = None
    checkpointing: bool | None = None
    chunked_head: bool = True
    paper_tokens: float | None = None

    def __post_init__(self) -> None:
        within("at least 1", row=self.row, micro_steps=self.micro_steps)
        if not self.documents:
            raise ValueError("plan.documents needs at least one kind")
        if not 1 <= self.scales <= len(BASE_SIZES):
            raise ValueError(f"plan.scales is from 1 to {len(BASE_SIZES)}, got {self.scales}")
