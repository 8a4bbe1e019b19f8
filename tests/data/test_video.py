"""Video: what moves by itself is kept, what stands still or only the camera moves is dropped, texts find their frames."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.data import video
from nextflow_ar.data.check import check_rows
from nextflow_ar.data.motion import MotionConfig, compare, shrink
from nextflow_ar.data.rows import LeftOut, PicturePart, Row, RowError
from nextflow_ar.data.sources import Source, SourceError, open_source, spans_of
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.data.video import FrameRef, VideoConfig

cv2 = pytest.importorskip("cv2")
GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"
GROUND = dead_leaves((3,), 260, 400)
CONFIG = MotionConfig()


def view(x: int = 40, y: int = 40, zoom: float = 1.0) -> np.ndarray:
    """160 x 120 pixels of a ground that is still, seen from (x, y)."""
    height, width = round(120 * zoom), round(160 * zoom)
    part = np.ascontiguousarray(GROUND[y : y + height, x : x + width])
    return part if zoom == 1 else cv2.resize(part, (160, 120), interpolation=cv2.INTER_AREA)


def put(frame: np.ndarray, x: int, y: int, side: int = 18) -> np.ndarray:
    out = frame.copy()
    out[y : y + side, x : x + side] = (230, 40, 40)
    return out


def change(before: np.ndarray, after: np.ndarray) -> str:
    return compare(shrink(before, CONFIG), shrink(after, CONFIG), CONFIG).change


def grain(frame: np.ndarray, seed: int) -> np.ndarray:
    return np.clip(frame + np.random.default_rng(seed).normal(0, 4, frame.shape), 0, 255).astype(np.uint8)


def test_what_stands_still() -> None:
    assert change(view(), view()) == "still"
    assert change(grain(view(), 1), grain(view(), 2)) == "still"
    lighter = np.clip(view() * 1.1 + 6, 0, 255).astype(np.uint8)
    assert change(view(), lighter) == "still"


@pytest.mark.parametrize("ground", [view(), np.full((120, 160, 3), 200, np.uint8)])
def test_a_thing_that_moves_over_still_ground(ground: np.ndarray) -> None:
    for side in (8, 18, 40):
        found = compare(
            shrink(put(ground, 30, 40, side), CONFIG), shrink(put(ground, 60, 50, side), CONFIG), CONFIG
        )
        assert found.change == "moving" and found.own == found.flowing > 0.02, (side, found)
    assert change(ground, put(ground, 60, 50)) == "moving"  # it appears


def test_the_camera_alone() -> None:
    for step in (3, 10, 25, 35):
        found = compare(shrink(view(), CONFIG), shrink(view(40 + step, 40 + step // 3), CONFIG), CONFIG)
        assert found.change == "camera" and found.flowing > 0.8 and found.own < 0.02, (step, found)
    assert change(view(20, 25, 1.25), view()) == "camera"  # zoom in
    assert change(view(), view(20, 25, 1.25)) == "camera"  # and out
    turn = cv2.getRotationMatrix2D((120, 100), 4, 1)
    turned = cv2.warpAffine(GROUND, turn, (400, 260))[40:160, 40:200]
    assert change(view(), np.ascontiguousarray(turned)) == "camera"


def test_camera_and_thing_together() -> None:
    for step in (4, 12, 24):
        found = compare(
            shrink(put(view(), 30, 40), CONFIG), shrink(put(view(40 + step, 44), 70, 52), CONFIG), CONFIG
        )
        assert found.change == "moving" and 0.02 < found.own < 0.5 < found.flowing, (step, found)


def film(path: Path, frames: list[np.ndarray], fps: float = 4) -> Path:
    """A file as OpenCV (mp4, webm) or Pillow (gif) writes it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".gif":
        pictures = [Image.fromarray(frame) for frame in frames]
        pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=round(1000 / fps), loop=0)
        return path
    code = cv2.VideoWriter_fourcc(*("VP80" if path.suffix == ".webm" else "mp4v"))
    writer = cv2.VideoWriter(str(path), code, fps, (frames[0].shape[1], frames[0].shape[0]))
    assert writer.isOpened()
    for frame in frames:
        writer.write(cv2.cvtColor(frame, cv2.COLOR_RGB2BGR))
    writer.release()
    return path


def uneven(path: Path, frames: list[np.ndarray], durations: list[int]) -> Path:
    """A GIF whose frames are shown for so many milliseconds each."""
    pictures = [Image.fromarray(frame) for frame in frames]
    pictures[0].save(path, save_all=True, append_images=pictures[1:], duration=durations, loop=0)
    return path


def folder(path: Path, frames: list[np.ndarray]) -> Path:
    path.mkdir(parents=True)
    for i, frame in enumerate(frames):
        Image.fromarray(frame).save(path / f"{i + 1:03d}.png")
    return path


def moving(count: int, still_from: int = 1000) -> list[np.ndarray]:
    return [put(view(), 10 + 3 * min(i, still_from), 40) for i in range(count)]


def told(row: Row) -> list[str]:
    return [p.picture.name.rpartition(": ")[2] if isinstance(p, PicturePart) else p.text for p in row.parts]


def rows(source: Source, start: int = 0) -> list[Row | RowError]:
    return list(source.rows(start))


@pytest.mark.parametrize("suffix", [".mp4", ".webm", ".gif"])
def test_files_give_frames_at_the_rate(tmp_path: Path, suffix: str) -> None:
    path = film(tmp_path / f"a{suffix}", moving(33))  # 8 s: looks at 0, 2, 4, 6, 8
    path.with_suffix(".txt").write_text("a square slides\n[3.0] it goes on\n[3.5] further\n")
    (row,) = rows(open_source(path))
    assert isinstance(row, Row), row
    assert told(row) == [
        "a square slides",
        "frame 0",
        "frame 8",
        "it goes on further",
        "frame 16",
        "frame 24",
        "frame 32",
    ]
    assert [(p.role, p.supervised) for p in row.parts] == [("user", False)] + [("assistant", True)] * 6
    wanted = moving(33)[16].astype(float)
    assert (
        np.abs(np.asarray(row.pictures[2].open(), float) - wanted).mean() < 12
    )  # compressed, but this frame
    assert row.pictures[2].size() == (120, 160) and row.pictures[2].content()[1] == "png"
    (row,) = rows(open_source(path, VideoConfig(rate=1, frames=3, least=3)))[:1]
    assert isinstance(row, Row) and [p.name.rpartition(" ")[2] for p in row.pictures] == ["0", "4", "8"]


def test_looks_may_be_more_frequent_than_frames(tmp_path: Path) -> None:
    """A frame is looked at several times then, as in a folder of frames."""
    path = film(tmp_path / "a.mp4", moving(9))  # four a second
    config = VideoConfig(rate=8, frames=5, least=2, filter=False)
    path.with_suffix(".txt").write_text("a square slides")
    found = rows(open_source(path, config))
    assert [told(row)[1:] if isinstance(row, Row) else str(row) for row in found] == [
        [f"frame {i}" for i in numbers]
        for numbers in ((0, 0, 1, 2, 2), (2, 3, 4, 4, 4), (5, 6, 6, 6, 7), (8, 8))
    ]


def test_frames_that_last_differently_long_are_seen_while_they_are_shown(tmp_path: Path) -> None:
    path = uneven(tmp_path / "a.gif", moving(20), [100] * 10 + [1000] * 10)  # frame 10 at 1 s, 11 at 2 s, ...
    path.with_suffix(".txt").write_text("[0.9] ten comes\n[5.0] fourteen\n[6.1] late\n")
    config = VideoConfig(frames=3, filter=False)
    found = rows(open_source(path, config))
    assert [told(row) for row in found if isinstance(row, Row)] == [
        ["frame 0", "ten comes", "frame 11", "frame 13"],
        ["fourteen", "frame 15", "late", "frame 17", "frame 19"],
    ]
    (again,) = rows(open_source(path, config), 1)
    assert isinstance(again, Row) and told(again) == ["fourteen", "frame 15", "late", "frame 17", "frame 19"]
    path.with_suffix(".txt").unlink()
    uneven(path, moving(11), [100] * 10 + [8000])  # 9 s, of which nine tenths show the last one
    (row,) = rows(open_source(path, VideoConfig(filter=False)))
    assert isinstance(row, Row) and told(row) == ["frame 0"] + ["frame 10"] * 4
    uneven(path, moving(11), [4000] + [100] * 10)  # and four fifths the first
    (row,) = rows(open_source(path, VideoConfig(rate=1, filter=False)))
    assert isinstance(row, Row) and told(row) == ["frame 0"] * 4 + ["frame 1"]


@pytest.mark.parametrize(
    "stamp", [lambda at: 0.0, lambda at: at % 500, lambda at: -at, lambda at: float("nan")]
)
def test_containers_without_times_go_by_the_number_of_frames(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, stamp: Callable[[float], float]
) -> None:
    path, config = film(tmp_path / "a.mp4", moving(33)), VideoConfig(rate=1, filter=False)
    wanted = [told(row) for row in rows(open_source(path, config)) if isinstance(row, Row)]

    class Capture:
        def __init__(self, real: Any) -> None:
            self.real = real

        def __getattr__(self, name: str) -> Any:
            return getattr(self.real, name)

        def get(self, key: int) -> float:
            found = self.real.get(key)
            if key == cv2.CAP_PROP_POS_MSEC:
                return stamp(found)
            return -1.0 if key == cv2.CAP_PROP_FRAME_COUNT else found

    opened = video._capture
    monkeypatch.setattr(video, "_capture", lambda clip: Capture(opened(clip)))
    assert [told(row) for row in rows(open_source(path, config)) if isinstance(row, Row)] == wanted
    assert wanted[0] == ["frame 0", "frame 4", "frame 8", "frame 12", "frame 16"] and len(wanted) == 2


def test_a_file_that_was_cut_off_tells_so(tmp_path: Path) -> None:
    path = film(tmp_path / "a.webm", moving(60))
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    first, *others = rows(open_source(path, VideoConfig(rate=1)))
    assert isinstance(first, Row) and len(others) == 2
    assert all("ends before its header says so" in str(row) for row in others)


def test_beside_the_name_of_a_picture_other_columns_are_labels(tmp_path: Path) -> None:
    folder(tmp_path / "train", moving(3))
    film(tmp_path / "train" / "a.mp4", moving(9))
    labels = {"folder": "train", "video": "train/a.mp4"}
    table = tmp_path / "metadata.jsonl"
    for key in ("file_name", "image"):
        lines = [{key: f"train/{i:03d}.png", **labels, "text": f"caption {i}"} for i in (1, 2)]
        table.write_text("\n".join(map(json.dumps, lines)))
        found = [told(row) if isinstance(row, Row) else str(row) for row in rows(open_source(tmp_path))]
        assert found == [[f"caption {i}", f"train/{i:03d}.png"] for i in (1, 2)]
    table.write_text(json.dumps({"file_name": "train/a.mp4", "folder": "train", "text": "a film"}))
    (row,) = rows(open_source(tmp_path))
    assert isinstance(row, Row) and told(row) == ["a film", "frame 0", "frame 8"]


@pytest.mark.parametrize("inner", ["", "images"])
@pytest.mark.parametrize("name", ["metadata.jsonl", "metadata.csv", "captions.jsonl", "manifest.jsonl"])
def test_a_split_with_a_table_of_its_own_is_no_clip(tmp_path: Path, name: str, inner: str) -> None:
    split = tmp_path / "train"
    folder(split / inner, moving(3))
    assert len(rows(open_source(tmp_path))) == 1  # a clip, without the table
    (split / name).write_text("{}")
    message = rf"train has a table of its own \({name}\), so it is a data set: name that folder"
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)
    for picture in (split / inner).glob("*.png"):
        picture.unlink()
    film(split / inner / "a.mp4", moving(9))
    with pytest.raises(SourceError, match=message):
        open_source(tmp_path)
    (split / name).rename(split / "metadata.json")  # a camera's or a crawler's notes
    assert len(rows(open_source(tmp_path))) == 1


def test_videos_that_pillow_knows_are_no_pictures(tmp_path: Path) -> None:
    for name in ("a.mpg", "b.mpeg"):
        film(tmp_path / "a.mp4", moving(9)).rename(tmp_path / name)
    found = rows(open_source(tmp_path))
    assert len(found) == 2 and all(isinstance(row, Row) for row in found)


def test_a_picture_table_may_name_a_gif(tmp_path: Path) -> None:
    for name in ("a.png", "b.gif"):
        Image.fromarray(view()).save(tmp_path / name)
    table = tmp_path / "metadata.jsonl"
    lines = [{"file_name": name, "text": name} for name in ("a.png", "b.gif")]
    table.write_text("\n".join(map(json.dumps, lines)))
    found = rows(open_source(tmp_path))
    assert [told(row)[0] if isinstance(row, Row) else str(row) for row in found] == ["a.png", "b.gif"]
    film(tmp_path / "b.gif", moving(33))
    table.write_text(json.dumps(lines[1]))
    (row,) = rows(open_source(tmp_path))
    assert isinstance(row, Row) and len(row.pictures) == 5
    table.write_text("\n".join(map(json.dumps, [{"video": "b.gif"}, lines[0]])))
    assert [type(row) for row in rows(open_source(tmp_path))] == [Row, RowError]


def test_still_frames_and_pans_are_dropped(tmp_path: Path) -> None:
    clips = {
        "mover": moving(5),
        "pause": moving(5, still_from=2),
        "pan": [view(40 + 20 * i, 40) for i in range(5)],
        "static": [grain(view(), i) for i in range(5)],
        "pan_mover": [put(view(40 + 8 * i, 40), 10 + 25 * i, 40) for i in range(5)],
    }
    for name, frames in clips.items():
        folder(tmp_path / name, frames)
    found = dict(zip(sorted(clips), rows(open_source(tmp_path)), strict=True))
    kept = {name: len(row.pictures) if isinstance(row, Row) else str(row) for name, row in found.items()}
    assert kept["mover"] == 5 and kept["pause"] == 3 and kept["pan_mover"] == 5
    assert isinstance(found["pan"], LeftOut) and "1 of 5 frames kept (0 still, 4 moved by the camera" in str(
        kept["pan"]
    )
    assert isinstance(found["static"], LeftOut) and "1 of 5 frames kept (4 still, 0" in str(kept["static"])
    everything = rows(open_source(tmp_path, VideoConfig(filter=False)))
    assert [len(r.pictures) for r in everything if isinstance(r, Row)] == [5] * 5
    pause = found["pause"]
    # nothing says what to draw, so the first frame is given
    assert isinstance(pause, Row) and [p.supervised for p in pause.parts] == [False, True, True]
    assert told(pause) == ["001.png", "002.png", "003.png"]


def test_long_clips_are_several_rows_with_fixed_numbers(tmp_path: Path) -> None:
    film(tmp_path / "a.mp4", moving(13), fps=0.5)  # 13 looks: parts of 5, 5 and 3
    film(tmp_path / "b.mp4", moving(11), fps=0.5)  # the eleventh would be alone
    source = open_source(tmp_path)
    found = rows(source)
    assert source.count() == len(found) == 5
    assert [r.where.rpartition("/")[2] for r in found if isinstance(r, Row)] == [
        "a.mp4: part 1", "a.mp4: part 2", "a.mp4: part 3", "b.mp4: part 1", "b.mp4: part 2",
    ]  # fmt: skip
    assert [told(r) for r in found if isinstance(r, Row)][2] == ["frame 10", "frame 11", "frame 12"]
    for start in range(6):
        again = rows(source, start)
        assert [told(r) for r in again if isinstance(r, Row)] == [
            told(r) for r in found[start:] if isinstance(r, Row)
        ]


def test_texts_follow_dropped_frames_to_the_next_kept_one(tmp_path: Path) -> None:
    frames = moving(4)
    folder(tmp_path / "a", [frames[0], frames[1], frames[1], frames[2]])
    (tmp_path / "a.json").write_text(json.dumps({"caption": "c", "texts": ["one", "two", "three", "four"]}))
    (row,) = rows(open_source(tmp_path / "a"))
    assert isinstance(row, Row)
    assert told(row) == ["c", "one", "001.png", "two", "002.png", "three four", "004.png"]
    (tmp_path / "a.json").write_text(json.dumps({"texts": ["one"]}))
    (row,) = rows(open_source(tmp_path / "a"))
    assert isinstance(row, RowError) and "1 texts for 4 frames at 0.5 per second" in str(row)
    (tmp_path / "a.json").unlink()
    lines = [{"caption": "c"}, {"time": 4, "text": "later"}, {"time": 1.5, "text": "soon"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, lines)))
    (row,) = rows(open_source(tmp_path / "a"))
    assert isinstance(row, Row) and told(row) == ["c", "001.png", "soon", "002.png", "later", "004.png"]


def test_texts_of_dropped_frames_reach_over_the_end_of_a_part(tmp_path: Path) -> None:
    frames = moving(15)
    frames[3] = frames[4] = frames[2]
    frames[5:10] = [frames[5]] * 5
    clip = folder(tmp_path / "a", frames)  # looks at 0, 2, ..., 28 s; 3, 4 and 6 to 9 stand still
    lines = [{"time": 2.0 * i, "text": f"at {i}"} for i in (2, 3, 4, 5, 9, 10)]
    (tmp_path / "a.json").write_text(json.dumps({"texts": lines}))
    found = [told(row) if isinstance(row, Row) else str(row) for row in rows(open_source(clip))]
    assert found[0] == ["001.png", "002.png", "at 2", "003.png"]
    assert "part 2: 1 of 5 frames kept (4 still, 0 moved" in found[1]
    assert found[2][:2] == ["at 9 at 10", "011.png"] and "at 5" not in found[2]
    for start in (1, 2):  # whoever starts there finds the same
        again = [told(row) if isinstance(row, Row) else str(row) for row in rows(open_source(clip), start)]
        assert again == found[start:]
    least = VideoConfig(least=1)
    found = [told(row) for row in rows(open_source(clip, least)) if isinstance(row, Row)]
    assert found[1] == ["at 3 at 4 at 5", "006.png"]
    (again, *_) = rows(open_source(clip, least), 1)
    assert isinstance(again, Row) and told(again) == found[1]
    everything = VideoConfig(filter=False)
    (_, second, _) = rows(open_source(clip, everything))
    (again, _) = rows(open_source(clip, everything), 1)
    assert isinstance(second, Row) and isinstance(again, Row)
    assert (
        told(second) == told(again) == ["at 5", "006.png", "007.png", "008.png", "009.png", "at 9", "010.png"]
    )


def test_all_notes_beside_a_clip_are_read(tmp_path: Path) -> None:
    path = film(tmp_path / "a.mp4", moving(9))
    text, note, lines = (path.with_suffix(s) for s in (".txt", ".json", ".jsonl"))
    text.write_text("\ufeff[0.0] start\ncafé", encoding="utf-8")
    note.write_text('\ufeff{"fps": 4, "width": 160, "caption": null}', encoding="utf-8")
    (row,) = rows(open_source(path))
    assert isinstance(row, Row) and told(row) == ["café", "start", "frame 0", "frame 8"]
    lines.write_text('{"time": 2, "text": "a\u2028line"}\n\n{"prompt": ""}')
    note.write_text('{"text": "from the note"}')
    (row,) = rows(open_source(path))
    assert isinstance(row, Row) and told(row) == ["from the note", "frame 0", "a\u2028line", "frame 8"]
    lines.unlink()
    table = tmp_path / "metadata.jsonl"
    table.write_text('{"video": "a.mp4", "text": "from the table"}')
    (row,) = rows(open_source(tmp_path))
    assert isinstance(row, Row) and told(row)[0] == "from the table"
    table.unlink()
    text.write_bytes("café".encode("latin-1"))
    (row,) = rows(open_source(path))
    assert isinstance(row, RowError) and str(row) == f"{path}: a.txt beside it is not UTF-8 (byte 3)"


@pytest.mark.parametrize(
    ("told", "problem"),
    [
        ('"fps": Infinity', "fps is a number above 0, got inf"),
        ('"fps": NaN', "fps is a number above 0, got nan"),
        ('"fps": true', "fps is a number above 0, got True"),
        ('"fps": -2', "fps is a number above 0, got -2"),
        ('"fps": 1e-9', "fps is at least 0.0001, got 1e-09"),
        ('"fps": 1' + "0" * 400, "fps is a number above 0, got 1000"),
        ('"texts": [{"time": Infinity, "text": "x"}]', "texts[0]: time is in seconds, got inf"),
        ('"caption": "\\ud83d"', "a text has half of a character"),
        ('"texts": ["\\ud83d"]', "a text has half of a character"),
    ],
)
def test_numbers_and_texts_that_are_none(tmp_path: Path, told: str, problem: str) -> None:
    folder(tmp_path / "a", moving(4))
    (tmp_path / "metadata.jsonl").write_text(f'{{"folder": "a", {told}}}')
    (row,) = rows(open_source(tmp_path))
    assert (
        isinstance(row, RowError)
        and problem in str(row)
        and str(row).startswith(f"{tmp_path}/metadata.jsonl:1: a")
    )


def test_what_is_told_of_a_clip_counts_as_its_content(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder(tmp_path / "a", moving(4))
    film(tmp_path / "b" / "b.mp4", moving(9))
    bare = spans_of(open_source(tmp_path / "a"), 0, 1)
    assert bare == [(f"{tmp_path.name}/a", 0, 1)]
    seen = [bare]
    notes = ({"caption": "old"}, {"caption": "new"}, {"fps": 2}, {"fps": 4}, {"texts": [{"time": 0, "text": "x"}]},
             {"texts": [{"time": 1, "text": "x"}]})  # fmt: skip
    for note in notes:
        (tmp_path / "a.json").write_text(json.dumps(note))
        found = spans_of(open_source(tmp_path / "a"), 0, 1)
        assert found not in seen and found == spans_of(open_source(tmp_path / "a"), 0, 1)
        seen.append(found)
    monkeypatch.chdir(tmp_path / "a")
    assert spans_of(open_source("."), 0, 1) == seen[-1]
    (row,) = rows(open_source("."))
    assert isinstance(row, Row) and told(row)[1] == "x"  # the file beside it is found, too


def test_a_table_lists_clips_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder(tmp_path / "a", moving(17))
    film(tmp_path / "b.mp4", moving(9))
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    lines = [
        {"folder": "a", "fps": 4, "caption": "first"},
        {"file_name": "b.mp4", "caption": "second"},
        {"video": "none.mp4", "caption": "gone"},
        {"video": "bad.mp4", "caption": "bad"},
        {"folder": "a", "fps": 0},
        {"caption": "of nothing"},
        {"folder": "a", "texts": [{"text": "no time"}]},
        {"folder": "a", "fps": 4, "texts": [{"time": 0, "text": ""}]},
    ]
    table = tmp_path / "metadata.jsonl"
    table.write_text("\n".join(map(json.dumps, lines)) + "\n{x\n")
    found = rows(open_source(tmp_path))
    first, second = found[:2]
    assert isinstance(first, Row) and told(first) == ["first", "001.png", "009.png", "017.png"]
    assert isinstance(second, Row) and told(second) == ["second", "frame 0", "frame 8"]
    for line, what, row in zip(
        range(3, 10),
        ("none.mp4: no such file", "bad.mp4: damaged or no video", "fps is a number above 0, got 0", "names no clip",
         "texts[0]: time is in seconds, got None", "texts[0] has no text", "not valid JSON"),
        found[2:], strict=True,
    ):  # fmt: skip
        assert isinstance(row, RowError) and str(row).startswith(f"{table}:{line}") and what in str(row), row
    assert (
        run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--video", "rate=1", "--max-tokens", "900"])
        == 1
    )
    out, err = capsys.readouterr()
    assert "9 rows, 7 problems" in out and "2 drawing" in out and "nextflow-ar:" not in err
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--video", "speed=1"]) == 2
    assert "unknown key 'speed'" in capsys.readouterr().err


def test_frames_that_are_left_out_are_no_fault_of_the_data(tmp_path: Path) -> None:
    folder(tmp_path / "a", moving(3))
    folder(tmp_path / "b", [view()] * 3)
    report = check_rows(
        open_source(tmp_path), num_scales=5, most_tokens=900, count_text=lambda t: len(t.split())
    )
    assert report.rows == 2 and report.problems == [] and len(report.left_out) == 1
    assert "1 left out on purpose" in report.table() and report.as_dict()["left_out"] == report.left_out


def test_what_is_no_set_of_clips(tmp_path: Path) -> None:
    folder(tmp_path / "mixed", moving(2))
    film(tmp_path / "mixed" / "a.mp4", moving(2))
    with pytest.raises(
        SourceError, match=r"1 video files and 2 pictures: put them into folders of their own"
    ):
        open_source(tmp_path / "mixed")
    folder(tmp_path / "captioned", moving(2))
    (tmp_path / "captioned" / "001.txt").write_text("a picture")
    (row, other) = rows(open_source(tmp_path / "captioned"))
    assert isinstance(row, Row) and told(row)[0] == "a picture" and "no caption beside it" in str(other)
    with pytest.raises(ValueError, match="at most `frames` frames"):
        VideoConfig(frames=1)
    with pytest.raises(ValueError, match="at a rate above 0 and up to 1000 a second"):
        VideoConfig(rate=float("inf"))
    assert FrameRef("x", pixels=np.zeros((2, 3, 3), np.uint8)).open().size == (3, 2)


@pytest.mark.parametrize(
    ("key", "values"),
    [
        ("side", (-5, 0, 15, 100_000)),
        ("difference", (-1, 256, float("nan"))),
        ("error", (-0.1, 0, 1.5)),
        *[(key, (-1, 1.5, float("nan"))) for key in ("shift", "area", "rest", "inliers", "spread")],
    ],
)
def test_settings_of_motion_have_bounds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], key: str, values: tuple[float, ...]
) -> None:
    for value in values:
        with pytest.raises(ValueError, match=rf"^{key} is "):
            MotionConfig(**{key: value})  # pyright: ignore[reportArgumentType]
    film(tmp_path / "a.mp4", moving(2))
    assert run(["data", "check", str(tmp_path), "-m", str(GOLDEN), "--video", f"motion.{key}=-5"]) == 2
    assert f"{key} is " in capsys.readouterr().err


@pytest.mark.shared
def test_the_shared_clips() -> None:
    place = Path(__file__).parents[3] / "shared" / "data" / "video"
    if not place.is_dir():
        pytest.skip("needs ../shared")
    found = rows(open_source(place, VideoConfig(rate=5)))
    by_clip: dict[str, list[Row | RowError]] = {}
    for row in found:
        where = row.where if isinstance(row, Row) else str(row)
        by_clip.setdefault(where.split(": ")[1], []).append(row)
    for name in ("sam2_01_dog", "sam2_02_cups", "sam2_03_blocks", "sam2_04_coffee", "sam2_05_default_juggle"):
        assert all(isinstance(row, Row) for row in by_clip[name]), name
        assert sum(len(row.pictures) for row in by_clip[name] if isinstance(row, Row)) >= 36, name
    (desk, *_) = by_clip["realshort"]  # a potted tree on a desk, the camera moves
    assert isinstance(desk, LeftOut) and "moved by the camera alone" in str(desk)


def test_the_notes_of_a_clip_are_no_rows(tmp_path: Path) -> None:
    film(tmp_path / "a.gif", moving(33))
    (tmp_path / "a.jsonl").write_text('{"time": 0, "text": "it falls"}\n')
    (tmp_path / "a.txt").write_text("a ball")
    found = list(open_source(tmp_path).rows())
    assert isinstance(found[0], Row) and told(found[0])[:2] == ["a ball", "it falls"]
