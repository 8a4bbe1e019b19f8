"""How the page looks: theme, style sheet, and the two kinds of HTML block with their script."""

from __future__ import annotations

import importlib.resources
from typing import Any

import gradio as gr
from gradio.themes import Soft


def resource(name: str) -> str:
    """A text file beside this module."""
    return (importlib.resources.files("nextflow_ar.app.ui") / name).read_text(encoding="utf-8")


def look() -> dict[str, Any]:
    """Theme and style sheet, as ``launch`` and ``mount_gradio_app`` take them. No font and no file comes from elsewhere."""
    sans = ["Inter", "system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif"]
    theme = Soft(
        primary_hue="indigo",
        secondary_hue="rose",
        neutral_hue="slate",
        radius_size="lg",
        font=sans,
        font_mono=["ui-monospace", "Menlo", "monospace"],
    ).set(
        body_background_fill="#f6f6fb",
        body_background_fill_dark="*neutral_950",
        block_background_fill="white",
        block_background_fill_dark="*neutral_900",
        block_border_width="1px",
        block_border_color="*neutral_200",
        block_border_color_dark="*neutral_800",
        block_title_background_fill="none",
        block_title_padding="0",
        block_title_text_color="*body_text_color",
        block_label_background_fill="white",
        block_label_background_fill_dark="*neutral_900",
        block_label_text_color="*body_text_color",
        body_text_color_subdued="*neutral_500",
        body_text_color_subdued_dark="*neutral_300",
        link_text_color="*primary_600",
        link_text_color_dark="*primary_300",
    )
    return {"theme": theme, "css": resource("page.css")}


def status_html(name: str) -> gr.HTML:
    """A live region: what is written into it is read out by screen readers."""
    script = "element.setAttribute('role', 'status'); element.setAttribute('aria-live', 'polite');"
    return gr.HTML("", elem_id=name, elem_classes="nf-live", js_on_load=script)


def notice(dialogue: bool, what: str) -> None:
    """Say so where a checkpoint without dialogue is asked for more than pictures and captions."""
    if not dialogue:
        text = f"This checkpoint was not trained on dialogue: {what} may be nothing, or a guess."
        gr.HTML(f"<p>{text}</p>", elem_classes="nf-notice")


def stage_html(value: str, name: str) -> gr.HTML:
    """A block of figures whose strips can be chosen from by mouse and by arrow keys."""
    return gr.HTML(value, elem_id=name, elem_classes="nf-stage-block", js_on_load=resource("stage.js"))
