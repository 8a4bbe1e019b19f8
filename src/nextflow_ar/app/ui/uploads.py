"""Where a visitor puts a picture in."""

from __future__ import annotations

from typing import Any, Literal

import gradio as gr

Source = Literal["upload", "webcam", "clipboard"]


def picture_input(label: str, height: int, sources: list[Source], alt: str) -> gr.Image:
    """A place for one picture; handlers get its path and open it themselves, so that a file which is no picture ends in a
    line of ours on the page.
    """
    found = gr.Image(
        label=label,
        type="filepath",
        image_mode=None,
        sources=sources,
        height=height,
        elem_classes="nf-input",
        alt_text=alt,
    )
    found.preprocess = path_of  # pyright: ignore[reportAttributeAccessIssue]
    return found


def path_of(payload: Any) -> str | None:
    """The uploaded file as it is; gradio itself would open it, and tell of the server's folders where it cannot."""
    return None if payload is None else payload.path
