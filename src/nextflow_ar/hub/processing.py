"""Texts, pictures and conversations as inputs of the model, and its outputs as texts and pictures."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image as PILImage
from transformers import BatchFeature, PreTrainedTokenizerFast, ProcessorMixin

from nextflow_ar.generation.documents import Manner, part
from nextflow_ar.hub.tokens import ids_of
from nextflow_ar.model.checkpoint import GENERATION_FILE
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.vocab import Vocabulary, load_text_tokenizer
from nextflow_ar.storage import read_checked
from nextflow_ar.tokenizer.pictures import open_picture, to_rgb, upright
from nextflow_ar.types import Codes


def as_pixels(picture: Any) -> torch.Tensor:
    """A Pillow image, an array or a picture file as (H, W, 3) uint8, upright. Raises ValueError for anything else,
    addresses and pictures without a pixel too.
    """
    if isinstance(picture, str | Path):
        if str(picture).startswith(("http:", "https:")):
            raise ValueError(f"{str(picture)[:80]}: addresses are not fetched; pass the picture or a file")
        picture = open_picture(picture)
    if isinstance(picture, PILImage.Image):
        picture = np.asarray(to_rgb(upright(picture)))
    if isinstance(picture, torch.Tensor) and picture.dtype == torch.uint8:
        picture = picture.cpu().numpy()
    numbers = isinstance(picture, np.ndarray | torch.Tensor)
    good = isinstance(picture, np.ndarray) and picture.dtype == np.uint8 and picture.ndim == 3
    if not good or not picture.size or picture.shape[2] not in (3, 4):
        got = f"{tuple(picture.shape)} {picture.dtype}" if numbers else type(picture).__name__
        raise ValueError(f"a picture is a Pillow image, a file or (H, W, 3) uint8, got {got}")
    return torch.from_numpy(np.array(picture[..., :3]))


class NextFlowProcessor(ProcessorMixin):
    """``processor(text=..., images=...)`` puts the pictures before the text; :meth:`apply_chat_template` lays out a
    conversation as the checkpoint was trained. Rows are padded on the left. ``caption``: what is asked about pictures where
    nobody asks.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast, dialogue: bool = False, caption: str = "") -> None:
        super().__init__(tokenizer)
        self.dialogue, self.caption = dialogue, caption

    @classmethod
    def get_attributes(cls) -> list[str]:
        """Parts that transformers is told of."""
        return ["tokenizer"]

    @property
    def vocab(self) -> Vocabulary:
        """Ids of text and of marks (codes never stand in token ids)."""
        return Vocabulary(self.tokenizer, len(self.tokenizer), 0)

    @classmethod
    def from_pretrained(cls, name: str | Path, **kwargs: Any) -> NextFlowProcessor:  # pyright: ignore
        """Of a checkpoint folder, a Hub id or a bundled model. Raises StorageError or RequestError."""
        from nextflow_ar.hub.modeling import folder_of

        folder = folder_of(name, **kwargs)
        generation = json.loads(read_checked(folder, GENERATION_FILE))
        tokenizer = load_text_tokenizer(folder / "text_tokenizer")
        return cls(tokenizer, bool(generation.get("dialogue", False)), str(generation.get("caption", "")))

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> list[str]:  # pyright: ignore
        """Nothing is written: the model's own folder holds all of it."""
        return []

    def __call__(  # pyright: ignore
        self, images: Any = None, text: str | Sequence[str] | None = None, **_: Any
    ) -> BatchFeature:
        """``images``: one picture, or one or several for each text; without words the checkpoint's own question is asked.
        Returns ``input_ids``, ``attention_mask`` (B, L) and ``pixel_values``, all pictures in order as (H, W, 3) uint8.
        Raises ValueError where the numbers do not match.
        """
        texts = [text or ""] if text is None or isinstance(text, str) else list(text)
        several = isinstance(images, list | tuple)
        groups: list[Any] = (list(images) if len(texts) > 1 else [images]) if several else [images]
        if images is None:
            groups = [[]] * len(texts)
        if len(groups) != len(texts):
            raise ValueError(f"{len(texts)} texts, but pictures for {len(groups)}")
        groups = [list(g) if isinstance(g, list | tuple) else [g] for g in groups]
        # Laid out as the pipeline lays out a picture and a question: no turn where the checkpoint knows none.
        rows = [
            self._laid([*[("user", None)] * len(g), ("user", t if t.strip() or not g else self.caption)])
            for g, t in zip(groups, texts, strict=True)
        ]
        return self._batch(rows, [as_pixels(picture) for group in groups for picture in group])

    def apply_chat_template(  # pyright: ignore
        self,
        conversation: Any,
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        **_: Any,
    ) -> BatchFeature:
        """A conversation, or several, as inputs. Parts: ``{"type": "text", "text": ...}`` and ``{"type": "image", "image":
        picture}`` (or ``path``). The answer begins behind it, or goes on where the last words are the assistant's; with
        neither ``add_generation_prompt`` nor ``continue_final_message`` the last turn ends instead. Raises ValueError for
        other parts.
        """
        finished = not (add_generation_prompt or continue_final_message)
        several = conversation if isinstance(conversation[0], list | tuple) else [conversation]
        rows, pixels = [], []
        for messages in several:
            said: list[tuple[str, str | None]] = []
            for message in messages:
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                for one in parts:
                    if one.get("type") == "text":
                        said.append((message["role"], one["text"]))
                    elif one.get("type") == "image":
                        pixels.append(as_pixels(one.get("image", one.get("path", one.get("url")))))
                        said.append((message["role"], None))
                    else:
                        raise ValueError(f"parts of a message are text and image, got {one.get('type')!r}")
            rows.append(self._laid(said, finished=finished))
        return self._batch(rows, pixels)

    def _laid(self, said: Sequence[tuple[str, str | None]], *, finished: bool = False) -> list[int]:
        """Token ids in the checkpoint's manner; None is a picture."""
        place = Codes.plain(ScaleSchedule.square(1), torch.zeros(1, dtype=torch.long))  # any picture
        parts = [part(role, place if what is None else what) for role, what in said]
        return ids_of(Manner(self.dialogue).document(parts, finished=finished).segments, self.vocab)

    def _batch(self, rows: Sequence[Sequence[int]], pixels: Sequence[torch.Tensor]) -> BatchFeature:
        longest = max(len(row) for row in rows)
        pad = self.vocab.end
        ids = torch.tensor([[pad] * (longest - len(row)) + list(row) for row in rows], dtype=torch.long)
        mask = torch.tensor([[0] * (longest - len(row)) + [1] * len(row) for row in rows], dtype=torch.long)
        data: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
        if pixels:
            data["pixel_values"] = list(pixels)
        return BatchFeature(data)

    def post_process_multimodal_output(  # pyright: ignore
        self,
        generated_outputs: Any,
        skip_special_tokens: bool = True,
        generation_mode: str | None = None,
        **_: Any,
    ) -> list[Any]:
        """Texts of token ids, or, in mode "image", the pictures as they are."""
        if generation_mode == "image":
            return list(generated_outputs)
        return [
            str(self.tokenizer.decode(row, skip_special_tokens=skip_special_tokens))
            for row in generated_outputs
        ]
