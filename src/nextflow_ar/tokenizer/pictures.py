"""Picture files in and out: any mode, orientation and size, bounded memory, one-line errors."""

from __future__ import annotations

import contextlib
import io
import os
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from nextflow_ar.types import Frame

Fit = Literal["pad", "crop"]
"""How a picture of any size gets onto a canvas: "pad" keeps all of it (its border is repeated outwards; it is scaled down
only where it is larger than the canvas), "crop" covers the canvas and loses what hangs over.
"""

MAX_PIXELS = 64_000_000
"""Largest picture that is opened, in pixels; the header is checked before anything is decoded."""


class PictureError(ValueError):
    """A picture cannot be read or written: one line that names the file and the reason."""


def open_picture(path: Path | str, name: str = "") -> Image.Image:
    """The first frame of a picture file as upright 8-bit RGB; transparency is laid over white. ``name``: what messages call
    it (default: its path).

    Accepts what Pillow reads: PNG, JPEG, WebP, GIF, BMP, TIFF and more, in grey, palette, CMYK, 16-bit or alpha modes.
    Raises PictureError when the file is missing, damaged, no picture, or larger than :data:`MAX_PIXELS`.
    """
    return _opened(Path(path), name or str(path))


def decode_picture(
    data: bytes, name: str, *, most: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> Image.Image:
    """:func:`open_picture` for the bytes of a file; ``name``: what messages call it. ``most``: pixels; ``formats``:
    Pillow's names of those that are tried (None: all that it reads).
    """
    return _opened(io.BytesIO(data), name, most, formats)


def decode_mask(
    data: bytes, name: str, *, most: int = MAX_PIXELS, formats: Sequence[str] | None = None
) -> np.ndarray:
    """(H, W) bool of a picture that marks an area: where it is transparent if it has transparency, else where it is white
    (at least half). Raises PictureError as :func:`decode_picture`.
    """
    return _opened(io.BytesIO(data), name, most, formats, marked)


def marked(picture: Image.Image) -> np.ndarray:
    """(H, W) bool: transparent where there is transparency, else white."""
    if "A" in picture.getbands() or "transparency" in picture.info:
        alpha = np.asarray(picture.convert("RGBA").getchannel("A"))
        if alpha.min() < 255:
            return alpha < 128
    return np.asarray(to_rgb(picture).convert("L")) >= 128


def _opened(
    source: Path | io.BytesIO,
    name: str,
    most: int = MAX_PIXELS,
    formats: Sequence[str] | None = None,
    made: Callable[[Image.Image], Any] | None = None,
) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            with Image.open(source, formats=None if formats is None else tuple(formats)) as file:
                if file.width * file.height > most:
                    raise PictureError(
                        f"{name}: {file.width}x{file.height} pixels are too many; up to {most / 1_000_000:g} "
                        "megapixels are accepted"
                    )
                file.load()
                return (made or to_rgb)(ImageOps.exif_transpose(file) or file)
    except PictureError:
        raise
    except (FileNotFoundError, NotADirectoryError):
        raise PictureError(f"{name}: no such file") from None
    except IsADirectoryError:
        raise PictureError(f"{name}: is a folder, not a picture") from None
    except PermissionError:
        raise PictureError(f"{name}: may not be read") from None
    except Image.DecompressionBombError:
        raise PictureError(
            f"{name}: the picture is too large; up to {MAX_PIXELS // 1_000_000} megapixels are accepted"
        ) from None
    except UnidentifiedImageError:
        raise PictureError(
            f"{name}: not a picture (PNG, JPEG, WebP, GIF, BMP and TIFF are accepted)"
        ) from None
    except MemoryError:
        raise
    except Exception as error:  # what Pillow's decoders raise differs from format to format
        reason = " ".join(str(error).split())[:120]
        raise PictureError(f"{name}: damaged or truncated picture ({reason})") from None


def upright(picture: Image.Image) -> Image.Image:
    """A picture turned and mirrored as its EXIF orientation says, which it then no longer has; itself where it has none."""
    picture.load()  # what is wrong with the picture itself is told here
    try:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in range(2, 9)
        return ImageOps.exif_transpose(picture) if turned else picture
    except (
        Exception
    ):  # EXIF that is none, at which Pillow raises many kinds: the picture is whole all the same
        return picture


def as_picture(array: np.ndarray) -> Image.Image:
    """An array as a picture: (H, W, 3) uint8, or what else Pillow takes, such as grey (H, W) or RGBA. Raises ValueError."""
    array = np.asarray(array)
    try:
        if 0 in array.shape or array.ndim not in (2, 3):
            raise ValueError("it is empty, or no plane")
        return Image.fromarray(np.ascontiguousarray(array))
    except (TypeError, ValueError):
        told = f"{tuple(array.shape)} {array.dtype}"
        raise ValueError(f"a picture is a Pillow image or (H, W, 3) uint8, got {told}") from None


def to_rgb(picture: Image.Image) -> Image.Image:
    """8-bit RGB: 16-bit grey and numbers up to 1 are scaled, transparency is laid over white."""
    if picture.mode.startswith("I;16") or picture.mode in ("I", "F"):
        values = np.asarray(picture, dtype=np.float64)
        most = values.max(initial=0)
        top = 65535.0 if most > 255 else 1.0 if picture.mode == "F" and most <= 1 else 255.0
        return Image.fromarray(np.clip(values * (255.0 / top) + 0.5, 0, 255).astype(np.uint8)).convert("RGB")
    if "A" in picture.getbands() or "transparency" in picture.info:
        front = picture.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", front.size, (255, 255, 255, 255)), front).convert(
            "RGB"
        )
    return picture.convert("RGB")


def fit_picture(picture: Image.Image, height: int, width: int) -> np.ndarray:
    """A picture scaled to cover ``height`` x ``width`` and cropped about its middle, (height, width, 3) uint8."""
    if picture.size != (width, height):
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BICUBIC)
    return np.asarray(picture, dtype=np.uint8)


def place(picture: Image.Image, height: int, width: int, fit: Fit) -> tuple[np.ndarray, Frame]:
    """A picture on a canvas of ``height`` x ``width``, (height, width, 3) uint8, and how to undo it."""
    if fit == "crop":
        scale = max(height / picture.height, width / picture.width)
        seen = (round(height / scale), round(width / scale))
        return np.array(fit_picture(picture, height, width)), Frame((0, 0, height, width), seen)
    size = (picture.height, picture.width)
    scale = min(1.0, height / size[0], width / size[1])
    h, w = (
        max(1, min(limit, round(side * scale))) for limit, side in zip((height, width), size, strict=True)
    )
    if (h, w) != size:
        picture = picture.resize((w, h), Image.Resampling.LANCZOS)
    top, left = (height - h) // 2, (width - w) // 2
    around = ((top, height - h - top), (left, width - w - left), (0, 0))
    canvas = np.pad(np.asarray(picture, np.uint8), around, mode="edge")
    return canvas, Frame((top, left, top + h, left + w), size)


def unplace(canvas: np.ndarray, frame: Frame | None) -> Image.Image:
    """The picture that :func:`place` put on a canvas, at its own size."""
    if frame is None:
        return Image.fromarray(canvas)
    top, left, bottom, right = frame.box
    picture = Image.fromarray(canvas[top:bottom, left:right])
    height, width = frame.size
    return (
        picture
        if picture.size == (width, height)
        else picture.resize((width, height), Image.Resampling.BICUBIC)
    )


def files_below(folder: Path) -> list[Path]:
    """All files in a folder and below it, in no order. Linked folders are entered, none twice, nor what the folder itself
    lies in; what they link to within it is there already. Folders that may not be read are left out. Raises OSError for
    what fails otherwise.
    """
    root = os.path.realpath(folder)
    seen, found = {root}, []

    def failed(error: OSError) -> None:
        if not isinstance(error, PermissionError):
            raise error

    for place, folders, files in os.walk(folder, onerror=failed, followlinks=True):
        entered = []
        for name in sorted(folders):
            path = os.path.join(place, name)
            real = os.path.realpath(path)
            within = os.path.islink(path) and real.startswith(os.path.join(root, ""))
            above = root.startswith(os.path.join(real, ""))
            if real not in seen and not within and not above:
                seen.add(real)
                entered.append(name)
        folders[:] = entered
        found += [path for name in files if (path := Path(place, name)).is_file()]
    return found


def picture_files(paths: list[Path], *, strict: bool = False) -> list[Path]:
    """The picture files among files and folders (with all that lies below them), in order. Raises PictureError for a folder
    without pictures and, ``strict``, for a path that is not there, which is found out on opening it otherwise.
    """
    Image.init()
    found: list[Path] = []
    for path in paths:
        if not path.is_dir():
            if strict and not path.is_file():
                raise PictureError(f"{path}: no such file or folder")
            found.append(path)
            continue
        inside = sorted(p for p in files_below(path) if p.suffix.lower() in Image.EXTENSION)
        if not inside:
            raise PictureError(f"{path}: the folder holds no pictures")
        found += inside
    return found


def save_picture(pixels: np.ndarray, path: Path | str) -> None:
    """Write (H, W, 3) uint8 as the file's suffix says, whole or not at all. Raises PictureError."""
    path = Path(path)
    Image.init()
    kind = Image.EXTENSION.get(path.suffix.lower())
    if kind is None or kind not in Image.SAVE:
        raise PictureError(f"{path}: cannot write '{path.suffix}' pictures; use .png, .jpg or .webp")
    _written(path, lambda place: Image.fromarray(pixels).save(place, format=kind))


def save_frames(frames: Sequence[Image.Image], path: Path | str, rate: float) -> None:
    """Write a moving picture (.gif, .webp or .png, the last two without loss) of ``rate`` frames a second that starts over
    at its end, whole or not at all. Raises PictureError.
    """
    path = Path(path)
    kind = {".gif": "GIF", ".webp": "WEBP", ".png": "PNG"}.get(path.suffix.lower())
    if kind is None:
        raise PictureError(f"{path}: cannot write '{path.suffix}' videos; use .gif, .webp or .png")
    options = {"duration": round(1000 / rate), "loop": 0} | ({"lossless": True} if kind == "WEBP" else {})
    first, *rest = frames
    _written(path, lambda place: first.save(place, format=kind, save_all=True, append_images=rest, **options))


def _written(path: Path, save: Callable[[Path], None]) -> None:
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save(temporary)
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise PictureError(f"{path}: cannot be written: {error.strerror or error}") from None
