"""Video: what moves by itself is kept, what stands still or only the camera moves is dropped, texts find their frames."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.data.check import check_rows
from nextflow_ar.data.motion import MotionConfig, compare, shrink
from nextflow_ar.data.rows import LeftOut, PicturePart, Row, RowError
from nextflow_ar.data.sources import Source, SourceError, open_source
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
    assert FrameRef("x", pixels=np.zeros((2, 3, 3), np.uint8)).open().size == (3, 2)


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
