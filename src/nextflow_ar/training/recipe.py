"""Recipes of the transformer's stages: what a stage trains, on what, and how (paper section 3). Stages are data."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Discriminator, Tag

from nextflow_ar.config import ConfigError, ModelConfig, from_dict, to_dict, within
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.data.loader import ShardSource
from nextflow_ar.data.playground.mixture import MixtureConfig
from nextflow_ar.data.tasks import TaskName
from nextflow_ar.model.checkpoint import checkpoint_folder
from nextflow_ar.precision import Precision
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.optim import OptimizerConfig
from nextflow_ar.training.plan_config import PlanConfig
from nextflow_ar.training.sharded import ShardingConfig

GENERATION_DEFAULTS: dict[str, Any] = {
    "guidance": 3.0, "temperature": 1.0, "top_k": 0, "top_p": 0.95, "think": False,
}  # fmt: skip
"""Of a model that starts from nothing."""
MAY_CHANGE = (
    "out", "steps", "accumulate", "sheet_seconds", "save_seconds", "compile", "optimizer", "correction", "checkpointing",
    "peak", "tensorboard", "sharding", "prefetch", "workers", "flex", "precision", "plan",
)  # fmt: skip
"""Keys that a resumed run may have otherwise than before."""


@dataclass(frozen=True)
class Source:
    """Part of every step's batch: ``rows`` documents of one task, padded to ``length`` tokens (more where one is longer).

    ``scales``: drawings are laid out up to this scale only (null: whole). The coarse scales decide what is drawn where;
    prefixes show many more of them in the same time. ``swap``: share of the colours and of the names in a response that
    are fed as another colour or name, targets unchanged, so that the next word has to follow from the picture or the
    prompt, not from the word before it. Not for responses that a picture follows: it would stop following its plan.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    task: TaskName
    rows: int
    length: int
    data: MixtureConfig
    scales: int | None = None
    swap: float = 0.0
    kind: Literal["playground"] = "playground"

    def __post_init__(self) -> None:
        within("at least 1", rows=self.rows, length=self.length, scales=self.scales)
        if self.swap and self.task in ("text_to_image", "think_to_image"):
            raise ValueError(f"swap is for responses in words, not for {self.task}")
        if not 0 <= self.swap <= 1:
            raise ValueError(f"swap is a share from 0 to 1, got {self.swap}")


def _kind(source: Any) -> str:
    if isinstance(source, dict):
        return str(source.get("kind", "playground"))
    return getattr(source, "kind", "playground")


AnySource = Annotated[
    Annotated[Source, Tag("playground")]
    | Annotated[ShardSource, Tag("shards")]
    | Annotated[EpisodeSource, Tag("episodes")],
    Discriminator(_kind),
]
"""A playground task, or, with ``kind: shards``, a mixture of extractions, or, with ``kind: episodes``, of the wide world's
tasks.
"""


def in_dialogue(source: Source | ShardSource | EpisodeSource) -> bool:
    """Whether all of a source's documents have chat marks around their turns."""
    if isinstance(source, ShardSource):
        return all(folder.dialogue for folder in source.folders)
    return isinstance(source, EpisodeSource) and source.dialogue


@dataclass(frozen=True)
class CorrectionConfig:
    """Self-correction of input codes: ``share`` of the cells from step ``start`` on, reached over ``ramp`` steps.

    For the playground's pictures that are drawn; shards were extracted with it.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    share: float
    top_k: int
    temperature: float
    start: int
    ramp: int

    def __post_init__(self) -> None:
        within("from 0 to 1", share=self.share)
        within("at least 1", top_k=self.top_k)
        within("above 0", temperature=self.temperature)
        within("at least 0", start=self.start, ramp=self.ramp)

    def at(self, step: int) -> SelfCorrection | None:
        """Self-correction at a step (0-based), or None while it is off: the first of ``ramp`` steps has one part of it."""
        reached = min(1.0, max(0.0, (step - self.start + 1) / max(1, self.ramp)))
        share = self.share * reached
        return SelfCorrection(share, self.top_k, self.temperature) if share > 0 else None


@dataclass(frozen=True)
class LoraConfig:
    """Adapters of rank ``rank`` on every linear layer whose name ends with one of ``targets``, scaled by alpha / rank.
    ``modules_to_save``: tables that train beside them, and are saved with them. ``rows``: "all" of these, or "new", those
    of codes and of tokens that shards' texts have much more often than what is replayed: the others stay bit for bit.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    rank: int = 16
    alpha: float = 32.0
    targets: tuple[str, ...] = (
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
    )  # fmt: skip
    modules_to_save: tuple[Literal["embed_tokens", "head"], ...] = ()
    rows: Literal["all", "new"] = "all"

    def __post_init__(self) -> None:
        within("above 0", alpha=self.alpha)
        if self.rank < 1 or not self.targets:
            raise ValueError("lora needs a rank of at least 1 and at least one target")


@dataclass(frozen=True)
class DistillationConfig:
    """What is replayed is said as ``teacher`` says it, a checkpoint of the same tokens (None: ``start``): ``share`` of
    a token's target is that model's distribution, the rest the token itself. ``shards``: of documents in shards, too;
    without, those are what is to be learnt.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    share: float = 1.0
    shards: bool = False
    teacher: str | None = None

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise ValueError(f"distillation.share is above 0 and at most 1, got {self.share}")


Trains = Literal["everything", "alignment", "alignment_two_steps", "lora"]
"""See :class:`ModelRecipe`."""


@dataclass(frozen=True)
class ModelRecipe:
    """Recipe of one training stage of the transformer. ``start``: what to go on from, a checkpoint folder, a bundled
    model or a Hub id, or null; its sampling defaults are inherited, ``generation`` (keys of generation.json) over them. The
    ``canvases`` that the sources teach and the ``fit`` of shards are found out, where ``generation`` does not say them.

    ``alpha``: scale reweighting. ``text_weight``: loss weight of a text token (an image token's mean is 1).
    ``model``: null takes the architecture of ``start``.

    ``trains``: "everything"; "alignment": connector and the rows of embedding and head that belong to the vision codes,
    ``<boi>`` and ``<eoi>``; "alignment_two_steps": for ``connector_steps`` steps the connector alone, then the rows alone;
    "lora": adapters of ``lora``, and its ``modules_to_save``. All else stays bit for bit.

    ``accumulate``: parts that a step's rows are computed in, one after the other. ``checkpointing``: activations of the
    layers are computed again in the backward pass. ``peak``: TFLOP/s of one device, or "measured"; null tells no
    utilisation. ``tensorboard``: write event files beside metrics.jsonl. ``plan``: for ``nextflow-ar plan`` only.
    ``precision``: of products, weights being fp32: "auto" is bf16 where the device is fast at it, else fp32. Shards have
    their own (``sharding.params``).

    ``sharding``: weights, moments and averages are spread over the processes, checkpoints are written by all and read by
    any number of them, one alone too; null: every process holds all of them. ``prefetch``:
    episodes, and rows of shards, of the next step are made by a thread while this one is computed; worth it where a device
    or a core is idle. ``together``: what several sources of episodes have of one width is computed at once (null: on a
    GPU); ``prefetch`` is for shards alone then.
    ``flex``: compiled training on a GPU attends by FlexAttention.
    ``workers``: or by so many processes, for a GPU that is faster than one; it is the same data.

    ``codes``: "anew" where ``start`` was trained with another image tokenizer's codes: their embeddings begin as this
    tokenizer's codebook, their rows of the head at zero; "carried": they begin as what ``start``'s own codes meant, by
    playground pictures that both encode. Without it, other codes than ``start``'s are refused.

    ``distillation``: a frozen ``start`` teaches what is replayed (learning without forgetting). Costs its forward pass.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    kind: str
    out: Path
    seed: int
    image_tokenizer: Path
    text_entries: int
    start: Path | None
    steps: int
    alpha: float
    text_weight: float
    ema: float
    compile: bool
    sheet_seconds: float
    save_seconds: float
    optimizer: OptimizerConfig
    correction: CorrectionConfig
    sources: tuple[AnySource, ...]
    model: ModelConfig | None
    trains: Trains = "everything"
    connector_steps: int = 0
    lora: LoraConfig | None = None
    distillation: DistillationConfig | None = None
    accumulate: int = 1
    checkpointing: bool = False
    peak: float | Literal["measured"] | None = None
    precision: Precision = "auto"
    tensorboard: bool = False
    plan: PlanConfig | None = None
    sharding: ShardingConfig | None = None
    prefetch: bool = False
    workers: int = 0
    flex: bool = True
    together: bool | None = None
    codes: Literal["kept", "anew", "carried"] = "kept"
    generation: dict[str, Any] = field(default_factory=dict)

    @property
    def base(self) -> Path | None:
        """The folder of ``start``. Raises StorageError when there is none."""
        return None if self.start is None else checkpoint_folder(self.start)

    @property
    def products(self) -> Precision:
        """What products are asked in: ``precision``, or what the shards say."""
        return self.precision if self.sharding is None else self.sharding.params

    @property
    def shapes(self) -> int:
        """Shapes of batches that are compiled for, at most: torch's own eight, the widths of two doublings of every source
        of rows of equal compute, and those of rows that are padded; as many again for the frozen copy that teaches.
        """
        packings = [s.packing for s in self.sources if isinstance(s, ShardSource | EpisodeSource)]
        widths = [2 * p.widths for p in packings if p.mode == "compute"]
        widths += [math.ceil(p.budget / 64) for p in packings if p.mode == "pad"]
        return (8 + sum(widths)) * (1 if self.distillation is None else 2)

    def _check_lora(self) -> None:
        """Raises ConfigError where adapters and the keys about them do not go together."""
        if (self.trains == "lora") != (self.lora is not None):
            raise ConfigError(
                "trains: lora goes with the key lora (rank, alpha, targets, modules_to_save), only with it"
            )
        shards = any(isinstance(source, ShardSource) for source in self.sources)
        if self.lora is not None and self.lora.modules_to_save and self.lora.rows == "new" and not shards:
            raise ConfigError(
                "lora.rows: new are those of words in shards, and no source has any: set rows: all"
            )
        if self.optimizer.adapter_lr is not None and self.lora is None:
            raise ConfigError("optimizer.adapter_lr goes with trains: lora")

    def check(self, processes: int = 1) -> None:
        """Raises ConfigError, one line, for a senseless value, and where parts do not go together."""
        within("at least 1", steps=self.steps, text_entries=self.text_entries, accumulate=self.accumulate)
        within(
            "at least 0", seed=self.seed, text_weight=self.text_weight, alpha=self.alpha, workers=self.workers
        )
        within("at least 0 and below 1", ema=self.ema)
        within("above 0", peak=None if self.peak == "measured" else self.peak)
        seconds = {"sheet_seconds": self.sheet_seconds, "save_seconds": self.save_seconds}
        within("a number of seconds of at least 0", **seconds)
        if self.start is None and (self.model is None or self.trains != "everything"):
            raise ConfigError(f"trains: {self.trains} and model: null need a checkpoint folder to start from")
        if self.start is None and self.model is not None and self.text_entries > self.model.text_vocab:
            raise ConfigError(
                f"text_entries {self.text_entries} do not fit into the model's text_vocab {self.model.text_vocab}"
            )
        self._check_lora()
        if (self.trains == "alignment_two_steps") != (0 < self.connector_steps < self.steps):
            raise ConfigError(
                "connector_steps, above 0 and below steps, goes with trains: alignment_two_steps"
            )
        if self.codes != "kept" and (
            self.start is None or self.trains == "lora" or self.sharding is not None
        ):
            raise ConfigError(
                f"codes: {self.codes} is for a run with a start, without lora and without sharding"
            )
        if self.distillation is not None and (
            self.start is None or self.codes != "kept" or self.sharding is not None
        ):
            raise ConfigError(
                "distillation is for a run with a start whose codes are kept, and without sharding"
            )
        if self.sharding is not None and self.trains == "lora":
            raise ConfigError("adapters are not trained in shards: leave out the key sharding")
        if self.sharding is not None and (self.compile or self.checkpointing):
            raise ConfigError(
                "compile and checkpointing are for runs that are not sharded: set sharding.compile and sharding.recompute"
            )
        if self.sharding is not None and self.together:
            raise ConfigError("together is for runs that are not sharded: leave it out")
        if self.sharding is not None and self.precision != "auto":
            raise ConfigError("precision is for runs that are not sharded: set sharding.params")
        if self.together and self.accumulate > 1:
            raise ConfigError("together: true is for accumulate: 1")
        if not self.sources:
            raise ConfigError("a recipe needs at least one source")
        parts = self.accumulate * processes
        for number, source in enumerate(self.sources):
            if source.rows % parts:
                raise ConfigError(
                    f"sources.{number}: {source.rows} rows do not divide into {self.accumulate} parts of {processes} "
                    "processes"
                )


def with_defaults(values: dict[str, Any]) -> dict[str, Any]:
    """A model's resolved recipe of an earlier version with the keys that came later. Raises ConfigError."""
    return to_dict(from_dict(ModelRecipe, values))
