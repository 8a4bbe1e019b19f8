"""How a tab's buttons start and stop its work."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import gradio as gr

from nextflow_ar.app.ui.history import History
from nextflow_ar.app.ui.showing import status

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
"""Options of every event: not part of a public interface, and without gradio's own spinner."""


def shared(places: int) -> dict[str, Any]:
    """Options of events that ask the model: all of them together have ``places``; one button runs once at a time."""
    return {"concurrency_id": "model", "concurrency_limit": places, "trigger_mode": "once", **QUIET}


def wire(
    steps: Callable[..., Iterator[list[object]]],
    pipeline: NextFlowPipeline,
    history: History,
    places: int,
    triggers: list[Any],
    stop: gr.Button,
    inputs: list[Any],
    outputs: list[Any],
) -> None:
    """Let ``triggers`` run ``steps(pipeline, history, kept, *inputs)``; ``stop`` ends it. What it yields goes to
    ``outputs`` (page, status, ...) and then to the history.
    """

    def run(*values: Any) -> Iterator[list[object]]:
        yield from steps(pipeline, history, *values)

    event = gr.on(triggers, run, [history.kept, *inputs], [*outputs, *history.outputs], **shared(places))
    stop.click(lambda: status("Stopped."), outputs=outputs[1], cancels=event, **QUIET)
