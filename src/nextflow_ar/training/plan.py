"""What a training stage will take, before it runs: tokens, FLOPs, memory per GPU and days (roofline), and what helps.

Counts are exact for the block mask. Times are a roofline: products at a stated share of the peak, elementwise work and
the optimiser at the memory's bandwidth, and the traffic of fully sharded parameters beside them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

from pydantic import ConfigDict

from nextflow_ar.config import ConfigError, ModelConfig, from_dict
from nextflow_ar.model.costs import (
    Counts,
    ImageShape,
    Parameters,
    Shape,
    TextShape,
    count,
    forward_flops,
    parameters,
    saved_bytes,
)
from nextflow_ar.model.loss import HELD_LOGITS
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.training.hardware import Gpu, attention_flops, measure_machine, muon_rate, product_flops
from nextflow_ar.training.optim import OptimizerConfig

RESERVED = 0.06
"""Share of a GPU's memory for the driver, communication buffers and gaps."""
TRAFFIC = 5
"""How often a layer's saved bytes cross the memory bus in a step: written and read forward, read backward, and a gradient
of the same size written and read.
"""
SOFTMAX = 48
"""Bytes that the loss moves per logit: read in bf16 and written in fp32, largest and best looked for, subtracted,
exponentiated, summed, scaled to the gradient, written in bf16; every pass is a kernel of its own (model/loss.py).
"""
UPDATE = 36
"""Bytes that an update moves per trained parameter beside moments: 12 for the weight and its gradient, 12 for the
gradient's norm and clipping, 12 for the bf16 copies of weight and gradient.
"""
MUON = 34
"""More of them per parameter of Muon's: the looked-ahead momentum, its bf16 copy and norm, the decay of the weight."""


@dataclass(frozen=True)
class DocumentPlan:
    """``samples`` documents of one kind: ``text`` tokens before every image (or in all, without images), ``images`` of the
    stage's scales. Of ``text_to_image``, the share ``inverted`` is captioning instead (paper section 3.3).
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    samples: float
    text: int
    images: int = 1
    inverted: float = 0.0


@dataclass(frozen=True)
class PlanConfig:
    """The group ``plan`` of a recipe: what its data is taken to be. ``documents``: by kind, ``text``, ``text_to_image``,
    ``image_to_text``, ``edit``, ``interleaved``. ``scales``: of every image, square. ``row``: places per GPU and micro
    step, packed; ``micro_steps``: per update. ``state_bytes``: of one moment of the optimiser, 4 (fp32) or 2 (bf16).
    ``paper_tokens``: what the paper says of the stage, for the table.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    scales: int
    row: int
    micro_steps: int
    documents: dict[str, DocumentPlan]
    checkpointing: bool = True
    chunked_head: bool = True
    state_bytes: int = 4
    paper_tokens: float | None = None


@dataclass(frozen=True)
class Stage:
    """What a recipe asks for, whatever machine runs it. ``counts``: of the whole stage; ``row``, ``row_counts``: of one
    micro step on one GPU. ``steps``: of the recipe, where it does not follow from its documents.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    alignment: bool
    averaged: bool
    counts: Counts
    row_counts: Counts
    micro_steps: int
    checkpointing: bool
    chunked_head: bool
    state_bytes: int
    paper_tokens: float | None
    steps: float | None


@dataclass(frozen=True)
class Memory:
    """Bytes per GPU by part."""

    weights: float
    gathered: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        """All parts, with the reserve on top."""
        return sum(asdict(self).values()) / (1 - RESERVED)


@dataclass(frozen=True)
class Times:
    """Seconds of one update: ``step`` is the longer of computing and communicating, and the optimiser."""

    products: float
    elementwise: float
    communication: float
    optimizer: float

    @property
    def step(self) -> float:
        """Seconds of one update; communication runs beside the computation."""
        return max(self.products + self.elementwise, self.communication) + self.optimizer


def documents_of(kind: str, plan: DocumentPlan, schedule: ScaleSchedule) -> list[tuple[float, list[Shape]]]:
    """(number, shape) of the documents that an entry of ``plan.documents`` stands for."""
    text, drawn, seen = plan.text, ImageShape(schedule, True), ImageShape(schedule)
    if kind == "text":
        return [(plan.samples, [TextShape(text, True)])]
    if kind == "text_to_image":
        told: list[Shape] = [seen, TextShape(text, True)]
        drawings: list[Shape] = [TextShape(text), drawn]
        return [(plan.samples * (1 - plan.inverted), drawings), (plan.samples * plan.inverted, told)]
    if kind == "image_to_text":
        return [(plan.samples, [seen, TextShape(text, True)])]
    if kind == "edit":
        return [(plan.samples, [seen, TextShape(text), drawn])]
    if kind == "interleaved":
        return [(plan.samples, [TextShape(text, True), drawn] * plan.images)]
    kinds = "text, text_to_image, image_to_text, edit, interleaved"
    raise ConfigError(f"plan.documents: unknown kind {kind!r}: one of {kinds}")


def stage_counts(plan: PlanConfig, context_images: str = "scales") -> Counts:
    """Counts of all documents of a stage. ``context_images``: as in LayoutOptions."""
    schedule, total = ScaleSchedule.square(plan.scales), Counts(0, 0, 0)
    for kind, documents in plan.documents.items():
        for number, shapes in documents_of(kind, documents, schedule):
            total += count(shapes, context_images).times(number)
    return total


def read_stage(values: Mapping[str, Any], where: str) -> Stage:
    """Stage of a recipe's values. With a group ``plan``, of the documents that it names; without, of the rows of its
    sources. Raises ConfigError for a recipe of something else.
    """
    if values.get("kind") != "model":
        raise ConfigError(f"{where}: plan is for recipes of kind model, got {values.get('kind')!r}")
    for key in ("model", "optimizer"):
        if key not in values:
            raise ConfigError(f"{where}: missing key '{key}'")
    model = from_dict(ModelConfig, values["model"], f"{where}: model")
    optimizer = from_dict(OptimizerConfig, values["optimizer"], f"{where}: optimizer")
    alignment, averaged = (
        str(values.get("trains", "")).startswith("alignment"),
        float(values.get("ema", 0.0)) > 0,
    )
    if "plan" in values:
        plan = from_dict(PlanConfig, values["plan"], f"{where}: plan")
        counts = stage_counts(plan, model.context_images)
        return Stage(
            model, optimizer, alignment, averaged, counts, counts.times(plan.row / counts.tokens),
            plan.micro_steps, plan.checkpointing, plan.chunked_head, plan.state_bytes, plan.paper_tokens, None,
        )  # fmt: skip
    sources, steps = values.get("sources"), values.get("steps")
    try:
        rows = [(int(source["rows"]), int(source["length"])) for source in sources or ()]
        steps = float(steps or 0)
    except (KeyError, TypeError, ValueError):
        rows = []
    if not rows or not steps:
        raise ConfigError(f"{where}: to plan, a recipe needs a group 'plan', or sources with rows and length")
    tokens, pairs = sum(n * length for n, length in rows), sum(n * length**2 for n, length in rows)
    row = Counts(tokens, pairs, tokens)
    return Stage(
        model, optimizer, alignment, averaged, row.times(steps), row, 1, False, True, 4, None, steps
    )  # fmt: skip


def trained(stage: Stage) -> int:
    """Trained parameters: all, or in alignment the connector with its embeddings, and in embedding and head the rows of
    ``<boi>``, ``<eoi>`` and (head) the codes.
    """
    p, config = parameters(stage.model), stage.model
    return p.inputs + (2 + 2 + config.codes) * config.hidden if stage.alignment else p.total


def useful_flops(stage: Stage, counts: Counts) -> float:
    """FLOPs of a training over ``counts``: forward, and twice that backward; layers that stay as they are need the
    gradient of their inputs only.
    """
    layers, head = forward_flops(counts, stage.model)
    return layers * (2 if stage.alignment else 3) + 3 * head


def executed_flops(stage: Stage, counts: Counts) -> float:
    """Useful FLOPs, and the second forward of checkpointed layers."""
    layers, _ = forward_flops(counts, stage.model)
    return useful_flops(stage, counts) + (layers if stage.checkpointing else 0)


def muon_flops(stage: Stage) -> float:
    """FLOPs of Muon's five Newton-Schulz iterations over all hidden matrices (r x c, r the shorter): 4 r r c + 2 r r r."""
    c = stage.model
    if stage.optimizer.muon_lr == 0 or stage.alignment:
        return 0.0
    keys = c.kv_heads * (c.hidden // c.heads)
    shapes = [(c.hidden, c.hidden)] * 2 + [(c.hidden, keys)] * 2 + [(c.hidden, c.intermediate)] * 3
    return c.layers * sum(
        5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes
    )  # the few matrices outside the layers are left out


def moments(stage: Stage) -> float:
    """Moments that the optimiser keeps, in numbers of parameters: AdamW two, Muon one for hidden matrices."""
    p = parameters(stage.model)
    muon = p.layers if stage.optimizer.muon_lr and not stage.alignment else 0
    return 2 * trained(stage) - muon


def memory(stage: Stage, gpus: int) -> Memory:
    """Bytes per GPU: fp32 weights, gradients, moments and averages sharded over all; bf16 copies of two layers and of
    embeddings and head; activations of one micro step in bf16.
    """
    p, config, tokens = parameters(stage.model), stage.model, stage.row_counts.tokens
    outside = p.total - p.layers
    alone = gpus == 1
    layer = tokens * saved_bytes(config)
    kept = (
        2 * tokens * config.hidden * config.layers + layer if stage.checkpointing else config.layers * layer
    )
    edges = tokens * config.hidden * (2 + 4 + 4)  # embeddings, and the last norm in fp32
    predicted = stage.row_counts.predicted
    logits = 2.0 * min(HELD_LOGITS, predicted * config.vocab) + 4 * p.head
    if not stage.chunked_head:
        logits = predicted * config.vocab * (2 + 4 + 4)  # bf16 logits, their fp32 copy, its gradient
    return Memory(
        weights=4 * p.total / gpus,
        gathered=0.0 if alone else 2 * (2 * p.layer + outside),
        gradients=4 * trained(stage) / gpus + (0 if alone else 2 * p.layer),
        optimizer=stage.state_bytes * moments(stage) / gpus,
        average=4 * p.total / gpus if stage.averaged else 0.0,
        activations=kept + edges,
        logits=logits,
    )


def communication(stage: Stage, gpu: Gpu, gpus: int) -> float:
    """Seconds of fully sharded traffic in one update: every micro step gathers bf16 weights twice and scatters gradients
    in fp32. Across nodes, a node's GPUs take in one copy together; within, each takes it over its links.
    """
    if gpus == 1:
        return 0.0
    p = parameters(stage.model)
    moved = (2 * 2 * p.total + 4 * trained(stage)) * (gpus - 1) / gpus
    rate = gpu.link if gpus <= gpu.node else min(gpu.link, gpu.network * gpu.node)
    return stage.micro_steps * moved / rate


def times(
    stage: Stage,
    gpu: Gpu,
    gpus: int,
    efficiency: float,
    attention: float | None = None,
    muon: float | None = None,
) -> Times:
    """Seconds of one update. ``efficiency``: share of the peak that products reach; ``attention``, ``muon``: FLOP/s of
    attention and of Muon's products, where those were measured apart.
    """
    row, micro, config = stage.row_counts, stage.micro_steps, stage.model
    rate = gpu.flops * efficiency
    work = executed_flops(stage, row)
    apart = 0.0
    if attention is not None:
        pairs = executed_flops(stage, Counts(0, row.pairs, 0))
        work, apart = work - pairs, pairs / attention
    passes = TRAFFIC + (2 if stage.checkpointing else 0)
    elementwise = passes * saved_bytes(config) * row.tokens * config.layers / gpu.bandwidth
    elementwise += SOFTMAX * row.predicted * config.vocab / gpu.bandwidth
    state = 2 * stage.state_bytes * moments(stage) + UPDATE * trained(stage)
    state += MUON * (2 * trained(stage) - moments(stage))  # Muon has one moment, AdamW two
    state += 12 * parameters(config).total if stage.averaged else 0
    iterations = muon_flops(stage) / gpus / (muon or rate)
    return Times(
        products=micro * (work / rate + apart),
        elementwise=micro * elementwise,
        communication=communication(stage, gpu, gpus),
        optimizer=state / gpus / gpu.bandwidth + iterations,
    )


@dataclass(frozen=True)
class Knob:
    """A change that saves memory: what it is, GiB per GPU afterwards, and the step's time relative to the plan's."""

    name: str
    memory: float
    slower: float


def knobs(stage: Stage, gpu: Gpu, gpus: int, efficiency: float) -> list[Knob]:
    """What each change alone would do to memory and time per token, those that save most first."""
    half = replace(stage, row_counts=stage.row_counts.times(0.5), micro_steps=2 * stage.micro_steps)
    tried: list[tuple[str, Stage, int]] = [
        ("half the row, twice the micro steps", half, gpus),
        (f"{2 * gpus} GPUs", stage, 2 * gpus),
    ]
    if not stage.checkpointing:
        tried.append(("activation checkpointing", replace(stage, checkpointing=True), gpus))
    if not stage.chunked_head:
        tried.append(("chunked head", replace(stage, chunked_head=True), gpus))
    if stage.state_bytes > 2:
        tried.append(("bf16 optimiser state", replace(stage, state_bytes=2), gpus))
    if stage.averaged:
        tried.append(("no moving average", replace(stage, averaged=False), gpus))
    now = times(stage, gpu, gpus, efficiency).step
    found = [Knob(name, memory(s, n).total, times(s, gpu, n, efficiency).step / now) for name, s, n in tried]
    return sorted(found, key=lambda knob: knob.memory)


@dataclass(frozen=True)
class Plan:
    """A stage on ``gpus`` of one kind. ``steps``: updates; ``tokens`` and ``flops``: of the whole stage."""

    gpu: Gpu
    gpus: int
    efficiency: float
    parameters: Parameters
    trained: int
    tokens: float
    flops: float
    steps: float
    memory: Memory
    times: Times
    knobs: list[Knob]
    paper_tokens: float | None

    @property
    def fits(self) -> bool:
        """Whether a GPU's memory holds it."""
        return self.memory.total <= self.gpu.memory

    @property
    def days(self) -> float:
        """Days of the whole stage."""
        return self.steps * self.times.step / 86400

    @property
    def utilisation(self) -> float:
        """Useful FLOPs over what the GPUs' peak gives in that time (model FLOPs utilisation)."""
        return self.flops / (self.steps * self.times.step * self.gpus * self.gpu.flops)


def make_plan(
    stage: Stage,
    gpu: Gpu,
    gpus: int,
    efficiency: float,
    attention: float | None = None,
    muon: float | None = None,
) -> Plan:
    """The plan of a stage. ``attention``, ``muon``: see :func:`times`. Raises ConfigError for senseless numbers."""
    if gpus < 1 or not 0 < efficiency <= 1:
        raise ConfigError(
            f"--gpus is at least 1 and --efficiency above 0 and at most 1, got {gpus}, {efficiency:g}"
        )
    per_update = stage.row_counts.tokens * stage.micro_steps * gpus
    return Plan(
        gpu=gpu,
        gpus=gpus,
        efficiency=efficiency,
        parameters=parameters(stage.model),
        trained=trained(stage),
        tokens=stage.counts.tokens,
        flops=useful_flops(stage, stage.counts),
        steps=stage.steps or stage.counts.tokens / per_update,
        memory=memory(stage, gpus),
        times=times(stage, gpu, gpus, efficiency, attention, muon),
        knobs=knobs(stage, gpu, gpus, efficiency),
        paper_tokens=stage.paper_tokens,
    )


def measured_plan(stage: Stage) -> Plan:
    """The plan on this machine alone: its peak, its bandwidth, and the rates that products, attention and Muon's
    iterations of the recipe's own shapes reach, all measured now (seconds).
    """
    machine, tokens = measure_machine(), int(stage.row_counts.tokens)
    reached = product_flops(stage.model, min(tokens, 4096))
    length = max(1, min(1024, round(stage.row_counts.pairs / tokens)))
    attention = attention_flops(stage.model, max(1, min(16, 4096 // length)), length)
    muon = muon_rate(stage.model)
    return make_plan(stage, machine, 1, min(1.0, reached / machine.flops), attention, muon)
