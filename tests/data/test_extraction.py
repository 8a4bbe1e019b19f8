"""Extraction: codes as (input, target) pairs, whole shards, going on after a stop, and no shard of another tokenizer."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import pickle
import platform
import shutil
import signal
import subprocess
import sys
import time
import types
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image as PILImage
from tokenizers import AddedToken, Tokenizer

from nextflow_ar.app.cli import run
from nextflow_ar.data import extraction
from nextflow_ar.data.code_shards import CodeShard, CodeShards, as_document, encoded
from nextflow_ar.data.extraction import (
    ExtractionConfig,
    ShardWriter,
    extract,
    forget_left_out,
    lacking,
    left_out,
    same_source,
    settled,
)  # fmt: skip
from nextflow_ar.data.ray_extraction import ShardActor, extract_with_ray
from nextflow_ar.data.rows import Row, RowError, parse_row
from nextflow_ar.data.sources import SourceError, Span, open_source, spans_of
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.transforms import invert
from nextflow_ar.data.video import VideoConfig
from nextflow_ar.data.workers import Extraction, extract_with_workers, one_thread
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle, checkpoint_folder
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import IGNORED, build
from nextflow_ar.sequence.vocab import Vocabulary, fast_tokenizer, load_text_tokenizer
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.types import Codes, Document, Image, Mark, Text
from tests.conftest import TINY_TOKENIZER, tiny_bundle, tiny_image_tokenizer

CONFIG = ExtractionConfig(num_scales=5, rows=3, tokens=0.6, top_k=4, temperature=5.0)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Eight rows: drawings of two aspect ratios, an edit, a question, a text, and two that are broken."""
    for i in range(4):
        PILImage.fromarray(dead_leaves((i,), 40, 40 if i < 3 else 100)).save(tmp_path / f"{i}.png")
    lines = [
        {"image": "0.png", "caption": "a"},
        {"image": "gone.png", "caption": "b"},
        {"source": "1.png", "instruction": "c", "target": "2.png"},
        {"image": "3.png", "caption": "d"},
        {"image": "1.png", "question": "e?", "answer": "f"},
        {"image": "1.png", "caption": ""},
        {"text": "g"},
        {"image": "2.png", "caption": "h"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    return path


def test_documents_come_back_with_their_codes(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "shards"
    found = extract(open_source(rows), tokenizer, out, CONFIG)
    assert found["rows"] == 6 and list(found["broken"]) == ["1", "5"]
    assert "gone.png: no such file" in found["broken"]["1"] and "caption is empty" in found["broken"]["5"]
    assert json.loads((out / "broken_000.json").read_text()) == found["broken"]
    assert [p.name for p in sorted(out.glob("*.parquet"))] == [
        "000000.parquet",
        "000001.parquet",
        "000002.parquet",
    ]
    shards = CodeShards(out, tokenizer)
    documents = dict(shards.documents())
    assert list(documents) == [0, 2, 3, 4, 6, 7]
    assert [n for n, _ in shards.documents(4)] == [4, 6, 7]
    drawn = documents[0].segments[1]
    assert documents[0].segments[0] == Text("a") and isinstance(drawn, Image) and drawn.supervised
    assert drawn.codes.schedule == ScaleSchedule.square(5)
    sampled = (drawn.codes.input != drawn.codes.target).float().mean()
    assert 0.2 < float(sampled) < 0.6
    plain = tokenizer.encode_bytes(torch.from_numpy(dead_leaves((0,), 40, 40))[None]).target[0]
    assert int(drawn.codes.target[0]) == int(plain[0])  # nothing was corrupted before the first scale
    wide = documents[3].segments[1]
    assert isinstance(wide, Image) and wide.codes.schedule == ScaleSchedule.nearest(40, 100, 5)
    assert [s.supervised for s in documents[2].segments if not isinstance(s, Mark)] == [False, False, True]


SIZES = ((60, 40), (64, 48), (192, 108), (108, 192), (80, 60), (40, 60), (100, 50), (51, 51), (30, 100))
"""Of pictures, width and height."""


def test_a_picture_is_extracted_as_it_is_read_and_drawn(tmp_path: Path) -> None:
    """One canvas, one schedule: of eight scales several aspect ratios share a canvas."""
    tokenizer = ImageTokenizer(replace(TINY_TOKENIZER, num_scales=8)).eval().requires_grad_(False)
    tokenizer.load_state_dict(tiny_image_tokenizer().state_dict())
    for i, (width, height) in enumerate(SIZES):
        PILImage.fromarray(dead_leaves((i,), height, width)).save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text("x")
    config = ExtractionConfig(num_scales=8, tokens=0.0)
    extract(open_source(tmp_path), tokenizer, tmp_path / "s", config)
    shards = CodeShards(tmp_path / "s", tokenizer)
    found = [next(s for s in d.segments if isinstance(s, Image)).codes for _, d in shards.documents()]
    sizes = [codes.schedule.image_size(8) for codes in found]
    assert sizes[:3] == [(48, 80), (56, 72), (48, 80)] and sizes[6] == (48, 88)
    assert [codes.schedule.num_tokens for codes in found[:2]] == [189, 200]
    made = tiny_bundle()
    canvases = {"canvases": [f"{width}x{height}" for height, width in sizes]}
    pipeline = NextFlowPipeline(Bundle(made.model, tokenizer, made.vocab, canvases))
    for i, codes in enumerate(found):
        picture = PILImage.open(tmp_path / f"{i}.png")
        read = pipeline.encode(picture)
        alone = tokenizer.encode(picture, num_scales=8, fit="crop")
        assert isinstance(alone, Codes) and read.schedule == alone.schedule == codes.schedule
        assert torch.equal(read.target, codes.target) and torch.equal(alone.target, codes.target)
        assert pipeline.schedule_for(codes.schedule.image_size(8)[::-1]) == codes.schedule
    assert shards.shard(0).astray() == 0


def as_before(monkeypatch: pytest.MonkeyPatch, final: tuple[int, int]) -> None:
    """Wide pictures get the schedule of an aspect ratio of their own, as versions of before laid them out."""
    old = ScaleSchedule.from_final(final, 5)
    now, grid = extraction.canvas_schedule, extraction.final_of
    monkeypatch.setattr(
        extraction, "canvas_schedule", lambda c, h, w: old if (h, w) == old.image_size(8) else now(c, h, w)
    )
    monkeypatch.setattr(extraction, "final_of", lambda g, n: final if g == old.final else grid(g, n))


def test_an_extraction_of_before_goes_on_with_one_kind_of_schedule(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, out, config = tiny_image_tokenizer(), tmp_path / "s", replace(CONFIG, rows=2)
    lines = []
    for i in range(8):
        wide = i in (2, 6)
        PILImage.fromarray(dead_leaves((i,), 48 if wide else 40, 80 if wide else 40)).save(
            tmp_path / f"{i}.png"
        )
        lines.append({"text": f"{i}"} if i == 5 else {"image": f"{i}.png", "caption": f"{i}"})
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))

    def go(to: Path = out) -> int:
        return extract(open_source(tmp_path / "rows.jsonl"), tokenizer, to, config)["rows"]

    def shown() -> list[ScaleSchedule]:
        documents = [d for _, d in CodeShards(out, tokenizer).documents()]
        return [s.codes.schedule for d in documents for s in d.segments if isinstance(s, Image)]

    own, other = ScaleSchedule.from_final((52, 76), 5), ScaleSchedule.from_final((52, 72), 5)
    assert own.final == other.final and own != other
    with monkeypatch.context() as before:
        as_before(before, (52, 72))
        assert go() == 8
    (out / "000003.parquet").unlink()  # stopped before its last shard
    kept = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    assert shown().count(other) == 1 and own not in shown()  # read as they are
    astray = [CodeShards(out, tokenizer).shard(n).astray() for n in range(3)]
    assert astray == [0, 1, 0]
    for path in out.glob("*.parquet"):  # before shards told that theirs are canonical
        table = pq.read_table(path)
        told = {k: v for k, v in table.schema.metadata.items() if k != b"nextflow_ar.schedules"}
        pq.write_table(table.replace_schema_metadata(told), path)
    assert [CodeShards(out, tokenizer).shard(n).astray() for n in range(3)] == astray
    assert (
        go() == 4 and caplog.text.count("000001.parquet: 1 pictures on schedules that inference has not") == 1
    )
    assert caplog.text.count("extracted again") == 1 and shown().count(own) == 2 and other not in shown()
    caplog.clear()
    assert go() == 0 and not caplog.messages
    assert go(tmp_path / "whole") == 8
    for name in ("000001.parquet", "000003.parquet"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes() != kept.get(name)
    assert (tmp_path / "whole" / "000000.parquet").read_bytes() == kept["000000.parquet"]  # squares as ever


def test_shards_of_many_scales_need_no_look(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, replace(CONFIG, num_scales=12, tokens=0.0))
    for path in out.glob("*.parquet"):
        pq.write_table(pq.read_table(path).replace_schema_metadata(None), path)
    monkeypatch.setattr(CodeShard, "_open", None)
    assert [CodeShards(out, tokenizer).shard(n).astray() for n in range(3)] == [0, 0, 0]


def test_without_correction_inputs_are_the_targets(rows: Path, tmp_path: Path) -> None:
    tokenizer = tiny_image_tokenizer()
    extract(open_source(rows), tokenizer, tmp_path / "s", replace(CONFIG, samples=0.0))
    (first,) = [d for n, d in CodeShards(tmp_path / "s", tokenizer).documents() if n == 0]
    image = first.segments[1]
    assert isinstance(image, Image) and torch.equal(image.codes.input, image.codes.target)
    plain = tokenizer.encode_bytes(torch.from_numpy(dead_leaves((0,), 40, 40))[None]).target[0]
    assert torch.equal(image.codes.target, plain)


def test_given_pictures_are_clean_and_inverted_ones_too(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    plain = [
        tokenizer.encode_bytes(torch.from_numpy(dead_leaves((i,), 40, 40))[None]).target[0] for i in range(3)
    ]
    documents = dict(CodeShards(out, tokenizer).documents())
    for given, picture in ((documents[2].segments[0], 1), (documents[4].segments[0], 1)):
        assert isinstance(given, Image) and not given.supervised
        assert torch.equal(given.codes.input, plain[picture]) and torch.equal(
            given.codes.target, plain[picture]
        )
    edited = documents[2].segments[2]
    assert isinstance(edited, Image) and not torch.equal(edited.codes.input, edited.codes.target)

    shards = CodeShards(out, tokenizer)
    records = {r["row"]: r["parts"] for r in shards.records()}
    assert [n for n, parts in records.items() if any(p["clean"] for p in parts)] == [
        0,
        3,
        7,
    ]  # no edit, no question
    drawn, told = as_document(records[0]), as_document(invert(records[0]))
    (asked, shown), (seen, said) = drawn.segments, told.segments
    assert (
        isinstance(shown, Image)
        and isinstance(seen, Image)
        and asked == Text("a")
        and said == Text("a", True)
    )
    assert torch.equal(seen.codes.input, plain[0]) and torch.equal(seen.codes.target, plain[0])
    assert not torch.equal(shown.codes.target, plain[0]) and not torch.equal(shown.codes.input, plain[0])

    extract(open_source(rows), tokenizer, tmp_path / "all", replace(CONFIG, given=True))
    given = dict(CodeShards(tmp_path / "all", tokenizer).documents())[4].segments[0]
    assert isinstance(given, Image) and not torch.equal(given.codes.input, given.codes.target)


def test_shards_of_before_plain_codes_are_read_as_they_were(rows: Path, tmp_path: Path) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, replace(CONFIG, given=True))
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["config"]["given"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    table = pq.read_table(out / "000000.parquet")
    part = [field for field in table.schema.field("parts").type.value_type if field.name != "clean"]
    schema = table.schema.set(2, pa.field("parts", pa.list_(pa.struct(part)))).remove_metadata()
    records = table.to_pylist()
    for record in records:
        for each in record["parts"]:
            del each["clean"]
    pq.write_table(pa.Table.from_pylist(records, schema=schema), out / "000000.parquet")

    shards = CodeShards(out, tokenizer)
    both = {r["row"]: r["parts"] for r in shards.records()}  # old and new in one table
    seen, new = as_document(invert(both[0])).segments[0], as_document(invert(both[3])).segments[0]
    assert isinstance(seen, Image) and seen.codes.input.tolist() == both[0][1]["input"]
    assert seen.codes.target.tolist() == both[0][1]["target"]
    assert isinstance(new, Image) and new.codes.input.tolist() == both[3][1]["clean"]
    (out / "000001.parquet").unlink()
    with pytest.raises(
        StorageError, match=r"begun with self-correction of given pictures: go on with --corr"
    ):
        extract(open_source(rows), tokenizer, out, CONFIG)
    assert extract(open_source(rows), tokenizer, out, replace(CONFIG, given=True))["rows"] == 2


def test_a_stopped_extraction_goes_on_and_processes_share_the_work(rows: Path, tmp_path: Path) -> None:
    tokenizer = tiny_image_tokenizer()
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    extract(open_source(rows), tokenizer, whole, CONFIG)
    second = extract(open_source(rows), tokenizer, parts, CONFIG, process=1, processes=2)
    assert second["rows"] == 2 and [p.name for p in parts.glob("*.parquet")] == ["000001.parquet"]
    extract(open_source(rows), tokenizer, parts, CONFIG, process=0, processes=2)
    (parts / "000002.parquet").unlink()  # stopped before its last shard
    again = extract(open_source(rows), tokenizer, parts, CONFIG)
    assert again["rows"] == 2
    for name in ("000000", "000001", "000002"):
        assert (whole / f"{name}.parquet").read_bytes() == (parts / f"{name}.parquet").read_bytes()
    assert extract(open_source(rows), tokenizer, parts, CONFIG)["rows"] == 0


def test_a_source_that_has_grown_is_extracted_to_its_end(rows: Path, tmp_path: Path) -> None:
    """The last shard of before is short of the new rows; what it left out is told with it, not at the end."""
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "out"
    extract(open_source(rows), tokenizer, out, CONFIG)
    before = [path.read_bytes() for path in sorted(out.glob("*.parquet"))]
    with rows.open("a") as file:
        file.write("".join(f'\n{{"text": "row {i}"}}' for i in range(8, 13)))
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 2 + 5  # the last of before anew
    records = CodeShards(out, tokenizer)
    found = [r["row"] for r in records.records()]
    assert found == [0, 2, 3, 4, 6, 7, 8, 9, 10, 11, 12]
    after = [path.read_bytes() for path in sorted(out.glob("*.parquet"))]
    assert after[:2] == before[:2] and len(after) == 5
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 0
    (out / "000000.parquet").unlink()
    (out / "broken_000.json").unlink()

    def stop(shard: int, written: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        extract(open_source(rows), tokenizer, out, CONFIG, progress=stop)
    assert list(json.loads((out / "broken_000.json").read_text())) == ["1"]


@pytest.mark.parametrize("seeks", [True, False])
def test_a_stream_is_not_begun_anew_for_every_shard(rows: Path, tmp_path: Path, seeks: bool) -> None:
    class Counted:
        """Told by its file: where it was opened, and how many rows were read."""

        def __init__(self) -> None:
            self.seeks, self.source = seeks, open_source(rows)
            self.opened: list[int] = []
            self.read = 0

        def rows(self, start: int = 0) -> Iterator[Row | RowError]:
            self.opened.append(start)
            for row in self.source.rows(start):
                self.read += 1
                yield row

        def count(self) -> int:
            return self.source.count()

        def spans(self, start: int, stop: int) -> list[Span] | None:
            return spans_of(self.source, start, stop)

    tokenizer, whole, parts = tiny_image_tokenizer(), tmp_path / "whole", tmp_path / "parts"
    config = replace(CONFIG, rows=1)
    extract(open_source(rows), tokenizer, whole, config)
    source = Counted()
    extract(source, tokenizer, parts, config, process=1, processes=3)
    assert source.opened == ([1, 4, 7, 10] if seeks else [1]) and source.read == (3 if seeks else 7)
    extract(open_source(rows), tokenizer, parts, config, process=0, processes=3)
    extract(source, tokenizer, parts, config)  # some shards are there, some are not
    assert shards(parts) == shards(whole) and len(shards(whole)) == 8
    writer = ShardWriter(source, tokenizer, tmp_path / "back", config)
    assert writer.write(5) and writer.write(2)  # what lies behind is begun anew
    assert {n: shards(whole)[n] for n in ("000002.parquet", "000005.parquet")} == shards(tmp_path / "back")


def test_a_source_that_changed_before_its_end_is_extracted_anew_there(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, place, out, config = (
        tiny_image_tokenizer(),
        tmp_path / "p",
        tmp_path / "out",
        replace(CONFIG, rows=2),
    )

    def add(*names: str) -> None:
        for name in names:
            PILImage.fromarray(dead_leaves((ord(name),), 40, 40)).save(place / f"{name}.png")
            (place / f"{name}.txt").write_text(f"picture {name}")

    def found() -> tuple[int, str]:
        wrote = extract(open_source(place), tokenizer, out, config)["rows"]
        return wrote, "".join(r["parts"][0]["text"][-1] for r in CodeShards(out, tokenizer).records())

    place.mkdir()
    add(*"bcdf")
    assert found() == (4, "bcdf") and not caplog.messages
    (place / "a.png").write_bytes(b"no picture")
    (place / "a.txt").write_text("broken")
    assert found() == (4, "bcdf")  # the broken one, and all behind it in other places
    assert "rows 0 to 1 are others by now" in caplog.text and "rows 2 to 3 are others" in caplog.text
    assert list(json.loads((out / "broken_000.json").read_text())) == ["0"]
    add("a")
    (out / "000000.parquet").unlink()
    assert found() == (2, "abcdf") and json.loads((out / "broken_000.json").read_text()) == {}
    (place / "f.png").unlink()
    add("e")
    assert found() == (1, "abcde")
    assert found() == (0, "abcde")
    (place / "c.txt").write_text("another x")
    assert found() == (2, "abxde")
    for name in "bcdef":  # of f its caption is left, which is a broken row
        (place / f"{name}.png").unlink(missing_ok=True)
        (place / f"{name}.txt").unlink()
    with pytest.raises(StorageError, match=r"000001.parquet: its source has no such rows .* \(2 in all\)"):
        found()
    (out / "000001.parquet").unlink()
    with pytest.raises(
        StorageError, match=r"000002.parquet: its source has no such rows any more: remove it"
    ):
        found()  # nor are those forgotten that lie behind one that was removed


@pytest.mark.parametrize("table", ["rows.jsonl", "metadata.jsonl"])
def test_a_table_that_changed_is_told_by_its_lines(tmp_path: Path, table: str) -> None:
    tokenizer, place, out, config = (
        tiny_image_tokenizer(),
        tmp_path / "p",
        tmp_path / "out",
        replace(CONFIG, rows=2),
    )
    place.mkdir()
    PILImage.fromarray(dead_leaves((0,), 40, 40)).save(place / "a.png")
    lines = [json.dumps({"image": "a.png", "caption": word}) for word in "abcd"]

    def found() -> tuple[int, str]:
        (place / table).write_text("\n\n".join(lines))
        wrote = extract(open_source(place), tokenizer, out, config)["rows"]
        return wrote, "".join(r["parts"][0]["text"] for r in CodeShards(out, tokenizer).records())

    assert found() == (4, "abcd")
    lines[2] = lines[2].replace('"c"', '"x"')
    assert found() == (2, "abxd")
    lines.insert(1, lines[0].replace('"a"', '"y"'))
    assert found() == (5, "aybxd")
    assert found() == (0, "aybxd")


def test_a_shard_that_ended_with_its_source_is_not_settled_when_that_grows(
    rows: Path, tmp_path: Path
) -> None:
    tokenizer, config = tiny_image_tokenizer(), replace(CONFIG, rows=6)
    extract(open_source(rows), tokenizer, tmp_path / "s", config)
    with rows.open("a") as file:
        file.write("".join(f'\n{{"text": "row {i}"}}' for i in range(8, 20)))
    now = [settled(tmp_path / "s", n, open_source(rows), 6, tokenizer.fingerprint()) for n in range(4)]
    assert now == [True, False, False, False]  # what Ray's actors are given


def test_rows_are_encoded_one_by_one(tmp_path: Path) -> None:
    """A row of a film holds its frames: those of a whole shard would be gigabytes."""
    alive: list[weakref.ref[Row]] = []

    class Films:
        def rows(self, start: int = 0) -> Iterator[Row]:
            for i in range(start, 12):
                row = parse_row({"text": f"row {i}"}, f"films: {i}")
                alive.append(weakref.ref(row))
                yield row
                del row
                assert sum(ref() is not None for ref in alive) <= 1

        def count(self) -> int:
            return 12

    assert extract(Films(), tiny_image_tokenizer(), tmp_path / "s", replace(CONFIG, rows=12))["rows"] == 12


def test_a_damaged_page_is_no_other_code(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    path = out / "000000.parquet"
    whole, group = path.read_bytes(), pq.read_metadata(path).row_group(0)
    for column in map(group.column, range(group.num_columns)):
        start = column.dictionary_page_offset or column.data_page_offset
        last = start + column.total_compressed_size - 1  # of the chunk's last page
        path.write_bytes(whole[:last] + bytes([whole[last] ^ 4]) + whole[last + 1 :])
        with pytest.raises(
            StorageError, match=r"the shard cannot be read \(.*: remove it and extract again$"
        ):
            list(CodeShards(out, tokenizer).records())
    path.unlink()  # as it says
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 2 and path.read_bytes() == whole
    assert len(list(CodeShards(out, tokenizer).records())) == 6
    (out / "mine.parquet").write_bytes(b"")
    pq.write_table(pa.table({"x": [1]}), out / "mine.parquet")
    with pytest.raises(StorageError, match=r"mine.parquet: the shard cannot be read"):
        list(CodeShards(out, tokenizer).records())
    for content, why in (("{", "not valid JSON"), ("[]", "no extraction's manifest")):
        (out / "manifest.json").write_text(content)
        with pytest.raises(StorageError, match=why):
            CodeShards(out, tokenizer)
        with pytest.raises(StorageError, match=why):
            extract(open_source(rows), tokenizer, out, CONFIG)


def test_codes_of_another_tokenizer_are_refused(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    other = tiny_image_tokenizer(seed=1)
    with pytest.raises(StorageError, match="made by another image tokenizer"):
        CodeShards(out, other)
    seeded = replace(CONFIG, seed=1, fit="pad")
    print_ = tokenizer.fingerprint()[:5]
    for made, config, why in (
        (other, CONFIG, rf"\(tokenizer {print_}\S+, not \S+\)"),
        (tokenizer, seeded, r"\(fit crop, not pad; seed 0, not 1\)"),
    ):
        with pytest.raises(StorageError, match=f"another tokenizer or setting {why}: name another folder"):
            extract(open_source(rows), made, out, config)
    with pytest.raises(StorageError, match="no extraction here"):
        CodeShards(tmp_path, tokenizer)
    # saving rounds to bf16; the fingerprint is that of the saved weights, and a new decoder does not change codes
    tokenizer.save_pretrained(tmp_path / "t")
    assert ImageTokenizer.from_pretrained(tmp_path / "t").fingerprint() == tokenizer.fingerprint()
    assert other.fingerprint() != tokenizer.fingerprint()
    with torch.no_grad():
        tokenizer.decoder.last_weight.mul_(2)
    CodeShards(out, tokenizer)


def test_a_shard_of_another_tokenizer_is_found_out(rows: Path, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet")
    tokenizer, other = tiny_image_tokenizer(), tiny_image_tokenizer(seed=1)
    mine, theirs = tmp_path / "mine", tmp_path / "theirs"
    extract(open_source(rows), tokenizer, mine, CONFIG)
    extract(open_source(rows), other, theirs, CONFIG)
    shard = mine / "000001.parquet"
    told = pq.read_schema(shard).metadata[b"nextflow_ar.tokenizer"]
    assert told.decode() == tokenizer.fingerprint()
    whole = shard.read_bytes()
    shard.write_bytes((theirs / shard.name).read_bytes())
    shards = CodeShards(mine, tokenizer)
    assert shards.shard(0).table().num_rows == 2
    for reading in (
        lambda: list(shards.records()),
        lambda: shards.texts(9),
        lambda: list(shards.documents()),
        lambda: extract(open_source(rows), tokenizer, mine, CONFIG),
    ):
        with pytest.raises(
            StorageError, match=r"000001.parquet: the shard was made by another image tokenizer"
        ):
            reading()
    pq.write_table(pq.read_table(theirs / shard.name).replace_schema_metadata(None), shard)
    assert (
        len(list(CodeShards(mine, tokenizer).documents())) == 6
    )  # of before shards said so: the manifest decides
    shard.write_bytes(whole[:-40])
    for reading in (lambda: extract(open_source(rows), tokenizer, mine, CONFIG), lambda: left_out(mine)):
        with pytest.raises(
            StorageError, match=r"01.parquet: the shard cannot be read .*: remove it and extract"
        ):
            reading()


def test_an_extraction_goes_on_from_the_same_source_only(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    other = tmp_path / "other.jsonl"
    other.write_text(rows.read_text())
    extract(open_source(rows), tokenizer, out, CONFIG, place=rows)
    (out / "000001.parquet").unlink()
    with pytest.raises(
        StorageError, match=r"s holds codes of .*rows.jsonl, not of .*other.jsonl: name another"
    ):
        extract(open_source(other), tokenizer, out, CONFIG, place=other)
    assert not (out / "000001.parquet").is_file()
    monkeypatch.chdir(tmp_path)
    assert extract(open_source(rows), tokenizer, out, CONFIG, place="rows.jsonl")["rows"] == 2
    with pytest.raises(StorageError, match=r"not of hf://me/it: name another"):
        same_source(out, "hf://me/it/")
    spread = replace(job(other, tmp_path, "s"), place=str(other))
    answer = ShardActor(spread)({"shard": np.array([1, 2])})
    assert answer["rows"] == [0, 0] and all("other.jsonl: name another" in why for why in answer["failed"])
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest.pop("source") == str(rows)
    (out / "manifest.json").write_text(json.dumps(manifest))  # of before sources were told
    assert extract(open_source(other), tokenizer, out, CONFIG, place=other)["rows"] == 0


def test_dialogue_marks_turns_and_learns_their_end() -> None:
    parts = [
        {"role": "user", "supervised": False, "text": "hi", "final": None},
        {"role": "assistant", "supervised": True, "text": "two dogs", "final": None},
    ]
    document = as_document(parts, dialogue=True)
    assert document.segments == (
        Mark("<|im_start|>"), Text("user\n"), Text("hi"), Mark("<|im_end|>"), Text("\n"), Mark("<|im_start|>"),
        Text("assistant\n"), Text("two dogs", True), Mark("<|im_end|>", True),
    )  # fmt: skip
    assert as_document(parts).segments == (Text("hi"), Text("two dogs", True))
    bundle = tiny_bundle()
    sample = build(Document(document.segments), bundle.vocab, bundle.layout)
    learned = [int(t) for t in sample.targets if t != IGNORED]
    assert learned == [*bundle.vocab.encode("two dogs"), bundle.vocab.special("<|im_end|>")]


def test_extract_as_a_command(rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny_image_tokenizer().save_pretrained(tmp_path / "t")
    out = str(tmp_path / "s")
    assert (
        run(["extract", str(rows), "-o", out, "--image-tokenizer", str(tmp_path / "t"), "--rows", "3"]) == 0
    )
    told = capsys.readouterr().out
    assert f"6 rows written to {out}, 2 left out" in told and "gone.png" in told
    options = ["--image-tokenizer", str(tmp_path / "t")]
    assert run(["extract", str(rows), "-o", out, *options]) == 1  # another number of rows per shard
    assert "another tokenizer or setting" in capsys.readouterr().err
    same = [*options, "--rows", "3"]
    assert run(["extract", str(rows), "-o", out, *same, "--correct-given"]) == 1
    assert "was begun without self-correction of given pictures" in capsys.readouterr().err
    (tmp_path / "other.jsonl").write_text(rows.read_text())
    assert run(["extract", str(tmp_path / "other.jsonl"), "-o", out, *same]) == 1
    told = capsys.readouterr().err
    assert "rows.jsonl, not of" in told and len(told.split("nextflow-ar: ")[1].splitlines()) == 1
    assert run(["extract", str(rows), "-o", out, *options, "--process", "2", "--processes", "2"]) == 2


def test_rows_left_out_are_tried_again_where_asked(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tiny_image_tokenizer().save_pretrained(tmp_path / "t")
    out = tmp_path / "s"
    options = ["extract", str(rows), "-o", str(out), "--image-tokenizer", str(tmp_path / "t"), "--rows", "3"]
    assert run([*options, "--workers", "2"]) == 0
    assert "--retry" not in capsys.readouterr().out
    before = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    PILImage.fromarray(dead_leaves((9,), 40, 40)).save(tmp_path / "gone.png")
    assert run(options) == 0
    told = capsys.readouterr().out
    assert f"0 rows written to {out} (6 there already), 0 left out" in told
    assert f"2 left out earlier ({out}/broken_*.json): --retry tries them again" in told
    assert run([*options, "--retry", "--seed", "1"]) == 1
    assert run([*options, "--retry", "--processes", "2"]) == 2
    assert {path.name: path.read_bytes() for path in out.glob("*.parquet")} == before
    capsys.readouterr()
    assert run([*options, "--retry"]) == 0
    told = capsys.readouterr().out
    assert (
        f"5 rows written to {out} (2 there already), 1 left out" in told
        and "caption is empty" in told
        and "earlier" not in told
    )
    found = [r["row"] for r in CodeShards(out, ImageTokenizer.from_pretrained(tmp_path / "t")).records()]
    assert found == [0, 1, 2, 3, 4, 6, 7]
    after = {path.name: path.read_bytes() for path in out.glob("*.parquet")}
    assert after["000002.parquet"] == before["000002.parquet"]
    (out / "broken_000.json").write_text("{")
    assert run(options) == 1
    assert "broken_000.json: no list of rows left out" in capsys.readouterr().err
    (out / "broken_000.json").write_text(json.dumps({"0": "on purpose: nothing moves"}))
    assert run(options) == 0 and "1 left out earlier" in capsys.readouterr().out
    (out / "broken_001.json").write_text(json.dumps({"5": "on purpose: nothing moves"}))
    assert run(options) == 0 and "left out earlier" not in capsys.readouterr().out
    assert lacking(out) == ()


def test_a_stop_before_a_shard_or_its_list_loses_no_row(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out, stopped = tiny_image_tokenizer(), tmp_path / "s", []
    write = extraction.write_atomic

    def stop(path: Path, data: bytes) -> None:
        """Of everything that is written, one file more in every run."""
        stopped.append(path.name)
        if len(stopped) == limit:
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(extraction, "write_atomic", stop)
    for limit in range(1, 20):
        shutil.rmtree(out, ignore_errors=True)
        stopped.clear()
        with contextlib.suppress(KeyboardInterrupt):
            extract(open_source(rows), tokenizer, out, CONFIG)
        if len(stopped) < limit:
            break
        limit = 0
        extract(open_source(rows), tokenizer, out, CONFIG)
        assert list(left_out(out)) == ["1", "5"] and "gone.png" in left_out(out)["1"]
    assert len(stopped) == 1 + 3 + 2  # the manifest, three shards, two lists


def test_a_stop_while_a_shard_is_made_again_loses_no_row(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    PILImage.fromarray(dead_leaves((9,), 40, 40)).save(tmp_path / "gone.png")
    write = extraction.write_atomic

    def stop(path: Path, data: bytes) -> None:
        if path.suffix == ".parquet":
            raise KeyboardInterrupt
        write(path, data)

    monkeypatch.setattr(extraction, "write_atomic", stop)
    with pytest.raises(KeyboardInterrupt):
        extract(open_source(rows), tokenizer, out, CONFIG, again=lacking(out))
    monkeypatch.undo()
    assert list(left_out(out)) == ["1", "5"] and lacking(out) == (0, 1)
    extract(open_source(rows), tokenizer, out, CONFIG, again=lacking(out))
    assert list(left_out(out)) == ["5"] and lacking(out) == (1,)


def test_the_list_of_a_process_that_is_no_more_adds_no_row(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    for process in range(2):
        extract(open_source(rows), tokenizer, out, CONFIG, process=process, processes=2)
    assert [p.name for p in sorted(out.glob("broken_*"))] == ["broken_000.json", "broken_001.json"]
    assert list(left_out(out)) == ["1", "5"]
    rows.write_text(rows.read_text().replace('"caption": ""', '"caption": "x"'))
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 3
    assert list(left_out(out)) == ["1"] and lacking(out) == (0,)
    (out / "broken_001.json").write_text('{"0": "gone", "8": "gone", "77": "gone"}')  # there, no more, never
    assert list(left_out(out)) == ["1"]
    (out / "000000.parquet").unlink()
    assert left_out(out) == {}  # not left out, but not made yet
    extract(open_source(rows), tokenizer, out, CONFIG)
    (out / "broken_000.json").unlink()
    assert left_out(out) == {"1": "left out, and no list says why"} and lacking(out) == (0,)
    table = pq.read_table(out / "000000.parquet").replace_schema_metadata(None)
    pq.write_table(table, out / "000000.parquet")  # of before shards said how many rows they are of
    assert left_out(out) == {}
    (out / "broken_000.json").write_text('{"0": "gone", "1": "gone"}')
    assert left_out(out) == {"1": "gone"}


@pytest.mark.parametrize("content", ["{", "[]", '{"one": "gone"}', "3"])
def test_a_damaged_list_is_told_before_the_work(rows: Path, tmp_path: Path, content: str) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    (out / "000001.parquet").unlink()
    for name in ("broken_000.json", "broken_001.json"):
        (out / name).write_text(content)
        with pytest.raises(
            StorageError, match=rf"{name}: no list of rows left out \(.*\): remove it"
        ) as told:
            extract(open_source(rows), tokenizer, out, CONFIG)
        assert len(str(told.value).splitlines()) == 1 and not (out / "000001.parquet").is_file()
        (out / name).unlink()
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 2
    assert list(left_out(out)) == ["1", "5"]


def test_reasons_of_before_a_retry_are_dropped(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    found = extract(open_source(rows), tokenizer, out, CONFIG)
    (out / "broken_007.json").write_text('{"1": "another reason", "6": "another", "7": "gone"}')
    forget_left_out(out, (0, 1), found["broken"])
    assert json.loads((out / "broken_007.json").read_text()) == {"6": "another", "7": "gone"}
    assert json.loads((out / "broken_000.json").read_text()) == found["broken"]


def test_shards_tell_how_many_tokens_texts_have(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tokenizer, bundle = tiny_image_tokenizer(), tiny_bundle()
    tokenizer.save_pretrained(tmp_path / "t")
    options = ["extract", str(rows), "--image-tokenizer", str(tmp_path / "t"), "--rows", "3"]
    assert run([*options, "-o", str(tmp_path / "nano"), "--text-tokenizer", "nano"]) == 0
    vocab = Vocabulary(load_text_tokenizer(checkpoint_folder("nano") / "text_tokenizer"), 4096, 1)
    shards = CodeShards(tmp_path / "nano", tokenizer)
    parts = [part for record in shards.records() for part in record["parts"]]
    texts = [part for part in parts if part["text"] is not None]
    assert len(texts) > 3 and all(part["tokens"] == len(vocab.encode(part["text"])) for part in texts)
    assert all(part["tokens"] is None for part in parts if part["text"] is None)
    counters = [TokenCounter(each.tokenizer).fingerprint for each in (vocab, bundle.vocab)]
    assert {shards.shard(i).counted for i in range(3)} == {counters[0]} and counters[0] != counters[1]
    capsys.readouterr()
    assert run([*options, "-o", str(tmp_path / "none"), "--text-tokenizer", str(tmp_path / "no")]) == 1
    told = capsys.readouterr().err
    assert "no such checkpoint folder" in told and not (tmp_path / "none").exists()


def test_special_tokens_make_no_other_text_tokenizer() -> None:
    vocab = tiny_bundle().vocab
    before = TokenCounter(vocab.tokenizer)
    text = "a red <boi> leaf <extra> <tool> <|im_end|>"
    for special in (True, False):
        other = fast_tokenizer(Tokenizer.from_str(vocab.tokenizer.backend_tokenizer.to_str()))
        other.add_tokens(
            [AddedToken("<extra>" if special else "<tool>", special=special)], special_tokens=special
        )
        after = TokenCounter(other)
        assert (after.fingerprint == before.fingerprint) is (after([text]) == before([text])) is special


def job(rows: Path, folder: Path, out: str, **changes: object) -> Extraction:
    if not (folder / "t").is_dir():
        tiny_image_tokenizer().save_pretrained(folder / "t")
    return Extraction(str(rows), str(folder / "t"), folder / out, replace(CONFIG, **changes), VideoConfig())


def shards(folder: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in folder.glob("*.parquet")}


@pytest.mark.slow
def test_workers_write_the_very_same_shards(rows: Path, tmp_path: Path) -> None:
    one, two = job(rows, tmp_path, "one"), job(rows, tmp_path, "two")
    alone = one.run(0, 1, lambda shard, done: None)
    counts: list[int] = []
    together = extract_with_workers(two, 2, counts.append)
    assert together == alone and alone["rows"] == 6 and counts[-1] == 6
    assert shards(one.out) == shards(two.out) and len(shards(one.out)) == 3
    with pytest.raises(StorageError, match=r"worker \d: .*another tokenizer or setting"):
        extract_with_workers(replace(two, config=replace(CONFIG, seed=9)), 1)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_workers_end_with_their_command(rows: Path, tmp_path: Path, number: signal.Signals) -> None:
    """What it is told of, and what it cannot hear: none of them goes on alone."""
    place = job(rows, tmp_path, "x")
    rows.write_text("\n".join([json.dumps({"image": "0.png", "caption": "a"})] * 50_000))
    command = [sys.executable, "-m", "nextflow_ar.app.cli", "extract", place.place, "-o", str(place.out)]
    process = subprocess.Popen(
        [*command, "--image-tokenizer", place.tokenizer, "--rows", "3", "--workers", "2"],
        stderr=subprocess.PIPE, text=True, start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background jobs ignore it
    )  # fmt: skip
    try:
        until = time.monotonic() + 600
        while not any(place.out.glob("*.parquet")):
            assert process.poll() is None and time.monotonic() < until
            time.sleep(0.05)
        if number == signal.SIGINT:
            os.killpg(process.pid, number)  # as a terminal does
        else:
            process.send_signal(number)
        told = process.communicate(timeout=60)[1]  # which the workers hold open, too
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    wanted = {
        signal.SIGTERM: (143, "nextflow-ar: stopped; the same command goes on"),
        signal.SIGINT: (130, "nextflow-ar: interrupted"),
        signal.SIGKILL: (-9, ""),
    }
    status, line = wanted[number]
    lines = [one for one in told.splitlines() if one.strip() and not one.startswith("extract ")]
    assert process.returncode == status and (number == signal.SIGKILL or lines == [line])


def test_a_signal_ends_the_command_with_one_line(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = job(rows, tmp_path, "x")
    options = ["extract", str(rows), "-o", str(place.out), "--image-tokenizer", place.tokenizer]

    def killed(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    before = signal.signal(
        signal.SIGTERM, lambda *_: None
    )  # without the fix nothing happens, and the test fails
    try:
        mine = signal.getsignal(signal.SIGTERM)
        with monkeypatch.context() as patched:
            patched.setattr(Extraction, "run", killed)
            assert run(options) == 143
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)
    assert capsys.readouterr().err.splitlines()[-1] == "nextflow-ar: stopped; the same command goes on"
    assert run(options) == 0


def test_shards_do_not_mix_with_their_source(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = job(rows, tmp_path, "x")
    folder = tmp_path / "source"
    folder.mkdir()
    pq.write_table(pa.table({"text": ["a", "b"]}), folder / "000000.parquet")
    whole = (folder / "000000.parquet").read_bytes()
    (tmp_path / "link").symlink_to(folder)
    options = ["--image-tokenizer", place.tokenizer]
    for source in (folder, folder / "000000.parquet", tmp_path / "link"):
        assert run(["extract", str(source), "-o", str(folder), *options, "--workers", "2"]) == 1
        told = capsys.readouterr().err.splitlines()[-1]
        assert (
            told
            == f"nextflow-ar: {folder}: the source lies there, and shards would mix with it: name another folder"
        )
        with pytest.raises(StorageError, match="the source lies there"):
            extract(open_source(source), tiny_image_tokenizer(), folder, CONFIG, place=source)
    assert [path.name for path in folder.iterdir()] == ["000000.parquet"]
    assert (folder / "000000.parquet").read_bytes() == whole
    assert run(["extract", str(folder), "-o", str(folder / "codes"), *options]) == 0
    assert run(["extract", str(rows), "-o", str(tmp_path), *options]) == 0  # a file beside its shards


def test_a_device_is_one_that_is_here(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    for device, why in (
        ("gpu", "--device is cpu, cuda or one of several such as cuda:1, got 'gpu'"),
        ("meta", "--device is cpu, cuda or one of several such as cuda:1, got 'meta'"),
        ("cuda:2", "--device cuda:2: there are cuda:0 to cuda:1 here"),
        ("xpu", "--device xpu: there is no such device here; cpu is, or cuda"),
    ):
        assert run(["extract", str(rows), "-o", str(tmp_path / "x"), "--device", device]) == 2
        assert capsys.readouterr().err.splitlines()[-1] == f"nextflow-ar: {why}"


def test_without_pyarrow_shards_say_what_they_need(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    shard = CodeShards(out, tokenizer).shard(0)
    for name in ("pyarrow", "pyarrow.parquet"):
        with monkeypatch.context() as without:
            without.setitem(sys.modules, name, None)
            for reading in (
                lambda: CodeShards(out, tokenizer).shard(0), shard.table, lambda: encoded([], "", 0),
            ):  # fmt: skip
                with pytest.raises(
                    SourceError, match=r"^shards of codes need pyarrow: pip install 'nextflow-ar\[train\]'"
                ):
                    reading()


def test_an_extraction_of_nothing_is_no_success(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = job(rows, tmp_path, "x")
    rows.write_text("")
    options = ["extract", str(rows), "-o", str(place.out), "--image-tokenizer", place.tokenizer]
    for more in ([], ["--json"]):
        assert run([*options, *more]) == 1
        told = capsys.readouterr()
        assert told.out == "" and told.err.splitlines()[-1] == f"nextflow-ar: {rows}: no rows to extract"
    assert run([*options, "--processes", "2"]) == 0  # of which another one may have rows
    capsys.readouterr()
    rows.write_text(json.dumps({"image": "gone.png", "caption": "a"}))
    for out in (
        f"0 rows written to {place.out}, 1 left out\n  {rows}:1: ",
        f"0 rows written to {place.out}, 0 left",
    ):
        assert run(options) == 1
        told = capsys.readouterr()
        assert told.out.startswith(out)
        assert (
            told.err.splitlines()[-1] == f"nextflow-ar: {rows}: no row could be extracted, all were left out"
        )


def test_the_number_of_threads_is_put_back() -> None:
    before = torch.get_num_threads()
    with one_thread():
        assert torch.get_num_threads() == 1
    assert torch.get_num_threads() == before


def test_batches_of_equal_schedules(rows: Path, tmp_path: Path) -> None:
    tokenizer = tiny_image_tokenizer()
    one = extract(open_source(rows), tokenizer, tmp_path / "one", replace(CONFIG, rows=8))
    many = extract(open_source(rows), tokenizer, tmp_path / "many", replace(CONFIG, rows=8, batch=4))
    assert many == one
    pairs = zip(
        CodeShards(tmp_path / "one", tokenizer).documents(),
        CodeShards(tmp_path / "many", tokenizer).documents(),
        strict=True,
    )
    same: list[float] = []
    for (number, first), (other, second) in pairs:
        assert number == other and len(first.segments) == len(second.segments)
        for a, b in zip(first.segments, second.segments, strict=True):
            if isinstance(a, Image) and isinstance(b, Image):
                assert a.codes.schedule == b.codes.schedule
                same.append(float((a.codes.target == b.codes.target).float().mean()))
    assert (
        len(same) == 6 and sum(same) / 6 > 0.97
    )  # rounding may turn a code near a boundary, and what follows it
    with pytest.raises(StorageError, match="another tokenizer or setting"):
        extract(open_source(rows), tokenizer, tmp_path / "one", replace(CONFIG, rows=8, batch=4))


@pytest.mark.parametrize(("batch", "noise"), [(1, 0), (4, 0), (1, 3)])
def test_kept_targets_take_over_what_did_not_change(tmp_path: Path, batch: int, noise: int) -> None:
    before = np.full((64, 64, 3), (200, 60, 60), dtype=np.uint8)
    before[36:60, 32:56] = (240, 240, 60)
    shift = np.random.default_rng(0).integers(-noise, noise + 1, before.shape)
    after = (before + shift).astype(np.uint8)
    after[4:20, 4:20] = (60, 60, 220)
    for name, picture in (("before", before), ("after", after)):
        PILImage.fromarray(picture).save(tmp_path / f"{name}.png")
    lines = [
        {"source": "before.png", "instruction": "add a blue square", "target": "after.png"},
        {"image": "after.png", "question": "what is it?", "answer": "a picture"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    tokenizer = ImageTokenizer.from_pretrained("nano")

    def images(name: str, kept: int | None) -> list[torch.Tensor]:
        setting = ExtractionConfig(num_scales=8, tokens=0.0, batch=batch, kept=kept)
        extract(open_source(tmp_path / "rows.jsonl"), tokenizer, tmp_path / name, setting)
        shards = CodeShards(tmp_path / name, tokenizer).documents()
        return [s.codes.target for _, d in shards for s in d.segments if isinstance(s, Image)]

    plain, strict, kept = images("plain", None), images("strict", 0), images("kept", 2 * noise)
    assert noise or torch.equal(strict[1], kept[1])
    assert not noise or torch.equal(strict[1], plain[1])  # no pixel is what it was
    for found in (strict, kept):  # given pictures continue nothing
        assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])

    schedule = ScaleSchedule.square(8)

    def copies(codes: torch.Tensor) -> float:
        """Share of the last grid's codes that bring the picture nearer to the one before."""
        would = tokenizer.quantizer.copied(plain[0][None], codes[None], schedule, 7, 8)[0]
        return float((would == codes[schedule.offsets[7] :]).float().mean())

    assert copies(plain[1]) < 0.15 and copies(kept[1]) > copies(plain[1]) + 0.3
    for codes in (plain[1], kept[1]):
        shown = tokenizer.decode_bytes(codes[None], schedule)[0]
        assert (
            float((shown[6:18, 6:18].float().mean((0, 1)) - torch.tensor([60.0, 60, 220])).abs().max()) < 25
        )


def test_an_extraction_from_before_batches_goes_on(rows: Path, tmp_path: Path) -> None:
    tokenizer, out = tiny_image_tokenizer(), tmp_path / "s"
    extract(open_source(rows), tokenizer, out, CONFIG)
    manifest = json.loads((out / "manifest.json").read_text())
    del manifest["config"]["batch"]
    (out / "manifest.json").write_text(json.dumps(manifest))
    (out / "000001.parquet").unlink()
    assert extract(open_source(rows), tokenizer, out, CONFIG)["rows"] == 2
    assert CodeShards(out, tokenizer).config == CONFIG


def test_the_actor_of_ray_writes_the_very_same_shards(rows: Path, tmp_path: Path) -> None:
    plain, spread = job(rows, tmp_path, "plain"), job(rows, tmp_path, "spread")
    alone = plain.run(0, 1, lambda shard, done: None)
    (why,) = ShardActor(spread)({"shard": np.array([0])})["failed"]
    assert "spread: what the command wrote there is not here: every machine must see" in why
    assert not spread.out.exists()  # nothing is written where nobody looks for it
    spread.out.mkdir()
    shutil.copy(plain.out / "manifest.json", spread.out)
    found = [ShardActor(spread)({"shard": np.array(numbers)}) for numbers in ([2], [1, 0, 7])]
    assert shards(plain.out) == shards(spread.out) and len(shards(plain.out)) == 3
    assert [each["rows"] for each in found] == [[2], [2, 2, 0]] and alone["rows"] == 6
    assert found[1]["broken_rows"] == [["5"], ["1"], []] and found[1]["failed"] == ["", "", ""]
    assert list(left_out(spread.out)) == ["1", "5"]  # each actor's lists are its own
    assert [p.name[-11:] for p in sorted(spread.out.glob("broken_ray_*"))] == ["000000.json", "000001.json"]
    ShardActor(spread)({"shard": np.array([0, 1])})  # what is there already stays told
    assert left_out(spread.out) == left_out(plain.out)


class Cluster:
    """In place of Ray: actors in this process, but in another working directory, and what crosses is pickled.

    ``jobs``: what the actors were given. ``before``, ``after``: are called when the actors begin and when they are done.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch, elsewhere: Path) -> None:
        self.jobs: list[Extraction] = []
        self.before: Callable[[], object] = lambda: None
        self.after: Callable[[], object] = lambda: None
        self._elsewhere = elsewhere
        ray, data = types.ModuleType("ray"), types.ModuleType("ray.data")
        names = {"from_items": self._items, "ActorPoolStrategy": lambda size: size}
        data.__dict__.update(names)
        ray.__dict__["data"] = data
        monkeypatch.setitem(sys.modules, "ray", ray)
        monkeypatch.setitem(sys.modules, "ray.data", data)

    def _items(self, items: list[dict[str, int]], override_num_blocks: int) -> Cluster:
        assert override_num_blocks == len(items)
        self._numbers = [item["shard"] for item in items]
        return self

    def map_batches(self, kind: Any, *, fn_constructor_args: Any, compute: int, **options: Any) -> Cluster:
        assert options == {"batch_size": 1, "num_cpus": 1}
        self._kind, self._sent, self._actors = kind, pickle.dumps(fn_constructor_args), compute
        return self

    def take_all(self) -> list[dict[str, Any]]:
        self._elsewhere.mkdir(exist_ok=True)
        with contextlib.chdir(self._elsewhere):
            self.before()
            self.jobs = [pickle.loads(self._sent)[0] for _ in range(self._actors)]
            actors = [self._kind(job) for job in self.jobs]
            answers = [
                actors[i % len(actors)]({"shard": np.array([number])})
                for i, number in enumerate(self._numbers)
            ]
            self.after()
        return [{key: values[0] for key, values in answer.items()} for answer in answers[::-1]]


def test_with_ray_relative_paths_are_meant_from_here(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster = Cluster(monkeypatch, tmp_path / "elsewhere")
    plain = job(rows, tmp_path, "plain")
    plain.run(0, 1, lambda shard, done: None)
    monkeypatch.chdir(tmp_path)
    options = ["extract", "rows.jsonl", "-o", "x", "--rows", "3", "--scales", "5"]
    setting = ["--correct-tokens", "0.6", "--top-k", "4", "--temperature", "5"]
    assert run([*options, *setting, "--image-tokenizer", "t", "--ray", "2"]) == 0
    assert "6 rows written to x, 2 left out" in capsys.readouterr().out
    assert shards(tmp_path / "x") == shards(plain.out) and list((tmp_path / "elsewhere").iterdir()) == []
    assert [each.tokenizer for each in cluster.jobs] == [str(tmp_path / "t")] * 2
    (tmp_path / "nano").mkdir()  # no tokenizer: the bundled one is meant
    (tmp_path / "text.jsonl").write_text('{"text": "a"}')
    here = Extraction(
        "text.jsonl", "nano", Path("y"), replace(CONFIG, num_scales=10), VideoConfig(), "cpu", "nano"
    )
    assert extract_with_ray(here, 1) == {"rows": 1, "broken": {}}
    (sent,) = cluster.jobs
    assert (sent.tokenizer, sent.model, sent.place) == ("nano", "nano", str(tmp_path / "text.jsonl"))


def test_with_ray_shards_that_are_not_here_are_told(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, spread, waited = Cluster(monkeypatch, tmp_path / "elsewhere"), job(rows, tmp_path, "s"), []
    lost = [spread.out / "000001.parquet", spread.out / "000002.parquet"]
    monkeypatch.setattr("time.sleep", waited.append)
    cluster.after = lambda: [path.unlink() for path in lost]
    with pytest.raises(
        StorageError, match=r"s/000001.parquet: written by another machine, but not here \(2 in all\): every"
    ):
        extract_with_ray(spread, 1)
    assert waited == [0, 1, 4, 15, 40]

    waited.clear()
    kept: dict[Path, bytes] = {}
    cluster.after = lambda: [(kept.update({path: path.read_bytes()}), path.unlink()) for path in lost]

    def late(seconds: float) -> None:
        waited.append(seconds)
        if len(waited) == 3:  # a network file system's memory of what was not there
            for path, content in kept.items():
                path.write_bytes(content)

    monkeypatch.setattr("time.sleep", late)
    assert extract_with_ray(spread, 1)["rows"] == 4 and waited == [0, 1, 4]

    lost[0].unlink()
    cluster.before, cluster.after = lambda: shutil.rmtree(spread.out), lambda: None
    with pytest.raises(
        StorageError, match=r"s: what the command wrote there is not here: every machine must see the folder"
    ):
        extract_with_ray(spread, 1)
    assert not spread.out.exists()


def test_with_ray_another_setting_or_tokenizer_is_refused_as_without(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, out = Cluster(monkeypatch, tmp_path / "elsewhere"), tmp_path / "s"
    for seed in (0, 1):
        tiny_image_tokenizer(seed=seed).save_pretrained(tmp_path / f"t{seed}")
    options = ["extract", str(rows), "-o", str(out), "--rows", "3"]
    mine = ["--image-tokenizer", str(tmp_path / "t0")]
    assert run([*options, *mine]) == 0
    for work_left in (False, True):
        if work_left:
            (out / "000001.parquet").unlink()
        for other in ([*mine, "--top-k", "4"], ["--image-tokenizer", str(tmp_path / "t1")]):
            told = []
            for how in ([], ["--ray", "1"]):
                capsys.readouterr()
                assert run([*options, *other, *how]) == 1
                told.append(capsys.readouterr().err.splitlines()[-1])
            assert told[0] == told[1] and "holds codes of another tokenizer or setting (" in told[0]
    assert cluster.jobs == [] and not (out / "000001.parquet").is_file()
    assert run([*options, *mine, "--ray", "1"]) == 0 and len(cluster.jobs) == 1


def test_with_ray_what_goes_wrong_elsewhere_is_one_line(
    rows: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    cluster, spread = Cluster(monkeypatch, tmp_path / "elsewhere"), job(rows, tmp_path, "s")
    write, tried = ShardWriter.write, []

    def failing(error: Exception) -> Callable[..., object]:
        def fail(self: ShardWriter, number: int, who: str) -> object:
            tried.append(number)
            if number == 1:
                raise error
            return write(self, number, who)

        return fail

    monkeypatch.setattr(ShardWriter, "write", failing(StorageError("s: disk\nfull")))
    with pytest.raises(StorageError, match=rf"^{platform.node()}: s: disk full; whole shards stay$"):
        extract_with_ray(spread, 1)
    assert tried == [0, 1] and list(shards(spread.out)) == ["000000.parquet"] and not caplog.messages
    monkeypatch.setattr(ShardWriter, "write", failing(KeyError("x")))
    with pytest.raises(StorageError, match=rf"^{platform.node()}: KeyError: 'x'; whole shards stay$"):
        extract_with_ray(spread, 2)
    assert "Traceback" in caplog.text and sorted(shards(spread.out)) == ["000000.parquet", "000002.parquet"]

    def die() -> None:
        raise RuntimeError("died\n  File x\n\nModuleNotFoundError: No module named 'nextflow_ar'\n")

    cluster.before = die
    with pytest.raises(StorageError, match=r"^Ray: RuntimeError: ModuleNotFoundError: No module named 'nex"):
        extract_with_ray(spread, 1)


@pytest.mark.slow
def test_ray_writes_the_very_same_shards(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ray = pytest.importorskip("ray")
    pytest.importorskip("ray.data")
    monkeypatch.setenv("RAY_worker_niceness", "0")  # on a busy machine workers of the lowest rank never start
    plain, spread = job(rows, tmp_path, "plain"), job(rows, tmp_path, "spread")
    alone = plain.run(0, 1, lambda shard, done: None)
    ray.init(num_cpus=3, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        assert extract_with_ray(spread, 2) == alone
        assert shards(plain.out) == shards(spread.out) and len(shards(plain.out)) == 3
        (spread.out / "000001.parquet").unlink()
        assert extract_with_ray(spread, 1)["rows"] == 2
        assert shards(plain.out) == shards(spread.out)
        assert extract_with_ray(spread, 1) == {"rows": 0, "broken": {}}
    finally:
        ray.shutdown()


def test_the_ways_to_share_the_work(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    place = job(rows, tmp_path, "x")
    options = [
        "extract",
        str(rows),
        "-o",
        str(tmp_path / "x"),
        "--image-tokenizer",
        place.tokenizer,
        "--rows",
        "3",
    ]
    assert run([*options, "--workers", "2", "--processes", "2"]) == 2
    assert "take one" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "ray", None)
    assert run([*options, "--ray", "2"]) == 1
    assert "extraction with Ray needs it: pip install 'nextflow-ar[ray]'" in capsys.readouterr().err
    assert run([*options, "--batch", "2"]) == 0
    assert "6 rows written" in capsys.readouterr().out


def test_shards_of_before_words_counted_are_as_good_as_they_were(
    tmp_path: Path,
) -> None:
    """Their digests are of names and ranges alone; a corpus is not extracted again for that."""
    rows = [{"text": f"row {i}"} for i in range(4)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    source = open_source(tmp_path / "x.parquet")
    now, before = extraction._known_items(source, 0, 4)
    assert before == hashlib.sha256(json.dumps([("", 0, 4)]).encode()).hexdigest()[:16] != now
    rows[2]["text"] = "another"
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "x.parquet")
    changed, same = extraction._known_items(open_source(tmp_path / "x.parquet"), 0, 4)
    assert changed != now and same == before
