"""What several commands share: options, loading, and checks that come before the work."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    import numpy as np

    from nextflow_ar.generation.pipeline import NextFlowPipeline
    from nextflow_ar.generation.sampling import PerScale, SamplingSettings

PER_SCALE = "one value, two (first and last scale), or one per scale, joined by commas"
Model = Annotated[
    str, typer.Option("--model", "-m", help="nano (bundled), a checkpoint folder, or a Hub id.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document instead of text.")]
Seed = Annotated[
    int, typer.Option("--seed", min=0, max=2**63 - 1, help="The same seed gives the same result.")
]
Number = Annotated[int, typer.Option("--n", "-n", min=1, max=1024, help="How many pictures.")]
PictureOut = Annotated[Path, typer.Option("-o", "--out", help="Picture file to write (.png, .jpg, .webp).")]
PictureIn = Annotated[Path, typer.Argument(help="Picture file.")]
Size = Annotated[str | None, typer.Option("--size", help="WIDTHxHEIGHT; default: the model's own square.")]
Guidance = Annotated[str | None, typer.Option("--guidance", help=f"Strength of guidance: {PER_SCALE}.")]
Temperature = Annotated[str | None, typer.Option("--temperature", help=f"Temperature: {PER_SCALE}.")]
TopK = Annotated[str | None, typer.Option("--top-k", help=f"Keep the k best codes (0: all): {PER_SCALE}.")]
TopP = Annotated[str | None, typer.Option("--top-p", help=f"Keep the nucleus: {PER_SCALE}.")]


class UsageError(ValueError):
    """An argument that cannot be meant: one line."""


def _per_scale(text: str | None, name: str) -> PerScale | None:
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        raise UsageError(f"{name} takes {PER_SCALE}; got {text!r}") from None
    return values[0] if len(values) == 1 else values


def size_of(text: str | None) -> tuple[int, int] | None:
    """(width, height) of --size. Raises UsageError."""
    if text is None:
        return None
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit()):
        raise UsageError(f"--size takes WIDTHxHEIGHT in pixels such as 64x64, got {text!r}")
    return int(width), int(height)


@contextmanager
def waiting(text: str, quiet: bool) -> Iterator[None]:
    """A spinner on stderr while something takes its time."""
    from rich.console import Console

    console = Console(stderr=True)
    if quiet or not console.is_terminal:
        yield
        return
    with console.status(text):
        yield


def load_pipeline(model: str) -> NextFlowPipeline:
    """The model of --model, with a spinner while it loads. Raises RequestError, StorageError."""
    from nextflow_ar.generation.pipeline import NextFlowPipeline

    with waiting(f"loading {model}", False):
        return NextFlowPipeline.from_pretrained(model)


def sampling(pipeline: NextFlowPipeline, **given: str | None) -> SamplingSettings:
    """The model's settings with the options that were given. Raises UsageError, SettingError."""
    changes = {name: _per_scale(text, "--" + name.replace("_", "-")) for name, text in given.items()}
    return pipeline.defaults.changed(**changes)


def numbered(out: Path, count: int) -> list[Path]:
    """The output file itself for one picture, ``name-1.png`` and so on for several."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{i + 1}") for i in range(count)]


def writable(path: Path) -> None:
    """Fail before the work, not after it, when a picture cannot be written there."""
    from PIL import Image

    from nextflow_ar.tokenizer.pictures import PictureError

    Image.init()
    if Image.EXTENSION.get(path.suffix.lower()) not in Image.SAVE:
        raise UsageError(f"{path}: cannot write '{path.suffix}' pictures; use .png, .jpg or .webp")
    if path.is_dir():
        raise UsageError(f"{path} is a folder; name a file to write")
    if path.parent.exists() and not path.parent.is_dir():
        raise PictureError(f"{path}: cannot be written: {path.parent} is not a folder")


def as_array(picture: Any) -> np.ndarray:
    """(H, W, 3) uint8 of a Pillow image."""
    import numpy as np

    return np.asarray(picture)


def save_numbered(pictures: list[Any], out: Path) -> list[str]:
    """Write pictures as :func:`numbered` names them; returns the names."""
    from nextflow_ar.tokenizer.pictures import save_picture

    paths = numbered(out, len(pictures))
    for picture, path in zip(pictures, paths, strict=True):
        save_picture(as_array(picture), path)
    return [str(path) for path in paths]


def free_folder(path: Path) -> None:
    """Fail before the work when a folder cannot be made there."""
    for parent in (path, *path.parents):
        if parent.exists() and not parent.is_dir():
            raise UsageError(f"{path}: {parent} is a file; name a folder to write")
