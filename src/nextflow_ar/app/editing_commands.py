"""The commands ``nextflow-ar edit``, ``inpaint`` and ``variations``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer

from nextflow_ar.app.terminal import (
    Guidance,
    Json,
    Model,
    Number,
    PictureIn,
    PictureOut,
    Seed,
    Temperature,
    TopK,
    TopP,
    UsageError,
    load_pipeline,
    sampling,
    save_numbered,
    waiting,
    writable,
)


def edit(
    picture: PictureIn,
    instruction: Annotated[str, typer.Argument(help="What to change.")],
    out: PictureOut,
    n: Number = 1,
    seed: Seed = 0,
    before: Annotated[
        list[Path] | None, typer.Option("--before", help="Example of the change: the picture before it.")
    ] = None,
    after: Annotated[
        list[Path] | None, typer.Option("--after", help="The same example after it. Both may be repeated.")
    ] = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Plan in words before drawing. Default: as the model says."),
    ] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Change a picture by an instruction, or as example pairs show."""
    from nextflow_ar.tokenizer.pictures import open_picture
    from nextflow_ar.types import Event, TextDelta

    if len(before or []) != len(after or []):
        raise UsageError("--before and --after come in pairs: one each for every example")
    writable(out)
    given = open_picture(picture)
    examples = [(open_picture(a), open_picture(b)) for a, b in zip(before or [], after or [], strict=True)]
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    thoughts = [""] * n

    def hear(event: Event) -> None:
        if isinstance(event, TextDelta):
            thoughts[event.row] += event.text

    with waiting("editing", as_json):
        drawn = pipeline.edit(
            given,
            instruction,
            n=n,
            seed=seed,
            settings=settings,
            think=think,
            examples=examples,
            on_event=hear,
        )
    files = save_numbered(drawn, out)
    told = {
        "picture": str(picture),
        "instruction": instruction,
        "model": model,
        "seed": seed,
        "pictures": files,
    }
    _tell(told | ({"thoughts": thoughts} if any(thoughts) else {}), as_json)


def inpaint(
    picture: PictureIn,
    mask: Annotated[Path, typer.Argument(help="Picture of the same size: white is redrawn.")],
    out: PictureOut,
    prompt: Annotated[str, typer.Argument(help="What the whole picture shows then.")] = "",
    n: Number = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Draw a part of a picture anew; the rest stays the tokenizer's own reconstruction, to the pixel."""
    from nextflow_ar.tokenizer.pictures import open_picture

    writable(out)
    given, white = open_picture(picture), open_picture(mask)
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    with waiting("drawing", as_json):
        drawn = pipeline.inpaint(given, white, prompt, n=n, seed=seed, settings=settings)
    files = save_numbered(drawn, out)
    told = {"picture": str(picture), "mask": str(mask), "prompt": prompt, "model": model}
    _tell({**told, "seed": seed, "pictures": files}, as_json)


def variations(
    picture: PictureIn,
    out: PictureOut,
    from_scale: Annotated[
        int, typer.Option("--from-scale", "-k", min=1, max=18, help="First scale that is drawn anew.")
    ] = 4,
    prompt: Annotated[str, typer.Option("--prompt", help="What the picture shows.")] = "",
    n: Number = 4,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Pictures that share a picture's coarse scales, drawn anew from some scale on."""
    from nextflow_ar.tokenizer.pictures import open_picture

    writable(out)
    given = open_picture(picture)
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    with waiting("drawing", as_json):
        drawn = pipeline.variations(
            given, from_scale=from_scale, prompt=prompt, n=n, seed=seed, settings=settings
        )
    files = save_numbered(drawn, out)
    told = {"picture": str(picture), "from_scale": from_scale, "prompt": prompt, "model": model}
    _tell({**told, "seed": seed, "pictures": files}, as_json)


def _tell(told: Mapping[str, object], as_json: bool) -> None:
    pictures = told["pictures"]
    assert isinstance(pictures, list)
    typer.echo(json.dumps(told) if as_json else "\n".join(pictures))
