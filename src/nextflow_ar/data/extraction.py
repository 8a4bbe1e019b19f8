"""Codes computed once, offline: rows of any source become parquet shards of texts and (input, target) codes.

A shard covers a fixed range of a source's rows and is written whole or not at all, so an extraction that was stopped goes
on with the shards that are missing, and several processes share the work by shard number. What a shard holds depends on its
rows and the setting alone, not on who writes it. Every shard names the tokenizer that made it by fingerprint; with another
tokenizer it is refused.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nextflow_ar.data.code_shards import MANIFEST, CodeShard, ExtractionConfig, encoded, parquet, setting_of
from nextflow_ar.data.rows import PicturePart, Row, RowError, TextPart
from nextflow_ar.data.sources import Source, SourceError
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.transforms import invertible
from nextflow_ar.data.video import VideoSource
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError, write_atomic
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import PictureError, place
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection, kept_features


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
    progress: Callable[[int, int], None] = lambda shards, rows: None,
) -> dict[str, Any]:
    """Write the shards that are missing; returns how many rows this call wrote and which it left out, and why.

    ``place``: where the source is, as ``open_source`` takes it, so that an extraction goes on with the same one only; "" is
    not looked at. ``process`` of ``processes`` writes every so-manieth shard. ``counter``: of the text tokenizer that will
    be trained with, so that shards tell how many tokens their texts have and no training has to count them. Raises
    StorageError when the folder holds an extraction of another source, setting or tokenizer, or cannot be written.
    """
    writer = ShardWriter(source, tokenizer, out, config, place, counter)
    written, broken, number = 0, {}, process
    while (found := writer.write(number)) is not None:
        written, broken = written + found["rows"], broken | found["broken"]
        note_broken(out, f"{process:03d}", found["broken"])  # with its shard: a stop loses neither
        if found["wrote"]:
            progress(number, written)
        number += processes
    return {"rows": written, "broken": broken}


class ShardWriter:
    """Writes the shards of one extraction, any of them and in any order. ``place``, ``counter``: see :func:`extract`.

    Raises StorageError when the folder holds an extraction of another source, setting or tokenizer.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: ImageTokenizer,
        out: Path,
        config: ExtractionConfig,
        place: Path | str = "",
        counter: TokenCounter | None = None,
    ) -> None:
        self.counter = counter
        self.source, self.tokenizer, self.out, self.config = source, tokenizer, out, config
        self._ahead: tuple[int, Iterator[Row | RowError]] = (-1, iter(()))  # (row, the source from there on)
        self.fingerprint = tokenizer.fingerprint()
        parquet()
        manifest = {"tokenizer": self.fingerprint, "codes": tokenizer.config.quantizer.codebook_size}
        manifest |= {"config": asdict(config)}
        if isinstance(source, VideoSource):
            manifest["video"] = asdict(source.config)
        _claim(out, manifest, config, place)

    def write(self, number: int) -> dict[str, Any] | None:
        """Write shard ``number`` if it is missing, or short of rows that a grown source has by now: {"wrote", "rows",
        "broken"}; None when the source has no such rows.

        Raises StorageError when it is there, but damaged or of another tokenizer.
        """
        name = self.out / f"{number:06d}.parquet"
        if name.is_file() and not self.short(number):
            return {"wrote": False, "rows": 0, "broken": {}}
        first = number * self.config.rows
        rows = self._rows(first)
        found = list(islice(rows, self.config.rows))
        self._ahead = (first + len(found), rows)
        if not found:
            return None
        records, wrong = _records(found, first, self.tokenizer, self.config)
        write_atomic(name, encoded(records, self.fingerprint, len(found), self.counter))
        return {"wrote": True, "rows": len(records), "broken": wrong}

    def short(self, number: int) -> bool:
        """Whether a shard that is there ended with the source, which has more rows now. Not seen of a source that does not
        know its length, and of shards that do not say how many they read. Raises StorageError as :meth:`write` does.
        """
        shard = CodeShard(self.out / f"{number:06d}.parquet", self.fingerprint)
        held = self.config.rows if shard.read is None else shard.read
        if held >= self.config.rows:
            return False
        try:
            return self.source.count() > number * self.config.rows + held
        except SourceError:
            return False

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


def note_broken(out: Path, who: str, broken: dict[str, str]) -> None:
    """Add to the list of rows that an extraction left out, by row number."""
    if not broken:
        return
    known = out / f"broken_{who}.json"
    before = json.loads(known.read_text()) if known.is_file() else {}
    write_atomic(known, json.dumps(before | broken, indent=1, ensure_ascii=False).encode())


def same_source(out: Path, place: Path | str) -> None:
    """Raises StorageError when ``out`` holds an extraction of a source at another place. Manifests of before say none."""
    path = out / MANIFEST
    known = json.loads(path.read_text()).get("source", "") if path.is_file() else ""
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
    known = json.loads(path.read_text())
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
        raise StorageError(f"{out} holds codes of another tokenizer or setting: name another folder")
    same_source(out, place)


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
    rows: list[Row | RowError], first: int, tokenizer: ImageTokenizer, config: ExtractionConfig
) -> tuple[list[dict[str, Any]], dict[str, str]]:
    records, wrong = [], {}
    waiting: dict[ScaleSchedule, list[_Wanted]] = {}
    for number, row in enumerate(rows, start=first):
        if isinstance(row, RowError):
            wrong[str(number)] = str(row)
            continue
        try:
            parts = [
                _part(part, (config.seed, number, i), tokenizer, config) for i, part in enumerate(row.parts)
            ]
        except (PictureError, ValueError) as error:
            wrong[str(number)] = str(error) if row.where in str(error) else f"{row.where}: {error}"
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
    return records, wrong


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
    schedule = ScaleSchedule.nearest(picture.height, picture.width, config.num_scales)
    canvas, _ = place(picture, *schedule.image_size(tokenizer.config.downsample), config.fit)
    final = ScaleSchedule.nearest(picture.height, picture.width, 18).final
    common |= {"final": list(final), "scales": config.num_scales}
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
