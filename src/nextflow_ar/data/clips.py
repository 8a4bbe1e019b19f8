"""Finding clips, video files and folders of numbered frames, and what is told of them beside or in a table."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from PIL import Image as PILImage

from nextflow_ar.data.layouts import VIDEO_SUFFIXES, short, shown
from nextflow_ar.data.rows import RowError, printable
from nextflow_ar.data.sources import SourceError
from nextflow_ar.tokenizer.pictures import files_below

_TABLES = ("metadata.jsonl", "captions.jsonl", "manifest.jsonl")
_UNREAD = ("metadata.csv", "metadata.parquet")
_NUMBERED = re.compile(r"(frame[-_ ]?)?\d+", re.IGNORECASE)
_TIMED = re.compile(r"\[(\d+(?:\.\d+)?)\]\s*(.*)")
_SLOWEST = 1e-4  # frames per second, one in three hours: a slower clip would be looked at without end


@dataclass(frozen=True)
class Clip:
    """``path``: a file, or a folder of frames. ``texts``: (seconds, or None for "one a look", text) in order. ``fps``: of
    a folder's frames; None: every frame is looked at, and times count at the rate of the looks.
    """

    path: Path
    where: str
    caption: str | None = None
    texts: tuple[tuple[float | None, str], ...] = ()
    fps: float | None = None


def frame_files(folder: Path) -> list[Path]:
    """The numbered frames of a folder (``001.jpg``, ``frame_12.png``) by number; none when it holds other pictures too,
    or captions beside them.
    """
    PILImage.init()
    files = [p for p in folder.iterdir() if p.suffix.lower() in PILImage.EXTENSION and p.is_file()]
    if not files or not all(_NUMBERED.fullmatch(p.stem) for p in files):
        return []
    notes = {p.stem for p in folder.iterdir() if p.suffix.lower() in (".txt", ".caption", ".json")}
    if any(p.stem in notes for p in files):
        return []
    return sorted(files, key=lambda p: (int(re.sub(r"\D", "", p.stem)), p.name))


def find_clips(path: Path) -> list[Clip | RowError] | None:
    """The clips at a path; None when it holds pictures or nothing. Raises SourceError for pictures and videos mixed, and
    for a table that nothing would read.
    """
    if path.is_file():
        return [_clip(path, {}, str(path))] if path.suffix.lower() in VIDEO_SUFFIXES else None
    table = next((path / name for name in _TABLES if (path / name).is_file()), None)
    if table is not None:
        return _listed(table)
    files = files_below(path)
    videos = sorted(p for p in files if p.suffix.lower() in VIDEO_SUFFIXES)
    pictures = [p for p in files if _is_picture(p.suffix)]
    films = [p for p in videos if p.suffix.lower() != ".gif"]
    if films and pictures:
        raise SourceError(
            f"{path}: {len(films)} video files and {len(pictures)} pictures: put them into folders of their own, "
            "or list the clips in metadata.jsonl"
        )
    if videos and not pictures:
        _no_tables(path, {p.parent for p in videos})
        return [_clip(p, {}, str(p)) for p in videos]
    folders = sorted({p.parent for p in pictures})
    apart = folders == [path] or path not in folders
    if folders and apart and all(frame_files(folder) for folder in folders):
        _no_tables(path, folders)
        return [_clip(folder, {}, str(folder)) for folder in folders]
    return None


def _is_picture(suffix: str) -> bool:
    """Whether a file of that suffix is a still picture; a GIF may be a film, and Pillow counts some videos in."""
    PILImage.init()
    return suffix.lower() in PILImage.EXTENSION and suffix.lower() not in VIDEO_SUFFIXES


def _no_tables(path: Path, folders: Iterable[Path]) -> None:
    """Raises SourceError for a table in the folders of clips below ``path`` or above them: its captions would be lost."""
    above = {up for folder in folders for up in (folder, *folder.parents) if up.is_relative_to(path)}
    for folder in sorted(above):
        found = [p.name for p in folder.iterdir() if p.name in _TABLES or p.name in _UNREAD]
        if found and folder == path:
            raise SourceError(
                f"{path}: {min(found)} is not read: make it metadata.jsonl, a line of JSON a clip, or move it away"
            )
        if found:
            raise SourceError(
                f"{folder} has a table of its own ({min(found)}), so it is a data set: name that folder"
            )


def _listed(table: Path) -> list[Clip | RowError] | None:
    """The clips of a table; None when its first lines name none, so that it is one of pictures. A GIF among other pictures
    is one of them.
    """
    found: list[Clip | RowError] = []
    sure = False
    with table.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            clip, film = _line(line, table, number)
            found.append(clip)
            sure = sure or film
            if len(found) == 20 and not sure and not all(isinstance(clip, Clip) for clip in found):
                return None
    return found if sure or (found and all(isinstance(clip, Clip) for clip in found)) else None


def _line(line: bytes, table: Path, number: int) -> tuple[Clip | RowError, bool]:
    """What a line names, and whether that can be no picture."""
    where = f"{table}:{number}"
    try:
        values = json.loads(line)
    except ValueError as error:
        return RowError(f"{where}: not valid JSON ({error})"), False
    values = values if isinstance(values, dict) else {}
    file = values.get("file_name") or values.get("file")
    picture = file or values.get("image")
    suffix = Path(picture).suffix.lower() if isinstance(picture, str) else ""
    # beside the name of a file the others may be labels: the split that a picture is of, the film it was taken from
    named = None if _is_picture(suffix) or suffix == ".gif" else values.get("video")
    named = named or (None if _is_picture(suffix) or suffix in VIDEO_SUFFIXES else values.get("folder"))
    name = named or file
    if not isinstance(name, str) or not (named or Path(name).suffix.lower() in VIDEO_SUFFIXES):
        return RowError(f"{where}: names no clip (video, folder, or file_name of a video file)"), False
    clip = _clip(table.parent / name, values, f"{where}: {short(name)}")
    return clip, bool(named) or not name.lower().endswith(".gif")


def _clip(path: Path, values: Mapping[str, Any], where: str) -> Clip | RowError:
    """A clip with what its table's line and the files beside it tell; the line counts more."""
    try:
        told = {**_beside(path), **_told(values)}
        caption, fps = told.get("caption"), told.get("fps")
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"caption is text, got {type(caption).__name__}")
        if fps is not None and not (_is_number(fps) and fps > 0):
            raise ValueError(f"fps is a number above 0, got {shown(fps)}")
        if fps is not None and fps < _SLOWEST:
            raise ValueError(f"fps is at least {_SLOWEST:g}, got {shown(fps)}")
        texts = _texts(told.get("texts") or [])
        if any(printable(text) != text for text in (caption or "", *(text for _, text in texts))):
            raise ValueError("a text has half of a character")
        rate = None if fps is None else float(fps)
        return Clip(path, printable(where), (caption or "").strip() or None, texts, rate)
    except ValueError as error:
        return RowError(f"{where}: {error}")


def _is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a number; it may be none ("NaN", "Infinity"), and too large for one."""
    try:
        return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _texts(values: object) -> tuple[tuple[float | None, str], ...]:
    if not isinstance(values, list):
        raise ValueError("texts is a list of texts, or of mappings with time and text")
    found: list[tuple[float | None, str]] = []
    for i, value in enumerate(values):
        at = value.get("time") if isinstance(value, Mapping) else None
        text = value.get("text") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{i}] has no text")
        if isinstance(value, Mapping) and not (_is_number(at) and at >= 0):
            raise ValueError(f"texts[{i}]: time is in seconds, got {shown(at)}")
        found.append((None if at is None else float(at), text.strip()))
    return tuple(sorted(found, key=lambda item: item[0] or 0.0))


def _told(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a line or a note says of a clip: ``caption``, ``texts``, ``fps``, those of them that say something."""
    caption = next((values[key] for key in ("caption", "prompt", "text") if values.get(key)), None)
    found = {"caption": caption, "texts": values.get("texts") or None, "fps": values.get("fps")}
    return {key: value for key, value in found.items() if value is not None}


def _beside(clip: Path) -> dict[str, Any]:
    """What the files of a clip's name tell together; where they differ, ``.json`` before ``.jsonl`` before ``.txt``.

    Raises ValueError.
    """
    base = Path(os.path.abspath(clip))  # "." has no name
    base = base if clip.is_dir() else base.with_suffix("")
    told: dict[str, Any] = {}
    for suffix, read in ((".json", _of_json), (".jsonl", _of_jsonl), (".txt", _of_txt)):
        note = base.with_name(base.name + suffix)
        if not note.is_file():
            continue
        try:
            told = _told(read(note.read_bytes().decode("utf-8-sig"))) | told
        except UnicodeDecodeError as error:
            raise ValueError(f"{note.name} beside it is not UTF-8 (byte {error.start})") from None
        except (ValueError, OSError) as error:
            raise ValueError(f"{note.name} beside it: {error}") from None
    return told


def _of_json(content: str) -> dict[str, Any]:
    values = json.loads(content)
    if not isinstance(values, dict):
        raise ValueError("a mapping is needed")
    return values


def _of_jsonl(content: str) -> dict[str, Any]:
    """A text a line; lines without a time tell the rest."""
    lines = [json.loads(line) for line in content.split("\n") if line.strip()]
    if not all(isinstance(line, dict) for line in lines):
        raise ValueError("every line is a mapping")
    told = {k: v for line in lines if "time" not in line for k, v in line.items()}
    timed = [line for line in lines if "time" in line]
    return told | ({"texts": timed} if timed else {})


def _of_txt(content: str) -> dict[str, Any]:
    """The caption, and lines such as ``[3.5] it falls``."""
    timed = [(match, line) for line in content.splitlines() if line.strip()
             for match in [_TIMED.match(line.strip())]]  # fmt: skip
    caption = " ".join(line.strip() for match, line in timed if match is None)
    return {"caption": caption, "texts": [{"time": float(m[1]), "text": m[2]} for m, _ in timed if m]}
