"""The web page: tabs over one pipeline. :func:`build_page` makes it, :func:`mount_page` puts it into a server."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING, Any

import gradio as gr

from nextflow_ar.app.ui.chat import chat_tab
from nextflow_ar.app.ui.describe import describe_tab
from nextflow_ar.app.ui.draw import draw_tab
from nextflow_ar.app.ui.edit import edit_tab
from nextflow_ar.app.ui.history import History, Kept, chosen_of
from nextflow_ar.app.ui.showing import enlarged
from nextflow_ar.app.ui.style import look
from nextflow_ar.app.ui.telling import film_tab, story_tab
from nextflow_ar.app.ui.wiring import QUIET

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

LARGEST_UPLOAD = "20mb"
TIDY = (3600, 24 * 3600)
"""Every so many seconds, files older than so many seconds are removed."""


def build_page(pipeline: NextFlowPipeline, *, name: str = "nano", places: int = 2) -> gr.Blocks:
    """The page as gradio Blocks. ``name``: the model's, for the heading. ``places``: requests answered at once; others
    wait in line.
    """
    with gr.Blocks(title="NextFlow-AR", analytics_enabled=False, delete_cache=TIDY) as page:
        gr.HTML(
            '<header class="nf-head"><h1>NextFlow-AR</h1><p>One transformer that reads and writes text and pictures '
            f"&middot; model {html.escape(name)}</p></header>"
        )
        history = History()
        with gr.Tabs() as tabs:
            with gr.Tab("Draw", id="draw"):
                draw = draw_tab(pipeline, history, places)
            with gr.Tab("Edit", id="edit"):
                editor = edit_tab(pipeline, history, places)
            with gr.Tab("Chat", id="chat"):
                chat_tab(pipeline, history, places)
            with gr.Tab("Story", id="story"):
                story_tab(pipeline, history, places)
            with gr.Tab("Animate", id="animate"):
                first = film_tab(pipeline, history, places)
            with gr.Tab("Describe", id="describe"):
                described = describe_tab(pipeline, places)
        again, edit, describe, animate, _ = history.show()

        def draw_again(kept: list[Kept], selected: int) -> list[object]:
            found = chosen_of(kept, selected)
            return [gr.Tabs(selected="draw"), found.words, found.seed, False]

        def to_editor(kept: list[Kept], selected: int) -> list[object]:
            picture = enlarged(chosen_of(kept, selected).open())
            return [gr.Tabs(selected="edit"), {"background": picture, "layers": [], "composite": picture}]

        def take(tab: str) -> Any:
            def taken(kept: list[Kept], selected: int) -> list[object]:
                return [gr.Tabs(selected=tab), chosen_of(kept, selected).path]

            return taken

        which: list[Any] = [history.kept, history.selected]
        again.click(draw_again, which, [tabs, draw.prompt, draw.seed, draw.fresh], **QUIET)
        edit.click(to_editor, which, [tabs, editor], **QUIET)
        animate.click(take("animate"), which, [tabs, first], **QUIET)
        describe.click(take("describe"), which, [tabs, described], **QUIET)
    return page


def launch_options() -> dict[str, Any]:
    """What ``launch`` and ``mount_gradio_app`` are both told."""
    return {**look(), "footer_links": [], "max_file_size": LARGEST_UPLOAD, "show_error": True}


def mount_page(
    app: Any, pipeline: NextFlowPipeline, path: str = "/ui", *, name: str = "nano", places: int = 2
) -> Any:
    """Put the page into a FastAPI app below ``path``; returns the app."""
    return gr.mount_gradio_app(
        app, build_page(pipeline, name=name, places=places), path, ssr_mode=False, **launch_options()
    )
