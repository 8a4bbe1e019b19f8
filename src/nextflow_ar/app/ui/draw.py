"""The tab Draw: a picture sharpens scale by scale, and a strip below it keeps every scale."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr

from nextflow_ar.app.ui.history import History, Kept
from nextflow_ar.app.ui.settings import (
    MOST_PICTURES,
    THINKING,
    as_size,
    chosen,
    next_seed,
    sampling_inputs,
    seed_inputs,
    size_input,
    think_input,
)
from nextflow_ar.app.ui.showing import Growing, planned, status
from nextflow_ar.app.ui.style import stage_html, status_html
from nextflow_ar.app.ui.wiring import wire
from nextflow_ar.app.ui.work import Follow, line_for, watched
from nextflow_ar.generation.pipeline import fold_seed

if TYPE_CHECKING:
    from PIL import Image as PILImage

    from nextflow_ar.generation.pipeline import NextFlowPipeline

EXAMPLES = (
    "a red circle on a blue background",
    "three frogs on an orange background",
    "a cat left of a rocket",
    "a yellow cross and a green triangle",
)
EMPTY = (
    '<div class="nf-empty"><p>Your picture appears here. It starts as a single cell of colour and sharpens '
    "scale by scale.</p></div>"
)


@dataclass(frozen=True)
class DrawTab:
    """What other tabs fill in."""

    prompt: gr.Textbox
    seed: gr.Number
    fresh: gr.Checkbox


def draw_steps(
    pipeline: NextFlowPipeline,
    history: History,
    kept: list[Kept],
    prompt: str,
    n: float,
    size: str,
    seed: float | None,
    fresh: bool,
    think: str,
    steps: bool,
    *sampling: float,
) -> Iterator[list[object]]:
    """Values of (stage, status, seed, *history) after every step of drawing. Errors become a line of status."""
    skip, began = gr.skip(), time.perf_counter()
    nothing = [skip] * len(history.outputs)
    used, count = next_seed(seed, fresh), int(n)
    try:
        settings, wanted = chosen(pipeline, *sampling), as_size(size)
        schedule = pipeline.schedule_for(wanted)

        def draw(on_event: Follow) -> list[PILImage.Image]:
            return pipeline.generate(
                prompt,
                n=count,
                seed=used,
                settings=settings,
                size=wanted,
                think=THINKING[think],
                on_event=on_event,
            )

        seeds = [fold_seed(used, j) for j in range(count)]
        growing = Growing(
            [prompt.strip()] * count,
            (lambda _, codes, k: pipeline.preview(schedule, codes, k)) if steps else None,
        )
        yield [growing.html() if prompt.strip() else skip, status("Drawing …"), used, *nothing]
        pictures = yield from watched(draw, growing, skip, skip, *nothing)
    except Exception as error:
        yield [EMPTY, status(line_for(error), failed=True), skip, *nothing]
        return
    for figure, thought in zip(growing.figures, growing.thoughts, strict=True):
        figure.note = planned(thought)
        figure.finish(figure.picture or pictures[0], {"Description": prompt, "Comment": f"seed {used}"})
    seconds = time.perf_counter() - began
    told = f"Done: {count} picture{'s' * (count > 1)} in {seconds:.1f} s, seed {used}."
    yield [
        growing.html(),
        status(told),
        skip,
        *history.added(kept, pictures, prompt.strip(), seeds, "drawn"),
    ]


def draw_tab(pipeline: NextFlowPipeline, history: History, places: int) -> DrawTab:
    """Build the tab inside the open ``gr.Tab``."""
    with gr.Row(equal_height=False, elem_classes="nf-bench"):
        with gr.Column(elem_classes="nf-ask"):
            prompt = gr.Textbox(
                label="What to draw",
                placeholder=f"such as: {EXAMPLES[0]}",
                info="Say it in a sentence, then press Enter.",
                lines=1,
                max_lines=6,
                autofocus=True,
                submit_btn=False,
                elem_id="nf-prompt",
            )
            gr.Examples([[text] for text in EXAMPLES], inputs=prompt, label="Try one of these")
            with gr.Row(elem_classes="nf-buttons"):
                go = gr.Button("Draw", variant="primary", elem_id="nf-draw")
                stop = gr.Button("Stop", variant="stop", elem_id="nf-draw-stop")
        with gr.Column(elem_classes="nf-set"):
            n = gr.Slider(
                1,
                MOST_PICTURES,
                1,
                step=1,
                label="How many pictures",
                info="All are drawn together, each with a seed of its own.",
            )
            seed, fresh = seed_inputs()
            with gr.Accordion("More settings", open=False):
                size, think = size_input(pipeline), think_input()
                sampling = sampling_inputs(pipeline)
                steps = gr.Checkbox(
                    True,
                    label="Show every scale",
                    info="A picture after each scale. Untick it for large pictures on a slow machine.",
                )
        with gr.Column(elem_classes="nf-show"):
            said = status_html("nf-draw-status")
            stage = stage_html(EMPTY, "nf-draw-stage")
    inputs = [prompt, n, size, seed, fresh, think, steps, *sampling.all]
    wire(draw_steps, pipeline, history, places, [go.click, prompt.submit], stop, inputs, [stage, said, seed])
    return DrawTab(prompt, seed, fresh)
