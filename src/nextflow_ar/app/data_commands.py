"""The commands ``nextflow-ar data ...`` and ``nextflow-ar extract``."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

data_app = typer.Typer(help="Look at training data before it is trained on.", no_args_is_help=True)


@data_app.command()
def check(
    place: Annotated[str, typer.Argument(help="Folder, .jsonl, .parquet or .tar file, or hf://OWNER/NAME.")],
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model whose text tokenizer, level and context count.")
    ] = "nano",
    scales: Annotated[
        int | None,
        typer.Option("--scales", min=1, max=18, help="Level of the pictures (default: the model's)."),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest row accepted (default: the model's context)."),
    ] = None,
    headers: Annotated[
        bool, typer.Option("--headers", help="Read pictures' headers only: faster, misses truncated files.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Read every row of a data set and say which are broken, how and where. Exit status 1 if any is."""
    from nextflow_ar.data.check import check_rows
    from nextflow_ar.data.sources import open_source
    from nextflow_ar.generation.pipeline import resolve_model
    from nextflow_ar.model.checkpoint import load_bundle

    source = open_source(place)
    bundle = load_bundle(resolve_model(model))
    report = check_rows(
        source,
        num_scales=scales or bundle.image_tokenizer.config.num_scales,
        most_tokens=most or bundle.model.config.max_positions,
        count_text=lambda text: len(bundle.vocab.encode(text)),
        deep=not headers,
    )
    typer.echo(json.dumps(report.as_dict(), ensure_ascii=False) if as_json else report.table())
    if report.problems or not report.rows:
        raise typer.Exit(1)


def extract(
    place: Annotated[str, typer.Argument(help="Folder, .jsonl, .parquet or .tar file, or hf://OWNER/NAME.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of shards; a stopped extraction goes on there.")
    ],
    tokenizer: Annotated[
        str, typer.Option("--image-tokenizer", help="Bundled name, folder or Hub id.")
    ] = "nano",
    scales: Annotated[
        int | None, typer.Option("--scales", min=1, max=18, help="Level (default: the tokenizer's).")
    ] = None,
    fit: Annotated[
        str, typer.Option("--fit", help="crop: fill the canvas; pad: keep the whole picture.")
    ] = "crop",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the source per shard.")] = 1000,
    samples: Annotated[
        float, typer.Option("--correct-samples", min=0, max=1, help="Share of pictures with self-correction.")
    ] = 1.0,
    tokens: Annotated[
        float, typer.Option("--correct-tokens", min=0, max=1, help="Share of their tokens that is sampled.")
    ] = 0.6,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Sampled among so many nearest codes.")] = 8,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    process: Annotated[int, typer.Option("--process", min=0, help="Number of this process.")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that share the work.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Turn a data set into shards of codes, once, for any number of trainings."""
    from nextflow_ar.config import ConfigError, from_dict
    from nextflow_ar.data.extraction import ExtractionConfig
    from nextflow_ar.data.extraction import extract as run_extraction
    from nextflow_ar.data.sources import open_source
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
    from nextflow_ar.training.runs import progress_bar

    if process >= processes:
        raise ConfigError(f"--process is from 0 to {processes - 1}, got {process}")
    source, model = open_source(place), ImageTokenizer.from_pretrained(tokenizer)
    values = {
        "num_scales": scales or model.config.num_scales, "fit": fit, "rows": rows, "samples": samples, "tokens": tokens,
        "top_k": top_k, "temperature": temperature, "seed": seed,
    }  # fmt: skip
    config = from_dict(ExtractionConfig, values, "extract")
    with progress_bar("extract", 1) as update:
        found = run_extraction(
            source, model, out, config, process=process, processes=processes,
            progress=lambda shard, done: update(0, f"shard {shard}, {done} rows"),
        )  # fmt: skip
        update(1, f"{found['rows']} rows")
    if as_json:
        typer.echo(json.dumps(found, ensure_ascii=False))
        return
    typer.echo(f"{found['rows']} rows written to {out}, {len(found['broken'])} left out")
    for why in found["broken"].values():
        typer.echo(f"  {why}")
