"""Finding every broken shard and row of an extraction before a training does: what is wrong, and where."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nextflow_ar.data.check import CheckReport
from nextflow_ar.data.code_shards import (
    CODES,
    MANIFEST,
    CodeShard,
    ExtractionConfig,
    as_document,
    lacks,
    read_manifest,
    setting_of,
)
from nextflow_ar.data.extraction import left_out
from nextflow_ar.data.transforms import draws, reads
from nextflow_ar.model.costs import count, shapes
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError


def check_codes(
    folder: Path,
    *,
    fingerprint: str,
    codes: int,
    max_scales: int,
    most_tokens: int,
    count_text: Callable[[str], int],
    dialogue: bool = False,
    context_images: str = "scales",
    progress: Callable[[int], None] = lambda rows: None,
) -> CheckReport:
    """Read all shards of an extraction, against the checksums of their pages.

    ``fingerprint``: of the model's image tokenizer (a warning where another made the codes), which has so many ``codes``;
    ``max_scales``: that the model has embeddings for. The others: as in :func:`~nextflow_ar.data.check.check_rows`. Raises
    StorageError where the folder holds no extraction.
    """
    manifest = read_manifest(folder / MANIFEST)
    config = setting_of(manifest, folder / MANIFEST)
    report = CheckReport()
    if manifest["tokenizer"] != fingerprint:
        report.warnings.append(
            "the codes are of another image tokenizer than the model's (-m), which refuses them"
        )
    if config.num_scales > max_scales:
        report.problems.append(
            f"{folder}: its pictures have {config.num_scales} scales, the model has embeddings for {max_scales}: extract "
            f"with --scales {max_scales}"
        )
    codes = manifest.get("codes", codes)  # those of before do not tell
    files = sorted(folder.glob("*.parquet"))
    if lost := lacks(folder, files):
        report.problems.append(lost)
    for path in files:
        try:
            shard = CodeShard(path, manifest["tokenizer"])
            records = shard.records()
        except StorageError as error:
            report.problems.append(str(error))
            continue
        astray = 0
        for record, wrong in zip(records, _wrong(shard, records, config, codes), strict=True):
            report.rows += 1
            progress(report.rows)
            if not wrong:
                wrong = _measure(record, path, most_tokens, count_text, dialogue, context_images, report)
                astray += sum(not schedule.canonical for schedule in _schedules(record))
            report.problems += wrong
        if astray:
            report.warnings.append(
                f"{path}: {astray} pictures on schedules that inference has not: extract again makes it anew"
            )
    _tell_left_out(folder, report)
    return report


def _wrong(
    shard: CodeShard, records: list[dict[str, Any]], config: ExtractionConfig, codes: int
) -> Iterator[list[str]]:
    """Of every record of a shard, a line for each thing that is wrong with it."""
    first, stop = _span(shard, config)
    before = None
    for record in records:
        found, row = list(_faults(record, config.num_scales, codes)), record.get("row")
        if not found and not first <= record["row"] < stop:
            found = ["it is none of this shard's"]
        if not found and row == before:
            found = ["it is there twice"]
        before = row
        yield [f"{shard.path}: row {row}: {one}: remove the shard and extract again" for one in found]


def _span(shard: CodeShard, config: ExtractionConfig) -> tuple[int, int]:
    """First of the rows that a shard is of, and the one behind its last."""
    if not shard.path.stem.isdigit():
        return 0, sys.maxsize
    first = int(shard.path.stem) * config.rows
    return first, first + (config.rows if shard.read is None else shard.read)


def _faults(record: dict[str, Any], scales: int, codes: int) -> Iterator[str]:
    """What of a record cannot be trained: codes that are none, or too few or many, and what is no record at all."""
    try:
        if not any(part["supervised"] for part in record["parts"]):
            yield "nothing in it is supervised"
        for part in record["parts"]:
            if part["text"] is None:
                yield from _of_picture(part, scales, codes)
        if record["row"] is None:
            yield "it has no number"
    except (TypeError, ValueError, IndexError) as error:
        yield f"it is no record ({error})"


def _of_picture(part: dict[str, Any], scales: int, codes: int) -> Iterator[str]:
    height, width = part["final"]
    schedule = ScaleSchedule.from_final((height, width), part["scales"])
    if len(schedule) != scales:
        yield f"{len(schedule)} scales, its extraction has {scales}"
    for key in CODES:
        if part[key] is None and key != "target":
            continue
        found = part[key] or []
        if len(found) != schedule.num_tokens:
            yield f"{len(found)} codes as {key}, its grids take {schedule.num_tokens}"
        elif min(found) < 0 or max(found) >= codes:
            wrong = min(found) if min(found) < 0 else max(found)
            yield f"code {wrong} as {key} is not among the codebook's {codes}"


def _schedules(record: dict[str, Any]) -> list[ScaleSchedule]:
    pictures = [part for part in record["parts"] if part["text"] is None]
    return [ScaleSchedule.from_final(tuple(part["final"]), part["scales"]) for part in pictures]


def _measure(
    record: dict[str, Any],
    path: Path,
    most_tokens: int,
    count_text: Callable[[str], int],
    dialogue: bool,
    context_images: str,
    report: CheckReport,
) -> list[str]:
    """A good record's length, kind and pictures; or what is wrong: that it is too long."""
    document = as_document(record["parts"], dialogue=dialogue)
    for part in record["parts"]:
        if part["text"] is None:
            report.ratios["x".join(map(str, part["final"]))] += 1
    length = int(count(shapes(document, count_text), context_images).tokens)
    if length > most_tokens:
        return [
            f"{path}: row {record['row']}: {length} tokens are too long, up to {most_tokens} are accepted"
        ]
    report.lengths.append(length)
    report.kinds["drawing" if draws(document) else "reading" if reads(document) else "writing"] += 1
    return []


def _tell_left_out(folder: Path, report: CheckReport) -> None:
    """A warning where rows of the source are missing for a fault of theirs."""
    try:
        faults = left_out(folder)
    except StorageError as error:  # a damaged shard has been told
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return
    if faults:
        row, why = next(iter(faults.items()))
        report.warnings.append(
            f"{len(faults)} rows of the source were left out, such as {row} ({why}): extract --retry once they are whole"
        )
