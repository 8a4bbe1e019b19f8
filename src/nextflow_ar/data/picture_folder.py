"""A folder of pictures as rows: with a table, or with a text file beside each picture."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

from PIL import Image as PILImage

from nextflow_ar.data.layouts import deeper, saved_folder, told_unreadable, unreadable
from nextflow_ar.data.rows import Row, RowError
from nextflow_ar.data.sources import KINDS, TABLES, SourceError, make_row, parsed
from nextflow_ar.data.spans import Span, checksum, words
from nextflow_ar.tokenizer.pictures import files_below

_CAPTION_SUFFIXES = (".txt", ".caption")
_NOTES = frozenset(
    {
        "readme", "license", "licence", "copying", "notice", "changelog", "classes", "requirements", "prompts", "captions",
        "tags", "labels", "sources", "credits", "attribution", "urls", "list", "train", "val", "test",
    }
)  # fmt: skip
"""Texts beside captioned pictures that are no captions."""


class FolderSource:
    """Pictures with captions: a table (metadata.jsonl with ``file_name`` and ``text``, as Hugging Face's image folders have
    it; captions.jsonl or manifest.jsonl likewise), or beside each picture a text file of the same name. ``notes``: what
    lies there and is no row, a line each: such texts without a picture, and files that look like pictures of other kinds.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = next((folder / name for name in TABLES if (folder / name).is_file()), None)
        PILImage.init()
        below = files_below(folder)
        self.files = sorted(p for p in below if p.suffix.lower() in PILImage.EXTENSION)
        unread = unreadable(below) if self.table is None else []
        self.notes = [told_unreadable(unread)] if unread else []
        if self.table is None and (alone := _alone(below, self.files, unread)):
            self.notes.append(f"{len(alone)} captions have no picture beside them, such as {alone[0]}")
        if not self.files:
            what = saved_folder(folder) or f"neither pictures nor {', '.join(KINDS)} files in this folder"
            what += f" ({told_unreadable(unread)})" if unread else ""
            raise SourceError(
                f"{folder}: {what}{'' if saved_folder(folder) else deeper(folder, tuple(KINDS))}"
            )
        self.seeks = self.table is None

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`."""
        if self.table is not None:
            yield from islice(self._listed(self.table), start, None)
            return
        for path in self.files[start:]:
            beside = _beside(path)
            if beside is None:
                yield RowError(f"{path}: no caption beside it ({path.stem}.txt or .caption)")
                continue
            text = words(beside.read_bytes())
            values = {"image": path.name, "caption": text}
            yield (
                RowError(f"{beside}: not UTF-8") if text is None else make_row(values, str(path), path.parent)
            )

    def count(self) -> int:
        """See :class:`Source`."""
        if self.table is None:
            return len(self.files)
        with self.table.open("rb") as file:
            return sum(1 for line in file if line.strip())

    def spans(self, start: int, stop: int) -> list[Span]:
        """See :func:`spans_of`."""
        if self.table is None:
            return [
                (
                    path.relative_to(self.folder).as_posix(),
                    zlib.crc32(told.read_bytes()) if (told := _beside(path)) else 0,
                )
                for path in self.files[start:stop]
            ]
        with self.table.open("rb") as file:
            lines = list(islice((line for line in file if line.strip()), start, stop))
        return [(len(lines), checksum(lines))]

    def _listed(self, table: Path) -> Iterator[Row | RowError]:
        with table.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{table}:{number}"
                yield parsed(line, where, self.folder, listed=True)


def _beside(picture: Path) -> Path | None:
    """The file of a picture's caption."""
    return next((p for s in _CAPTION_SUFFIXES if (p := picture.with_suffix(s)).is_file()), None)


def _alone(below: list[Path], pictures: list[Path], unread: list[Path]) -> list[Path]:
    """The captions without a picture, in folders in which pictures have captions."""
    captioned = {p.parent for p in pictures if _beside(p) is not None}
    shown = {p.with_suffix("") for p in (*pictures, *unread)} | set(pictures)  # "1.png.txt" is beside "1.png"
    found = (p for p in below if p.suffix.lower() in _CAPTION_SUFFIXES and p.parent in captioned)
    alone = (p for p in found if p.with_suffix("") not in shown and p.name[0] != ".")
    return sorted(p for p in alone if p.stem.partition(".")[0].lower() not in _NOTES)
