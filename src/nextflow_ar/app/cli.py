"""The command ``nextflow-ar``. It shows events and files; all work is done on lower floors.

Exit status: 0 done, 1 failed, 2 wrong use. Errors are one line on stderr; ``--debug`` anywhere shows the traceback.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from typer.core import TyperGroup

from nextflow_ar.app.chat_command import chat
from nextflow_ar.app.data_commands import data_app, extract
from nextflow_ar.app.editing_commands import edit, inpaint, variations
from nextflow_ar.app.plan_command import plan
from nextflow_ar.app.serve_command import ServeError, serve
from nextflow_ar.app.telling_commands import story, video
from nextflow_ar.app.terminal import (
    Guidance,
    Json,
    Model,
    Seed,
    Temperature,
    TopK,
    TopP,
    UsageError,
    as_array,
    numbered,
    sampling,
    size_of,
    waiting,
    writable,
)
from nextflow_ar.app.terminal import load_pipeline as _load
from nextflow_ar.app.ui_command import PageError, ui
from nextflow_ar.config import ConfigError
from nextflow_ar.storage import StorageError


class Interrupted(Exception):
    """A command was stopped by Ctrl-C, or by what a training asks to stop with: what to say of it, or nothing."""


class _Commands(TyperGroup):
    """Typer ends without a word on Ctrl-C, and what was said with it is lost."""

    def invoke(self, ctx: typer.Context) -> Any:  # type: ignore[override]
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as stop:
            raise Interrupted(str(stop)) from None


app = typer.Typer(
    name="nextflow-ar",
    cls=_Commands,
    help="Draw pictures from words, describe pictures, and train the model that does it.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

app.add_typer(data_app, name="data")
app.command()(extract)
app.command()(plan)
app.command()(ui)
for command in (edit, inpaint, variations, story, video, chat, serve):
    app.command()(command)


def _print_version(asked: bool) -> None:
    if asked:
        from importlib.metadata import version

        typer.echo(version("nextflow-ar"))
        raise typer.Exit(0)


@app.callback()
def _options(
    debug: Annotated[bool, typer.Option("--debug", help="Show tracebacks (accepted anywhere).")] = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version and exit."),
    ] = False,
) -> None:
    """Draw pictures from words, describe pictures, and train the model that does it."""


@app.command()
def generate(
    prompt: Annotated[str, typer.Argument(help="What to draw.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Picture file to write (.png, .jpg, .webp).")],
    size: Annotated[
        str | None, typer.Option("--size", help="WIDTHxHEIGHT; default: the model's largest square.")
    ] = None,
    n: Annotated[int, typer.Option("--n", "-n", min=1, max=1024, help="How many pictures.")] = 1,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    think: Annotated[
        bool | None,
        typer.Option("--think/--no-think", help="Plan in words before drawing. Default: as the model says."),
    ] = None,
    preview: Annotated[
        Path | None, typer.Option("--preview", help="Folder for a picture after every scale.")
    ] = None,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Draw a picture from words."""
    from nextflow_ar.tokenizer.pictures import save_picture
    from nextflow_ar.types import ImageReady, ScaleReady, TextDelta

    writable(out)
    wanted = size_of(size)
    pipeline = _load(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    from nextflow_ar.generation.pipeline import fold_seed

    seeds = [fold_seed(seed, j) for j in range(n)]
    requests = pipeline.requests([prompt] * n, seeds, settings, wanted)
    paths, previews, thoughts = numbered(out, n), [], [""] * n
    schedule = requests[0].schedule
    with waiting("drawing", as_json):
        for event in pipeline.stream(requests, think=think):
            if isinstance(event, TextDelta):
                thoughts[event.row] += event.text
            if isinstance(event, ScaleReady) and preview is not None:
                name = f"{paths[event.row].stem}-scale-{event.scale + 1:02d}.png"
                picture = pipeline.preview(schedule, event.codes, event.scale + 1)
                save_picture(as_array(picture), preview / name)
                previews.append(str(preview / name))
            if isinstance(event, ImageReady) and event.image is not None:
                save_picture(as_array(event.image), paths[event.row])
    if as_json:
        rows = zip(paths, seeds, thoughts, strict=True)
        files = [{"file": str(p), "seed": s, **({"thought": t} if t else {})} for p, s, t in rows]
        typer.echo(
            json.dumps({"prompt": prompt, "model": model, "pictures": files, "previews": sorted(previews)})
        )
    else:
        typer.echo("\n".join(str(p) for p in paths))


@app.command()
def describe(
    image: Annotated[Path, typer.Argument(help="Picture file.")],
    question: Annotated[
        str | None, typer.Option("--question", "-q", help="Ask something about the picture.")
    ] = None,
    max_tokens: Annotated[int, typer.Option("--max-tokens", min=1, max=4096)] = 64,
    model: Model = "nano",
    as_json: Json = False,
) -> None:
    """Say what a picture shows."""
    from nextflow_ar.tokenizer.pictures import open_picture

    picture = open_picture(image)
    pipeline = _load(model)
    with waiting("reading", as_json):
        text = pipeline.describe(picture, question=question, max_tokens=max_tokens)[0]
    typer.echo(json.dumps({"image": str(image), "text": text}) if as_json else text)


@app.command()
def reconstruct(
    images: Annotated[list[Path], typer.Argument(help="Picture files, or folders of them.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the reconstructions.")],
    level: Annotated[
        int | None,
        typer.Option(
            "--scales", min=1, max=18, help="Scales of the schedule (default: as many as fit the picture)."
        ),
    ] = None,
    upto: Annotated[
        int | None, typer.Option("--upto-scale", min=1, max=18, help="Decode the first so many scales only.")
    ] = None,
    fit: Annotated[
        str, typer.Option("--fit", help="pad: keep the whole picture; crop: fill the canvas.")
    ] = "pad",
    model: Annotated[
        str, typer.Option("--model", "-m", help="Image tokenizer or model: bundled name, folder or Hub id.")
    ] = "nano",
    as_json: Json = False,
) -> None:
    """Pass pictures of any size through the image tokenizer and back: PSNR, SSIM, bits per pixel, and a sheet."""
    from nextflow_ar.evaluation.reconstruction import reconstruct_files
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
    from nextflow_ar.tokenizer.pictures import PictureError, picture_files

    if fit not in ("pad", "crop"):
        raise UsageError(f"--fit takes pad or crop, got {fit!r}")
    files = picture_files(images)
    tokenizer = ImageTokenizer.from_pretrained(model)
    with waiting("reconstructing", as_json):
        found = reconstruct_files(tokenizer, files, out, num_scales=level, upto_scale=upto, fit=fit)
    if found.rows:
        typer.echo(json.dumps({"model": model, **found.as_dict()}) if as_json else found.table())
    named = [path for path in images if str(path) in found.broken]
    if named or not found.rows:  # a folder may hold what is no picture; a file that was named may not
        raise PictureError(next(iter(found.broken.values())))


@app.command()
def train(
    recipe: Annotated[Path, typer.Argument(help="Recipe file (recipes/*.yaml).")],
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: a.b=c. May be repeated.")
    ] = None,
    minutes: Annotated[
        float | None,
        typer.Option("--minutes", min=0.1, help="As many steps as fit, instead of the recipe's number."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Run one training stage; a stopped run goes on where it was."""
    from nextflow_ar.app.stages import run_recipe

    folder = run_recipe(recipe, changes or [], minutes)
    if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one tells
        typer.echo(json.dumps({"out": str(folder)}) if as_json else str(folder))


@app.command()
def evaluate(
    suite: Annotated[str, typer.Argument(help="playground, world (the wide playground), or tokenizer")],
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder for results; a stopped run goes on there.")
    ],
    model: Model = "nano",
    prompts: Annotated[int, typer.Option("--prompts", min=1, help="Held-out prompts per task type.")] = 80,
    captions: Annotated[
        int, typer.Option("--captions", min=0, help="Scenes to caption, half of them held out.")
    ] = 800,
    judge: Annotated[Path | None, typer.Option("--judge", help="Folder of another judge.")] = None,
    photos: Annotated[
        list[Path] | None,
        typer.Option(
            "--photos", help="Photographs for the suite tokenizer: files or folders, never trained on."
        ),
    ] = None,
    items: Annotated[int | None, typer.Option("--items", min=2, help="world: items per line.")] = None,
    lines: Annotated[list[str] | None, typer.Option("--line", help="world: only these lines.")] = None,
    join: Annotated[
        list[Path] | None,
        typer.Option("--join", help="world: folder of a run of other lines, whose results are taken over."),
    ] = None,
    canvases: Annotated[
        list[str] | None, typer.Option("--canvas", help="world: WIDTHxHEIGHT, such as 96x96.")
    ] = None,
    settings_file: Annotated[
        Path | None, typer.Option("--settings", help="world: YAML of the benchmark's own settings.")
    ] = None,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    seed: Seed = 0,
    as_json: Json = False,
) -> None:
    """Score a model (drawing, captions, and the ceilings beside them), or an image tokenizer."""
    if suite not in ("playground", "world", "tokenizer"):
        raise UsageError(f"unknown suite {suite!r}: playground, world or tokenizer")
    if suite == "tokenizer":
        from nextflow_ar.app.stages import evaluate_tokenizer

        typer.echo(evaluate_tokenizer(model, out, photos or [], prompts, judge, as_json))
        return
    if suite == "world":
        from nextflow_ar.app.world_command import evaluate_world_with, world_settings, world_table

        wide = world_settings(settings_file, items, lines or [], canvases or [])
        pipeline = _load(model)
        chosen = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
        found = evaluate_world_with(pipeline, chosen, seed, out, wide, judge, model, join or [])
        typer.echo(found.to_json() if as_json else world_table(found))
        return
    from nextflow_ar.app.stages import evaluate_playground
    from nextflow_ar.evaluation.playground import BenchSettings

    pipeline = _load(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    size = BenchSettings(n_per_type=prompts, in_distribution=prompts, captions=captions, batch=32)
    report = evaluate_playground(pipeline, settings, seed, out, size, judge, model)
    typer.echo(report.to_json() if as_json else report.table())


@app.command()
def init(
    language_model: Annotated[
        str, typer.Option("--language-model", help="Qwen2.5-VL of any size: folder or Hub id.")
    ],
    image_tokenizer: Annotated[
        str, typer.Option("--image-tokenizer", help="Image tokenizer: bundled name, folder or Hub id.")
    ],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    rope_range: Annotated[
        float, typer.Option("--rope-range", min=1.0, help="Coordinate range C of every grid.")
    ] = 64.0,
    positions: Annotated[
        str,
        typer.Option(
            "--positions",
            help="rope: Multiscale 3D RoPE; learned_1d: one axis and an embedding per cell, TokenFlow's; learned: both.",
        ),
    ] = "rope",
    scale_input: Annotated[
        str,
        typer.Option("--scale-input", help="What a grid is fed: residual, or (TokenFlow's) accumulated."),
    ] = "residual",
    closing_input: Annotated[
        str,
        typer.Option(
            "--closing-input", help="What the block behind a picture is fed: accumulated, residual."
        ),
    ] = "accumulated",
    context_images: Annotated[
        str,
        typer.Option(
            "--context-images", help="A given picture is laid out as: scales, closing (block alone)."
        ),
    ] = "scales",
    seed: Seed = 0,
) -> None:
    """Make an untrained model from a language model's weights and an image tokenizer, ready for alignment."""
    from nextflow_ar.app.stages import initialise_model

    with waiting(f"loading {language_model}", False):
        wiring = {
            "rope_range": rope_range, "positions": positions, "scale_input": scale_input,
            "closing_input": closing_input, "context_images": context_images,
        }  # fmt: skip
        initialise_model(language_model, image_tokenizer, out, seed, wiring)
    typer.echo(out)


@app.command()
def export(
    model: Annotated[str, typer.Argument(help="nano, a checkpoint folder, or a Hub id.")],
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder to write.")],
    card: Annotated[Path | None, typer.Option("--card", help="Model card (Markdown) to put in.")] = None,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a sampling default: guidance=3, think=true.")
    ] = None,
    adapter: Annotated[
        Path | None,
        typer.Option("--adapter", help="Folder of an adapter trained on this model: merge it in."),
    ] = None,
    image_tokenizer: Annotated[
        str | None,
        typer.Option(
            "--image-tokenizer", help="Folder of one with the same codes and another decoder: put it in."
        ),
    ] = None,
    average: Annotated[
        list[str] | None,
        typer.Option("--average", help="Another stage of the same model: write the mean of the weights."),
    ] = None,
    share: Annotated[
        float | None,
        typer.Option("--share", help="How much of the mean the others are; all count the same without."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint folder anew: another card, defaults or decoder, an adapter merged in, a mean of stages."""
    from nextflow_ar.app.stages import export_bundle

    if card is not None and not card.is_file():
        raise UsageError(f"{card}: no such file")
    text = card.read_text() if card is not None else None
    export_bundle(model, out, text, changes or [], adapter, image_tokenizer, average or [], share)
    typer.echo(json.dumps({"out": str(out)}) if as_json else str(out))


def _known_errors() -> tuple[tuple[type[BaseException], ...], tuple[type[BaseException], ...]]:
    """Errors of wrong use, and of failed work; imported late, since most commands need few of them."""
    from nextflow_ar.data.playground.sprites import SpritesMissing
    from nextflow_ar.data.sources import SourceError
    from nextflow_ar.evaluation.judge import JudgeError
    from nextflow_ar.evaluation.playground import BenchError
    from nextflow_ar.generation.engine import ContextError
    from nextflow_ar.generation.pipeline import RequestError
    from nextflow_ar.generation.sampling import SettingError
    from nextflow_ar.tokenizer.pictures import PictureError

    usage = (UsageError, ConfigError, ContextError, RequestError, SettingError)
    failed = (
        StorageError,
        PictureError,
        ServeError,
        SourceError,
        SpritesMissing,
        JudgeError,
        BenchError,
        FloatingPointError,
        PageError,
    )
    return usage, failed


def run(arguments: Sequence[str]) -> int:
    """Run the command with ``arguments``; returns the exit status. Prints one line on stderr for every error."""
    debug = "--debug" in arguments
    try:
        result = app(args=[a for a in arguments if a != "--debug"], standalone_mode=False)
        return result if isinstance(result, int) else 0
    except typer.Exit as stop:
        return stop.exit_code
    except (KeyboardInterrupt, Interrupted, typer.Abort) as stop:
        if os.environ.get("RANK", "0") == "0":  # of torchrun's processes, one tells
            print(f"nextflow-ar: {str(stop) or 'interrupted'}", file=sys.stderr)
        return 130
    except BrokenPipeError:
        return 1
    except Exception as error:
        if debug:
            raise
        if hasattr(error, "format_message"):  # the command line parser's own errors
            message = error.format_message()  # type: ignore[attr-defined]
            if message:
                print(f"nextflow-ar: {' '.join(message.split())}", file=sys.stderr)
            return 2
        usage, failed = _known_errors()
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, (*usage, *failed)):
            print(f"nextflow-ar: {message}", file=sys.stderr)
            return 2 if isinstance(error, usage) else 1
        kind = type(error).__name__
        print(f"nextflow-ar: {kind}: {message[:300]} (--debug shows where)", file=sys.stderr)
        return 1


def main() -> None:
    """Entry point of the command."""
    raise SystemExit(run(sys.argv[1:]))


if __name__ == "__main__":
    main()
