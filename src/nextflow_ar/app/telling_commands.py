"""The commands ``nextflow-ar story`` and ``nextflow-ar video``."""

from __future__ import annotations

import html
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from nextflow_ar.app.terminal import (
    Guidance,
    Json,
    Model,
    Seed,
    Size,
    Temperature,
    TopK,
    TopP,
    UsageError,
    as_array,
    free_folder,
    load_pipeline,
    sampling,
    size_of,
    waiting,
    writable,
)

if TYPE_CHECKING:
    from PIL import Image

_PAGE = (
    '<!doctype html><html lang=en><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>{title}</title><style>:root {{ color-scheme: light dark; }} body {{ margin: 0 auto; max-width: 560px; "
    "padding: 32px 20px 64px; font: 18px/1.5 system-ui, sans-serif; }} img {{ display: block; width: 100%; "
    "image-rendering: pixelated; border-radius: 8px; margin: 0 0 28px; }} p {{ margin: 0 0 8px; }}"
    "</style></head><body><h1>{title}</h1>{body}</body></html>"
)


def story(
    prompt: Annotated[str, typer.Argument(help="What to tell, or how to do what.")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for index.html, story.txt and the pictures.")
    ],
    images: Annotated[int, typer.Option("--images", min=1, max=64, help="Most pictures.")] = 5,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Tell a story, or a recipe, in sentences and pictures; the model decides when a picture comes."""
    free_folder(out)
    wanted = size_of(size)
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    with waiting("telling", as_json):
        parts = pipeline.story(prompt, max_pictures=images, seed=seed, settings=settings, size=wanted)
    told = _save_story(prompt, parts, out)
    if as_json:
        found = {
            "prompt": prompt,
            "model": model,
            "seed": seed,
            "page": str(out / "index.html"),
            "parts": told,
        }
        typer.echo(json.dumps(found))
    else:
        typer.echo("\n".join([*(next(iter(one.values())) for one in told), str(out / "index.html")]))


def _save_story(prompt: str, parts: Sequence[str | Image.Image], out: Path) -> list[dict[str, str]]:
    """Write pictures, text and page; returns the parts with names of files for pictures."""
    from nextflow_ar.storage import write_atomic
    from nextflow_ar.tokenizer.pictures import save_picture

    told: list[dict[str, str]] = []
    body, count = "", 0
    for one in parts:
        if isinstance(one, str):
            told.append({"text": one})
            body += f"<p>{html.escape(one)}</p>"
            continue
        count += 1
        save_picture(as_array(one), out / f"{count}.png")
        told.append({"picture": str(out / f"{count}.png")})
        body += f'<img src="{count}.png" alt="picture {count}">'
    out.mkdir(parents=True, exist_ok=True)
    lines = [one.get("text") or f"[{Path(one['picture']).name}]" for one in told]
    write_atomic(out / "story.txt", ("\n".join(lines) + "\n").encode())
    write_atomic(out / "index.html", _PAGE.format(title=html.escape(prompt.strip()), body=body).encode())
    return told


def video(
    out: Annotated[Path, typer.Option("-o", "--out", help="File to write: .gif, .webp or moving .png.")],
    prompt: Annotated[str, typer.Argument(help="What moves. May be left out with --first.")] = "",
    first: Annotated[
        list[Path] | None,
        typer.Option("--first", help="Picture to go on from; repeated: the first frames in order."),
    ] = None,
    frames: Annotated[
        int, typer.Option("--frames", min=1, max=64, help="How many, given ones included.")
    ] = 5,
    rate: Annotated[float, typer.Option("--rate", min=0.1, max=50, help="Frames a second.")] = 2.0,
    size: Size = None,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Draw the frames of something that moves, from words or going on from given frames."""
    from nextflow_ar.tokenizer.pictures import open_picture, save_frames

    if out.suffix.lower() not in (".gif", ".webp", ".png"):
        raise UsageError(f"{out}: cannot write '{out.suffix}' videos; use .gif, .webp or .png")
    writable(out)
    wanted = size_of(size)
    if first and wanted:
        raise UsageError("--size is for videos from words: with --first, frames are of that picture's size")
    if first and len(first) >= frames:
        raise UsageError(f"--frames {frames} leaves nothing to draw behind {len(first)} given; ask for more")
    given = [open_picture(path) for path in first or []]
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    with waiting("drawing", as_json):
        drawn = pipeline.video(
            prompt, first=given or None, frames=frames, seed=seed, settings=settings, size=wanted
        )
    save_frames(drawn, out, rate)
    told = {"prompt": prompt, "model": model, "seed": seed, "frames": len(drawn), "video": str(out)}
    typer.echo(json.dumps(told) if as_json else str(out))
