"""A folder data set of captioned pictures from emoji files: each laid over plain backgrounds, with metadata.jsonl:
python examples/emoji_folder.py MANIFEST -o FOLDER [--group "Animals & Nature"] [--backgrounds 12] [--held-out 1]

A line of MANIFEST: {"files": {"3d": "3d/1f436.png"}, "caption": "dog face", "group": "Animals & Nature"}; rows with a
"skin_tone" are left out. Further pictures: --shades, of each background a little lighter or darker, and --halves, on two
backgrounds, one above the other. FOLDER_held_out gets each emoji on backgrounds that FOLDER does not show it on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Sequence
from itertools import permutations
from pathlib import Path

import numpy as np
from PIL import Image

BACKGROUNDS = {
    "white": (255, 255, 255), "black": (20, 20, 20), "grey": (150, 150, 150), "blue": (60, 110, 220),
    "green": (70, 160, 80), "yellow": (245, 215, 80), "pink": (245, 170, 195), "red": (205, 60, 55),
    "orange": (240, 145, 55), "purple": (135, 85, 180), "brown": (125, 85, 55), "cyan": (100, 205, 220),
    "beige": (230, 215, 185),
}  # fmt: skip


SHADE = 24
"""How much lighter or darker a shade is at most, of 255, in each channel."""


def on_background(file: Path, upper: Sequence[int], lower: Sequence[int], size: int = 64) -> Image.Image:
    """The emoji over one colour above another (or the same), with a margin of a tenth."""
    emoji = Image.open(file).convert("RGBA").resize((size * 4 // 5,) * 2, Image.Resampling.LANCZOS)
    canvas = Image.new("RGBA", (size, size), (*upper, 255))
    canvas.paste((*lower, 255), (0, size // 2, size, size))
    canvas.alpha_composite(emoji, ((size - emoji.width) // 2, (size - emoji.height) // 2))
    return canvas.convert("RGB")


def backgrounds(names: Sequence[str], shades: int, halves: int, rng: np.random.Generator) -> Iterator[tuple]:
    """(name, upper colour, lower colour) of all pictures of one emoji: each name as it is and in further shades, then
    pairs of two names.
    """
    for number in range(shades):
        for name in names:
            off = rng.integers(-SHADE, SHADE + 1, 3) if number else 0
            colour = tuple(np.clip(np.add(BACKGROUNDS[name], off), 0, 255).tolist())
            yield name, colour, colour
    pairs = list(permutations(names, 2))
    for chosen in rng.choice(len(pairs), halves, replace=False).tolist():
        upper, lower = pairs[chosen]
        yield f"{upper} and {lower}", BACKGROUNDS[upper], BACKGROUNDS[lower]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("-o", "--out", type=Path, required=True)
    parser.add_argument("--group", help="only emoji of this group")
    parser.add_argument("--backgrounds", type=int, default=12, help="plain backgrounds of every emoji")
    parser.add_argument("--shades", type=int, default=1, help="pictures on each of them")
    parser.add_argument("--halves", type=int, default=0, help="further pictures on two backgrounds each")
    parser.add_argument("--held-out", type=int, default=0, help="further pictures of it, in FOLDER_held_out")
    parser.add_argument("--style", default="3d")
    args = parser.parse_args()
    if not args.manifest.is_file():
        parser.error(f"no manifest {args.manifest}: a file with a line of JSON for every emoji is expected")
    if not 1 <= args.backgrounds <= args.backgrounds + args.held_out <= len(BACKGROUNDS):
        parser.error(
            f"--backgrounds and --held-out share {len(BACKGROUNDS)} backgrounds: {', '.join(BACKGROUNDS)}"
        )
    pairs = args.backgrounds * (args.backgrounds - 1)
    if args.shades < 1 or not 0 <= args.halves <= pairs:
        parser.error(
            f"--shades of at least 1 and --halves of 0 to {pairs} (pairs of backgrounds) are accepted"
        )
    shown, order, chance = args.backgrounds, np.random.default_rng(0), np.random.default_rng(1)
    held_out = args.out.with_name(args.out.name + "_held_out")
    lines: dict[Path, list[str]] = {args.out: [], held_out: []}
    for row in map(json.loads, args.manifest.read_text().splitlines()):
        known = args.group in (None, row.get("group")) and args.style in row["files"]
        if not known or row.get("skin_tone"):
            continue
        file = args.manifest.parent / row["files"][args.style]
        names = order.permutation(list(BACKGROUNDS)).tolist()
        for folder, found in (
            (args.out, backgrounds(names[:shown], args.shades, args.halves, chance)),
            (held_out, backgrounds(names[shown : shown + args.held_out], 1, 0, chance)),
        ):
            for number, (name, upper, lower) in enumerate(found):
                folder.mkdir(parents=True, exist_ok=True)
                picture = f"{file.stem}-{number}-{name.replace(' ', '-')}.png"
                on_background(file, upper, lower).save(folder / picture)
                article = "an" if name[0] in "aeiou" else "a"
                text = f"{row['caption']}, {args.style} emoji on {article} {name} background"
                lines[folder].append(json.dumps({"file_name": picture, "text": text}))
    if not lines[args.out]:
        parser.error(f"{args.manifest} has no emoji of group {args.group!r} in style {args.style!r}")
    for folder in filter(lines.get, lines):
        (folder / "metadata.jsonl").write_text("\n".join(lines[folder]) + "\n")
        print(f"{len(lines[folder])} pictures in {folder}")


if __name__ == "__main__":
    main()
