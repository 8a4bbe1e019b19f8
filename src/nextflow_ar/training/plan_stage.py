"""What a recipe asks of any machine: its model, what of it trains, and counts of its documents, for ``nextflow-ar plan``.

Read from the recipe's own keys (``sharding``, ``checkpointing``, ``accumulate``, ``trains``, ``ema``), as the trainer does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields, replace
from math import gcd
from typing import Any, Literal

from nextflow_ar.config import ConfigError, ModelConfig, from_dict, within
from nextflow_ar.model.checkpoint import checkpoint_folder, load_architecture
from nextflow_ar.model.costs import (
    Counts,
    ImageShape,
    Shape,
    TextShape,
    count,
    parameters,
)
from nextflow_ar.precision import Precision
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.training.optim import OptimizerConfig
from nextflow_ar.training.plan_config import DocumentPlan, PlanConfig
from nextflow_ar.training.recipe import LoraConfig, ModelRecipe
from nextflow_ar.training.sharded import ShardingConfig


@dataclass(frozen=True)
class Stage:
    """What a recipe asks for, whatever machine runs it. ``counts``: of the whole stage; ``row_counts``: of one micro step
    on one GPU; ``largest``: of the largest micro step there (null: they are alike). ``shared``: both are of the rows of
    all GPUs together, whose number :meth:`on` divides by. ``rows``: of all GPUs in a step, by source, of which micro steps
    are made as small as can be.
    ``steps``: of the recipe, where it does not follow from its documents; ``asked``: of the recipe.
    ``apart``: the stage of sources that are not computed together, where they are (``together``). ``products``: what
    products are asked in. ``adapters``: parameters of adapters, ``whole``: the tables that train beside them.
    ``sharding``: null where every GPU holds all of the model. ``accumulate``: the recipe's.
    """

    model: ModelConfig
    optimizer: OptimizerConfig
    trains: Literal["everything", "alignment", "lora"]
    averaged: bool
    counts: Counts
    row_counts: Counts
    micro_steps: int
    checkpointing: bool
    chunked_head: bool
    sharding: ShardingConfig | None = None
    adapters: int = 0
    whole: tuple[str, ...] = ()
    paper_tokens: float | None = None
    steps: float | None = None
    asked: float | None = None
    largest: Counts | None = None
    shared: int | None = None
    rows: tuple[int, ...] | None = None
    accumulate: int = 1
    products: Precision = "auto"
    apart: Stage | None = None

    @property
    def number_bytes(self) -> int:
        """Bytes of a number in what products are computed in, on a GPU."""
        return 4 if self.products == "float32" else 2

    @property
    def alignment(self) -> bool:
        """Whether only what belongs to the vision codes trains."""
        return self.trains == "alignment"

    def on(self, gpus: int) -> Stage:
        """The stage as ``gpus`` see it. Raises ConfigError where the recipe's rows do not divide among them."""
        most = self.shared if self.rows is None else gcd(*self.rows)
        if most is None:
            return self
        if most % gpus:
            raise ConfigError(f"--gpus: the recipe's rows cannot be divided among {gpus} GPUs")
        if self.rows is not None:  # every source in as many parts
            mean, large = sum(self.rows) / len(self.rows) / most, max(self.rows) / most
            return replace(
                self, accumulate=most // gpus, micro_steps=most // gpus * len(self.rows), rows=None,
                row_counts=self.row_counts.times(mean), largest=self.row_counts.times(large) if large > mean else None,
            )  # fmt: skip
        largest = None if self.largest is None else self.largest.times(1 / gpus)
        return replace(self, row_counts=self.row_counts.times(1 / gpus), largest=largest, shared=None)


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


def read_stage(values: Mapping[str, Any], where: str, *, cuda: bool = True) -> Stage:
    """Stage of a recipe's values. With a group ``plan``, of the documents that it names; without, of the rows of its
    sources, each taken for one document. ``cuda``: on GPUs, where ``together`` is true by default. Raises
    ConfigError for a recipe of something else, and for what the trainer refuses in a recipe that has all of its keys.
    """
    if values.get("kind") != "model":
        raise ConfigError(f"{where}: plan is for recipes of kind model, got {values.get('kind')!r}")
    if "optimizer" not in values:
        raise ConfigError(f"{where}: missing key 'optimizer'")
    _check(values, where)
    model = _model(values, where)
    optimizer = from_dict(OptimizerConfig, values["optimizer"], f"{where}: optimizer")
    sharding = None
    if values.get("sharding") is not None:
        sharding = from_dict(ShardingConfig, values["sharding"], f"{where}: sharding")
    trains, adapters, whole = str(values.get("trains", "everything")), 0, ()
    if trains == "lora":
        lora = from_dict(LoraConfig, values.get("lora") or {}, f"{where}: lora")
        adapters, whole = adapter_parameters(model, lora), lora.modules_to_save
    accumulate = values.get("accumulate", 1)
    if not isinstance(accumulate, int) or accumulate < 1:
        raise ConfigError(f"{where}: accumulate is at least 1, got {accumulate}")
    again = bool(values.get("checkpointing")) if sharding is None else sharding.recompute
    plan = None
    if values.get("plan") is not None:
        plan = from_dict(PlanConfig, values["plan"], f"{where}: plan")
    stage = Stage(
        model=model,
        optimizer=optimizer,
        trains="alignment" if trains.startswith("alignment") else "lora" if adapters else "everything",
        averaged=float(values.get("ema", 0.0)) > 0 or bool(adapters),
        counts=Counts(0, 0, 0),
        row_counts=Counts(0, 0, 0),
        micro_steps=1,
        checkpointing=again if plan is None or plan.checkpointing is None else plan.checkpointing,
        chunked_head=plan is None or plan.chunked_head,
        sharding=sharding,
        adapters=adapters,
        whole=whole,
        accumulate=accumulate,
        products=values.get("precision", "auto") if sharding is None else sharding.params,
    )
    if plan is None:
        together = cuda if values.get("together") is None else values["together"]
        return _of_sources(stage, values, where, bool(together) and sharding is None and accumulate == 1)
    counts = stage_counts(plan, model.context_images)
    return replace(
        stage, counts=counts, row_counts=counts.times(plan.row / counts.tokens), paper_tokens=plan.paper_tokens,
        micro_steps=plan.micro_steps or 1, rows=None if plan.micro_steps else _rows(values, where),
        asked=_steps(values, where),
    )  # fmt: skip


def _check(values: Mapping[str, Any], where: str) -> None:
    """The trainer's checks of a recipe; of one that lacks keys of the trainer's, that of its steps alone."""
    _steps(values, where)
    needed = {f.name for f in fields(ModelRecipe) if f.default is MISSING and f.default_factory is MISSING}
    if needed <= values.keys():
        from_dict(ModelRecipe, dict(values), where).check()


def _steps(values: Mapping[str, Any], where: str) -> float | None:
    steps = values.get("steps")
    if steps is not None and not isinstance(steps, int | float):
        raise ConfigError(f"{where}: steps is a number, got {steps!r}")
    within("at least 1", steps=steps)
    return steps


def _rows(values: Mapping[str, Any], where: str) -> tuple[int, ...]:
    """Rows of a step, of every source."""
    try:
        rows = tuple(int(source["rows"]) for source in values["sources"])
    except (KeyError, TypeError, ValueError):
        rows = ()
    if not rows or min(rows) < 1:
        raise ConfigError(f"{where}: to plan, a recipe needs the rows of its sources, or plan.micro_steps")
    return rows


def _model(values: Mapping[str, Any], where: str) -> ModelConfig:
    """The recipe's architecture, or that of what it starts from."""
    if values.get("model") is not None:
        return from_dict(ModelConfig, values["model"], f"{where}: model")
    if values.get("start") is None:
        raise ConfigError(f"{where}: missing key 'model', or a 'start' to take it from")
    return load_architecture(checkpoint_folder(str(values["start"])))[0]


def adapter_parameters(model: ModelConfig, lora: LoraConfig) -> int:
    """Parameters of the adapters of all layers: rank times inputs and outputs of every adapted matrix."""
    hidden, keys, wide = model.hidden, model.kv_heads * (model.hidden // model.heads), model.intermediate
    sides = {
        "q_proj": 2 * hidden, "k_proj": hidden + keys, "v_proj": hidden + keys, "o_proj": 2 * hidden,
        "gate_proj": hidden + wide, "up_proj": hidden + wide, "down_proj": hidden + wide,
    }  # fmt: skip
    unknown = sorted(set(lora.targets) - set(sides))
    if unknown:
        raise ConfigError(
            f"lora.targets: {unknown[0]!r} is no layer that takes adapters; accepted: {', '.join(sides)}"
        )
    return model.layers * lora.rank * sum(sides[target] for target in lora.targets)


def _length(source: Mapping[str, Any]) -> int:
    """Places of a source's rows. Raises KeyError, TypeError or ValueError where they are not said."""
    packing = source.get("packing")
    if packing is None:
        return int(source["length"])
    if packing["mode"] not in ("length", "pad"):
        raise ValueError
    return int(packing["budget"])


def _of_sources(stage: Stage, values: Mapping[str, Any], where: str, together: bool) -> Stage:
    """The stage, its counts those of the sources' rows: every source is a micro step, or ``accumulate`` of them;
    ``together``: sources of episodes of one width are one.
    """
    sources, steps, parts = values.get("sources"), values.get("steps"), values.get("accumulate", 1)
    try:
        rows = [(int(source["rows"]), _length(source)) for source in sources or ()]
        steps, parts = float(steps or 0), int(parts)
    except (AttributeError, KeyError, TypeError, ValueError):
        rows = []
    if not rows or not steps or parts < 1:
        raise ConfigError(
            f"{where}: to plan, a recipe needs a group 'plan', or sources with rows and length (or packing of the mode "
            "length)"
        )
    each = [Counts(n * length, n * length**2, n * length) for n, length in rows]
    whole = sum(each, Counts(0, 0, 0))
    apart = None
    if together:
        joined: dict[tuple[int, int], Counts] = {}
        for number, (source, (_, length), one) in enumerate(zip(sources or (), rows, each, strict=True)):
            key = (length, -1) if source.get("kind") == "episodes" else (length, number)
            joined[key] = joined.get(key, Counts(0, 0, 0)) + one
        if len(joined) < len(each):
            apart, each = _of_sources(stage, values, where, together=False), list(joined.values())
    if any(n % parts for n, _ in rows):
        raise ConfigError(f"{where}: the rows do not divide into {parts} parts")
    micro = len(each) * parts
    return replace(
        stage, apart=apart, counts=whole.times(steps), row_counts=whole.times(1 / micro), steps=steps, micro_steps=micro,
        largest=max(each, key=lambda one: one.tokens).times(1 / parts), shared=gcd(*(n // parts for n, _ in rows)),
    )  # fmt: skip


def head_trains(stage: Stage) -> bool:
    """Whether the head, or rows of it, has a gradient."""
    return stage.trains != "lora" or "head" in stage.whole


def touched(stage: Stage) -> int:
    """Numbers of parameters that have gradients: of a table of which some rows train, all of it."""
    p = parameters(stage.model)
    return p.inputs + p.embeddings + p.head if stage.alignment else trained(stage)


def trained(stage: Stage) -> int:
    """Trained parameters: all, the adapters and the tables beside them, or in alignment the connector with its embeddings,
    and in embedding and head the rows of ``<boi>``, ``<eoi>`` and (head) the codes.
    """
    p, config = parameters(stage.model), stage.model
    if stage.trains == "lora":
        return stage.adapters + p.embeddings * ("embed_tokens" in stage.whole) + p.head * head_trains(stage)
    return p.inputs + (2 + 2 + config.codes) * config.hidden if stage.alignment else p.total
