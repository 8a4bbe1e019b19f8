"""A folder data set of captioned pictures from emoji files: each laid over a plain background, with metadata.jsonl.

python examples/emoji_folder.py MANIFEST -o FOLDER [--style 3d] [--size 64] [--seed 0]

MANIFEST has a line per emoji: {"files": {"3d": "3d/1f436.png", ...}, "caption": "dog face", "skin_tone": null}.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "white": (255, 255, 255),
    "black": (20, 20, 20),
    "grey": (150, 150, 150),
    "blue": (60, 110, 220),
    "green": (70, 160, 80),
    "yellow": (245, 215, 80),
    "pink": (245, 170, 195),
}


def on_background(file: Path, colour: tuple[int, int, int], size: int) -> Image.Image:
    """The emoji over a plain colour, with a margin of a tenth."""
    emoji = Image.open(file).convert("RGBA").resize((size * 4 // 5,) * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (*colour, 255))
    canvas.alpha_composite(emoji, ((size - emoji.width) // 2, (size - emoji.height) // 2))
    return canvas.convert("RGB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--style", default="3d")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    lines = []
    for row in map(json.loads, args.manifest.read_text().splitlines()):
        if args.style in row["files"] and row.get("skin_tone") is None:
            file = args.manifest.parent / row["files"][args.style]
            name = str(rng.choice(list(BACKGROUNDS)))
            on_background(file, BACKGROUNDS[name], args.size).save(args.out / f"{file.stem}.png")
            text = f"{row['caption']}, {args.style} emoji on a {name} background"
            lines.append(json.dumps({"file_name": f"{file.stem}.png", "text": text}, ensure_ascii=False))
    (args.out / "metadata.jsonl").write_text("\n".join(lines) + "\n")
    print(f"{len(lines)} pictures in {args.out}")


if __name__ == "__main__":
    main()
