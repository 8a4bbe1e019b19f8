"""The tab Describe: what a picture shows, or the answer to a question about it."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import gradio as gr

from nextflow_ar.app.ui.showing import status
from nextflow_ar.app.ui.style import status_html
from nextflow_ar.app.ui.uploads import picture_input
from nextflow_ar.app.ui.work import line_for
from nextflow_ar.tokenizer.pictures import open_picture

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline


def described(pipeline: NextFlowPipeline, path: str | None, question: str, most: float) -> tuple[object, str]:
    """Values of (answer, status)."""
    if not path:
        return gr.skip(), status("Choose a picture first.", failed=True)
    try:
        text = pipeline.describe(open_picture(path), question=question or None, max_tokens=int(most))[0]
    except Exception as error:
        return "", status(line_for(error), failed=True)
    if not text:
        return "", status("The model had nothing to say.")
    return f'<blockquote class="nf-answer">{html.escape(text)}</blockquote>', ""


def describe_tab(pipeline: NextFlowPipeline, places: int) -> gr.Image:
    """Build the tab inside the open ``gr.Tab``; returns where its picture goes."""
    with gr.Row(equal_height=False):
        with gr.Column(scale=1, min_width=300):
            picture = picture_input(
                "Picture", 360, ["upload", "clipboard", "webcam"], "The picture to describe"
            )
        with gr.Column(scale=1, min_width=300):
            question = gr.Textbox(
                label="Question (optional)",
                placeholder="such as: how many frogs are there?",
                info="Leave it empty for a description.",
                lines=1,
                max_lines=6,
                elem_id="nf-question",
            )
            most = gr.Slider(
                8,
                512,
                64,
                step=8,
                label="Longest answer",
                info="In tokens; a word takes one to three of them.",
            )
            go = gr.Button("Describe", variant="primary", elem_id="nf-describe")
            said = status_html("nf-describe-status")
            answer = status_html("nf-answer")

    def describe(path: str | None, asked: str, tokens: float) -> tuple[object, str]:
        return described(pipeline, path, asked, tokens)

    gr.on(
        [go.click, question.submit],
        describe,
        [picture, question, most],
        [answer, said],
        concurrency_id="model",
        concurrency_limit=places,
        api_visibility="private",
        trigger_mode="once",
    )
    return picture
