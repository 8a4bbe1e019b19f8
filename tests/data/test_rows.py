"""The data format: full and short forms, every source, and a check that finds every broken row."""

from __future__ import annotations

import io
import json
import os
import shutil
import sys
import tarfile
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from nextflow_ar.app.cli import run
from nextflow_ar.data.check import check_rows
from nextflow_ar.data.hub_rows import HubSource
from nextflow_ar.data.rows import PicturePart, PictureRef, Row, RowError, TextPart, parse_row
from nextflow_ar.data.sources import SourceError, open_source, spans_of
from nextflow_ar.model.costs import ImageShape, TextShape, count
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.pictures import PictureError

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"


def png(size: tuple[int, int] = (20, 20), colour: str = "red") -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, "PNG")
    return buffer.getvalue()


def told(row: Row) -> list[tuple[str, str, bool]]:
    return [
        (part.text if isinstance(part, TextPart) else "<image>", part.role, part.supervised)
        for part in row.parts
    ]


USER, DRAWN = ("<image>", "user", False), ("<image>", "assistant", True)
FORMS: list[tuple[dict[str, Any], list[tuple[str, str, bool]]]] = [
    ({"image": "a.png", "caption": " a dog "}, [("a dog", "user", False), DRAWN]),
    ({"prompt": "draw a dog", "image": "a.png", "id": 7}, [("draw a dog", "user", False), DRAWN]),
    (
        {"image": "a.png", "question": "what?", "answer": "a dog"},
        [USER, ("what?", "user", False), ("a dog", "assistant", True)],
    ),
    (
        {"images": ["a.png", "b.png"], "prompt": "which is red?", "response": "the first"},
        [USER, USER, ("which is red?", "user", False), ("the first", "assistant", True)],
    ),
    (
        {"images": ["a.png"], "question": "what?", "answer": "a dog"},
        [USER, ("what?", "user", False), ("a dog", "assistant", True)],
    ),
    (
        {"source": "a.png", "instruction": "red", "target": "b.png"},
        [USER, ("red", "user", False), DRAWN],
    ),
    (
        {"prompt": "tell", "images": ["a.png", "b.png"], "texts": ["one", "two"]},
        [("tell", "user", False), ("one", "assistant", True), DRAWN, ("two", "assistant", True), DRAWN],
    ),
    ({"prompt": "hi", "response": "hello"}, [("hi", "user", False), ("hello", "assistant", True)]),
    ({"text": "once upon a time"}, [("once upon a time", "assistant", True)]),
    (
        {
            "segments": [
                {"text": "be brief", "role": "system"},
                {"text": "what?", "image": None},
                {"image": "a.png", "role": "assistant", "supervised": False},
                {"text": "a dog", "supervised": True},
            ]
        },
        [
            ("be brief", "system", False), ("what?", "user", False), ("<image>", "assistant", False),
            ("a dog", "assistant", True),
        ],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "wanted"), FORMS)
def test_every_form_is_a_row(values: dict[str, Any], wanted: list[tuple[str, str, bool]]) -> None:
    row = parse_row(values, "x:1", Path("/data"))
    assert told(row) == wanted and row.where == "x:1"
    assert all(ref.path is not None and ref.path.parent == Path("/data") for ref in row.pictures)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"image": "a.png"},
            r"x:1: no known form among the keys \['image'\]; accepted: segments; instruction",
        ),
        ({"image": "a.png", "caption": "  "}, "x:1: caption is empty"),
        (
            {"image": "a.png", "caption": None, "other": None},
            r"x:1: no known form among the keys \['image'\] \(caption is null\); accepted: segments",
        ),
        (
            {"image": "a.png", "text": None, "caption": None},
            r"\['image'\] \(caption, text are null\); accepted",
        ),
        ({"image": 3, "caption": "a"}, "x:1: image is a path or a picture, got int"),
        (
            {"images": ["a.png"], "texts": ["a", "b"]},
            "x:1: 1 images and 2 texts: the lists are to be equally long",
        ),
        ({"segments": []}, "x:1: segments is a list of at least one"),
        ({"segments": [{"text": "a", "rle": "user"}]}, "x:1: segment 0: unknown key 'rle'"),
        ({"segments": [{"text": "a", "image": "b"}]}, "x:1: segment 0 has either text or image"),
        (
            {"segments": [{"text": "a", "role": "bot"}]},
            "x:1: segment 0: role is one of system, user, assistant",
        ),
        ({"segments": [{"text": "a"}]}, "x:1: nothing in it is supervised"),
        ({"segments": [{"text": "a", "supervised": 1}]}, "x:1: segment 0: supervised is true or false"),
        ({"segments": ["a"]}, "x:1: segment 0 is a mapping, got str"),
        ({"text": 5}, "x:1: text is text, got int"),
        (
            {"image": {"bytes": "iVBOR", "path": "x.png"}, "caption": "a"},
            "image: bytes are a picture file's, got str",
        ),
        ({"image": {"bytes": 5}, "caption": "a"}, "image: bytes are a picture file's, got int"),
    ],
)
def test_broken_rows_say_what_and_where(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message):
        parse_row(values, "x:1")


def test_pictures_come_as_paths_bytes_structs_or_pillow_images(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png((30, 20)))
    for image in ("a.png", png((30, 20)), {"bytes": png((30, 20)), "path": "a.png"}, {"bytes": None, "path": "a.png"},
                  Image.new("RGB", (30, 20))):  # fmt: skip
        (ref,) = parse_row({"image": image, "caption": "a"}, "x:1", tmp_path).pictures
        assert ref.size() == (20, 30) and ref.open().size == (30, 20)
    (ref,) = parse_row({"image": b"none", "caption": "a"}, "x:1").pictures
    for reading in (ref.open, ref.size):
        with pytest.raises(PictureError, match=r"x:1: image: (damaged or no|not a) picture"):
            reading()


@pytest.fixture
def jsonl(tmp_path: Path) -> Path:
    (tmp_path / "good.png").write_bytes(png())
    (tmp_path / "cut.png").write_bytes(png((200, 200))[:150])
    (tmp_path / "long.png").write_bytes(png((500, 20)))
    rows = [
        {"image": "good.png", "caption": "a red square"},
        {"image": "none.png", "caption": "gone"},
        {"image": "cut.png", "caption": "cut"},
        {"image": "long.png", "caption": "long"},
        {"image": "good.png", "caption": ""},
        {"images": ["good.png"], "texts": []},
        {"image": "good.png", "question": "what?", "answer": "a square"},
        {"text": "word " * 400},
        {"text": "a story"},
    ]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(r) for r in rows) + "\n{broken\n[1]\n\n")
    return path


def test_the_check_finds_every_broken_row(jsonl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check_rows(
        open_source(jsonl), num_scales=5, most_tokens=200, count_text=lambda t: len(t.split())
    )
    assert report.rows == 11
    wanted = [
        (2, "none.png: no such file"),
        (3, "cut.png: damaged or truncated picture"),
        (4, "500x20 pixels fit no bucket: aspect ratios from 1:4 to 4:1"),
        (5, "caption is empty"),
        (6, "1 images and 0 texts"),
        (8, "400 tokens are too long, up to 200"),
        (10, "not valid JSON"),
        (11, "a row is a mapping of keys to values, got list"),
    ]
    assert len(report.problems) == len(wanted)
    for (line, what), problem in zip(wanted, report.problems, strict=True):
        assert problem.startswith(f"{jsonl}:{line}: ") and what in problem, problem
    assert report.kinds == {"drawing": 1, "reading": 1, "writing": 1}
    # caption 3 + 55 codes; question: 55 + closing 25 + <eoi> + 1 + 2 words; story: 2 words
    assert sorted(report.lengths) == [2, 58, 84]
    assert report.ratios == {"64x64": 2}
    assert run(["data", "check", str(jsonl), "-m", str(GOLDEN)]) == 1
    out = capsys.readouterr().out
    assert "11 rows, 8 problems" in out and "rows.jsonl:10" in out


@pytest.mark.parametrize("context_images", ["scales", "closing"])
def test_the_check_counts_given_pictures_as_they_are_laid_out(tmp_path: Path, context_images: str) -> None:
    pictures = [{"image": f"{i}.png", "role": "user"} for i in range(3)]
    for i in range(3):
        (tmp_path / f"{i}.png").write_bytes(png((64, 64)))
    row = {
        "segments": [*pictures, {"text": "one two", "role": "user"}, {"text": "three", "role": "assistant"}]
    }
    (tmp_path / "a.jsonl").write_text(json.dumps(row))
    found = check_rows(
        open_source(tmp_path / "a.jsonl"), num_scales=8, most_tokens=9999, count_text=lambda text: len(text.split()),
        context_images=context_images,
    )  # fmt: skip
    given = [ImageShape(ScaleSchedule.nearest(64, 64, 8))] * 3
    assert found.lengths == [count([*given, TextShape(2), TextShape(1, True)], context_images).tokens]


def test_the_check_warns_about_a_one_sided_mix(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png())
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"image": "a.png", "caption": "a dog"}) + "\n")
    assert run(["data", "check", str(path), "-m", str(GOLDEN)]) == 0
    assert "warning: nothing in it teaches reading" in capsys.readouterr().out
    bare = shutil.copytree(GOLDEN, tmp_path / "bare")  # nothing but tokenizer and configuration is looked at
    (bare / "model.safetensors").unlink()
    assert run(["data", "check", str(path), "-m", str(bare)]) == 0
    assert "warning: nothing in it teaches reading" in capsys.readouterr().out
    path.write_text(json.dumps({"image": "a.png", "question": "what", "answer": "a dog"}) + "\n")
    assert run(["data", "check", str(path), "-m", str(GOLDEN), "--json", "--headers"]) == 0
    assert json.loads(capsys.readouterr().out)["kinds"] == {"reading": 1}
    assert run(["data", "check", str(path), "-m", str(GOLDEN)]) == 0
    assert "warning: nothing in it teaches drawing" in capsys.readouterr().out
    assert run(["data", "check", str(tmp_path / "none")]) == 1
    assert "none: no such file or folder" in capsys.readouterr().err


def test_the_check_names_keys_that_nothing_reads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"file_name": "a.png", "text": "a dog", "promt": "misspelt"},
        {"file_name": "a.png", "captions": ["a dog"], "promt": "again", "url": None},
        {"file_name": "a.png", "image": "a.png", "question": "what", "answer": "a dog"},
        {"segments": [{"text": "a", "supervised": True}], "id": 3},
        {"image": "a.png", "text": "a dog"},
        {"images": ["a.png"], "texts": ["a"], "prompt": "tell"},
    ]
    (tmp_path / "metadata.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ignored"] == {"promt": 2, "file_name": 1, "id": 1}
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN)]) == 0
    told = capsys.readouterr().out
    assert (
        "keys that nothing reads (rows): 'promt' (2), " in told and "'id' (1)" in told and "..." not in told
    )


def texts(source: Any, start: int = 0) -> list[str]:
    return [
        next(p.text for p in row.parts if isinstance(p, TextPart)) if isinstance(row, Row) else "!" + str(row)
        for row in source.rows(start)
    ]


def test_a_table_of_pictures_is_read_as_one_wherever_it_lies(tmp_path: Path) -> None:
    """Its words alone would train as plain text, without a line about the pictures."""
    (tmp_path / "a.png").write_bytes(png())
    rows = [{"file_name": "a.png", "text": "a dog"}]
    (tmp_path / "metadata.jsonl").write_text(json.dumps(rows[0]))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    for place in (tmp_path, tmp_path / "metadata.jsonl", tmp_path / "rows.json", tmp_path / "rows.parquet"):
        if place.is_dir():
            (tmp_path / "rows.parquet").rename(tmp_path / "rows.moved")
        (row,) = open_source(place).rows()
        assert isinstance(row, Row) and told(row) == [("a dog", "user", False), DRAWN], place
        assert row.pictures[0].size() == (20, 20) and not row.ignored
        if place.is_dir():
            (tmp_path / "rows.moved").rename(tmp_path / "rows.parquet")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"img": "a.png", "text": "a dog"}, "nothing reads 'img', which is a picture: name it image"),
        ({"jpg": png(), "text": "a dog"}, "nothing reads 'jpg', which is a picture"),
        ({"mp4": b"x", "text": "a dog"}, "nothing reads 'mp4', which is a picture"),
        ({"cover": {"bytes": png(), "path": None}, "text": "a"}, "nothing reads 'cover'"),
        ({"images": [None, "a.png"], "text": "a"}, "nothing reads 'images'"),
        ({"image_url": "https://x.org/a.JPG", "text": "a dog"}, "nothing reads 'image_url', which is a picture"),
        ({"img": "a.png", "messages": [{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]}, "reads 'img'"),
        ({"image": "a.png", "prompt": "what?", "answer": "a dog"}, "nothing reads 'answer': question \\+ answer or"),
        ({"image": "a.png", "text": "what?", "response": "a dog"}, "nothing reads 'response'"),
    ],
)  # fmt: skip
def test_words_whose_picture_or_answer_nothing_reads_are_an_error(
    values: dict[str, Any], message: str
) -> None:
    with pytest.raises(RowError, match=f"x:1: .*{message}"):
        parse_row(values, "x:1")


MARKED: list[tuple[dict[str, Any], list[str]]] = [
    ({"image": "a.png", "question": "<image>\nWhat?", "answer": "a"}, ["(a)", "What?", "a"]),
    ({"image": "a.png", "prompt": "What?\n<image>", "response": "a"}, ["What?", "(a)", "a"]),
    ({"image": "a.png", "prompt": "Is <image> red?", "response": "a"}, ["Is", "(a)", "red?", "a"]),
    (
        {"images": ["a.png", "b.png"], "prompt": "<image> and <image>: differ?", "response": "yes"},
        ["(a)", "and", "(b)", ": differ?", "yes"],
    ),
    ({"images": ["a.png", "b.png"], "texts": ["one <image>", "two <image>"]}, ["one", "(a)", "two", "(b)"]),
    ({"images": ["a.png", "b.png"], "texts": ["one", "two <image>"]}, ["one", "(a)", "two", "(b)"]),
    ({"source": "a.png", "instruction": "<image> red", "target": "b.png"}, ["(a)", "red", "(b)"]),
    ({"source": "a.png", "instruction": "red <image>", "target": "b.png"}, ["red", "(a)", "(b)"]),
    ({"image": "a.png", "caption": "<image>\na dog"}, ["a dog", "(a)"]),
    ({"image": "a.png", "caption": "a dog <image>"}, ["a dog", "(a)"]),
    ({"image": "a.png", "prompt": "<image>\na dog"}, ["a dog", "(a)"]),
    ({"image": "a.png", "prompt": "<image>", "response": "a dog"}, ["(a)", "a dog"]),
    ({"images": ["a.png", "b.png"], "prompt": "<image>\n<image>", "response": "dogs"}, ["(a)", "(b)", "dogs"]),
    ({"images": ["a.png", "b.png"], "texts": ["<image> one", "<image> two"]}, ["(a)", "one", "(b)", "two"]),
    (
        {"segments": [{"text": "<image>\nWhat?"}, {"image": "a.png"}, {"text": "a dog", "role": "assistant"}]},
        ["(a)", "What?", "a dog"],
    ),
    (
        {"segments": [{"text": "A: <image> B: <image>"}, {"image": "a.png"}, {"image": "b.png"},
                      {"text": "which?"}, {"text": "b", "role": "assistant"}]},
        ["A:", "(a)", "B:", "(b)", "which?", "b"],
    ),
    (
        {"segments": [{"text": "<image>"}, {"image": "a.png"}, {"text": "<image>", "role": "assistant"},
                      {"image": "b.png", "role": "assistant"}]},
        ["(a)", "(b)"],
    ),
    (
        {"segments": [{"image": "a.png"}, {"text": "<image> <image>?"}, {"image": "b.png"}, {"image": "c.png"},
                      {"text": "a", "role": "assistant"}]},
        ["(a)", "(b)", "(c)", "?", "a"],
    ),
    (
        {"segments": [{"image": "a.png"}, {"text": "<image>\nWhat?"}, {"text": "a dog", "role": "assistant"}]},
        ["(a)", "What?", "a dog"],
    ),
]  # fmt: skip


@pytest.mark.parametrize(("values", "wanted"), MARKED)
def test_marks_place_pictures_in_every_form(values: dict[str, Any], wanted: list[str]) -> None:
    parts = parse_row(values, "x:1", Path("/data")).parts
    found = [
        p.text if isinstance(p, TextPart) else f"({p.picture.path.stem if p.picture.path else ''})"
        for p in parts
    ]
    assert found == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "<image>\nWhat is it?", "response": "a"}, "0 images and 1 <image> marks \\('<image>"),
        ({"image": "a.png", "question": "<image> <image> what?", "answer": "a"}, "1 images and 2 <image> marks"),
        ({"images": ["a.png", "b.png"], "prompt": "<image> what?", "response": "a"}, "2 images and 1 <image> marks"),
        ({"image": "a.png", "prompt": "a tag <image> of a page"}, "0 images and 1 <image> marks"),
        ({"image": "a.png", "prompt": "<image>"}, "prompt is empty"),
        ({"source": "a.png", "instruction": "<image>", "target": "b.png"}, "instruction is nothing but <image>"),
        ({"segments": [{"text": "<image>"}, {"image": "a.png", "role": "assistant"}]}, "a text is nothing but <image>"),
        ({"segments": [{"text": "<image> <image>?"}, {"image": "a.png"}, {"text": "a", "supervised": True}]}, "0 images"),
        ({"segments": [{"text": "a <image> b", "role": "assistant"}, {"image": "a.png"}]}, "0 images and 1"),
    ],
)  # fmt: skip
def test_marks_that_no_picture_stands_at_are_an_error(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"x:1: {message}"):
        parse_row(values, "x:1")


def test_responses_that_quote_the_tag_are_words_and_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "a.png").write_bytes(png())
    rows = [
        {"text": "a tag <image> of a page"},
        {"prompt": "which tag?", "response": "<image>"},
        {"image": "a.png", "question": "<image> what is meant?", "answer": "the tag <image>"},
        {"image": "a.png", "prompt": "<image>", "response": "the tag <image> it is"},
        {"image": "a.png", "caption": "a dog"},
    ]
    (tmp_path / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = [row for row in open_source(tmp_path).rows() if isinstance(row, Row)]
    assert [[text for text, _, _ in told(row)] for row in found] == [
        ["a tag <image> of a page"],
        ["which tag?", "<image>"],
        ["<image>", "what is meant?", "the tag <image>"],
        ["<image>", "the tag <image> it is"],
        ["a dog", "<image>"],
    ]
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--json"]) == 0
    (warning,) = json.loads(capsys.readouterr().out)["warnings"]
    assert warning.startswith("4 rows have words that say <image> with no picture beside them")


@pytest.mark.parametrize(
    "beside",
    [
        {"url": "https://www.gov.im/"}, {"url": "https://x.org/a.jpg"}, {"title": "Foo.gif"}, {"minhash": b"\0\1"},
        {"audio": {"bytes": b"RIFF", "path": "a.wav"}}, {"id": "a.png"}, {"source": "wiki/a.png"}, {"file": "notes.pdf"},
        {"images": []}, {"image": None},
    ],
)  # fmt: skip
def test_words_with_addresses_and_names_beside_them_are_plain_text(beside: dict[str, Any]) -> None:
    plain = parse_row({"text": "a dog"} | beside, "x:1")
    assert told(plain) == [("a dog", "assistant", True)]
    assert plain.ignored == {key for key, value in beside.items() if value is not None}


def test_rows_of_a_table_whose_picture_is_null_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Words alone and pictures to be drawn may be meant in a table of several forms."""
    st = {"bytes": png(), "path": None}
    rows = [
        {"image": st, "prompt": "what?", "response": "a dog", "text": None},
        {"image": None, "prompt": "what?", "response": "a cat", "text": None},
        {"image": st, "prompt": "what?", "response": None, "text": None},
        {"image": None, "prompt": None, "response": None, "text": "once"},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"] == {"reading": 1, "writing": 2, "drawing": 1} and not report["problems"]
    assert report["warnings"] == [
        "2 rows are words alone and have image null: rows without a picture, or is it missing?",
        "1 rows with a picture and a prompt have response null: drawn, or is the answer missing?",
    ]
    for key in ("response", "output", "answer"):
        row = parse_row({"file_name": "a.png", "prompt": "draw", key: None}, "x:1")
        assert told(row) == [("draw", "user", False), DRAWN]
        (doubt,) = row.doubts
        assert f"have {key} null" in doubt
    drawn = {
        "image": "a.png",
        "prompt": "draw",
        "question": None,
        "answer": None,
    }  # of a table with questions
    assert told(parse_row(drawn, "x:1")) == [("draw", "user", False), DRAWN]
    assert not parse_row(drawn, "x:1").doubts


def shard(path: Path, members: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w") as file:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
    return path


def test_two_pictures_of_one_key_are_a_broken_row(tmp_path: Path) -> None:
    """The last one used to win: masks were drawn."""
    members = {
        "0001.jpg": png(),
        "0001.png": png(),
        "0001.txt": b"a dog",
        "0002.png": png(),
        "0002.txt": b"a cat",
    }
    found = texts(open_source(shard(tmp_path / "a.tar", members)))
    assert "a.tar: 0001: .jpg and .png are two pictures of one name" in found[0] and found[1:] == ["a cat"]
    members = {
        "1.json": b'{"instruction": "red"}',
        "1.source.png": png(),
        "1.target.jpg": png(),
        "1.source.jpg": png(),
    }
    (broken,) = texts(open_source(shard(tmp_path / "b.tar", members)))
    assert ".source.png and .source.jpg are two pictures" in broken
    members = {
        "1.jpg": png(),
        "1.h5": b"features",
        "1.eps": b"x",
        "1.txt": b"a dog",
        "2.eps": b"x",
        "2.txt": b"a cat",
    }
    assert texts(open_source(shard(tmp_path / "c.tar", members))) == ["a dog", "a cat"]


def test_captions_without_a_picture_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_text(f"a dog {name}")
    (tmp_path / "c.heic").write_bytes(b"x")
    (tmp_path / "notes").mkdir()
    for name in ("README.txt", "readme.zh.txt", "prompts.txt", "a.png.txt", "c.txt", "notes/x.txt"):
        (tmp_path / name).write_text("the caption of no picture that is missing")
    source = open_source(tmp_path)
    assert texts(source) == ["a dog a", "a dog b"] and source.count() == 2
    spans = spans_of(source, 0, 9)
    (line,) = source.notes  # type: ignore[attr-defined]
    assert "1 files look like pictures" in line
    for name in ("aa.txt", "bb.caption"):
        (tmp_path / name).write_text("gone")
    source = open_source(tmp_path)
    assert (
        texts(source) == ["a dog a", "a dog b"] and spans_of(source, 0, 9) == spans
    )  # no shard is made anew
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN)]) == 0
    assert (
        f"warning: 2 captions have no picture beside them, such as {tmp_path / 'aa.txt'}"
        in capsys.readouterr().out
    )


def test_files_of_kinds_that_are_not_read_are_told(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "c.heic").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"neither pictures nor .*1 files look like .*heic \(1\), such as"):
        open_source(tmp_path)
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.WMV").write_bytes(b"x")
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN)]) == 0
    told_of = capsys.readouterr().out
    assert (
        "warning: 2 files look like pictures or videos and are not read: .wmv (1), .heic (1), such as"
        in told_of
    )


def test_linked_folders_are_entered(tmp_path: Path) -> None:
    for place in ("data/own", "elsewhere/deep"):
        (tmp_path / place).mkdir(parents=True)
        (tmp_path / place / "a.png").write_bytes(png())
        (tmp_path / place / "a.txt").write_text(place)
    (tmp_path / "data" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "again").symlink_to(tmp_path / "data" / "own")  # is there already
    (tmp_path / "data" / "own" / "up").symlink_to(tmp_path / "data")
    (tmp_path / "elsewhere" / "loop").symlink_to(tmp_path)
    (tmp_path / "a.png").write_bytes(png())  # beside what is asked for, not in it
    (tmp_path / "a.txt").write_text("beside")
    assert texts(open_source(tmp_path / "data")) == ["elsewhere/deep", "data/own"]


def test_columns_of_a_webdataset_are_a_captioned_picture(tmp_path: Path) -> None:
    st = {"bytes": png(), "path": None}
    rows = [{"jpg": st, "txt": "a dog", "__key__": "0001"}, {"jpg": None, "txt": "a cat", "__key__": "0002"}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    row, other = open_source(tmp_path).rows()
    assert (
        isinstance(row, Row) and told(row) == [("a dog", "user", False), DRAWN] and row.ignored == {"__key__"}
    )
    assert isinstance(other, RowError) and "no known form" in str(other)
    assert told(parse_row({"png": png(), "txt": "a dog", "json": {}}, "x")) == [
        ("a dog", "user", False),
        DRAWN,
    ]


def test_members_of_a_tar_that_say_nothing(tmp_path: Path) -> None:
    """Notes that macOS puts between the files tore rows apart; a caption that is null hid the one beside it."""
    members = {"./._1.png": b"x", "./1.png": png(), "./._1.txt": b"x", "./1.txt": b"a dog",
               "2.png": png(), "2.json": b'{"caption": null}', "2.txt": b"a cat"}  # fmt: skip
    source = open_source(shard(tmp_path / "a.tar", members))
    assert texts(source) == ["a dog", "a cat"] and source.count() == 2


def test_reports_for_machines_are_ascii(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "clé": 1}\n')
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--json"]) == 0
    out = capsys.readouterr().out
    assert out.isascii() and json.loads(out)["ignored"] == {"clé": 1}


def test_a_folder_has_rows_of_one_kind(tmp_path: Path) -> None:
    (tmp_path / "A.JSONL").write_text('{"text": "one"}\n')
    (tmp_path / "notes.jsonl").mkdir()
    assert texts(open_source(tmp_path)) == ["one"]
    pq.write_table(pa.table({"text": ["two"]}), tmp_path / "b.parquet")
    with pytest.raises(SourceError, match=r"holds \.jsonl and \.parquet files, of which one kind is read"):
        open_source(tmp_path)


def test_a_folder_with_a_table_has_no_other_rows(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png())
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "a.png", "text": "a dog"}\n')
    (tmp_path / "captions.jsonl").write_text('{"file_name": "a.png", "text": "a cat"}\n')
    with pytest.raises(
        SourceError, match=r"holds metadata\.jsonl and captions\.jsonl, rows of several kinds"
    ):
        open_source(tmp_path)
    (tmp_path / "captions.jsonl").rename(tmp_path / "extra.jsonl")
    with pytest.raises(SourceError, match=r"holds metadata\.jsonl and extra\.jsonl, rows of several kinds"):
        open_source(tmp_path)
    (tmp_path / "metadata.jsonl").unlink()
    assert texts(open_source(tmp_path)) == ["a cat"]
    (tmp_path / "a.txt").write_text("a dog")
    (tmp_path / "b.mp4").write_bytes(b"x")
    source = open_source(
        tmp_path
    )  # a table over pictures that have captions, too, or a demonstration beside a data set
    assert texts(source) == ["a cat"] and source.notes == [  # type: ignore[attr-defined]
        f"{what} is no row of {tmp_path}, whose .jsonl files are read"
        for what in ("b.mp4", "a.png with a caption")
    ]
    (tmp_path / "metadata.jsonl").write_text('{"rows": 1}\n')  # of the files, not of pictures
    assert texts(open_source(tmp_path)) == ["a cat"]
    (tmp_path / "metadata.jsonl").unlink()
    (tmp_path / "b.mp4").unlink()
    (tmp_path / "extra.jsonl").unlink()
    assert texts(open_source(tmp_path)) == ["a dog"]


def test_words_in_another_encoding_are_a_broken_row(tmp_path: Path) -> None:
    """Replaced letters would be learned."""
    latin, marked = "un café".encode("latin-1"), "\ufeffa café".encode()
    for name, caption in (("a", latin), ("b", marked)):
        (tmp_path / f"{name}.png").write_bytes(png())
        (tmp_path / f"{name}.txt").write_bytes(caption)
    found = texts(open_source(tmp_path))
    assert "a.txt: not UTF-8" in found[0] and found[1:] == ["a café"]
    with tarfile.open(tmp_path / "x.tar", "w") as shard:
        for name in ("a.png", "a.txt", "b.png", "b.txt"):
            shard.add(tmp_path / name, name)
    found = texts(open_source(tmp_path / "x.tar"))
    assert "its .txt is not UTF-8" in found[0] and found[1:] == ["a café"]


def test_an_edited_word_is_noticed_in_every_kind_of_file(tmp_path: Path) -> None:
    """What a resumed extraction compares."""
    rows = [{"text": f"row {i}", "image": png()} for i in range(5)]

    def written(kind: str, changed: str) -> Path:
        file = tmp_path / f"x.{kind}"
        found = [row | ({"text": changed} if i == 3 else {}) for i, row in enumerate(rows)]
        if kind == "json":
            file.write_text(json.dumps([{"text": row["text"]} for row in found]))
        elif kind == "parquet":
            pq.write_table(pa.Table.from_pylist(found), file, row_group_size=2)
        else:
            with tarfile.open(file, "w") as shard:
                for i, row in enumerate(found):
                    for name, data in ((f"{i}.txt", str(row["text"]).encode()), (f"{i}.png", png())):
                        member = tarfile.TarInfo(name)
                        member.size = len(data)
                        shard.addfile(member, io.BytesIO(data))
        return file

    for kind in ("json", "parquet", "tar"):
        before, same, after = (
            [spans_of(open_source(written(kind, text)), low, low + 2) for low in (0, 2)]
            for text in ("row 3", "row 3", "row X")
        )
        assert before == same and before[0] == after[0] and before[1] != after[1], kind


def test_a_hostile_row_is_one_broken_row(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"text": "one"}\n' + "[" * 100_000 + '\n{"text": "two"}\n')
    found = texts(open_source(tmp_path / "x.jsonl"))
    assert (found[0], found[2]) == ("one", "two") and "not valid JSON" in found[1]
    (tmp_path / "y.json").write_text("[" * 100_000)
    with pytest.raises(SourceError, match="not valid JSON"):
        list(open_source(tmp_path / "y.json").rows())
    moments = pa.array([0, 2**62, 0], pa.timestamp("ms"))
    pq.write_table(pa.table({"text": ["one", "two", "three"], "when": moments}), tmp_path / "z.parquet")
    found = texts(open_source(tmp_path / "z.parquet"))
    assert (found[0], found[2]) == ("one", "three") and "row 1: cannot be read" in found[1]


def test_pictures_as_objects_are_read_like_files(tmp_path: Path) -> None:
    clear = Image.new("RGBA", (20, 30), (0, 0, 0, 0))
    turned = Image.new("RGB", (20, 30), "red")
    turned.getexif()[0x0112] = 6
    numbers = Image.fromarray(np.full((20, 20), 0.8, np.float32))
    for picture, size, colour in ((clear, (20, 30), 255), (turned, (30, 20), 255), (numbers, (20, 20), 204)):
        row = parse_row({"image": picture, "caption": "a"}, "x")
        opened = row.pictures[0].open()
        assert opened.size == size and opened.getpixel((5, 5))[0] == colour  # pyright: ignore


def test_a_picture_s_suffix_is_one_that_is_read(tmp_path: Path) -> None:
    for kind, suffix in (
        ("JPEG2000", "jp2"),
        ("PNG", "png"),
        ("JPEG", "jpg"),
        ("TIFF", "tif"),
        ("PPM", "ppm"),
    ):
        buffer = io.BytesIO()
        Image.new("RGB", (20, 20)).save(buffer, kind)
        assert PictureRef("x", data=buffer.getvalue()).content()[1] == suffix


def test_a_shard_names_no_file_outside_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "1").write_bytes(png())
    with tarfile.open("x.tar", "w") as shard:
        data = json.dumps({"image": "1", "caption": "a dog"}).encode()
        member = tarfile.TarInfo("0.json")
        member.size = len(data)
        shard.addfile(member, io.BytesIO(data))
    (row,) = open_source("x.tar").rows()
    assert isinstance(row, Row)
    with pytest.raises(PictureError, match="no such file"):
        row.pictures[0].open()


def test_folders_with_captions_beside_pictures_or_in_a_table(tmp_path: Path) -> None:
    for name in ("b", "a", "c"):
        (tmp_path / f"{name}.png").write_bytes(png())
    (tmp_path / "a.txt").write_text("first\n")
    (tmp_path / "b.caption").write_text("second")
    found = texts(open_source(tmp_path))
    assert found[:2] == ["first", "second"] and "c.png: no caption beside it" in found[2]
    assert texts(open_source(tmp_path), 1) == found[1:]
    lines = [
        {"file_name": "c.png", "text": "third"},
        {"file": "a.png", "captions": ["one", "uno"]},
        {"caption": "lost"},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n{x\n3\n")
    found = texts(open_source(tmp_path))
    assert found[:2] == ["third", "one"]
    assert (
        "metadata.jsonl:3: no known form" in found[2]
        and "not valid JSON" in found[3]
        and "got int" in found[4]
    )


def test_shards_of_webdataset(tmp_path: Path) -> None:
    shard(
        tmp_path / "0.tar",
        {"d/1.jpg": png(), "d/1.txt": b"one", "d/2.png": png(), "d/2.json": b'{"caption": "two"}'},
    )
    edit = {
        "3.source.png": png(),
        "3.target.png": png((9, 9)),
        "3.json": b'{"instruction": "three"}',
        "4.txt": b"four",
        "5.json": b"{",
    }
    shard(tmp_path / "1.tar", edit)
    found = texts(open_source(tmp_path))
    assert found[:3] == ["one", "two", "three"]
    assert "1.tar: 4: no known form" in found[3] and "1.tar: 5: not valid JSON" in found[4]
    assert texts(open_source(tmp_path), 2) == found[2:]
    third = next(iter(open_source(tmp_path / "1.tar").rows()))
    assert isinstance(third, Row) and [p.size() for p in third.pictures] == [(20, 20), (9, 9)]
    (tmp_path / "2.tar").write_bytes((tmp_path / "1.tar").read_bytes()[:700])
    assert "2.tar: the shard is damaged" in texts(open_source(tmp_path / "2.tar"))[-1]


def test_what_stands_behind_a_tar_is_told(tmp_path: Path) -> None:
    """To tarfile a broken header is the end."""
    for name, numbers in (("a", range(4)), ("b", range(4, 6))):
        with tarfile.open(tmp_path / f"{name}.tar", "w") as tar:
            for number in numbers:
                info = tarfile.TarInfo(f"{number}.txt")
                info.size = 4
                tar.addfile(info, io.BytesIO(b"text"))
    (tmp_path / "b.tar").rename(tmp_path / "b")
    whole = (tmp_path / "a.tar").read_bytes()
    for content, rows in (
        (whole[:2048] + b"x" + whole[2049:], 2),
        (whole + (tmp_path / "b").read_bytes(), 4),
    ):
        (tmp_path / "a.tar").write_bytes(content)
        source = open_source(tmp_path / "a.tar")
        found = texts(source)
        assert len(found) == rows + 1 == source.count()
        assert "a.tar: the shard is damaged (something that is no file of it follows" in found[-1]
    for content, why in ((b"", "the file is empty"), (b"no tar", "not a tar file")):
        (tmp_path / "a.tar").write_bytes(content)
        assert texts(open_source(tmp_path / "a.tar")) == [f"!{tmp_path}/a.tar: the shard is damaged ({why})"]
    (tmp_path / "a.tar").write_bytes(whole[: whole.rindex(b"text") + 512])  # as some writers leave it
    assert len(texts(open_source(tmp_path / "a.tar"))) == 4


def test_shards_come_before_the_tables_beside_them(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "00000.tar", "w") as tar:
        for name, data in (("0.png", png()), ("0.txt", b"a dog")):
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    pq.write_table(pa.table({"url": ["x"], "caption": ["a dog"], "key": ["0"]}), tmp_path / "00000.parquet")
    (tmp_path / "00000_stats.json").write_text("{}")
    assert texts(open_source(tmp_path)) == ["a dog"]


def test_text_that_no_file_can_hold_is_a_broken_row(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "a"}\n{"text": "a cut emoji \\ud83d and more"}\n{"text": "b"}')
    found = texts(open_source(rows))
    assert found[1] == f"!{rows}:2: text has half of a character: ...a cut emoji \\ud83d"
    place = tmp_path / "p"
    place.mkdir()
    for name, data in ((b"caf\xe9", png()), (b"th\xe9", b"no picture")):
        path = os.fsencode(place) + b"/" + name
        with open(path + b".png", "wb") as file:
            file.write(data)
        with open(path + b".txt", "wb") as file:
            file.write(b"\xef\xbb\xbfa cup")  # as Windows begins a file
    good, bad = open_source(place).rows()
    assert isinstance(good, Row) and good.where.endswith("caf\\udce9.png") and told(good)[0][0] == "a cup"
    assert isinstance(bad, Row)
    assert run(["data", "check", str(place), "-m", str(GOLDEN)]) == 1
    assert "th\\udce9.png: not a picture" in capsys.readouterr().out
    assert run(["extract", str(place), "-o", str(tmp_path / "s"), "--image-tokenizer", str(GOLDEN)]) == 0
    (why,) = json.loads((tmp_path / "s" / "broken_000.json").read_text()).values()
    assert "th\\udce9.png: not a picture" in why


def test_what_a_decoder_raises_is_a_broken_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = parse_row({"image": png(), "caption": "a"}, "here")

    def fails(*_: object) -> None:
        raise RuntimeError("frame 0")

    monkeypatch.setattr(PngImageFile, "load", fails)
    with pytest.raises(PictureError, match=r"here: image: damaged or truncated picture \(frame 0\)"):
        row.pictures[0].open()
    buffer = io.BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "JPEG")
    monkeypatch.setattr(Image.Image, "getexif", fails)
    with pytest.raises(PictureError, match=r"here: image: damaged picture \(frame 0\)"):
        parse_row({"image": buffer.getvalue(), "caption": "a"}, "here").pictures[0].size()


def test_a_row_of_no_shape_at_all_is_its_own_error(tmp_path: Path) -> None:
    lines = [
        {"text": "a"}, {"conversations": [{"from": ["user"], "value": "x"}]}, {"text": "b"},
    ]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    found = texts(open_source(tmp_path / "a.jsonl"))
    assert (found[0], found[2]) == ("a", "b") and found[1].startswith(f"!{tmp_path / 'a.jsonl'}:2")


def test_one_bad_value_of_a_parquet_file_is_one_row(tmp_path: Path) -> None:
    values = pa.array([b"a", b"\xff", b"c"] * 50, pa.binary()).view(pa.string())
    pq.write_table(pa.table({"text": values}), tmp_path / "a.parquet")
    found = texts(open_source(tmp_path / "a.parquet"))
    assert [i for i, text in enumerate(found) if text.startswith("!")] == list(range(1, 150, 3))
    assert "a.parquet: row 1: cannot be read ('utf-8' codec" in found[1] and found[149] == "c"


def test_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    rows = [{"image": {"bytes": png(), "path": None}, "caption": f"row {i}"} for i in range(7)]
    rows[4]["caption"] = ""
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=3)
    found = texts(open_source(tmp_path))
    assert found[3] == "row 3" and found[4] == f"!{tmp_path / 'a.parquet'}: row 4: caption is empty"
    for start in range(8):
        assert texts(open_source(tmp_path), start) == found[start:]
    damaged = bytearray((tmp_path / "a.parquet").read_bytes())
    group = pq.ParquetFile(tmp_path / "a.parquet").metadata.row_group(1)
    at = min(group.column(i).data_page_offset for i in range(group.num_columns))
    damaged[at : at + 60] = b"\xff" * 60
    (tmp_path / "c.parquet").write_bytes(damaged)
    left = texts(open_source(tmp_path / "c.parquet"))
    assert left[:3] + left[6:] == found[:3] + found[6:]  # rows 3 to 5 are of the damaged group
    assert all("its part of the file is damaged" in line for line in left[3:6])
    (tmp_path / "b.parquet").write_bytes(b"x")
    with pytest.raises(SourceError, match=r"b.parquet: not a parquet file"):
        list(open_source(tmp_path / "b.parquet").rows())


class Streamed(list):
    """As a streamed data set of ``datasets``: what is in it comes, an error is raised, and then the stream is over."""

    def skip(self, n: int) -> Streamed:
        return type(self)(self[n:])

    def __iter__(self) -> Iterator[Any]:
        for value in super().__iter__():
            found = value() if callable(value) else value
            if isinstance(found, Exception):
                raise found
            yield found


def hub(monkeypatch: pytest.MonkeyPatch, examples: list[Any]) -> tuple[list[Any], list[float]]:
    """Put a package ``datasets`` in place that knows ``examples``; returns what it is asked and how long is waited."""
    asked: list[Any] = []
    waited: list[float] = []

    def load(name: str, config: str | None, split: str, streaming: bool) -> Streamed:
        asked.append((name, config, split, streaming))
        if name == "me/none":
            raise OSError("not\nthere")
        return Streamed(examples)

    monkeypatch.setitem(sys.modules, "datasets", types.SimpleNamespace(load_dataset=load))
    monkeypatch.setattr("time.sleep", waited.append)
    return asked, waited


def test_a_data_set_of_the_hub_is_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [{"image": Image.new("RGB", (8, 8)), "text": f"row {i}"} for i in range(3)]
    asked, _ = hub(monkeypatch, rows)
    assert texts(open_source("hf://me/it/test"), 1) == ["row 1", "row 2"]
    assert texts(open_source("hf://me/it@large")) == ["row 0", "row 1", "row 2"]
    assert texts(open_source("hf://me/it@large/test/"), 5) == []
    assert asked == [
        ("me/it", c, s, True) for c, s in ((None, "test"), ("large", "train"), ("large", "test"))
    ]
    with pytest.raises(SourceError, match="hf://me/none/train: not there"):
        list(open_source("hf://me/none").rows())
    for wrong in ("it", "me/it@", "me@a/it", "me/it/train/more"):
        with pytest.raises(SourceError, match="hf://OWNER/NAME@CONFIG/SPLIT is accepted"):
            open_source(f"hf://{wrong}")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(SourceError, match="needs the package datasets"):
        list(open_source("hf://me/it").rows())


def test_a_broken_item_of_the_hub_is_an_error_in_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    good = [{"image": png(), "text": f"row {i}"} for i in range(20)]
    broken = ValueError("cannot\nidentify image file")
    _, waited = hub(monkeypatch, [good[0], broken, broken, good[3], {"image": png(), "text": " "}, good[5]])
    found = texts(open_source("hf://me/it"))
    told = "!hf://me/it/train: row {}: cannot identify image file"
    assert found[:4] == ["row 0", told.format(1), told.format(2), "row 3"]
    assert "row 4: caption is empty" in found[4] and found[5:] == ["row 5"] and not waited
    assert texts(open_source("hf://me/it"), 2) == found[2:]
    hub(monkeypatch, [good[0], *[broken] * 10, good[1]])
    with pytest.raises(
        SourceError, match=r"row 10: it and the 9 rows before cannot be read \(cannot identify"
    ):
        list(open_source("hf://me/it").rows())


def test_a_lost_connection_is_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            self.response = types.SimpleNamespace(status_code=status)

    good = [{"image": png(), "text": f"row {i}"} for i in range(3)]
    failing = [ConnectionError("gone"), TimeoutError(), Answer(503)]
    _, waited = hub(monkeypatch, [good[0], lambda: failing.pop() if failing else good[1], good[2]])
    assert texts(open_source("hf://me/it")) == ["row 0", "row 1", "row 2"] and waited == [1, 4, 15]
    _, waited = hub(monkeypatch, [good[0], ConnectionError("gone")])
    with pytest.raises(
        SourceError, match=r"row 1: the connection was lost, and so it was in 4 more .*\(gone\)"
    ):
        list(open_source("hf://me/it").rows())
    assert waited == [1, 4, 15, 60]
    _, waited = hub(monkeypatch, [good[0], Answer(404), good[2]])
    assert [t[:6] for t in texts(open_source("hf://me/it"))] == ["row 0", "!hf://", "row 2"] and not waited


def test_a_connection_that_is_lost_while_a_set_is_opened_is_tried_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Answer(Exception):
        def __init__(self, status: int) -> None:
            super().__init__(f"answer {status}")
            self.response = types.SimpleNamespace(status_code=status)

    def opened(*failing: Exception) -> tuple[list[str], list[float], int]:
        """What is read of two rows where opening fails first, the waits, and how often it was tried."""
        left, tried = list(failing), []
        _, waited = hub(monkeypatch, [{"text": "row 0"}, {"text": "row 1"}])
        load = sys.modules["datasets"].load_dataset

        def lost(*args: Any, **kwargs: Any) -> Streamed:
            tried.append(args)
            if left:
                raise left.pop(0)
            return load(*args, **kwargs)

        monkeypatch.setattr(sys.modules["datasets"], "load_dataset", lost)
        try:
            return texts(open_source("hf://me/it")), waited, len(tried)
        except SourceError as error:
            return [str(error)], waited, len(tried)

    assert opened(ConnectionError("gone"), Answer(503)) == (["row 0", "row 1"], [1, 4], 3)
    (told,), waited, tried = opened(*[ConnectionError("gone")] * 9)
    assert "hf://me/it/train: row 0: the connection was lost, and so it was in 4 more tries (gone)" in told
    assert waited == [1, 4, 15, 60] and tried == 5
    for final in (Answer(404), OSError("not there"), ConnectionError("no Hub (OfflineModeIsEnabled)")):
        assert opened(final) == ([f"hf://me/it/train: {final}"], [], 1)


def test_a_stream_of_the_hub_skips_without_being_opened_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    opened: list[int] = []
    hub(monkeypatch, [{"text": " " if i == 2 else f"row {i}"} for i in range(9)])
    skipped = Streamed.skip
    monkeypatch.setattr(Streamed, "skip", lambda self, n: (opened.append(n), skipped(self, n))[1])
    stream = HubSource("me/it").rows(1)
    stream.skip(1)
    assert "row 2: text is empty" in str(next(stream))
    stream.skip(3)
    assert "row 6" in str(next(stream)) and opened == [2]
    stream.skip(9)
    assert next(stream, None) is None and opened == [2]


def test_pictures_of_the_hub_that_are_only_named(monkeypatch: pytest.MonkeyPatch) -> None:
    fsspec = pytest.importorskip("fsspec")
    with fsspec.open("memory://a.png", "wb") as file:
        file.write(png((7, 5)))
    named = [{"image": {"bytes": None, "path": f"memory://{n}.png"}, "text": n} for n in ("a", "gone")]
    hub(monkeypatch, [*named, {"images": [named[0]["image"]], "texts": ["story"]}])
    one, none, story = open_source("hf://me/it").rows()
    for row in (one, story):
        assert isinstance(row, Row) and row.pictures[0].content() == (png((7, 5)), "png")
    assert isinstance(none, RowError) and str(none).startswith("hf://me/it/train: row 1: ")


def test_the_real_package_streams_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = datasets.Features(
        {"images": datasets.Sequence(datasets.Image()), "texts": datasets.Sequence(datasets.Value("string"))}
    )
    buffer = io.BytesIO()
    Image.new("RGB", (20, 20), "red").save(buffer, "JPEG")
    rows = [{"images": [{"bytes": buffer.getvalue(), "path": None}], "texts": [f"row {i}"]} for i in range(5)]
    rows[2]["images"][0]["bytes"] = b"none"
    folder = tmp_path / "me" / "it"
    folder.mkdir(parents=True)
    for name in ("a", "b"):
        pq.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / f"{name}.parquet")
    configs = "".join(f"- config_name: {n}\n  data_files: {n}.parquet\n" for n in ("a", "b"))
    (folder / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)  # a folder of that name stands for the Hub
    source = open_source("hf://me/it@b/train")
    found = list(source.rows(1))
    assert all(isinstance(row, Row) for row in found) and texts(source, 1) == [
        f"row {i}" for i in range(1, 5)
    ]
    contents = [row.pictures[0] for row in found if isinstance(row, Row)]
    assert contents[0].content() == (buffer.getvalue(), "jpg")
    with pytest.raises(PictureError):
        contents[1].open()
    with pytest.raises(
        SourceError, match=r"several configurations, name one \(hf://me/it@CONFIG\): \['a', 'b'\]"
    ):
        list(open_source("hf://me/it").rows())


def test_places_that_are_no_source(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("a")
    with pytest.raises(
        SourceError, match=r".jsonl, .tar, .parquet, .json and video files, folders and hf://OWNER/NAME"
    ):
        open_source(tmp_path / "a.csv")
    with pytest.raises(SourceError, match="neither pictures nor"):
        open_source(tmp_path)
    (tmp_path / "metadata.csv").write_text("file_name,text\n0.png,a dog\n")
    (tmp_path / "0.png").write_bytes(png())
    with pytest.raises(SourceError, match=r"metadata.csv is not read: make it metadata.jsonl"):
        open_source(tmp_path)


def test_folders_of_hugging_face_say_what_to_do(tmp_path: Path) -> None:
    for folder in (tmp_path / "set", tmp_path / "sets" / "train"):  # as save_to_disk writes them
        folder.mkdir(parents=True)
        for name in ("data-00000-of-00001.arrow", "dataset_info.json", "state.json"):
            (folder / name).write_text("{}")
    (tmp_path / "sets" / "dataset_dict.json").write_text('{"splits": ["train"]}')
    with pytest.raises(
        SourceError, match=r"set: an Arrow folder of datasets.save_to_disk is not read: write it"
    ):
        open_source(tmp_path / "set")
    with pytest.raises(
        SourceError, match=r"sets: a DatasetDict of datasets.save_to_disk is not read: write one"
    ):
        open_source(tmp_path / "sets")
    (tmp_path / "set" / "a.png").write_bytes(png((64, 64)))
    (tmp_path / "set" / "a.txt").write_text("a square")
    assert (
        len(list(open_source(tmp_path / "set").rows())) == 1
    )  # pictures are read, whatever lies beside them
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "state.json").write_text('[{"text": "a"}]')
    assert texts(open_source(tmp_path / "rows")) == ["a"]
    clone = tmp_path / "clone"
    (clone / "data").mkdir(parents=True)
    pq.write_table(pa.table({"text": ["a", "b"]}), clone / "data" / "train-00000-of-00001.parquet")
    for name in ("README.md", ".gitattributes", "dataset_infos.json"):
        (clone / name).write_text("{}")
    with pytest.raises(SourceError, match=rf"neither pictures nor .* in this folder: name {clone}/data$"):
        open_source(clone)
    assert texts(open_source(clone / "data")) == ["a", "b"]


def test_what_is_wrong_with_a_place_or_option_is_said_once(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = tmp_path / "pics"
    pictures.mkdir()
    (pictures / "wide.png").write_bytes(png((400, 10)))
    (pictures / "wide.txt").write_text("a")
    (tmp_path / "none.jsonl").write_text("")
    check = ["data", "check", "-m", str(GOLDEN)]
    assert run([*check, str(pictures), "--headers"]) == 1
    assert f"\n{pictures}/wide.png: 400x10 pixels fit no bucket" in capsys.readouterr().out
    for more, status, why in (
        ([str(tmp_path / "none.jsonl")], 1, f"{tmp_path}/none.jsonl: no rows"),
        ([""], 1, "the place of the data is empty: name a file, a folder or hf://OWNER/NAME"),
        ([str(pictures), "--video", "rate"], 2, "--video takes KEY=VALUE such as rate=1, got 'rate'"),
        (
            [str(pictures), "--video", "rate.x=1"],
            2,
            "--video rate.x=1: 'rate' is a value, not a group of keys",
        ),
    ):
        assert run([*check, *more]) == status
        assert capsys.readouterr().err.splitlines()[-1] == f"nextflow-ar: {why}"


def test_numbered_pictures_are_told_as_what_they_are_read(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    for i in range(4):
        (tmp_path / f"{i}.png").write_bytes(png(colour=["red", "blue"][i % 2]))
    run(["data", "check", str(tmp_path), "-m", str(GOLDEN)])
    told = "read as 1 clips, 1 of them folders of numbered frames; 0 have words (docs/data.md)"
    assert told in capsys.readouterr().err
    assert run(["extract", str(tmp_path), "-o", str(tmp_path / "s"), "--device", "cuda"]) == 2
    assert "--device cuda: there is no CUDA device here" in capsys.readouterr().err


@pytest.mark.shared
def test_the_shared_photographs_are_whole() -> None:
    folder = Path(__file__).parents[3] / "shared" / "data" / "coco_mini_cc"
    if not folder.is_dir():
        pytest.skip("needs ../shared")
    report = check_rows(
        open_source(folder), num_scales=8, most_tokens=1024, count_text=lambda t: len(t.split())
    )
    assert report.rows == 87 and report.problems == [] and report.kinds == {"drawing": 87}
    rows = [row for row in open_source(folder).rows() if isinstance(row, Row)]
    assert all([type(part) for part in row.parts] == [TextPart, PicturePart] for row in rows)
    assert len({told(row)[0][0] for row in rows}) == 87
