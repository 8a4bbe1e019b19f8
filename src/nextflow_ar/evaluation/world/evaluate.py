"""PlaygroundBench in the wide world, from a model to the files of a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextflow_ar.evaluation.world.asking import Answers, Reads
from nextflow_ar.evaluation.world.geneval import geneval_metadata, result_row
from nextflow_ar.evaluation.world.judge import WorldJudge
from nextflow_ar.evaluation.world.page import page
from nextflow_ar.evaluation.world.report import WorldReport, summed, table
from nextflow_ar.evaluation.world.run import Progress, Through, WorldBenchSettings, WorldRun


def evaluate_world(
    model: Answers | None,
    settings: WorldBenchSettings,
    out: Path,
    *,
    judge: WorldJudge | None = None,
    through: Through | None = None,
    read: Reads | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
    join: Sequence[Path] = (),
) -> WorldReport:
    """Run the benchmark, or go on with it, in the folder ``out``.

    ``model``: what is asked (None: ceilings alone). ``judge``: None for the bundled one. ``through``: pictures through the
    model's image tokenizer. ``read``: its language. ``about``: stored with the results. ``join``: folders of runs of
    the same settings, but for their lines, whose results are taken over. Writes results.jsonl, report.json,
    report.txt, report.html, geneval-SPLIT.jsonl and pictures/. Raises BenchError (one line) for a journal of another run or
    answers of the wrong kind, JudgeError, SpritesMissing.
    """
    run = WorldRun(settings, judge or WorldJudge.load(), out, through=through, about=about, progress=progress)
    for folder in join:
        run.join(folder)
    run.run(model, read)
    report = summed(run)
    (out / "report.json").write_text(report.to_json() + "\n")
    (out / "report.txt").write_text(table(report) + "\n")
    (out / "report.html").write_text(page(run, report))
    for split in settings.splits:
        rows = run.journal.part(f"draw_scene {split}")
        found = [
            result_row(geneval_metadata(run.item_of(("draw_scene", split, row["index"]))), row)
            for row in rows
        ]
        if found:
            (out / f"geneval-{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return report
