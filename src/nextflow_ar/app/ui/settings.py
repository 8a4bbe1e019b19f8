"""The page's settings: each with a sentence of help, and what the pipeline is told of them."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

import gradio as gr
from gradio.components import Component

from nextflow_ar.generation.pipeline import RequestError
from nextflow_ar.generation.sampling import PerScale, SamplingSettings, values_of
from nextflow_ar.scales import ScaleSchedule

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline

MOST_PICTURES = 8
LARGEST_SEED = 2**31 - 1
ASPECTS = ((1, 2), (2, 3), (3, 4), (1, 1), (4, 3), (3, 2), (2, 1))
THINKING = {"As the model prefers": None, "Yes": True, "No": False}


def first(value: PerScale) -> float:
    """The number that a slider shows for a setting that may differ by scale."""
    return float(values_of(value)[0])


@dataclass(frozen=True)
class SamplingInputs:
    """The four sampling widgets, in the order in which :func:`chosen` takes their values."""

    guidance: gr.Slider
    temperature: gr.Slider
    top_k: gr.Slider
    top_p: gr.Slider

    @property
    def all(self) -> list[Component]:
        """As inputs of an event."""
        return [self.guidance, self.temperature, self.top_k, self.top_p]


def sampling_inputs(pipeline: NextFlowPipeline) -> SamplingInputs:
    """Build the widgets, set to the checkpoint's defaults."""
    default, codes = pipeline.defaults, pipeline.bundle.vocab.codes
    guidance = gr.Slider(
        0,
        10,
        first(default.guidance),
        step=0.1,
        label="Guidance",
        info="How closely to follow your words. 1 is off; more is more literal, and less varied.",
    )
    temperature = gr.Slider(
        0,
        2,
        first(default.temperature),
        step=0.05,
        label="Temperature",
        info="How daring each choice is. 0 always takes the likeliest; above 1 surprises more and errs more.",
    )
    top_k = gr.Slider(
        0,
        codes,
        first(default.top_k),
        step=1,
        label="Top k",
        info="Choose among only so many of the best codes. 0 means all of them.",
    )
    top_p = gr.Slider(
        0.05,
        1,
        first(default.top_p),
        step=0.01,
        label="Top p",
        info="Leave out the unlikely tail: keep the best codes until their chances add up to this share.",
    )
    return SamplingInputs(guidance, temperature, top_k, top_p)


def chosen(
    pipeline: NextFlowPipeline, guidance: float, temperature: float, top_k: float, top_p: float
) -> SamplingSettings:
    """Settings of the widgets' values; one left as it was keeps the checkpoint's values for all scales."""
    default = pipeline.defaults
    given = {"guidance": guidance, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return default.changed(
        **{
            name: float(value) if value is not None and value != first(getattr(default, name)) else None
            for name, value in given.items()
        }
    )


def seed_inputs() -> tuple[gr.Number, gr.Checkbox]:
    """The seed, and whether to take a fresh one each time."""
    seed = gr.Number(
        1,
        label="Seed",
        precision=0,
        minimum=0,
        maximum=LARGEST_SEED,
        info="The same seed, words and settings give the same result again.",
    )
    fresh = gr.Checkbox(
        True, label="A new seed each time", info="Untick to repeat a result, or to change one setting only."
    )
    return seed, fresh


def next_seed(seed: float | None, fresh: bool) -> int:
    """The seed to use: a fresh one from the system's randomness, or the one in the field."""
    return random.SystemRandom().randrange(LARGEST_SEED) if fresh or seed is None else int(seed)


def think_input() -> gr.Radio:
    """Whether to plan in words."""
    return gr.Radio(
        list(THINKING),
        value=next(iter(THINKING)),
        label="Plan in words first",
        info="The model writes down what goes where before it draws.",
    )


def sizes(pipeline: NextFlowPipeline) -> list[tuple[str, str]]:
    """(label, WIDTHxHEIGHT) of what the model draws: the canvases that it names, or else aspect ratios at its full size;
    and smaller squares.
    """
    config = pipeline.image_tokenizer.config
    found: dict[str, str] = {}
    default = pipeline.schedule_for()
    named = [default, *pipeline.canvases]
    if len(named) == 1:
        aspects = [ScaleSchedule.nearest(height, width, len(default)) for width, height in ASPECTS]
        named = [*aspects, default]
    for schedule in named:
        h, w = schedule.image_size(config.downsample)
        kind = "square" if w == h else ("wide" if w > h else "tall")
        found.setdefault(f"{w}x{h}", f"{w} × {h}, {kind}")
    for count in range(len(default) - 1, 3, -1):
        h, w = ScaleSchedule.square(count).image_size(config.downsample)
        found.setdefault(f"{w}x{h}", f"{w} × {h}, square, fewer scales")
    return [(label, size) for size, label in found.items() if _drawn(pipeline, size)]


def _drawn(pipeline: NextFlowPipeline, size: str) -> bool:
    """Whether a size is one that the model draws."""
    try:
        return bool(pipeline.schedule_for(as_size(size)))
    except RequestError:
        return False


def size_input(pipeline: NextFlowPipeline) -> gr.Dropdown:
    """The size, set to the model's default."""
    h, w = pipeline.schedule_for().image_size(pipeline.image_tokenizer.config.downsample)
    return gr.Dropdown(
        sizes(pipeline),
        value=f"{w}x{h}",
        label="Size",
        info="Width × height in pixels. The model knows best the sizes that it was trained on.",
    )


def as_size(text: str) -> tuple[int, int]:
    """(width, height) of a choice of :func:`size_input`."""
    width, _, height = text.partition("x")
    return int(width), int(height)
