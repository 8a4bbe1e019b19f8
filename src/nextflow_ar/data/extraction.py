"""Codes computed once, offline: rows of any source become parquet shards of texts and (input, target) codes.

A shard covers a fixed range of a source's rows and is written whole or not at all, so an extraction that was stopped goes
on with the shards that are missing, and several processes share the work by shard number. What a shard holds depends on its
rows and the setting alone, not on who writes it. Every shard names the tokenizer that made it by fingerprint; with another
tokenizer it is refused.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextflow_ar.data.code_shards import (
    MANIFEST,
    CodeShard,
    ExtractionConfig,
    encoded,
    parquet,
    read_manifest,
    readable,
    setting_of,
)
from nextflow_ar.data.rows import LeftOut, PicturePart, Row, RowError, TextPart, printable
from nextflow_ar.data.sources import Source, SourceError, spans_of
from nextflow_ar.data.spans import Span
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.transforms import invertible
from nextflow_ar.data.video import VideoSource
from nextflow_ar.scales import ScaleSchedule, final_of
from nextflow_ar.storage import StorageError, write_atomic
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer, canvas_schedule
from nextflow_ar.tokenizer.pictures import PictureError, place
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection, kept_features

_LOG = logging.getLogger(__name__)
_PURPOSE = "on purpose: "
"""Before why a row was left out that has no fault."""
_UNTOLD = "left out, and no list says why"


def extract(
    source: Source,
    tokenizer: ImageTokenizer,
    out: Path,
    config: ExtractionConfig,
    *,
    place: Path | str = "",
    process: int = 0,
    processes: int = 1,
    counter: TokenCounter | None = None,
    again: Collection[int] = (),
    progress: Callable[[int, int], None] = lambda shards, rows: None,
) -> dict[str, Any]:
    """Write the shards that are missing; returns how many rows this call wrote and which it left out, and why.

    ``place``: where the source is, as ``open_source`` takes it, so that an extraction goes on with the same one only; "" is
    not looked at. ``process`` of ``processes`` writes every so-manieth shard. ``counter``: of the text tokenizer that will
    be trained with, so that shards tell how many tokens their texts have and no training has to count them. ``again``:
    shards that are made although they are there (:func:`lacking`). Raises
    StorageError when the folder holds an extraction of another source, setting or tokenizer, or cannot be written.
    """
    writer = ShardWriter(source, tokenizer, out, config, place, counter, again)
    written, broken, number = 0, {}, process
    while (found := writer.write(number, f"{process:03d}")) is not None:
        written, broken = written + found["rows"], broken | found["broken"]
        if found["wrote"]:
            progress(number, written)
        number += processes
    return {"rows": written, "broken": broken}


class ShardWriter:
    """Writes the shards of one extraction, any of them and in any order. ``place``, ``counter``, ``again``: see
    :func:`extract`.

    Raises StorageError when the folder is the source's own or holds an extraction of another source, setting or tokenizer,
    or a damaged list.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: ImageTokenizer,
        out: Path,
        config: ExtractionConfig,
        place: Path | str = "",
        counter: TokenCounter | None = None,
        again: Collection[int] = (),
    ) -> None:
        self.counter, self.again = counter, again
        self.source, self.tokenizer, self.out, self.config = source, tokenizer, out, config
        self._ahead: tuple[int, Iterator[Row | RowError]] = (-1, iter(()))  # (row, the source from there on)
        self.fingerprint = tokenizer.fingerprint()
        parquet()
        apart(out, place)
        manifest = {"tokenizer": self.fingerprint, "codes": tokenizer.config.quantizer.codebook_size}
        manifest |= {"config": asdict(config)}
        if isinstance(source, VideoSource):
            manifest["video"] = asdict(source.config)
        _claim(out, manifest, config, place)
        _reasons(out)  # a damaged list is told before the work

    def write(self, number: int, who: str = "000") -> dict[str, Any] | None:
        """Write shard ``number`` unless it is :func:`settled`: {"wrote", "rows", "broken"}; None if there are no such rows.

        ``who``: whose list names the rows left out; nobody else writes that one meanwhile. Raises StorageError when the
        shard is there, but damaged, of another tokenizer, or of rows that are no more.
        """
        if number not in self.again and settled(
            self.out, number, self.source, self.config.rows, self.fingerprint
        ):
            return {"wrote": False, "rows": 0, "broken": {}}
        name, first = self.out / f"{number:06d}.parquet", number * self.config.rows
        rows = self._rows(first)
        records, wrong, read = _records(islice(rows, self.config.rows), first, self.tokenizer, self.config)
        self._ahead = (first + read, rows)
        if not read:
            none_behind(self.out, number)
            return None
        items = _items(self.source, first, first + read)
        # before the shard: a stop between them loses no reason, and what a list says of no shard is not believed
        note_broken(self.out, who, wrong, first, self.config.rows)
        write_atomic(name, encoded(records, self.fingerprint, read, self.counter, items))
        return {"wrote": True, "rows": len(records), "broken": wrong}

    def _rows(self, first: int) -> Iterator[Row | RowError]:
        """The source from a row on: by going on where the last shard ended, unless it starts anywhere at little cost."""
        at, rows = self._ahead
        if at < 0 or at > first or (at < first and getattr(self.source, "seeks", False)):
            return self.source.rows(first)
        skip = getattr(rows, "skip", None)
        if skip is not None:
            skip(first - at)
        else:
            next(islice(rows, first - at, first - at), None)
        return rows


def settled(out: Path, number: int, source: Source, rows: int, fingerprint: str) -> bool:
    """Whether shard ``number``, of ``rows`` rows each, is there and has no other rows and no fewer than the source by now.

    A source that grew behind its last row has its last shard made anew; one that changed before it, all that changed, with
    a warning each. Not seen of a source that tells neither its length nor its files, and of shards of before. A shard with
    pictures on schedules that inference has not (:meth:`CodeShard.astray`) is made anew, too: an extraction that goes on
    holds no two kinds. Raises StorageError for a damaged shard, and for one of another image tokenizer.
    """
    path, first = out / f"{number:06d}.parquet", number * rows
    if not path.is_file():
        return False
    shard = CodeShard(path, fingerprint)
    held = rows if shard.read is None else shard.read
    if shard.items and shard.items not in _known_items(source, first, first + held):
        _LOG.warning("%s: rows %d to %d are others by now: extracted again", path, first, first + held - 1)
        return False
    if astray := shard.astray():
        _LOG.warning("%s: %d pictures on schedules that inference has not: extracted again", path, astray)
        return False
    try:
        return held >= rows or source.count() <= first + held
    except SourceError:
        return True


def none_behind(out: Path, number: int) -> None:
    """Raises StorageError for shards from ``number`` on, where the source has no rows any more: they would be trained."""
    left = [
        path for path in sorted(out.glob("*.parquet")) if path.stem.isdigit() and int(path.stem) >= number
    ]
    if left:
        raise StorageError(
            f"{left[0]}: its source has no such rows any more: remove it, and all behind it ({len(left)} in all)"
        )


def _items(source: Source, first: int, stop: int) -> str:
    """Digest of what rows of a source are of and say; "" where it cannot tell."""
    found = spans_of(source, first, stop)
    return "" if found is None else _digest(found)


def _digest(spans: Sequence[Span]) -> str:
    return hashlib.sha256(json.dumps(spans).encode()).hexdigest()[:16]


def _known_items(source: Source, first: int, stop: int) -> tuple[str, ...]:
    """:func:`_items`, and what it was before the words of all kinds of files counted: such shards stay as good."""
    found = spans_of(source, first, stop)
    if found is None:
        return ("",)
    before = [(re.sub(r" [0-9a-f]{8}$", "", str(name)), *rest[:2]) for name, *rest in found if len(rest) > 1]
    return _digest(found), _digest(before)


def note_broken(out: Path, who: str, broken: dict[str, str], first: int, rows: int) -> None:
    """Add to a list why rows are left out, by row number, in place of what it said of rows ``first`` on.

    Raises StorageError for a damaged list.
    """
    known = out / f"broken_{who}.json"
    before = _noted(known) if known.is_file() else {}
    kept = {row: why for row, why in before.items() if not first <= int(row) < first + rows} | broken
    if kept != before:
        write_atomic(known, json.dumps(kept, indent=1, ensure_ascii=False).encode())


def rows_there(out: Path) -> int | None:
    """How many rows the shards of an extraction hold; None where there are no shards. Raises StorageError."""
    shards = [path for path in out.glob("*.parquet") if path.stem.isdigit()]
    if not shards:
        return None
    fingerprint = read_manifest(out / MANIFEST)["tokenizer"]
    return sum(CodeShard(path, fingerprint).rows for path in shards)


def left_out(out: Path) -> dict[str, str]:
    """All rows that the shards there lack for a fault of the rows, by number, and why. Raises StorageError.

    Which they are the shards tell themselves, and the lists of all processes only why: a list that was lost hides none, and
    one of a process that is no more adds none that were made good since.
    """
    path = out / MANIFEST
    if not path.is_file():
        return {}
    manifest = read_manifest(path)
    each = setting_of(manifest, path).rows
    missing: dict[int, str] = {}
    for shard in out.glob("*.parquet"):
        if shard.stem.isdigit():
            missing |= _missing(CodeShard(shard, manifest["tokenizer"]), int(shard.stem) * each, each)
    told = _reasons(out)  # after the shards: whoever writes now writes lists first
    found = {str(row): told.get(str(row), why) for row, why in sorted(missing.items())}
    return {row: why for row, why in found.items() if why and not why.startswith(_PURPOSE)}


def _missing(shard: CodeShard, first: int, rows: int) -> dict[int, str]:
    """Rows from ``first`` on that a shard is of and lacks, with what is said of one that no list names: nothing where the
    shard does not tell how many it is of. Raises StorageError.
    """
    held = rows if shard.read is None else shard.read
    if shard.rows >= held:
        return {}
    with readable(shard.path), parquet().ParquetFile(shard.path, page_checksum_verification=True) as file:
        there = set(file.read(columns=["row"]).column("row").to_pylist())
    untold = "" if shard.read is None else _UNTOLD
    return dict.fromkeys((row for row in range(first, first + held) if row not in there), untold)


def _reasons(out: Path) -> dict[str, str]:
    """What all lists say, by row; of a row's several reasons a fault. Raises StorageError for a damaged list."""
    found: dict[str, str] = {}
    for path in sorted(out.glob("broken_*.json")):
        noted = _noted(path)
        found |= {r: why for r, why in noted.items() if r not in found or not why.startswith(_PURPOSE)}
    return found


def _noted(path: Path) -> dict[str, str]:
    """The rows of one list. Raises StorageError for a damaged one."""
    try:
        return {str(int(row)): str(why) for row, why in json.loads(path.read_bytes()).items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise StorageError(
            f"{path}: no list of rows left out ({error}): remove it (shards tell which these are, it says why)"
        ) from None


def lacking(out: Path) -> tuple[int, ...]:
    """Numbers of the shards that lack rows for a fault of these."""
    if not (missing := left_out(out)):
        return ()
    each = setting_of(read_manifest(out / MANIFEST), out / MANIFEST).rows
    return tuple(sorted({int(row) // each for row in missing}))


def forget_left_out(out: Path, shards: Collection[int], still: Mapping[str, str]) -> None:
    """Drop from all lists what they said of ``shards``, which were made again, unless it is ``still`` so."""
    each = setting_of(read_manifest(out / MANIFEST), out / MANIFEST).rows
    for path in out.glob("broken_*.json"):
        noted = _noted(path)
        kept = {
            row: why for row, why in noted.items() if int(row) // each not in shards or still.get(row) == why
        }
        if kept != noted:
            write_atomic(path, json.dumps(kept, indent=1, ensure_ascii=False).encode())


def apart(out: Path, place: Path | str) -> None:
    """Raises StorageError when shards in ``out`` would be read as the source at ``place``, or that one as a shard."""
    if not place or str(place).startswith("hf://"):
        return
    source, folder = Path(place).resolve(), out.resolve()
    if folder == source or (folder == source.parent and source.suffix.lower() == ".parquet"):
        raise StorageError(f"{out}: the source lies there, and shards would mix with it: name another folder")


def same_source(out: Path, place: Path | str) -> None:
    """Raises StorageError when ``out`` holds an extraction of a source at another place. Manifests of before say none."""
    path = out / MANIFEST
    known = read_manifest(path).get("source", "") if path.is_file() else ""
    if place and known and known != _whole_place(place):
        raise StorageError(
            f"{out} holds codes of {known}, not of {_whole_place(place)}: name another folder "
            f'(the same data at a new place: change "source" in its {MANIFEST})'
        )


def _whole_place(place: Path | str) -> str:
    """A place that means the same in every working directory."""
    return str(place).rstrip("/") if str(place).startswith("hf://") else str(Path(place).resolve())


def _claim(out: Path, manifest: dict[str, Any], config: ExtractionConfig, place: Path | str) -> None:
    path = out / MANIFEST
    if not path.is_file():
        manifest |= {"source": _whole_place(place)} if place else {}
        write_atomic(path, json.dumps(manifest, indent=1).encode())
        return
    known = read_manifest(path)
    known.pop("source", None)
    begun = setting_of(known, path)
    known["config"] = asdict(begun)
    if known | {"config": asdict(replace(begun, given=config.given))} == manifest != known:
        how = "" if begun.given else "out"
        raise StorageError(
            f"{out}: its extraction was begun with{how} self-correction of given pictures: go on with{how} "
            "--correct-given, or name another folder"
        )
    if known != manifest:
        raise StorageError(
            f"{out} holds codes of another tokenizer or setting ({_differences(known, manifest)}): name another folder"
        )
    same_source(out, place)


def _differences(there: dict[str, Any], asked: dict[str, Any]) -> str:
    """Which values of two manifests are not the same, those there first."""
    told = []
    for key in sorted(there.keys() | asked.keys()):
        a, b = there.get(key), asked.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            told += [_differences(a, b)] if a != b else []
        elif a != b:
            told.append(f"{key} {_brief(a)}, not {_brief(b)}")
    return "; ".join(told)


def _brief(value: object) -> str:
    text = "none" if value is None else str(value)
    return text if len(text) <= 20 else text[:10] + "..."


@dataclass
class _Wanted:
    """A picture on its canvas, until its codes are there. ``into``: its part of a record. ``before``: the one whose
    features it takes over where they are alike. ``invertible``: training may turn its record into captioning.
    """

    seed: tuple[int, int, int]
    schedule: ScaleSchedule
    pixels: torch.Tensor
    into: dict[str, Any]
    before: _Wanted | None = None
    invertible: bool = False


def _records(
    rows: Iterable[Row | RowError], first: int, tokenizer: ImageTokenizer, config: ExtractionConfig
) -> tuple[list[dict[str, Any]], dict[str, str], int]:
    """Records, why rows were left out, and how many rows there were; taken one by one, since frames are large."""
    records, wrong, read = [], {}, 0
    waiting: dict[ScaleSchedule, list[_Wanted]] = {}
    for number, row in enumerate(rows, start=first):
        read += 1
        if isinstance(row, RowError):
            wrong[str(number)] = f"{_PURPOSE if isinstance(row, LeftOut) else ''}{row}"
            continue
        try:
            parts = [
                _part(part, (config.seed, number, i), tokenizer, config) for i, part in enumerate(row.parts)
            ]
        except (PictureError, ValueError) as error:
            told = printable(str(error))
            wrong[str(number)] = told if row.where in told else f"{row.where}: {told}"
            continue
        told = [part.into if isinstance(part, _Wanted) else part for part in parts]
        if config.kept is not None:
            _follow([part for part in parts if isinstance(part, _Wanted)])
        turns_round = invertible(told)
        for wanted in parts:
            if isinstance(wanted, _Wanted):
                wanted.invertible = turns_round
                same = waiting.setdefault(wanted.schedule, [])
                same.append(wanted)
                if len(same) == config.batch:
                    _encode(same, tokenizer, config)
                    same.clear()
        records.append({"row": number, "where": row.where, "parts": told})
    for same in waiting.values():
        if same:
            _encode(same, tokenizer, config)
    return records, wrong, read


def _follow(pictures: list[_Wanted]) -> None:
    """Tell every picture to be drawn which one it could copy: the one before it, if that is of its schedule."""
    for before, each in pairwise(pictures):
        if each.into["supervised"] and before.schedule == each.schedule:
            each.before = before


def _part(
    part: TextPart | PicturePart,
    seed: tuple[int, int, int],
    tokenizer: ImageTokenizer,
    config: ExtractionConfig,
) -> dict[str, Any] | _Wanted:
    common: dict[str, Any] = {"role": part.role, "supervised": part.supervised, "text": None}
    if isinstance(part, TextPart):
        return common | {"text": part.text}
    picture = part.picture.open()
    down = tokenizer.config.downsample
    size = ScaleSchedule.nearest(picture.height, picture.width, config.num_scales).image_size(down)
    schedule = canvas_schedule(tokenizer.config, *size)
    canvas, _ = place(picture, *size, config.fit)
    common |= {"final": final_of(schedule.final, len(schedule)), "scales": len(schedule)}
    return _Wanted(seed, schedule, torch.from_numpy(canvas), common)


@torch.inference_mode()
def _encode(wanted: list[_Wanted], tokenizer: ImageTokenizer, config: ExtractionConfig) -> None:
    """Give pictures of one schedule their codes. The encoders see them together, the quantiser each by itself, in order:
    what one could copy has its codes before it.
    """
    pixels = to_unit(torch.stack([each.pixels for each in wanted]).to(tokenizer.device))
    features = tokenizer.embed(pixels)
    for i, each in enumerate(wanted):
        rng = np.random.default_rng(each.seed)
        corrected = config.tokens > 0 and rng.random() < config.samples
        corrected = corrected and (each.into["supervised"] or config.given)
        correction = SelfCorrection(config.tokens, config.top_k, config.temperature) if corrected else None
        generator = torch.Generator(device=tokenizer.device).manual_seed(int(rng.integers(2**62)))
        own = features[i : i + 1]
        if each.before is not None and config.kept is not None:
            own = _kept(own, each, each.before, tokenizer, config.kept)
        found = tokenizer.quantizer.quantize(own, each.schedule, correction=correction, generator=generator)
        each.into["target"] = found.target[0].tolist()
        each.into["input"] = found.input[0].tolist() if corrected else None  # the same as the targets
        # under self-correction the targets answer what was sampled before them: they are no picture by themselves
        clean = tokenizer.quantizer.quantize(own, each.schedule) if corrected and each.invertible else None
        each.into["clean"] = None if clean is None else clean.target[0].tolist()


def _kept(
    own: torch.Tensor, each: _Wanted, before: _Wanted, tokenizer: ImageTokenizer, most: int
) -> torch.Tensor:
    """The features of ``each`` with those that the codes of ``before`` add up to wherever the two look alike."""
    fed = before.into["input"] or before.into["target"]
    old = tokenizer.quantizer.accumulate(torch.tensor([fed], device=own.device), each.schedule)
    difference = (each.pixels.short() - before.pixels.short()).abs().amax(-1)
    return kept_features(own, old, (difference <= most)[None].to(own.device))
