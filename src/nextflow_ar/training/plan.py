"""What a training stage will take, before it runs: tokens, FLOPs, memory per GPU and days (roofline), and what helps.

Counts are exact for the block mask. Times are a roofline: products at a stated share of the peak, elementwise work and
the optimiser at the memory's bandwidth, and the traffic of fully sharded parameters beside them.
"""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict, dataclass, replace

from nextflow_ar.config import ConfigError
from nextflow_ar.model.costs import Counts, Parameters, forward_flops, parameters, saved_bytes
from nextflow_ar.model.flops import Passes, passed_flops
from nextflow_ar.model.loss import HELD_LOGITS
from nextflow_ar.precision import Precision
from nextflow_ar.training.hardware import Gpu, attention_flops, measure_machine, muon_rate, product_flops
from nextflow_ar.training.plan_stage import (
    Stage,
    adapter_parameters,
    head_trains,
    read_stage,
    touched,
    trained,
)
from nextflow_ar.training.recipe import LoraConfig
from nextflow_ar.training.sharded import ShardingConfig

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
SHARDED = ShardingConfig(
    replicas=1,
    params="bfloat16",
    reduce="float32",
    reshard=True,
    recompute=True,
    compile=True,
    reduce_each=False,
)
"""What is advised where a recipe has no shards."""
_SIZES = {"float32": 4, "bfloat16": 2}
MUON = 34
"""More of them per parameter of Muon's: the looked-ahead momentum, its bf16 copy and norm, the decay of the weight."""


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


def useful_flops(stage: Stage, counts: Counts) -> float:
    """FLOPs of a training over ``counts``: forward, and twice that backward; weights of layers, and of a head beside
    adapters, that stay as they are need the gradient of their inputs only. Adapters' own are in it.
    """
    passes = Passes(3 if stage.trains == "everything" else 2, 3 if head_trains(stage) else 2, stage.adapters)
    return passed_flops(counts.tokens, counts.pairs, counts.predicted, stage.model, passes)


def executed_flops(stage: Stage, counts: Counts) -> float:
    """Useful FLOPs, and the second forward of checkpointed layers."""
    layers, _ = forward_flops(counts, stage.model)
    again = layers + counts.tokens * 2 * stage.adapters
    return useful_flops(stage, counts) + (again if stage.checkpointing else 0)


def muon_flops(stage: Stage) -> float:
    """FLOPs of Muon's five Newton-Schulz iterations over all hidden matrices (r x c, r the shorter): 4 r r c + 2 r r r."""
    c = stage.model
    if stage.optimizer.muon_lr == 0 or stage.trains != "everything":
        return 0.0
    keys = c.kv_heads * (c.hidden // c.heads)
    shapes = [(c.hidden, c.hidden)] * 2 + [(c.hidden, keys)] * 2 + [(c.hidden, c.intermediate)] * 3
    return c.layers * sum(
        5 * (4 * min(s) ** 2 * max(s) + 2 * min(s) ** 3) for s in shapes
    )  # the few matrices outside the layers are left out


def _muon(stage: Stage) -> int:
    """Parameters that Muon trains."""
    layers = parameters(stage.model).layers
    own = stage.adapters if stage.optimizer.adapter_lr is None else 0
    muon = {"everything": layers, "lora": own, "alignment": 0}[stage.trains]
    return muon if stage.optimizer.muon_lr else 0


def moments(stage: Stage) -> float:
    """Moments that the optimiser keeps, in numbers of parameters: AdamW two, Muon one for hidden matrices."""
    kept = (
        trained(stage) if stage.sharding is None else touched(stage)
    )  # of some rows: shards keep those of the table
    return 2 * kept - _muon(stage)


def memory(stage: Stage, gpus: int) -> Memory:
    """Bytes per GPU. Sharded: fp32 weights, gradients, moments and averages over the GPUs of a line, layers gathered two at
    a time, all else at once, whole gradients of one group (of all, where a step has parts and ``reduce_each`` is off).
    Else all of them, the gradients once more in one message, and unless layers are computed again the copies in bf16 that
    autograd keeps of their weights. A table of which some rows train has whole gradients and averages. Activations and
    logits of one micro step.
    """
    p, config, trains = parameters(stage.model), stage.model, touched(stage)
    row = stage.largest or stage.row_counts
    outside, line = p.total - p.layers, _line(stage, gpus)
    bytes_ = stage.number_bytes
    layer = row.tokens * saved_bytes(config, bytes_)
    kept = (
        bytes_ * row.tokens * config.hidden * config.layers + layer
        if stage.checkpointing
        else config.layers * layer
    )
    edges = row.tokens * config.hidden * (bytes_ + 4 + 4)  # embeddings, and the last norm in fp32
    logits = float(bytes_) * min(HELD_LOGITS, row.predicted * config.vocab)
    logits += 4 * p.head * head_trains(stage)  # its gradient
    if not stage.chunked_head:
        logits = row.predicted * config.vocab * (bytes_ + 4 + 4)  # logits, their fp32 copy, its gradient
    gathered, gradients = 0.0, 4.0 * trains / line
    if stage.sharding is None and not stage.checkpointing and bytes_ == 2:
        gathered = 2.0 * p.layers
    if gpus > 1 and stage.sharding is None:
        gradients *= 2
    elif gpus > 1 and stage.sharding is not None:
        size = _SIZES[stage.sharding.params]
        gathered = size * ((2 * p.layer if stage.sharding.reshard else p.layers) + outside)
        alone = min(
            trains, p.layer + outside
        )  # summed one group after the other: the layer's and all the rest
        if stage.micro_steps > 1 and not stage.sharding.reduce_each:
            gradients += 4 * trains
        gradients += (size + _SIZES[stage.sharding.reduce]) * alone
    return Memory(
        weights=4 * (p.total + stage.adapters) / line,
        gathered=gathered,
        gradients=gradients,
        optimizer=4 * moments(stage) / line,
        average=4 * trains / line if stage.averaged else 0.0,
        activations=kept + edges,
        logits=logits,
    )


def _line(stage: Stage, gpus: int) -> int:
    """How many GPUs share one set of weights. Raises ConfigError where they cannot be divided so."""
    if stage.sharding is None:
        return 1
    replicas = stage.sharding.replicas
    if replicas < 1 or gpus % replicas:
        raise ConfigError(f"sharding.replicas: {gpus} GPUs cannot be divided into {replicas} groups")
    return gpus // replicas


def communication(stage: Stage, gpu: Gpu, gpus: int) -> float:
    """Seconds of traffic in one update. Sharded: every micro step gathers the weights forwards, and once more backwards;
    gradients are summed with the last one, or with each. Else gradients are summed once. Across nodes, a node's GPUs take
    in one copy together; within, each takes it over its links.
    """
    if gpus == 1:
        return 0.0
    total, trains, sharding = parameters(stage.model).total, touched(stage), stage.sharding
    line = _line(stage, gpus)
    groups = gpus // line
    across = gpu.link if gpus <= gpu.node else min(gpu.link, gpu.network * gpu.node)
    if sharding is None:
        return 2 * 4 * trains * (gpus - 1) / gpus / across
    rate = gpu.link if line <= gpu.node else min(gpu.link, gpu.network * gpu.node)
    sums = stage.micro_steps if sharding.reduce_each else 1
    gathers = stage.micro_steps * (2 if sharding.reshard else 1)
    reduce = _SIZES[sharding.reduce] * trains * sums
    moved = gathers * _SIZES[sharding.params] * total + reduce
    between = 2 * reduce / line * (groups - 1) / groups  # every group's sums are added to the others'
    return moved * (line - 1) / line / rate + between / (across if line > 1 else gpu.link)


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
    rate = gpu.of(stage.number_bytes).flops * efficiency
    work = executed_flops(stage, row)
    apart = 0.0
    if attention is not None:
        pairs = executed_flops(stage, Counts(0, row.pairs, 0))
        work, apart = work - pairs, pairs / attention
    passes = TRAFFIC + (2 if stage.checkpointing else 0)
    elementwise = (
        passes * saved_bytes(config, stage.number_bytes) * row.tokens * config.layers / gpu.bandwidth
    )
    elementwise += SOFTMAX * row.predicted * config.vocab / gpu.bandwidth
    state = 2 * 4 * moments(stage) + UPDATE * trained(stage)
    state += MUON * _muon(stage)
    state += 12 * trained(stage) if stage.averaged else 0
    line = _line(stage, gpus)
    # Without shards every GPU updates all; Muon's matrices are dealt out over all that are sharded together.
    iterations = muon_flops(stage) / line / (muon or rate)
    return Times(
        products=micro * (work / rate + apart),
        elementwise=micro * elementwise,
        communication=communication(stage, gpu, gpus),
        optimizer=state / line / gpu.bandwidth + iterations,
    )


@dataclass(frozen=True)
class Knob:
    """A change that saves memory: what it is, GiB per GPU afterwards, and the step's time relative to the plan's."""

    name: str
    memory: float
    slower: float


def _rows_halved(stage: Stage) -> Stage:
    largest = None if stage.largest is None else stage.largest.times(0.5)
    return replace(
        stage, row_counts=stage.row_counts.times(0.5), largest=largest, micro_steps=2 * stage.micro_steps
    )


def _less_at_once(asked: Stage, gpus: int) -> tuple[Stage | None, str]:
    """The stage with half as much at once, and how to say so in the recipe; None where it cannot be done."""
    if asked.rows is not None:  # a GPU computes one row at a time already
        return _rows_halved(asked.on(gpus)), "rows half as long, twice as many"
    if asked.shared is not None and asked.shared // gpus % 2:
        return None, ""
    return _rows_halved((asked.apart or asked).on(gpus)), "half the rows, accumulate twice"


def _others(asked: Stage, gpus: int) -> list[tuple[str, Stage, int]]:
    """What may be changed of the stage that was ``asked`` for: the change, by the recipe's keys, the stage with it on one
    of the GPUs, their number.
    """
    stage, tried = asked.on(gpus), list[tuple[str, Stage, int]]()
    half, name = _less_at_once(asked, gpus)
    sharding = stage.sharding
    if half is not None:
        tried.append((name, half, gpus))
    if asked.apart is not None:
        tried.append(("together: false", asked.apart.on(gpus), gpus))
    with suppress(ConfigError):  # where the rows do not divide among so many
        tried.append((f"{2 * gpus} GPUs", asked.on(2 * gpus), 2 * gpus))
    if sharding is None and gpus > 1 and stage.trains != "lora":
        tried.append(("sharding (docs/parallel.md)", replace(stage, sharding=SHARDED), gpus))
    if sharding is not None:
        if not sharding.reduce_each:
            each = replace(sharding, reduce_each=True)
            if stage.micro_steps > 1:
                tried.append(("sharding.reduce_each: true", replace(stage, sharding=each), gpus))
            if half is not None:
                tried.append((f"{name}, with reduce_each", replace(half, sharding=each), gpus))
        if not sharding.reshard:
            tried.append(
                ("sharding.reshard: true", replace(stage, sharding=replace(sharding, reshard=True)), gpus)
            )
        if sharding.replicas > 1:
            one = replace(sharding, replicas=1)
            tried.append(("sharding.replicas: 1", replace(stage, sharding=one), gpus))
    if not stage.checkpointing:
        key = "checkpointing" if sharding is None else "sharding.recompute"
        tried.append((f"{key}: true (activations again)", replace(stage, checkpointing=True), gpus))
    if not stage.chunked_head:
        tried.append(("plan.chunked_head: true (as it trains)", replace(stage, chunked_head=True), gpus))
    if stage.averaged and stage.trains != "lora":
        tried.append(("ema: 0 (no moving average)", replace(stage, averaged=False), gpus))
    if stage.trains == "everything":
        few = adapter_parameters(stage.model, LoraConfig())
        lora = replace(stage, trains="lora", adapters=few, whole=(), sharding=None, averaged=True)
        tried.append(("trains: lora, without sharding", lora, gpus))
    return tried


def knobs(asked: Stage, gpu: Gpu, gpus: int, efficiency: float) -> list[Knob]:
    """What each change alone that saves memory would do to it and to the time of an update, those that save most first.
    ``asked``: before :meth:`Stage.on`.
    """
    stage = asked.on(gpus)
    now, held = times(stage, gpu, gpus, efficiency).step, memory(stage, gpus).total
    found = [
        Knob(name, memory(s, n).total, times(s, gpu, n, efficiency).step / now)
        for name, s, n in _others(asked, gpus)
    ]
    return sorted((knob for knob in found if knob.memory < held), key=lambda knob: knob.memory)


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
    accumulate: int | None
    """What the recipe's key has to be for one row at a time, where it is not."""
    asked: float | None = None
    """The recipe's steps, where they are others by a hundredth or more."""

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
    asked, stage = stage, stage.on(gpus)
    accumulate = stage.accumulate if asked.rows and stage.accumulate != asked.accumulate else None
    steps = stage.steps or stage.counts.tokens / (stage.row_counts.tokens * stage.micro_steps * gpus)
    other = stage.asked is not None and abs(stage.asked - steps) > max(1, 0.01 * steps)
    return Plan(
        gpu=gpu.of(stage.number_bytes),
        gpus=gpus,
        efficiency=efficiency,
        parameters=parameters(stage.model),
        trained=trained(stage),
        tokens=stage.counts.tokens,
        flops=useful_flops(stage, stage.counts),
        steps=steps,
        memory=memory(stage, gpus),
        times=times(stage, gpu, gpus, efficiency, attention, muon),
        knobs=knobs(asked, gpu, gpus, efficiency),
        paper_tokens=stage.paper_tokens,
        accumulate=accumulate,
        asked=stage.asked if other else None,
    )


def measured_plan(stage: Stage) -> Plan:
    """The plan on this machine alone: its peak, its bandwidth, and the rates that products, attention and Muon's
    iterations of the recipe's own shapes reach, all measured now (seconds).
    """
    machine = measure_machine(products=stage.products)
    products: Precision = "float32" if machine.products == "fp32" else "bfloat16"  # what "auto" is here
    stage = replace(stage, products=products, apart=stage.apart and replace(stage.apart, products=products))
    one = stage.on(1)
    tokens = int((one.largest or one.row_counts).tokens)
    reached = product_flops(one.model, min(tokens, 4096), products)
    length = max(1, min(1024, round(one.row_counts.pairs / tokens)))
    attention = attention_flops(one.model, max(1, min(16, 4096 // length)), length, products)
    muon = muon_rate(one.model)
    return make_plan(stage, machine, 1, min(1.0, reached / machine.flops), attention, muon)


__all__ = ["Knob", "Memory", "Plan", "Stage", "Times", "make_plan", "measured_plan", "read_stage", "trained"]
