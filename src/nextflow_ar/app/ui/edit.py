"""The tab Edit: a picture changed by words, redrawn where it is painted over, or varied; before and after side by side."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr
import numpy as np
from gradio.components import Component
from PIL import Image as PILImage

from nextflow_ar.app.ui.history import History, Kept
from nextflow_ar.app.ui.settings import chosen, next_seed, sampling_inputs, seed_inputs
from nextflow_ar.app.ui.showing import Growing, data_uri, status
from nextflow_ar.app.ui.style import notice, stage_html, status_html
from nextflow_ar.app.ui.wiring import wire
from nextflow_ar.app.ui.work import Follow, line_for, watched
from nextflow_ar.generation.pipeline import RequestError, fold_seed
from nextflow_ar.tokenizer.pictures import to_rgb

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

BY_WORDS, VARY = "Follow my words", "Vary it"
LARGEST_FACTOR = 32
BRUSH = "#ff2d87"
EMPTY = '<div class="nf-empty"><p>The changed picture appears here.</p></div>'


def original(picture: PILImage.Image) -> PILImage.Image:
    """The small picture of which this one is a whole-number enlargement (see ``enlarged``), else the picture itself.

    A browser's canvas may be off by a shade here and there; that counts as the same.
    """
    pixels = np.asarray(picture, np.int16)
    if max(picture.size) > 1024:
        return picture
    for factor in range(LARGEST_FACTOR, 1, -1):
        if picture.width % factor or picture.height % factor or min(picture.size) // factor < 8:
            continue
        small = pixels[factor // 2 :: factor, factor // 2 :: factor]
        if np.abs(small.repeat(factor, 0).repeat(factor, 1) - pixels).mean() < 0.5:
            return PILImage.fromarray(small.astype(np.uint8))
    return picture


def painted(
    value: dict[str, Any] | None, rectangle: Sequence[float] | None
) -> tuple[PILImage.Image, np.ndarray | None]:
    """(picture, mask) of the editor: the strokes' pixels or ``rectangle`` (left, top, right, bottom in percent) as (H, W)
    bool, None where nothing is marked. Raises RequestError without a picture.
    """
    if value is None or value.get("background") is None:
        raise RequestError("choose a picture first: upload one, or take one from the history")
    whole = to_rgb(value["background"])
    picture = original(whole)
    mask = np.zeros((whole.height, whole.width), bool)
    for layer in value.get("layers") or []:
        strokes = layer if layer.size == whole.size else layer.resize(whole.size, PILImage.Resampling.NEAREST)
        mask |= np.asarray(strokes.convert("RGBA"))[..., 3] > 127
    if rectangle is not None:
        left, top, right, bottom = rectangle
        rows = slice(round(whole.height * top / 100), round(whole.height * bottom / 100))
        mask[rows, round(whole.width * left / 100) : round(whole.width * right / 100)] = True
    factor = whole.width // picture.width
    if factor > 1:
        mask = mask.reshape(picture.height, factor, picture.width, factor).any((1, 3))
    return picture, np.asarray(mask) if np.any(mask) else None


def edit_steps(
    pipeline: NextFlowPipeline,
    history: History,
    kept: list[Kept],
    value: dict[str, Any] | None,
    words: str,
    how: str,
    keep: float,
    by_rectangle: bool,
    left: float,
    top: float,
    right: float,
    bottom: float,
    n: float,
    seed: float | None,
    fresh: bool,
    *sampling: float,
) -> Iterator[list[object]]:
    """Values of (stage, status, seed, *history) after every step."""
    skip, began = gr.skip(), time.perf_counter()
    nothing = [skip] * len(history.outputs)
    used, seeds = next_seed(seed, fresh), []
    try:
        picture, mask = painted(value, (left, top, right, bottom) if by_rectangle else None)
        settings = chosen(pipeline, *sampling)
        seeds = [fold_seed(used, j) for j in range(int(n))]
        yield [skip, status("Reading the picture …"), used, *nothing]
        if how == VARY:
            title, requests = (
                "varied",
                pipeline.variation_requests(picture, int(keep) + 1, words, seeds, settings),
            )
        elif mask is not None:
            title, requests = "redrawn", pipeline.inpaint_requests(picture, mask, words, seeds, settings)
        else:
            title, requests = "edited", pipeline.edit_requests(picture, words, seeds, settings)
        think = title == "edited" and pipeline.thinks_edits
        schedule = requests[0].schedule
        growing = Growing(
            [words.strip() or title] * len(seeds), lambda _, codes, k: pipeline.preview(schedule, codes, k)
        )
        yield [growing.html(), status("Drawing …"), skip, *nothing]

        def draw(on_event: Follow) -> list[PILImage.Image]:
            return pipeline.draw(requests, think=think, on_event=on_event)

        pictures = yield from watched(draw, growing, skip, skip, *nothing)
    except Exception as error:
        yield [EMPTY, status(line_for(error), failed=True), skip, *nothing]
        return
    before = data_uri(PILImage.fromarray(pipeline.fit(picture)))
    for figure in growing.figures:
        figure.before = before
    told = f"Done: {title} in {time.perf_counter() - began:.1f} s, seed {used}."
    added = history.added(kept, pictures, words.strip(), seeds, title)
    yield [growing.html(), status(told), skip, *added]


def _rectangle() -> list[Component]:
    """The mask without a mouse."""
    with gr.Accordion("Mark a rectangle instead of painting", open=False):
        use = gr.Checkbox(
            False, label="Redraw this rectangle", info="For the keyboard: what lies inside is drawn anew."
        )
        sides = []
        with gr.Row():
            for name, start in (("Left", 25), ("Top", 25), ("Right", 75), ("Bottom", 75)):
                across = "width" if name in ("Left", "Right") else "height"
                sides.append(
                    gr.Slider(
                        0,
                        100,
                        start,
                        step=1,
                        label=name,
                        min_width=120,
                        info=f"{name} edge in percent of the picture's {across}.",
                    )
                )
    return [use, *sides]


def _options(pipeline: NextFlowPipeline) -> tuple[list[Component], gr.Number]:
    """The settings below the words, in the order of :func:`edit_steps`; and the seed among them."""
    scales = len(pipeline.schedule_for())
    how = gr.Radio(
        [BY_WORDS, VARY],
        value=BY_WORDS,
        label="How",
        info="Words change the whole picture, or only what you painted. Varying keeps the coarse scales.",
    )
    keep = gr.Slider(
        0,
        scales - 1,
        scales // 3,
        step=1,
        label="Scales to keep when varying",
        info="Few keep little more than the layout, many all but the fine detail.",
    )
    sides = _rectangle()
    with gr.Accordion("More settings", open=False):
        n = gr.Slider(1, 4, 1, step=1, label="How many results", info="Each has a seed of its own.")
        seed, fresh = seed_inputs()
        sampling = sampling_inputs(pipeline)
    return [how, keep, *sides, n, seed, fresh, *sampling.all], seed


def edit_tab(pipeline: NextFlowPipeline, history: History, places: int) -> gr.ImageEditor:
    """Build the tab inside the open ``gr.Tab``; returns where its picture goes."""
    notice(pipeline.manner.dialogue, "changes of a whole picture by words")
    with gr.Row(equal_height=False, elem_classes="nf-bench nf-even"):
        with gr.Column(elem_classes="nf-ask"):
            editor = gr.ImageEditor(
                label="Paint what to redraw",
                type="pil",
                format="png",
                height=440,
                sources=["upload", "clipboard"],
                transforms=(),
                layers=False,
                brush=gr.Brush(
                    default_size=48, colors=[(BRUSH, 0.7)], default_color=(BRUSH, 0.7), color_mode="fixed"
                ),
                eraser=gr.Eraser(default_size=48),
                canvas_size=(512, 512),
                buttons=[],
                elem_id="nf-editor",
                elem_classes="nf-input",
            )
            words = gr.Textbox(
                label="What to change, or what it shows then",
                placeholder="such as: make the circle green",
                info="For a whole picture say the change; for a painted part say what the picture shows afterwards.",
                lines=1,
                max_lines=6,
                elem_id="nf-instruction",
            )
            with gr.Row(elem_classes="nf-buttons"):
                go = gr.Button("Change it", variant="primary", elem_id="nf-edit")
                stop = gr.Button("Stop", variant="stop")
        with gr.Column(elem_classes="nf-set"):
            options, seed = _options(pipeline)
        with gr.Column(elem_classes="nf-show"):
            said = status_html("nf-edit-status")
            stage = stage_html(EMPTY, "nf-edit-stage")
    inputs = [editor, words, *options]
    wire(edit_steps, pipeline, history, places, [go.click, words.submit], stop, inputs, [stage, said, seed])
    return editor
