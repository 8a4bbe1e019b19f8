"""What a visitor has made in this session: a gallery below the tabs, and buttons that carry a picture into another tab."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr
from gradio import processing_utils
from PIL import Image as PILImage

from nextflow_ar.tokenizer.pictures import open_picture

MOST_KEPT = 48


@dataclass(frozen=True)
class Kept:
    """A finished picture. ``path``: its PNG file; ``words``: what was asked; ``kind``: by which tab."""

    path: str
    words: str
    seed: int
    kind: str

    @property
    def caption(self) -> str:
        """What stands below it in the gallery, and what a screen reader says."""
        return f"{self.words or self.kind} (seed {self.seed})"

    def open(self) -> PILImage.Image:
        """The picture. Raises PictureError when the server has tidied it away."""
        return open_picture(Path(self.path))


class History:
    """The gallery and its buttons; :meth:`show` builds them, below the tabs."""

    def __init__(self) -> None:
        self.kept = gr.State([])
        self.selected = gr.State(0)
        self.section = gr.Column(visible=False, elem_classes="nf-history", render=False)
        self.gallery = gr.Gallery(
            label="Made in this session",
            show_label=False,
            format="png",
            columns=8,
            height="auto",
            object_fit="contain",
            fit_columns=False,
            buttons=["download", "download_all", "fullscreen"],
            interactive=False,
            elem_classes="nf-gallery",
            render=False,
        )

    @property
    def outputs(self) -> list[Any]:
        """What :meth:`added` gives values for."""
        return [self.kept, self.gallery, self.selected, self.section]

    def added(
        self,
        kept: Sequence[Kept],
        pictures: Sequence[PILImage.Image],
        words: str,
        seeds: Sequence[int],
        kind: str,
    ) -> list[object]:
        """Values of :attr:`outputs` with ``pictures`` in front, newest first; the oldest beyond the limit are dropped."""
        new = []
        for picture, seed in zip(pictures, seeds, strict=True):
            noted = picture.copy()
            noted.info = {"Description": words, "Software": "NextFlow-AR", "Comment": f"{kind}, seed {seed}"}
            path = processing_utils.save_pil_to_cache(noted, self.gallery.GRADIO_CACHE, format="png")
            new.append(Kept(path, words, seed, kind))
        found = [*new, *kept][:MOST_KEPT]
        shown = gr.Gallery([(k.path, k.caption) for k in found], selected_index=None)
        return [found, shown, 0, gr.Column(visible=bool(found))]

    def show(self) -> tuple[gr.Button, gr.Button, gr.Button, gr.Button, gr.Button]:
        """Build the section; returns the buttons: draw again, edit, describe, animate, clear."""
        self.section.render()
        with self.section:
            gr.HTML(
                "<h2>History</h2><p>Choose a picture to take it further. It is gone when you close the page.</p>"
            )
            self.gallery.render()
            with gr.Row(elem_classes="nf-buttons"):
                again = gr.Button("Draw again", size="sm")
                edit = gr.Button("Edit it", size="sm")
                describe = gr.Button("Describe it", size="sm")
                animate = gr.Button("Animate it", size="sm")
                clear = gr.Button("Clear history", size="sm", variant="stop")
        self.gallery.select(_index, outputs=self.selected, api_visibility="private", show_progress="hidden")
        clear.click(
            lambda: [[], [], 0, gr.Column(visible=False)],
            outputs=self.outputs,
            api_visibility="private",
            show_progress="hidden",
        )
        return again, edit, describe, animate, clear


def _index(event: gr.SelectData) -> int:
    return int(event.index)


def chosen_of(kept: Sequence[Kept], selected: int) -> Kept:
    """The chosen picture. Raises gr.Error, one line, when there is none."""
    if not kept:
        raise gr.Error("There is no picture yet: draw one first.", print_exception=False)
    return kept[min(int(selected), len(kept) - 1)]
