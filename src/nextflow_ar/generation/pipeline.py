"""What users import: one object that loads a checkpoint and draws, edits, describes, tells and talks."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from PIL import Image as PILImage

from nextflow_ar.generation.base import (
    BUNDLED,
    OPTIONS,
    Picture,
    RequestError,
    best_dtype,
    canvases_of,
    default_of,
    fold_seed,
    listed,
    resolve_model,
)
from nextflow_ar.generation.documents import part
from nextflow_ar.generation.editing import Editing
from nextflow_ar.generation.engine import TextRequest
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.generation.sharing import Sharing
from nextflow_ar.generation.telling import Message, Telling
from nextflow_ar.types import Event, TextDelta

__all__ = [
    "BUNDLED",
    "OPTIONS",
    "Message",
    "NextFlowPipeline",
    "Picture",
    "RequestError",
    "best_dtype",
    "canvases_of",
    "default_of",
    "fold_seed",
    "resolve_model",
]


class NextFlowPipeline(Editing, Telling, Sharing):
    """A loaded checkpoint and its engine. Methods are re-entrant; nothing is kept between calls."""

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
        return self.draw(requests, think=think, on_event=on_event)

    def describe(
        self,
        pictures: Picture | Sequence[Picture],
        *,
        question: str | None = None,
        max_tokens: int = 64,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        guidance: float | None = None,
    ) -> list[str]:
        """A caption (or an answer to ``question``) for every picture; greedy unless ``settings`` say otherwise. Without a
        question the checkpoint's own is asked, if it has one (``caption`` in generation.json).

        ``guidance``: how far what any picture would be called is held against a word; 1 is not at all (None: as the
        checkpoint says, ``answer_guidance``).
        """
        asked = question.strip() if question else ""
        asked = asked or str(self.bundle.generation.get("caption", ""))
        said = [part("user", asked)] if asked else []
        strength = float(self.bundle.generation.get("answer_guidance", 1.0)) if guidance is None else guidance
        chosen = (settings or SamplingSettings(temperature=0.0)).changed(guidance=strength)
        blind = self.manner.document(said) if said else None
        requests = [
            TextRequest(
                self.manner.document([part("user", self.encode(picture)), *said]),
                max_tokens,
                seed,
                chosen,
                self.manner.ends,
                unconditional=blind,
            )
            for picture in listed(pictures)
        ]
        texts = [""] * len(requests)
        for event in self.engine.texts(requests):
            if isinstance(event, TextDelta):
                texts[event.row] += event.text
        return [text.strip() for text in texts]

    def reconstruct(self, picture: Picture) -> PILImage.Image:
        """A picture through the image tokenizer and back, at the tokenizer's size."""
        return self.decode(self.encode(picture))
