"""Conversion: every form to every form and back without loss, whole files or none, and going on after a stop."""

from __future__ import annotations

import io
import json
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.data.convert import convert
from nextflow_ar.data.rows import Row, RowError, TextPart
from nextflow_ar.data.sources import Source, SourceError, open_source
from nextflow_ar.storage import StorageError

pytest.importorskip("pyarrow")
SUFFIXES = (".jsonl", ".parquet", ".tar")


def picture(kind: str, colour: int, turned: bool = False) -> bytes:
    buffer = io.BytesIO()
    exif = Image.Exif()
    if turned:
        exif[0x0112] = 6  # lies on its side
    noise = np.random.default_rng(colour).integers(0, 255, (20, 30, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, kind, exif=exif)
    return buffer.getvalue()


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Every kind of row, pictures of three formats, one shared by two rows, two rows broken."""
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(picture("JPEG", 1, turned=True))
    (folder / "b.png").write_bytes(picture("PNG", 2))
    (folder / "c.webp").write_bytes(picture("WEBP", 3))
    lines = [
        {"image": "a.jpg", "caption": "é a dog\nrunning"},
        {"image": "gone.png", "caption": "gone"},
        {"source": "b.png", "instruction": "blue", "target": "c.webp"},
        {"images": ["a.jpg", "b.png"], "texts": ["one", "two"], "prompt": "tell"},
        {"image": "b.png", "caption": " "},
        {"segments": [{"text": "be brief", "role": "system"}, {"text": "hi"},
                      {"image": "c.webp", "role": "assistant", "supervised": False}, {"text": "ok", "role": "assistant"}]},
        {"text": "plain words"},
    ]  # fmt: skip
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, lines)))
    return folder / "rows.jsonl"


def told(source: Source, start: int = 0) -> list[list[tuple[object, ...]]]:
    out = []
    for row in source.rows(start):
        assert isinstance(row, Row), row
        out.append(
            [
                (
                    part.role,
                    part.supervised,
                    part.text if isinstance(part, TextPart) else part.picture.content(),
                )
                for part in row.parts
            ]
        )
    return out


def good(path: Path) -> list[list[tuple[object, ...]]]:
    rows = [r for i, r in enumerate(open_source(path).rows()) if isinstance(r, Row) and i != 1]
    return [
        [
            (p.role, p.supervised, p.text if isinstance(p, TextPart) else p.picture.content())
            for p in row.parts
        ]
        for row in rows
    ]


@pytest.mark.parametrize("second", SUFFIXES)
@pytest.mark.parametrize("first", SUFFIXES)
def test_there_and_back(data: Path, tmp_path: Path, first: str, second: str) -> None:
    wanted = good(data)
    one, two = tmp_path / "one" / f"x{first}", tmp_path / "two" / f"y{second}"
    found = convert(open_source(data), one)
    assert found.files == [one] and found.rows == 5 and list(found.broken) == ["1", "4"]
    assert "gone.png: no such file" in found.broken["1"] and "caption is empty" in found.broken["4"]
    assert told(open_source(one)) == wanted
    again = convert(open_source(one), two)
    assert again.rows == 5 and again.broken == {}
    assert told(open_source(two)) == wanted and open_source(two).count() == 5
    assert told(open_source(two.parent), 3) == wanted[3:]  # the folder is a source as well
    # a picture that lies on its side is upright whatever it is stored in
    (ref,) = next(r for r in open_source(two).rows() if isinstance(r, Row)).pictures
    assert ref.size() == (30, 20) and ref.open().size == (20, 30)


def test_a_picture_of_several_rows_is_stored_once(data: Path, tmp_path: Path) -> None:
    convert(open_source(data), tmp_path / "x.jsonl")
    assert len([p for p in (tmp_path / "x_pictures").rglob("*") if p.is_file()]) == 3


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_shards_go_on_after_a_stop(data: Path, tmp_path: Path, suffix: str) -> None:
    whole, parts = tmp_path / "whole" / f"x{suffix}", tmp_path / "parts" / f"x{suffix}"
    files = convert(open_source(data), whole, most_bytes=2000, place="p").files
    assert len(files) >= 3 and [f.name for f in files][:2] == [f"x-000000{suffix}", f"x-000001{suffix}"]
    assert told(open_source(whole.parent)) == good(data)

    def stop(rows: int) -> None:
        if rows == 3:
            raise Stopped

    with pytest.raises(Stopped):
        convert(open_source(data), parts, most_bytes=2000, place="p", progress=stop)
    there = [p.name for p in parts.parent.iterdir() if p.is_file()]
    assert f"x-000000{suffix}" in there and f"{files[-1].name}" not in there
    assert not any(name.endswith(".tmp") for name in there)
    with pytest.raises(StorageError, match="a conversion of another source or size was stopped there"):
        convert(open_source(data), parts, most_bytes=3000, place="p")
    found = convert(open_source(data), parts, most_bytes=2000, place="p")
    assert [f.name for f in found.files] == [f.name for f in files] and list(found.broken) == ["1", "4"]
    assert told(open_source(parts.parent)) == good(data)
    if suffix == ".tar":
        assert all(a.read_bytes() == b.read_bytes() for a, b in zip(found.files, files, strict=True))
    with pytest.raises(StorageError, match="exists already: name another file"):
        convert(open_source(data), parts, most_bytes=2000, place="p")


class Stopped(Exception):
    pass


def stopped(source: Source, out: Path, place: Path | str) -> None:
    """A conversion of which the first file is whole."""

    def stop(rows: int) -> None:
        if rows == 3:
            raise Stopped

    with pytest.raises(Stopped):
        convert(source, out, most_bytes=100, place=place, progress=stop)


@pytest.fixture
def words(tmp_path: Path) -> Path:
    path = tmp_path / "words.jsonl"
    path.write_text("".join(json.dumps({"text": f"r{i} " + "x" * 200}) + "\n" for i in range(6)))
    return path


def test_a_source_that_changed_is_not_gone_on_with(words: Path, tmp_path: Path) -> None:
    out, lines = tmp_path / "o" / "x.jsonl", words.read_text().splitlines(keepends=True)
    stopped(open_source(words), out, words)
    first = (out.parent / "x-000000.jsonl").read_text()
    for changed in (['{"text": "new"}\n', *lines], lines[1:], lines[:1]):
        words.write_text("".join(changed))
        with pytest.raises(
            StorageError, match=r"x-00000\d.jsonl: its source has changed since it was written"
        ) as e:
            convert(open_source(words), out, most_bytes=100, place=words)
        assert "\n" not in str(e.value)
    words.write_text("".join([*lines, '{"text": "more"}\n']))  # behind what is written
    found = convert(open_source(words), out, most_bytes=100, place=words)
    assert found.rows == 5 and [row[0][2] for row in told(open_source(out.parent))] == [
        *(f"r{i} " + "x" * 200 for i in range(6)), "more",
    ]  # fmt: skip
    assert (out.parent / "x-000000.jsonl").read_text() == first


def test_a_place_is_the_same_from_everywhere(
    words: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    stopped(open_source(words), Path("o/x.jsonl"), "words.jsonl")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / words.name).write_bytes(words.read_bytes())
    monkeypatch.chdir(tmp_path / "elsewhere")
    with pytest.raises(StorageError, match="a conversion of another source or size was stopped there"):
        convert(open_source(words.name), tmp_path / "o" / "x.jsonl", most_bytes=100, place=words.name)
    found = convert(open_source(words), Path("../o/x.jsonl"), most_bytes=100, place="../words.jsonl")
    assert len(found.files) == 6 and all(path.is_file() for path in found.files)


@pytest.mark.parametrize(
    "content", [b"{", b"[]", b"{}", b"\xff", b'{"setting": 1, "files": 2, "broken": {}}']
)
def test_a_damaged_journal_is_one_line(words: Path, tmp_path: Path, content: bytes) -> None:
    out = tmp_path / "o" / "x.jsonl"
    stopped(open_source(words), out, words)
    journal = out.parent / ".x.jsonl.progress.json"
    whole = journal.read_bytes()
    journal.write_bytes(content)
    with pytest.raises(StorageError, match=r"x.jsonl.progress.json: damaged \(.*name another file$"):
        convert(open_source(words), out, most_bytes=100, place=words)
    journal.write_bytes(whole)
    (out.parent / "x-000000.jsonl").unlink()
    with pytest.raises(StorageError, match=r"x-000000.jsonl: gone since the conversion was stopped"):
        convert(open_source(words), out, most_bytes=100, place=words)


def test_as_a_command(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "o" / "x.tar"
    assert run(["data", "convert", str(data), "-o", str(out)]) == 0
    assert f"{out}\n5 rows written, 2 left out\n" in capsys.readouterr().out
    assert run(["data", "convert", str(data), "-o", str(out)]) == 1
    assert "exists already" in capsys.readouterr().err
    assert run(["data", "convert", str(data), "-o", str(tmp_path / "x.csv")]) == 1
    assert "data is written as .jsonl, .parquet, .tar" in capsys.readouterr().err
    assert (
        run(
            [
                "data",
                "convert",
                str(data),
                "-o",
                str(tmp_path / "p" / "x.parquet"),
                "--shard-mb",
                "1",
                "--json",
            ]
        )
        == 0
    )
    assert json.loads(capsys.readouterr().out)["files"] == [str(tmp_path / "p" / "x-000000.parquet")]


def test_what_cannot_be_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        convert(open_source(data), tmp_path / "file" / "x.tar")
    with pytest.raises(SourceError, match="data is written as"):
        convert(open_source(data), tmp_path / "x.zip")
    with pytest.raises(Stopped):
        convert(_Stopping(), tmp_path / "x.tar")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "in"]  # nothing half done is left
    assert (tmp_path / "file").read_bytes() == b""


def test_nothing_is_written_into_the_source(
    words: Path,
    tmp_path_factory: pytest.TempPathFactory,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A stopped conversion would have gone on in its own output."""
    monkeypatch.chdir(words.parent)
    pictures = tmp_path_factory.mktemp("pictures")
    (pictures / "a.png").write_bytes(picture("PNG", 2))
    (pictures / "a.txt").write_text("a dog")
    for place, out in (
        (words.parent, words.parent / "x.jsonl"),
        (Path("."), Path("x.tar")),
        (pictures, pictures / "o" / "x.tar"),
    ):
        assert run(["data", "convert", str(place), "-o", str(out), "--shard-mb", "1"]) == 1
        assert f"{out} lies in the source, {place}, and would be read with it" in capsys.readouterr().err
    assert [path.name for path in words.parent.iterdir()] == ["words.jsonl"]
    assert run(["data", "convert", str(words.parent), "-o", "o/x.jsonl"]) == 0  # tables below it are not read
    assert open_source(words.parent).count() == 6
    assert run(["data", "convert", str(words), "-o", str(words.parent / "x.jsonl")]) == 0


@pytest.mark.parametrize(("more", "end"), [([], "begins anew"), (["--shard-mb", "1"], "goes on")])
def test_a_conversion_that_is_ended_leaves_nothing_half_done(
    words: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    more: list[str],
    end: str,
) -> None:
    def ended(self: object, number: int, segments: object) -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr("nextflow_ar.data.convert._Tar.add", ended)
    out = words.parent / "o" / "x.tar"
    assert run(["data", "convert", str(words), "-o", str(out), *more]) == 143
    assert capsys.readouterr().err.splitlines()[-1] == f"nextflow-ar: stopped; the same command {end}"
    assert list(out.parent.iterdir()) == []


def test_nothing_to_write_is_no_success(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "rows.jsonl"
    for content, why in (
        ("", "no rows to write"),
        (
            '{"image": "gone.png", "caption": "a"}\n',
            f"no row could be written, 1 left out: {place}:1: gone.png: no such file",
        ),
    ):
        place.write_text(content)
        for more in ([], ["--shard-mb", "1"]):
            assert run(["data", "convert", str(place), "-o", str(tmp_path / "x.parquet"), *more]) == 1
            assert capsys.readouterr().err.splitlines()[-1] == f"nextflow-ar: {place}: {why}"
            assert [path.name for path in tmp_path.iterdir()] == ["rows.jsonl"]


def test_a_row_whose_picture_is_a_folder(tmp_path: Path) -> None:
    (tmp_path / "pics").mkdir()
    place = tmp_path / "rows.jsonl"
    place.write_text('{"image": "pics", "caption": "a"}\n{"text": "b"}\n')
    found = convert(open_source(place), tmp_path / "x.tar")
    assert found.broken == {"0": f"{place}:1: pics: is a folder, not a picture"}


class _Stopping:
    """A source that ends in the middle of a file."""

    def rows(self, start: int = 0) -> Iterator[Row | RowError]:
        yield Row((TextPart("plain words", "assistant", True),), "here")
        raise Stopped

    def count(self) -> int:
        return 2
