"""examples/emoji_folder.py: what it shows of a thing, and what it holds back."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

SCRIPT = Path(__file__).parents[2] / "examples" / "emoji_folder.py"


def made(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> None:
    monkeypatch.setattr(sys, "argv", [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name="__main__")


@pytest.fixture
def manifest(tmp_path: Path) -> Path:
    """Two things and one with a tone of skin, which is left out."""
    rows = []
    for number, tone in ((1, None), (2, None), (3, "dark")):
        picture = np.zeros((40, 40, 4), np.uint8)
        picture[10:30, 10:30] = (250, 10 * number, 0, 255)
        Image.fromarray(picture).save(tmp_path / f"{number}.png")
        rows.append(
            {
                "files": {"3d": f"{number}.png"},
                "caption": f"thing {number}",
                "group": "Things",
                "skin_tone": tone,
            }
        )
    (tmp_path / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "manifest.jsonl"


def rows_of(folder: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]


def test_what_is_held_out_is_shown_nowhere(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "mine"
    asked = ("--backgrounds", "4", "--shades", "3", "--halves", "5", "--held-out", "2")
    made(monkeypatch, str(manifest), "-o", str(out), *asked)
    shown, held = rows_of(out), rows_of(tmp_path / "mine_held_out")
    assert (len(shown), len(held)) == (2 * (4 * 3 + 5), 2 * 2)
    assert len({row["file_name"] for row in shown}) == len(shown)
    for thing in ("thing 1", "thing 2"):
        names = [row["text"].split(" on ")[1] for row in held if row["text"].startswith(thing)]
        for name in names:
            colour = name.split()[1]
            assert not any(colour in row["text"] for row in shown if row["text"].startswith(thing))
    halves = [row for row in shown if " and " in row["text"]]
    assert len({row["text"] for row in halves}) == 10
    picture = np.asarray(Image.open(out / halves[0]["file_name"]))
    assert picture.shape == (64, 64, 3) and not np.array_equal(picture[0, 0], picture[63, 0])
    plain = [row for row in shown if row["text"] == shown[0]["text"]]
    shades = [np.asarray(Image.open(out / row["file_name"]))[0, 0].astype(int) for row in plain]
    assert len(plain) == 3 and len({tuple(shade) for shade in shades}) == 3
    assert max(abs(shade - shades[0]).max() for shade in shades) <= 24


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--backgrounds", "13", "--held-out", "1"), "share 13 backgrounds"),
        (("--backgrounds", "2", "--halves", "3"), "--halves of 0 to 2"),
        (("--shades", "0"), "--shades of at least 1"),
        (("--group", "Flags"), "no emoji of group 'Flags'"),
    ],
)
def test_what_cannot_be_is_one_line(
    manifest: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    arguments: tuple[str, ...], line: str,
) -> None:  # fmt: skip
    with pytest.raises(SystemExit) as stopped:
        made(monkeypatch, str(manifest), "-o", str(tmp_path / "mine"), *arguments)
    assert stopped.value.code == 2 and line in capsys.readouterr().err
    assert not (tmp_path / "mine").exists()
