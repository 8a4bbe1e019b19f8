"""The tab Chat: text and pictures from both sides; words come as they are written, pictures as they sharpen."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gradio as gr
from PIL import Image as PILImage

from nextflow_ar.app.ui.history import History, Kept
from nextflow_ar.app.ui.settings import chosen, next_seed, sampling_inputs, seed_inputs
from nextflow_ar.app.ui.showing import Telling, data_uri, enlarged, status
from nextflow_ar.app.ui.style import notice, status_html
from nextflow_ar.app.ui.wiring import QUIET, shared
from nextflow_ar.app.ui.work import Follow, Work, line_for
from nextflow_ar.generation.pipeline import RequestError
from nextflow_ar.tokenizer.pictures import open_picture

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

Turn = dict[str, Any]
"""``role``, and ``content``: a list of texts and Pillow pictures."""
SHOWN = 256
"""Pixels that a small picture is enlarged to in the conversation."""
EXAMPLES = ("Draw two dogs on a green background.", "What do you see?", "Now make it red.")


def bubble(role: str, part: str | PILImage.Image) -> dict[str, Any]:
    """One text or picture as the chat component shows it. Text is shown as it is: no markup in it takes effect."""
    if isinstance(part, str):
        return {"role": role, "content": html.escape(part, quote=False)}
    who = "Your picture" if role == "user" else "The model's picture"
    address = data_uri(enlarged(part, SHOWN), 1024)
    return {"role": role, "content": f'<img class="nf-said-picture" src="{address}" alt="{who}">'}


def bubbles(turns: Sequence[Turn]) -> list[dict[str, Any]]:
    """A whole conversation."""
    return [bubble(turn["role"], part) for turn in turns for part in turn["content"]]


def unfinished(telling: Telling) -> list[dict[str, Any]]:
    """What the model has said and drawn so far."""
    found = []
    for part in telling.parts:
        if isinstance(part, str):
            if part.strip():
                found.append(bubble("assistant", part.strip()))
        elif part.picture is not None:
            found.append(bubble("assistant", part.picture))
        elif part.steps:
            label = f"A picture, not finished: scale {len(part.steps)} of {part.total}"
            found.append(
                {
                    "role": "assistant",
                    "content": f'<img class="nf-said-picture" src="{part.steps[-1]}" alt="{label}">',
                }
            )
    return found


def chat_steps(
    pipeline: NextFlowPipeline,
    history: History,
    kept: list[Kept],
    turns: list[Turn],
    said: dict[str, Any] | None,
    tokens: float,
    pictures: float,
    seed: float | None,
    fresh: bool,
    *sampling: float,
) -> Iterator[list[object]]:
    """Values of (chat, box, turns, status, seed, *history) after every step. A failed turn leaves the box as it was."""
    skip = gr.skip()
    nothing = [skip] * len(history.outputs)
    used = next_seed(seed, fresh)
    try:
        text, files = ((said or {}).get("text") or "").strip(), (said or {}).get("files") or []
        mine: list[str | PILImage.Image] = [open_picture(Path(name)) for name in files]
        mine += [text] if text else []
        if not mine:
            raise RequestError("say something, or add a picture")
        asked = [*turns, {"role": "user", "content": mine}]
        yield [
            bubbles(asked),
            gr.MultimodalTextbox(interactive=False),
            skip,
            status("Answering …"),
            used,
            *nothing,
        ]
        request = pipeline.chat_requests(
            asked,
            max_tokens=int(tokens),
            max_pictures=int(pictures),
            seed=used,
            settings=chosen(pipeline, *sampling),
        )
        telling = Telling("", lambda _, codes, k: pipeline.preview(request.schedule, codes, k))

        def answer(on_event: Follow) -> list[str | PILImage.Image]:
            return pipeline.write(request, on_event)

        with Work(answer) as work:
            for events in work:
                telling.take(events)
                yield [bubbles(asked) + unfinished(telling), skip, skip, skip, skip, *nothing]
            parts = work.result
    except Exception as error:
        box = gr.MultimodalTextbox(interactive=True)
        yield [bubbles(turns), box, skip, status(line_for(error), failed=True), skip, *nothing]
        return
    answered = [*asked, {"role": "assistant", "content": parts}]
    drawn = [part for part in parts if isinstance(part, PILImage.Image)]
    told = status("Done." if parts else "The model had nothing to say.")
    box = gr.MultimodalTextbox(value=None, interactive=True)
    added = history.added(kept, drawn, text, [used] * len(drawn), "chat")
    yield [bubbles(answered), box, answered if parts else asked, told, skip, *added]


def without_last(turns: Sequence[Turn]) -> tuple[list[dict[str, Any]], list[Turn], str]:
    """(chat, turns, status) without what was said last and its answer."""
    left = list(turns)
    while left and left.pop()["role"] != "user":
        pass
    return bubbles(left), left, status("Took the last turn back.")


def _options(pipeline: NextFlowPipeline) -> tuple[list[Any], gr.Number]:
    """The settings, in the order of :func:`chat_steps`; and the seed among them."""
    with gr.Accordion("More settings", open=False):
        tokens = gr.Slider(
            8, 512, 128, step=8, label="Longest answer", info="In tokens; a word takes one to three of them."
        )
        pictures = gr.Slider(
            0,
            5,
            2,
            step=1,
            label="Most pictures",
            info="How many pictures one answer may hold; 0 for words only.",
        )
        seed, fresh = seed_inputs()
        sampling = sampling_inputs(pipeline)
    return [tokens, pictures, seed, fresh, *sampling.all], seed


def chat_tab(pipeline: NextFlowPipeline, history: History, places: int) -> None:
    """Build the tab inside the open ``gr.Tab``."""
    notice(pipeline.manner.dialogue, "its answers")
    turns = gr.State([])
    chat = gr.Chatbot(
        label="Conversation",
        height=480,
        layout="bubble",
        latex_delimiters=[],
        allow_tags=False,
        feedback_options=None,
        buttons=[],
        placeholder="Write to the model, or show it a picture.",
        elem_id="nf-chat",
        elem_classes="nf-chat",
    )
    box = gr.MultimodalTextbox(
        label="Your message",
        placeholder="Write, or add pictures; Enter sends",
        file_types=["image"],
        file_count="multiple",
        sources=["upload"],
        elem_id="nf-chat-box",
    )
    gr.Examples([[{"text": text, "files": []}] for text in EXAMPLES], inputs=box, label="Try one of these")
    said = status_html("nf-chat-status")
    with gr.Row(elem_classes="nf-buttons"):
        stop = gr.Button("Stop", variant="stop")
        undo = gr.Button("Take back the last turn")
        clear = gr.Button("New conversation", elem_id="nf-chat-clear")
    options, seed = _options(pipeline)

    def answer(*values: Any) -> Iterator[list[object]]:
        yield from chat_steps(pipeline, history, *values)

    event = box.submit(
        answer,
        [history.kept, turns, box, *options],
        [chat, box, turns, said, seed, *history.outputs],
        **shared(places),
    )
    stop.click(
        lambda kept: [bubbles(kept), gr.MultimodalTextbox(interactive=True), status("Stopped.")],
        turns,
        [chat, box, said],
        cancels=event,
        **QUIET,
    )
    chat.clear(lambda: [[], "", gr.MultimodalTextbox(interactive=True)], outputs=[turns, said, box], **QUIET)
    undo.click(without_last, turns, [chat, turns, said], cancels=event, **QUIET)
    clear.click(lambda: [[], [], ""], outputs=[chat, turns, said], cancels=event, **QUIET)
