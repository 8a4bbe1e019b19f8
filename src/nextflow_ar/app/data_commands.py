"""The commands ``nextflow-ar data ...``."""

from __future__ import annotations

import json
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
