"""Where rows come from: folders with captions, JSONL, parquet, WebDataset shards, Hugging Face data sets.

Every source is a fixed list of items in a fixed order, so that "row 1,234" means the same in every run: ``rows(start)``
goes on from any place. A broken item is a RowError in its place, never the end of the source.
"""

from __future__ import annotations

import json
import tarfile
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from PIL import Image as PILImage

from nextflow_ar.data.rows import Row, RowError, parse_row

_CAPTION_SUFFIXES = (".txt", ".caption")
_TABLES = ("metadata.jsonl", "captions.jsonl", "manifest.jsonl")


class SourceError(ValueError):
    """A source cannot be read at all: one line that says why and what is accepted."""


class Source(Protocol):
    """Rows in a fixed order."""

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """Row ``start`` and all that follow; a broken one is its error."""
        ...


def open_source(place: Path | str) -> Source:
    """The source at a path, by what is there; or ``hf://OWNER/NAME[/SPLIT]``. Raises SourceError."""
    if str(place).startswith("hf://"):
        return HubSource(str(place).removeprefix("hf://"))
    path = Path(place)
    if not path.exists():
        raise SourceError(f"{path}: no such file or folder")
    if path.is_file():
        kind = _KINDS.get(path.suffix.lower())
        if kind is None:
            raise SourceError(f"{path}: {', '.join(_KINDS)} files, folders and hf://OWNER/NAME are accepted")
        return kind([path])
    for suffix, kind in _KINDS.items():
        shards = [p for p in sorted(path.glob(f"*{suffix}")) if p.name not in _TABLES]
        if shards:
            return kind(shards)
    return FolderSource(path)


class _Files:
    """A source of files that are read from their beginning."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`."""
        yield from islice(self._all(), start, None)

    def _all(self) -> Iterator[Row | RowError]:
        raise NotImplementedError


class JsonlSource(_Files):
    """JSONL files; pictures' paths are relative to the file."""

    def _all(self) -> Iterator[Row | RowError]:
        for path in self.files:
            with path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if line.strip():
                        yield _parsed(line, f"{path}:{number}", path.parent)


def _parsed(line: bytes, where: str, folder: Path | None) -> Row | RowError:
    try:
        values = json.loads(line)
    except (ValueError, UnicodeDecodeError) as error:
        return RowError(f"{where}: not valid JSON ({error})")
    if not isinstance(values, dict):
        return RowError(f"{where}: a row is a mapping of keys to values, got {type(values).__name__}")
    return _row(values, where, folder)


def _row(values: Mapping[str, Any], where: str, folder: Path | None) -> Row | RowError:
    try:
        return parse_row(values, where, folder)
    except RowError as error:
        return error


class ParquetSource:
    """Parquet files; pictures as bytes, as Hugging Face's struct of bytes and path, or as paths relative to the file."""

    def __init__(self, files: list[Path]) -> None:
        self.files = files

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`; whole row groups before ``start`` are not read."""
        try:
            import pyarrow.parquet as pq  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SourceError("parquet files need pyarrow: pip install 'nextflow-ar[train]'") from None
        passed = 0
        for path in self.files:
            try:
                file = pq.ParquetFile(path)
            except Exception as error:
                raise SourceError(
                    f"{path}: not a parquet file ({' '.join(str(error).split())[:100]})"
                ) from None
            number = 0
            for group in range(file.num_row_groups):
                size = file.metadata.row_group(group).num_rows
                if passed + size <= start:
                    passed, number = passed + size, number + size
                    continue
                for values in file.read_row_group(group).to_pylist():
                    if passed >= start:
                        yield _row(values, f"{path}: row {number}", path.parent)
                    passed, number = passed + 1, number + 1


class FolderSource:
    """Pictures with captions: a table (metadata.jsonl with ``file_name`` and ``text``, as Hugging Face's image folders have
    it; captions.jsonl or manifest.jsonl likewise), or beside each picture a text file of the same name.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.table = next((folder / name for name in _TABLES if (folder / name).is_file()), None)
        PILImage.init()
        self.files = sorted(
            p for p in folder.rglob("*") if p.suffix.lower() in PILImage.EXTENSION and p.is_file()
        )
        if not self.files:
            raise SourceError(f"{folder}: neither pictures nor {', '.join(_KINDS)} files in this folder")

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`."""
        if self.table is not None:
            yield from islice(self._listed(self.table), start, None)
            return
        for path in self.files[start:]:
            beside = next((p for s in _CAPTION_SUFFIXES if (p := path.with_suffix(s)).is_file()), None)
            if beside is None:
                yield RowError(f"{path}: no caption beside it ({path.stem}.txt or .caption)")
                continue
            text = beside.read_text(errors="replace")
            yield _row({"image": path.name, "caption": text}, str(path), path.parent)

    def _listed(self, table: Path) -> Iterator[Row | RowError]:
        with table.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                where = f"{table}:{number}"
                try:
                    values = json.loads(line)
                except ValueError as error:
                    yield RowError(f"{where}: not valid JSON ({error})")
                    continue
                yield (
                    _row(_image_folder(values), where, self.folder)
                    if isinstance(values, dict)
                    else RowError(
                        f"{where}: a row is a mapping of keys to values, got {type(values).__name__}"
                    )
                )


def _image_folder(values: dict[str, Any]) -> dict[str, Any]:
    """Hugging Face's names as ours; several captions: the first."""
    found = dict(values)
    if "image" not in found and (file := found.get("file_name") or found.get("file")):
        found["image"] = file
    if "image" in found and not {"caption", "prompt", "question"} & set(found):
        told = found.pop("text", None) or found.get("captions")
        found["caption"] = told[0] if isinstance(told, list) and told else told
    return found


class TarSource(_Files):
    """WebDataset shards: files of one key (``0001.jpg``, ``0001.txt`` or ``0001.json``) are one row."""

    def _all(self) -> Iterator[Row | RowError]:
        for path in self.files:
            try:
                with tarfile.open(path) as shard:
                    for key, members in _by_key(shard):
                        yield _shard_row(members, f"{path}: {key}")
            except (tarfile.TarError, EOFError, OSError) as error:
                yield RowError(f"{path}: the shard is damaged ({error})")


def _by_key(shard: tarfile.TarFile) -> Iterator[tuple[str, dict[str, bytes]]]:
    key, found = "", {}
    for member in shard:
        if not member.isfile():
            continue
        folder, _, name = member.name.rpartition("/")
        stem, _, suffix = name.partition(".")
        current = f"{folder}/{stem}" if folder else stem
        if current != key:
            if found:
                yield key, found
            key, found = current, {}
        content = shard.extractfile(member)
        found[suffix.lower()] = content.read() if content else b""
    if found:
        yield key, found


def _shard_row(members: dict[str, bytes], where: str) -> Row | RowError:
    values: dict[str, Any] = {}
    for suffix, data in members.items():
        if suffix == "json":
            try:
                values |= json.loads(data)
            except (ValueError, TypeError) as error:
                return RowError(f"{where}: not valid JSON ({error})")
    for suffix, data in members.items():
        if suffix in ("txt", "caption"):
            values.setdefault("caption", data.decode(errors="replace"))
        elif "." + suffix.rpartition(".")[2] in PILImage.registered_extensions():
            name, dot, _ = suffix.rpartition(".")
            values[name if dot else "image"] = data  # "0001.source.png" is the key "source"
    return _row(values, where, None)


class HubSource:
    """A Hugging Face data set, streamed: ``OWNER/NAME`` or ``OWNER/NAME/SPLIT`` (default: train)."""

    def __init__(self, name: str) -> None:
        parts = name.strip("/").split("/")
        if len(parts) not in (2, 3):
            raise SourceError(f"hf://{name}: hf://OWNER/NAME or hf://OWNER/NAME/SPLIT is accepted")
        self.name, self.split = "/".join(parts[:2]), parts[2] if len(parts) == 3 else "train"

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        """See :class:`Source`."""
        try:
            import datasets  # pyright: ignore[reportMissingImports]
        except ImportError:
            raise SourceError("hf:// needs the package datasets: pip install 'nextflow-ar[train]'") from None
        try:
            found = datasets.load_dataset(self.name, split=self.split, streaming=True).skip(start)
        except Exception as error:
            raise SourceError(f"hf://{self.name}: {' '.join(str(error).split())[:140]}") from None
        for number, values in enumerate(found, start=start):
            yield _row(_image_folder(dict(values)), f"hf://{self.name}/{self.split}: row {number}", None)


_KINDS: dict[str, type[JsonlSource] | type[ParquetSource] | type[TarSource]] = {
    ".jsonl": JsonlSource,
    ".parquet": ParquetSource,
    ".tar": TarSource,
}
