"""``nextflow-ar evaluate world``, and the training of its judge."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nextflow_ar.config import ConfigError, from_dict, load_yaml, to_dict

if TYPE_CHECKING:
    from nextflow_ar.evaluation.world.report import WorldReport
    from nextflow_ar.evaluation.world.run import WorldBenchSettings
    from nextflow_ar.generation.pipeline import NextFlowPipeline
    from nextflow_ar.generation.sampling import SamplingSettings


def world_settings(
    path: Path | None, items: int | None, lines: Sequence[str], canvases: Sequence[str]
) -> WorldBenchSettings:
    """Settings of a file (None: the benchmark as it is reported), shortened or changed. Raises ConfigError."""
    from nextflow_ar.evaluation.world.run import WorldBenchSettings

    values = to_dict(WorldBenchSettings()) | (load_yaml(path) if path is not None else {})
    if items is not None:
        values |= {"items": items, "ceiling": min(values["ceiling"], items)}
    if lines:
        values["lines"] = list(lines)
    if canvases:
        values["canvases"] = dict.fromkeys(canvases, 1.0)
    return from_dict(WorldBenchSettings, values, str(path) if path is not None else "evaluate world")


def evaluate_world_with(
    pipeline: NextFlowPipeline,
    sampling: SamplingSettings,
    seed: int,
    out: Path,
    settings: WorldBenchSettings,
    judge_folder: Path | None,
    model: str,
    join: Sequence[Path] = (),
) -> WorldReport:
    """The benchmark of the wide world for a pipeline; a stopped run goes on. ``join``: see evaluate_world."""
    from nextflow_ar.evaluation.world.evaluate import evaluate_world
    from nextflow_ar.evaluation.world.judge import WorldJudge
    from nextflow_ar.evaluation.world.pipeline_model import PipelineAnswers
    from nextflow_ar.training.runs import progress_bar

    answers = PipelineAnswers(pipeline, sampling, seed)
    thinks = {"think": pipeline.thinks, "think_edits": pipeline.thinks_edits}
    thinks |= {"think_told": bool(pipeline.told_thoughts)}
    thinks |= {"thought_temperature": pipeline.thought_settings.temperature}
    about: dict[str, Any] = (
        {"model": model, "seed": seed}
        | thinks
        | {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(sampling).items()}
    )
    with progress_bar("world", 1) as update:

        def show(part: str, done: int, total: int) -> None:
            update(done / total, part)

        return evaluate_world(
            answers,
            settings,
            out,
            judge=WorldJudge.load(judge_folder),
            through=answers.through,
            read=answers.read,
            about=about,
            progress=show,
            join=join,
        )


def world_table(report: WorldReport) -> str:
    """What is printed of a report."""
    from nextflow_ar.evaluation.world.report import table

    return table(report)


def train_judge_of(values: dict[str, Any], where: str) -> Path:
    """Train what a recipe of the kind ``world_judge`` says; returns its folder. Raises ConfigError."""
    from rich.console import Console

    from nextflow_ar.evaluation.world.training import WorldJudgeSettings, train_world_judge

    plain = {k: v for k, v in values.items() if k not in ("kind", "out")}
    if "out" not in values:
        raise ConfigError(f"{where}: missing key 'out'")
    out, console = Path(values["out"]), Console(stderr=True)
    settings = from_dict(WorldJudgeSettings, plain, where)
    train_world_judge(settings, out, lambda line: console.print(line, highlight=False))
    return out
