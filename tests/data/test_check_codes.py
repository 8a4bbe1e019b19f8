"""``nextflow-ar data check`` of what an extraction wrote: damaged, lacking and impossible codes, each in a line."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image as PILImage

from nextflow_ar.app.cli import run
from nextflow_ar.data.check import CheckReport
from nextflow_ar.data.check_codes import check_codes
from nextflow_ar.data.code_shards import CodeShards
from nextflow_ar.data.extraction import ExtractionConfig, extract
from nextflow_ar.data.sources import SourceError, open_source
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from tests.conftest import tiny_bundle, tiny_image_tokenizer

CONFIG = ExtractionConfig(num_scales=5, rows=2, tokens=0.6, top_k=4, temperature=5.0)


@pytest.fixture
def codes(tmp_path: Path) -> Path:
    """Three shards of five rows: two drawings (one self-corrected picture each), a question, one that is broken, a text."""
    for i in range(3):
        PILImage.fromarray(dead_leaves((i,), 40, 40)).save(tmp_path / f"{i}.png")
    lines = [
        {"image": "0.png", "caption": "a"},
        {"image": "1.png", "caption": "b"},
        {"image": "2.png", "question": "c?", "answer": "d"},
        {"image": "gone.png", "caption": "e"},
        {"text": "f"},
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    extract(open_source(tmp_path / "rows.jsonl"), tiny_image_tokenizer(), tmp_path / "codes", CONFIG)
    return tmp_path / "codes"


def check(folder: Path, tokenizer: ImageTokenizer | None = None, **changes: Any) -> CheckReport:
    settings = {"codes": 64, "max_scales": 5, "most_tokens": 200, "count_text": len} | changes
    return check_codes(folder, fingerprint=(tokenizer or tiny_image_tokenizer()).fingerprint(), **settings)


def rewrite(path: Path, change: Callable[[list[dict[str, Any]]], None]) -> None:
    """A shard with other records, whole and with its checksums and metadata."""
    table = pq.read_table(path)
    records = table.to_pylist()
    change(records)
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), path, write_page_checksum=True)


def test_good_codes_have_no_problem(codes: Path) -> None:
    seen: list[int] = []
    found = check(codes, progress=seen.append)
    assert (found.rows, found.problems, seen) == (4, [], [1, 2, 3, 4])
    assert found.kinds == {"drawing": 2, "reading": 1, "writing": 1} and found.ratios == {"64x64": 3}
    (left,) = found.warnings
    assert left.startswith("1 rows of the source were left out, such as 3 (") and "gone.png" in left
    assert left.endswith("extract --retry once they are whole")


@pytest.mark.parametrize("dialogue", [False, True])
def test_rows_are_as_long_as_training_lays_them_out(codes: Path, dialogue: bool) -> None:
    vocab = tiny_bundle().vocab
    found = check(codes, count_text=lambda text: len(vocab.encode(text)), dialogue=dialogue)
    documents = CodeShards(codes, tiny_image_tokenizer()).documents(dialogue=dialogue)
    assert found.lengths == [
        len(build(document, vocab, LayoutOptions(constant_range=64))) for _, document in documents
    ]


def test_shards_that_are_damaged_or_not_there_are_told(codes: Path) -> None:
    path = codes / "000001.parquet"
    whole = path.read_bytes()
    column = pq.read_metadata(path).row_group(0).column(0)
    last = (column.dictionary_page_offset or column.data_page_offset) + column.total_compressed_size - 1
    path.write_bytes(whole[:last] + bytes([whole[last] ^ 4]) + whole[last + 1 :])
    found = check(codes)
    (line,) = found.problems
    assert line.startswith(f"{path}: the shard cannot be read (") and line.endswith(
        "remove it and extract again"
    )
    assert found.rows == 3  # the others are read all the same
    path.unlink()
    assert check(codes).problems == [f"{codes} lacks 1 shards (000001): extract again writes them"]
    path.write_bytes(whole)
    (codes / "broken_000.json").write_text("{")
    (line,) = check(codes).problems
    assert "broken_000.json: no list of rows left out" in line


def test_codes_that_cannot_be_are_told(codes: Path) -> None:
    first = codes / "000000.parquet"

    def spoil(records: list[dict[str, Any]]) -> None:
        picture, other = records[0]["parts"][1], records[1]["parts"][1]
        picture["target"][3] = 10_000
        picture["input"] = picture["input"][:-1]
        picture["clean"][0] = -1
        other["scales"] = 30

    def spoil_more(records: list[dict[str, Any]]) -> None:
        small = ScaleSchedule.square(3).num_tokens
        records[0]["parts"][1] |= {"scales": 3, "target": [0] * small, "input": None, "clean": None}
        records[1]["parts"][1]["final"] = [64]

    whole = first.read_bytes()
    size = json.loads((codes / "manifest.json").read_text())["codes"]
    places = len(pq.read_table(first).to_pylist()[0]["parts"][1]["target"])
    rewrite(first, spoil)
    end = "remove the shard and extract again"
    assert check(codes).problems == [
        f"{first}: row 0: code 10000 as target is not among the codebook's {size}: {end}",
        f"{first}: row 0: {places - 1} codes as input, its grids take {places}: {end}",
        f"{first}: row 0: code -1 as clean is not among the codebook's {size}: {end}",
        f"{first}: row 1: it is no record (the number of scales is 1 to 18, got 30): {end}",
    ]
    first.write_bytes(whole)
    rewrite(first, spoil_more)
    few, no_record = check(codes).problems
    assert few == f"{first}: row 0: 3 scales, its extraction has 5: {end}"
    assert no_record.startswith(f"{first}: row 1: it is no record (") and no_record.endswith(end)
    manifest = json.loads((codes / "manifest.json").read_text())
    (codes / "manifest.json").write_text(json.dumps({k: v for k, v in manifest.items() if k != "codes"}))
    first.write_bytes(whole)
    (codes / "000001.parquet").unlink()
    (codes / "000002.parquet").unlink()
    pictures = [record["parts"][1] for record in pq.read_table(first).to_pylist()]
    most = max(max(max(p["target"]), max(p["input"]), max(p["clean"])) for p in pictures)
    assert check(codes, codes=most + 1).problems == []
    assert any(f"code {most} as " in line for line in check(codes, codes=most).problems)


@pytest.mark.parametrize(
    ("place", "value"),
    [
        (("row",), None),
        (("parts",), None),
        (("parts", 1, "scales"), None),
        (("parts", 1, "final"), None),
        (("parts", 1, "final"), [64, 64, 64]),
        (("parts", 1, "target"), None),
        (("parts", 1, "target", 2), None),
        (("parts", 1, "final", 0), None),
        (("parts", 1), None),
    ],
)
def test_what_is_no_record_is_one_line(codes: Path, place: tuple[Any, ...], value: Any) -> None:
    first = codes / "000000.parquet"

    def spoil(records: list[dict[str, Any]]) -> None:
        inside: Any = records[0]
        for key in place[:-1]:
            inside = inside[key]
        inside[place[-1]] = value

    rewrite(first, spoil)
    found = check(codes)
    (line,) = found.problems
    assert line.startswith(f"{first}: row ") and line.endswith(": remove the shard and extract again")
    assert found.rows == 4


def test_damage_anywhere_is_told_and_hides_no_other_shard(codes: Path) -> None:
    """Of the words about a shard behind its pages, which have no checksum, and of a shard without any."""
    first = codes / "000000.parquet"
    whole = first.read_bytes()
    footer = len(whole) - 8 - int.from_bytes(whole[-8:-4], "little")
    for place in range(footer, len(whole), 11):
        for bit in (1, 128):
            first.write_bytes(whole[:place] + bytes([whole[place] ^ bit]) + whole[place + 1 :])
            assert check(codes).rows >= 2
    first.write_bytes(whole)
    pq.write_table(pq.read_table(first), first, compression="none")
    whole = first.read_bytes()
    for place in range(4, len(whole) - 8, 29):
        first.write_bytes(whole[:place] + bytes([whole[place] ^ 128]) + whole[place + 1 :])
        assert check(codes).rows >= 2


def test_pictures_on_a_schedule_of_before_are_told(codes: Path) -> None:
    first = codes / "000000.parquet"
    old = ScaleSchedule.from_final((52, 72), 5)  # its canvas has that of 52x76 by now
    assert not old.canonical

    def relay(records: list[dict[str, Any]]) -> None:
        picture = records[0]["parts"][1]
        picture |= {"final": [52, 72], "target": [0] * old.num_tokens, "input": None, "clean": None}

    rewrite(first, relay)
    found = check(codes)
    assert f"{first}: 1 pictures on schedules that inference has not: extract again makes it anew" in (
        found.warnings
    )
    assert not found.problems and found.ratios == {"64x64": 2, "52x72": 1}


def test_rows_of_no_use_or_of_another_shard_are_told(codes: Path) -> None:
    first = codes / "000000.parquet"

    def spoil(records: list[dict[str, Any]]) -> None:
        records[0]["row"] = 7
        records[1]["parts"][1]["supervised"] = False

    end = "remove the shard and extract again"
    whole = first.read_bytes()
    rewrite(first, spoil)
    assert check(codes).problems == [
        f"{first}: row 7: it is none of this shard's: {end}",
        f"{first}: row 1: nothing in it is supervised: {end}",
    ]
    first.write_bytes(whole)
    rewrite(first, lambda records: records[1].update(row=0))
    assert check(codes).problems == [f"{first}: row 0: it is there twice: {end}"]


def test_what_the_model_cannot_take_is_told(codes: Path) -> None:
    found = check(codes, tiny_image_tokenizer(seed=1), max_scales=4, most_tokens=20)
    assert found.warnings[0].startswith("the codes are of another image tokenizer than the model's")
    assert (
        f"{codes}: its pictures have 5 scales, the model has embeddings for 4: extract with --scales 4"
        in (found.problems[0])
    )
    too_long = [line for line in found.problems if "tokens are too long, up to 20 are accepted" in line]
    assert len(too_long) == 3 and found.kinds == {"writing": 1}


def test_as_a_command(codes: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["data", "check", str(codes)]) == 0
    told = capsys.readouterr().out
    assert told.startswith("4 rows, 0 problems\ngood rows: 2 drawing, 1 reading, 1 writing; ")
    assert "warning: the codes are of another image tokenizer than the model's" in told
    assert run(["data", "check", str(codes), "--max-tokens", "20", "--json"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert len(told["problems"]) == 3 and len(told["warnings"]) == 4
    assert run(["data", "check", str(codes), "--headers"]) == 2
    assert "--scales, --headers and --video are for pictures" in capsys.readouterr().err
    for path in codes.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:50])
    assert run(["data", "check", str(codes)]) == 1
    told = capsys.readouterr()
    assert "no rows" not in told.err and told.out.startswith("0 rows, 3 problems\n")


def test_codes_without_their_manifest_are_codes_all_the_same(
    codes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (codes / "manifest.json").write_text("{")
    assert run(["data", "check", str(codes)]) == 1
    assert "manifest.json: not valid JSON" in capsys.readouterr().err
    (codes / "manifest.json").unlink()
    assert run(["data", "check", str(codes)]) == 1
    assert f"{codes}: no extraction here (it lacks manifest.json)" in capsys.readouterr().err
    for place in (codes, codes / "000001.parquet"):
        with pytest.raises(SourceError, match=r"codes of an extraction, no rows: train from their folder"):
            open_source(place)


def test_codes_are_no_rows(codes: Path, tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"codes: codes of an extraction, no rows: train from their folder"):
        open_source(codes)
    other = tmp_path / "other"
    other.mkdir()
    (other / "manifest.json").write_text(json.dumps({"name": "mine"}))  # anybody's
    pq.write_table(pa.table({"text": ["a"]}), other / "x.parquet")
    assert open_source(other).count() == 1
