"""The tabs Story and Animate: sentences and pictures in turn, and frames that follow each other."""

from __future__ import annotations

import base64
import io
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import gradio as gr
from PIL import Image as PILImage

from nextflow_ar.app.ui.history import History, Kept
from nextflow_ar.app.ui.settings import as_size, chosen, next_seed, sampling_inputs, seed_inputs, size_input
from nextflow_ar.app.ui.showing import Telling, enlarged, film, status
from nextflow_ar.app.ui.style import notice, stage_html, status_html
from nextflow_ar.app.ui.uploads import picture_input
from nextflow_ar.app.ui.wiring import wire
from nextflow_ar.app.ui.work import Follow, line_for, watched
from nextflow_ar.tokenizer.pictures import open_picture

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

STORY_EMPTY = (
    '<div class="nf-empty"><p>The story appears here, sentence by sentence and picture by picture.</p></div>'
)
FILM_EMPTY = '<div class="nf-empty"><p>The animation appears here, frame by frame.</p></div>'


def gif_uri(frames: Sequence[PILImage.Image], speed: float) -> str:
    """Frames as an endless GIF, as a ``data:`` address."""
    buffer = io.BytesIO()
    large = [enlarged(frame, 256) for frame in frames]
    large[0].save(buffer, "GIF", save_all=True, append_images=large[1:], duration=round(1000 / speed), loop=0)
    return "data:image/gif;base64," + base64.b64encode(buffer.getvalue()).decode()


def frames_that_fit(pipeline: NextFlowPipeline) -> int:
    """Frames, five at most, that the model's context holds behind a short request."""
    schedule, room = pipeline.schedule_for(), pipeline.bundle.model.config.max_positions - 64
    each = schedule.num_tokens + schedule.sizes[-1] + 2 + pipeline.told_thoughts
    return max(2, min(5, room // each))


def story_steps(
    pipeline: NextFlowPipeline,
    history: History,
    kept: list[Kept],
    prompt: str,
    pictures: float,
    size: str,
    seed: float | None,
    fresh: bool,
    *sampling: float,
) -> Iterator[list[object]]:
    """Values of (page, status, seed, *history) after every step."""
    skip, began = gr.skip(), time.perf_counter()
    nothing = [skip] * len(history.outputs)
    used = next_seed(seed, fresh)
    try:
        settings, wanted = chosen(pipeline, *sampling), as_size(size)
        schedule = pipeline.schedule_for(wanted)
        telling = Telling(prompt.strip(), lambda _, codes, k: pipeline.preview(schedule, codes, k))

        def tell(on_event: Follow) -> list[str | PILImage.Image]:
            return pipeline.story(
                prompt,
                max_pictures=int(pictures),
                seed=used,
                settings=settings,
                size=wanted,
                on_event=on_event,
            )

        yield [STORY_EMPTY, status("Telling …"), used, *nothing]
        parts = yield from watched(tell, telling, skip, skip, *nothing)
        drawn = [one for one in parts if isinstance(one, PILImage.Image)]
    except Exception as error:
        yield [STORY_EMPTY, status(line_for(error), failed=True), skip, *nothing]
        return
    told = f"Done: {len(drawn)} picture{'s' * (len(drawn) != 1)} in {time.perf_counter() - began:.1f} s, seed {used}."
    added = history.added(kept, drawn, prompt.strip(), [used] * len(drawn), "told")
    yield [telling.html(), status(told), skip, *added]


def film_steps(
    pipeline: NextFlowPipeline,
    history: History,
    kept: list[Kept],
    prompt: str,
    first: str | None,
    frames: float,
    speed: float,
    size: str,
    seed: float | None,
    fresh: bool,
    *sampling: float,
) -> Iterator[list[object]]:
    """Values of (page, status, seed, *history) after every step."""
    skip, began = gr.skip(), time.perf_counter()
    nothing = [skip] * len(history.outputs)
    used = next_seed(seed, fresh)
    try:
        settings, wanted = chosen(pipeline, *sampling), as_size(size)
        given = pipeline.encode(open_picture(Path(first))) if first else None
        schedule = given.schedule if given is not None else pipeline.schedule_for(wanted)
        growing = Telling(prompt.strip(), lambda _, codes, k: pipeline.preview(schedule, codes, k))

        def move(on_event: Follow) -> list[PILImage.Image]:
            return pipeline.video(
                prompt,
                first=given,
                frames=int(frames),
                seed=used,
                settings=settings,
                size=wanted,
                on_event=on_event,
            )

        yield [FILM_EMPTY, status("Drawing frames …"), used, *nothing]
        found = yield from watched(move, growing, skip, skip, *nothing)
    except Exception as error:
        yield [FILM_EMPTY, status(line_for(error), failed=True), skip, *nothing]
        return
    seconds = time.perf_counter() - began
    told = f"Done: {len(found)} frame{'s' * (len(found) != 1)} in {seconds:.1f} s, seed {used}."
    page = (
        film(prompt.strip() or "what comes next", found, speed, gif_uri(found, speed))
        if found
        else FILM_EMPTY
    )
    added = history.added(kept, found[::-1], prompt.strip(), [used] * len(found), "frame")
    yield [page, status(told), skip, *added]


def story_tab(pipeline: NextFlowPipeline, history: History, places: int) -> None:
    """Build the tab inside the open ``gr.Tab``."""
    notice(pipeline.manner.dialogue, "its stories")
    with gr.Row(equal_height=False, elem_classes="nf-bench"):
        with gr.Column(elem_classes="nf-ask"):
            prompt = gr.Textbox(
                label="What the story is about",
                placeholder="such as: a story about a dog in three pictures",
                info="The model writes a sentence, draws a picture, and goes on.",
                lines=1,
                max_lines=6,
                elem_id="nf-story-prompt",
            )
            with gr.Row(elem_classes="nf-buttons"):
                go = gr.Button("Tell it", variant="primary", elem_id="nf-story")
                stop = gr.Button("Stop", variant="stop")
        with gr.Column(elem_classes="nf-set"):
            pictures = gr.Slider(
                1, 8, 3, step=1, label="Most pictures", info="The story ends by then; it may end before."
            )
            seed, fresh = seed_inputs()
            with gr.Accordion("More settings", open=False):
                size, sampling = size_input(pipeline), sampling_inputs(pipeline)
        with gr.Column(elem_classes="nf-show"):
            said = status_html("nf-story-status")
            page = stage_html(STORY_EMPTY, "nf-story-stage")
    inputs = [prompt, pictures, size, seed, fresh, *sampling.all]
    wire(story_steps, pipeline, history, places, [go.click, prompt.submit], stop, inputs, [page, said, seed])


def film_tab(pipeline: NextFlowPipeline, history: History, places: int) -> gr.Image:
    """Build the tab inside the open ``gr.Tab``; returns where its first frame goes."""
    notice(pipeline.manner.dialogue, "its animations")
    with gr.Row(equal_height=False, elem_classes="nf-bench"):
        with gr.Column(elem_classes="nf-ask"):
            prompt = gr.Textbox(
                label="What moves",
                placeholder="such as: a red car moves left",
                info="May be empty when there is a first frame.",
                lines=1,
                max_lines=6,
                elem_id="nf-film-prompt",
            )
            first = picture_input("First frame (optional)", 200, ["upload", "clipboard"], "The first frame")
            with gr.Row(elem_classes="nf-buttons"):
                go = gr.Button("Animate", variant="primary", elem_id="nf-film")
                stop = gr.Button("Stop", variant="stop")
        with gr.Column(elem_classes="nf-set"):
            frames = gr.Slider(
                2,
                16,
                frames_that_fit(pipeline),
                step=1,
                label="Frames",
                info="How many pictures follow each other. From words alone they all have to fit the model's context.",
            )
            speed = gr.Slider(1, 12, 4, step=1, label="Frames a second", info="How fast they are played.")
            seed, fresh = seed_inputs()
            with gr.Accordion("More settings", open=False):
                size, sampling = size_input(pipeline), sampling_inputs(pipeline)
        with gr.Column(elem_classes="nf-show"):
            said = status_html("nf-film-status")
            page = stage_html(FILM_EMPTY, "nf-film-stage")
    inputs = [prompt, first, frames, speed, size, seed, fresh, *sampling.all]
    wire(film_steps, pipeline, history, places, [go.click, prompt.submit], stop, inputs, [page, said, seed])
    return first
