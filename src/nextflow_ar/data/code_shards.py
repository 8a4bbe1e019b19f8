"""The shards of an extraction: what is in them, and reading it in parts.

Records are read without their codes first: what documents cost follows from their texts and the sizes of their pictures.
Codes lie in groups of few rows, so that a process of many reads those of its own rows and little else.
"""

from __future__ import annotations

import io
import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from pydantic import ConfigDict

from nextflow_ar.config import from_dict
from nextflow_ar.data.sources import SourceError
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import Fit
from nextflow_ar.types import Codes, Document, Image, Text

MANIFEST = "manifest.json"
_TOKENIZER = b"nextflow_ar.tokenizer"
"""Key in a shard's own metadata: fingerprint of the image tokenizer that made it."""
_READ = b"nextflow_ar.rows"
"""Another: how many rows of the source it is of, broken ones too."""
_COUNTED = b"nextflow_ar.text_tokenizer"
"""Another: the text tokenizer (``TokenCounter.fingerprint``) whose tokens of every text it tells, if it does."""
_ITEMS = b"nextflow_ar.source_rows"
"""Another: a digest of which files' rows it is of, if the source could tell."""
_SCHEDULES = b"nextflow_ar.schedules"
"""Another: "canonical" where all of its pictures lie on the schedules of their canvases."""
_ALONE = 12
"""From so many scales on, no two aspect ratios share a canvas."""
CODES = ("target", "input", "clean")
"""Columns of a picture's codes; all but the first may be null."""
_TOGETHER = 32
"""Rows whose codes are read together."""


@dataclass(frozen=True)
class ExtractionConfig:
    """How a source is extracted; a folder holds the shards of one setting.

    ``num_scales``: level of all pictures, each on the canvas of its nearest aspect ratio. ``fit``: how it gets onto that; a
    model that is trained on nothing else reads pictures likewise. ``rows``: of the source per shard.

    Self-correction (paper section 3.4): ``samples``: share of the pictures that get it (paper: 1), ``tokens``: share of
    their cells (paper: 0.6), ``top_k`` and ``temperature`` as in SelfCorrection. ``seed`` decides the sampling.
    ``given``: correct pictures that carry no loss, too; generation sees such pictures as they are, so by default training
    does. A corrected picture that inversion could give has its plain codes beside, as ``clean``.

    ``batch``: pictures of equal schedule that the encoders see together; 1 gives the codes that ``ImageTokenizer.encode``
    gives, more may round differently and turn codes that lie near a boundary.

    ``kept``: for models with ``copies``: a picture to be drawn behind another one of its schedule takes over that one's
    features where no channel of a pixel differs by more than this (0: files that keep pixels as they are; JPEG: about 12),
    so that copying is right there (:func:`~nextflow_ar.tokenizer.quantizer.kept_features`). None: every picture by itself.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    num_scales: int
    fit: Fit = "crop"
    rows: int = 1000
    samples: float = 1.0
    tokens: float = 0.6
    top_k: int = 8
    temperature: float = 1.0
    seed: int = 0
    given: bool = False
    batch: int = 1
    kept: int | None = None

    def __post_init__(self) -> None:
        if self.kept is not None and not 0 <= self.kept <= 255:
            raise ValueError(f"kept is a difference of pixels from 0 to 255, got {self.kept}")


def read_manifest(path: Path) -> dict[str, Any]:
    """What an extraction says of itself. Raises StorageError."""
    try:
        found = json.loads(path.read_text())
    except FileNotFoundError:
        raise StorageError(f"{path.parent}: no extraction here (it lacks {path.name})") from None
    except ValueError as error:
        raise StorageError(f"{path}: not valid JSON ({error})") from None
    if not isinstance(found, dict) or not {"tokenizer", "config"} <= found.keys():
        raise StorageError(f"{path}: no extraction's manifest (it lacks tokenizer or config)")
    return found


def is_extraction(folder: Path) -> bool:
    """Whether codes lie there instead of rows: whether it has an extraction's manifest, or its first shard is one."""
    try:
        if folder.is_dir() and read_manifest(folder / MANIFEST):
            return True
    except (OSError, StorageError):  # damaged, or lost
        pass
    return folder.is_dir() and any(map(is_shard, sorted(folder.glob("*.parquet"))[:1]))


def is_shard(path: Path) -> bool:
    """Whether a parquet file is a shard of codes, by its metadata."""
    try:
        pa = _arrow()
    except SourceError:
        return False
    try:
        return _TOKENIZER in (parquet().read_metadata(path).metadata or {})
    except (OSError, ValueError, pa.ArrowException):
        return False


def lacks(folder: Path, files: Iterable[Path]) -> str:
    """A line where shards are not there although later ones are, of an extraction that was stopped, or lost; else ""."""
    there = {int(path.stem) for path in files if path.stem.isdigit()}
    lost = sorted(set(range(max(there, default=0))) - there)
    some = ", ".join(f"{number:06d}" for number in lost[:3]) + ", ..." * (len(lost) > 3)
    return f"{folder} lacks {len(lost)} shards ({some}): extract again writes them" if lost else ""


def setting_of(manifest: dict[str, Any], path: Path) -> ExtractionConfig:
    """The setting of a manifest, with the fields that came later. Before ``given``, given pictures were corrected, too."""
    found = from_dict(ExtractionConfig, manifest["config"], str(path))
    if "given" not in manifest["config"]:
        found = replace(found, given=found.tokens > 0 and found.samples > 0)
    return found


def _arrow() -> Any:
    """Pyarrow, with its module for parquet. Raises SourceError where it is not installed."""
    try:
        import pyarrow as pa  # pyright: ignore[reportMissingImports]
        import pyarrow.parquet  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("shards of codes need pyarrow: pip install 'nextflow-ar[train]'") from None
    return pa


def parquet() -> Any:
    """Pyarrow's module of that name. Raises SourceError where it is not installed."""
    return _arrow().parquet


def _schema() -> Any:
    pa = _arrow()
    part = pa.struct(
        [
            ("role", pa.string()),
            ("supervised", pa.bool_()),
            ("text", pa.string()),
            ("tokens", pa.int32()),
            ("final", pa.list_(pa.int32())),
            ("scales", pa.int32()),
            *((name, pa.list_(pa.int32())) for name in CODES),
        ]
    )
    return pa.schema([("row", pa.int64()), ("where", pa.string()), ("parts", pa.list_(part))])


def encoded(
    records: list[dict[str, Any]],
    fingerprint: str,
    read: int,
    counter: TokenCounter | None = None,
    items: str = "",
) -> bytes:
    """The file of a shard with these records, made by the image tokenizer of this fingerprint from ``read`` rows.

    A record: ``row`` and ``where`` of the source, and ``parts``, each with ``role``, ``supervised`` and either ``text``
    or ``final``, ``scales`` and codes: ``target``, ``input`` (None: the same), ``clean`` (None: none beside). With a
    ``counter`` every text gets its number of ``tokens``. ``items``: a digest of what the rows are of.
    """
    pa = _arrow()
    metadata = {_TOKENIZER: fingerprint, _READ: str(read)} | ({_ITEMS: items} if items else {})
    if not _astray([part for record in records for part in record["parts"]]):
        metadata[_SCHEDULES] = "canonical"
    if counter is not None:
        metadata[_COUNTED] = counter.fingerprint
        texts = [part for record in records for part in record["parts"] if part.get("text") is not None]
        for part, tokens in zip(texts, counter([part["text"] for part in texts]), strict=True):
            part["tokens"] = tokens
    table = pa.Table.from_pylist(records, schema=_schema()).replace_schema_metadata(metadata)
    buffer = io.BytesIO()
    parquet().write_table(
        table, buffer, compression="zstd", row_group_size=_TOGETHER, write_page_checksum=True
    )
    return buffer.getvalue()


@contextmanager
def readable(path: Path) -> Iterator[None]:
    """What Arrow says of a shard becomes one line. Raises StorageError; SourceError where Arrow is not installed."""
    pa = _arrow()
    try:
        yield
    except (OSError, KeyError, ValueError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())[:100]
        raise StorageError(
            f"{path}: the shard cannot be read ({reason}): remove it and extract again"
        ) from None


class CodeShard:
    """One file of an extraction. ``rows``: records in it; ``read``: rows of the source that it is of (None: it does not
    say); ``items``: digest of what these are ("": likewise); ``counted``: fingerprint of the text tokenizer whose tokens it
    tells ("": of none).

    Raises StorageError, here and where it is read, for a damaged one; for one that another image tokenizer made, too;
    SourceError without pyarrow. One of before shards named their tokenizer is taken for what the manifest says.
    """

    def __init__(self, path: Path, fingerprint: str) -> None:
        self.path = path
        with readable(path):
            self._metadata = parquet().read_metadata(path)
            schema = self._metadata.schema
            self._outline = [
                name
                for i in range(len(schema))
                if not {*CODES, "where"} & set((name := schema.column(i).path).split("."))
            ]
            told = self._metadata.metadata or {}
            self.read = int(told[_READ]) if _READ in told else None
            self.items = told.get(_ITEMS, b"").decode()
            self.counted = told.get(_COUNTED, b"").decode()
        if told.get(_TOKENIZER, fingerprint.encode()) != fingerprint.encode():
            raise StorageError(
                f"{path}: the shard was made by another image tokenizer than its folder's: remove it and extract again"
            )
        self.rows: int = self._metadata.num_rows
        self._canonical = told.get(_SCHEDULES) == b"canonical"
        sizes = [self._metadata.row_group(i).num_rows for i in range(self._metadata.num_row_groups)]
        self._ends = list(accumulate(sizes))

    def _open(self) -> Any:
        return parquet().ParquetFile(self.path, metadata=self._metadata, page_checksum_verification=True)

    def table(self) -> Any:
        """All of it, as an Arrow table; columns that it is older than are null."""
        with readable(self.path), self._open() as file:
            return file.read().cast(_schema())

    def records(self) -> list[dict[str, Any]]:
        """All of them (see :func:`encoded`), whole."""
        with readable(self.path):
            return self.table().to_pylist()

    def outlines(self) -> Any:
        """``row`` and ``parts`` of its records without their codes, as they are in the file."""
        with readable(self.path), self._open() as file:
            return file.read(columns=self._outline)

    def astray(self) -> int:
        """How many pictures lie on another schedule than inference has for their canvas. Versions of before made such codes
        below 12 scales, where several aspect ratios share a canvas; they are read as they are.
        """
        if self._canonical:
            return 0
        names = [self._metadata.schema.column(i).path for i in range(self._metadata.num_columns)]
        scales = next((i for i, name in enumerate(names) if name.split(".")[-1] == "scales"), 0)
        groups = [self._metadata.row_group(i) for i in range(self._metadata.num_row_groups)]
        known = [group.column(scales).statistics for group in groups]
        if all(one is not None and one.has_min_max and one.min >= _ALONE for one in known):
            return 0
        wanted = [name for name in names if {"final", "scales"} & set(name.split("."))]
        with readable(self.path), self._open() as file:
            records = file.read(columns=wanted).column("parts").to_pylist()
        return _astray([part for parts in records for part in parts])

    def place(self, row: int) -> tuple[int, int]:
        """In which group of rows a record is, and which of them it is."""
        group = bisect_right(self._ends, row)
        return group, row - (self._ends[group - 1] if group else 0)

    def group(self, number: int) -> Any:
        """A group of rows, whole."""
        with readable(self.path), self._open() as file:
            return file.read_row_group(number).cast(_schema())


class CodeShards:
    """The documents of an extraction, in the order of the source's rows.

    Raises StorageError when there is none, or when ``tokenizer`` is not the one that made it.
    """

    def __init__(self, folder: Path, tokenizer: ImageTokenizer) -> None:
        path = folder / MANIFEST
        manifest = read_manifest(path)
        self.fingerprint = tokenizer.fingerprint()
        if manifest["tokenizer"] != self.fingerprint:
            raise StorageError(
                f"{folder}: its codes were made by another image tokenizer: extract again with this model's"
            )
        self.config = setting_of(manifest, path)
        self.files = sorted(folder.glob("*.parquet"))
        if not self.files:
            raise StorageError(f"{folder}: the extraction holds no shard yet")

    def shard(self, number: int) -> CodeShard:
        """The shard that is file ``number`` of :attr:`files`. Raises StorageError as CodeShard does."""
        return CodeShard(self.files[number], self.fingerprint)

    def records(self) -> Iterator[dict[str, Any]]:
        """All of them (see :func:`encoded`), whole, shard by shard."""
        for number in range(len(self.files)):
            yield from self.shard(number).records()

    def texts(self, count: int) -> list[str]:
        """Texts of the first ``count`` documents, to train a text tokenizer on."""
        out: list[str] = []
        for number in range(len(self.files)):
            records = self.shard(number).outlines().to_pylist()[:count]
            out += [part["text"] for r in records for part in r["parts"] if part["text"] is not None]
            count -= len(records)
            if count <= 0:
                break
        return out

    def documents(self, start: int = 0, *, dialogue: bool = False) -> Iterator[tuple[int, Document]]:
        """(number of the source's row, document) from row ``start`` on. ``dialogue``: with chat marks around every turn."""
        for number, path in enumerate(self.files):
            if (int(path.stem) + 1) * self.config.rows <= start:
                continue
            for record in self.shard(number).records():
                if record["row"] >= start:
                    yield record["row"], as_document(record["parts"], dialogue=dialogue)


def _astray(parts: Iterable[Mapping[str, Any]]) -> int:
    """How many of these parts are pictures on a schedule that is not canonical."""
    found = Counter((tuple(p["final"]), p["scales"]) for p in parts if p.get("final") is not None)
    return sum(n for kind, n in found.items() if not ScaleSchedule.from_final(*kind).canonical)


def as_document(parts: list[dict[str, Any]], *, dialogue: bool = False) -> Document:
    """The document of a record's parts. ``dialogue``: with chat marks around every turn (:func:`turns`).

    A given picture is fed its plain codes (``clean``) where the shard has them beside self-corrected ones.
    """
    pairs = [(part["role"], _segment(part)) for part in parts]
    return Document(turns(pairs) if dialogue else tuple(segment for _, segment in pairs))


def _segment(part: dict[str, Any]) -> Text | Image:
    if part["text"] is not None:
        return Text(part["text"], part["supervised"])
    height, width = part["final"]
    schedule = ScaleSchedule.from_final((height, width), part["scales"])
    if not part["supervised"] and part.get("clean") is not None:
        return Image(Codes.plain(schedule, torch.tensor(part["clean"])))
    target = torch.tensor(part["target"])
    fed = target if part["input"] is None else torch.tensor(part["input"])
    return Image(Codes(schedule, target, fed), part["supervised"])
