"""Finding clips, video files and folders of numbered frames, and what is told of them beside or in a table."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from nextflow_ar.data.rows import RowError
from nextflow_ar.data.sources import SourceError

SUFFIXES = (".mp4", ".m4v", ".mov", ".webm", ".mkv", ".avi", ".mpg", ".mpeg", ".gif")
_TABLES = ("metadata.jsonl", "captions.jsonl", "manifest.jsonl")
_NUMBERED = re.compile(r"(frame[-_ ]?)?\d+", re.IGNORECASE)
_TIMED = re.compile(r"\[(\d+(?:\.\d+)?)\]\s*(.*)")


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
    """The clips at a path; None when it holds pictures or nothing. Raises SourceError for pictures and videos mixed."""
    if path.is_file():
        return [_clip(path, {}, str(path))] if path.suffix.lower() in SUFFIXES else None
    table = next((path / name for name in _TABLES if (path / name).is_file()), None)
    if table is not None:
        return _listed(table)
    PILImage.init()
    files = [p for p in path.rglob("*") if p.is_file()]
    videos = sorted(p for p in files if p.suffix.lower() in SUFFIXES)
    pictures = [p for p in files if p.suffix.lower() in PILImage.EXTENSION and p.suffix.lower() != ".gif"]
    films = [p for p in videos if p.suffix.lower() != ".gif"]
    if films and pictures:
        raise SourceError(
            f"{path}: {len(films)} video files and {len(pictures)} pictures: put them into folders of their own, "
            "or list the clips in metadata.jsonl"
        )
    if videos and not pictures:
        return [_clip(p, {}, str(p)) for p in videos]
    folders = sorted({p.parent for p in pictures})
    apart = folders == [path] or path not in folders
    if folders and apart and all(frame_files(folder) for folder in folders):
        return [_clip(folder, {}, str(folder)) for folder in folders]
    return None


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
    named = values.get("video") or values.get("folder")
    name = named or values.get("file_name") or values.get("file")
    if not isinstance(name, str) or not (named or Path(name).suffix.lower() in SUFFIXES):
        return RowError(f"{where}: names no clip (video, folder, or file_name of a video file)"), False
    clip = _clip(table.parent / name, values, f"{where}: {name}")
    return clip, isinstance(clip, Clip) and (bool(named) or not name.lower().endswith(".gif"))


def _clip(path: Path, values: Mapping[str, Any], where: str) -> Clip | RowError:
    """A clip with what its table's line and the files beside it tell."""
    try:
        told = {**_beside(path), **{k: v for k, v in values.items() if v is not None}}
        caption = next((told[key] for key in ("caption", "prompt", "text") if told.get(key)), None)
        if caption is not None and not isinstance(caption, str):
            raise ValueError(f"caption is text, got {type(caption).__name__}")
        fps = told.get("fps")
        if fps is not None and not (isinstance(fps, int | float) and fps > 0):
            raise ValueError(f"fps is a number above 0, got {fps!r}")
        texts = _texts(told.get("texts") or [])
        return Clip(path, where, caption.strip() if caption else None, texts, fps)
    except ValueError as error:
        return RowError(f"{where}: {error}")


def _texts(values: object) -> tuple[tuple[float | None, str], ...]:
    if not isinstance(values, list):
        raise ValueError("texts is a list of texts, or of mappings with time and text")
    found: list[tuple[float | None, str]] = []
    for i, value in enumerate(values):
        at = value.get("time") if isinstance(value, Mapping) else None
        text = value.get("text") if isinstance(value, Mapping) else value
        if not isinstance(text, str) or not text.strip():
            raise ValueError(f"texts[{i}] has no text")
        if isinstance(value, Mapping) and not (isinstance(at, int | float) and at >= 0):
            raise ValueError(f"texts[{i}]: time is in seconds, got {at!r}")
        found.append((None if at is None else float(at), text.strip()))
    return tuple(sorted(found, key=lambda item: item[0] or 0.0))


def _beside(clip: Path) -> dict[str, Any]:
    """What the file of a clip's name tells: ``.json``, ``.jsonl`` (a text a line) or ``.txt``. Raises ValueError."""
    base = clip if clip.is_dir() else clip.with_suffix("")
    note = next(
        (p for s in (".json", ".jsonl", ".txt") if (p := base.with_name(base.name + s)).is_file()), None
    )
    if note is None:
        return {}
    content = note.read_text(errors="replace")
    try:
        if note.suffix == ".json":
            values = json.loads(content)
            if not isinstance(values, dict):
                raise ValueError("a mapping is needed")
            return values
        if note.suffix == ".jsonl":
            lines = [json.loads(line) for line in content.splitlines() if line.strip()]
            if not all(isinstance(line, dict) for line in lines):
                raise ValueError("every line is a mapping")
            told = {k: v for line in lines if "time" not in line for k, v in line.items()}
            return told | {"texts": [line for line in lines if "time" in line]}
    except ValueError as error:
        raise ValueError(f"{note.name} beside it: {error}") from None
    timed = [(match, line) for line in content.splitlines() if line.strip()
             for match in [_TIMED.match(line.strip())]]  # fmt: skip
    caption = " ".join(line.strip() for match, line in timed if match is None)
    texts = [{"time": float(match[1]), "text": match[2]} for match, _ in timed if match]
    return {"caption": caption, "texts": texts}
