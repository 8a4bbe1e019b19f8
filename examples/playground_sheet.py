"""Contact sheets of the playground: out/playground/TASK.png, episodes with their pictures and texts.

python examples/playground_sheet.py [--level wide] [--size 120x72] [--split test] [--tasks story chat]
"""

import argparse
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.curriculum import TASK_NAMES, episode
from nextflow_ar.data.playground.episodes import Said

parser = argparse.ArgumentParser()
for name, usual in {"level": "world", "size": "64x64", "split": "train", "seed": 7, "count": 12}.items():
    parser.add_argument(f"--{name}", type=type(usual), default=usual)
parser.add_argument("--tasks", nargs="*", default=TASK_NAMES)
given = parser.parse_args()
width, height = (2 * int(side) for side in given.size.split("x"))
font = ImageFont.load_default(13)
COLOURS = {"user": "#204080", "assistant": "#205020"}


def card(found):
    """One episode: pictures side by side, twice their size (drawn ones framed in green), texts beneath."""
    lines, pictures = [], 0
    for part in found.parts:
        pictures += not isinstance(part, Said)
        said = part.text if isinstance(part, Said) else f"[picture {pictures}]"
        lines += [(line, COLOURS[part.role]) for line in wrap(f"{part.role}: {said}", 50)]
    step = width + 8
    sheet = Image.new("RGB", (max(360, step * pictures + 8), height + 24 + 16 * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, shown in enumerate(found.pictures):
        picture = Image.fromarray(shown.render()).resize((width, height), Image.Resampling.NEAREST)
        left = 6 + number * step
        frame = "#40b060" if shown.supervised else "#bbbbbb"
        draw.rectangle((left - 3, 3, left + width + 2, height + 8), fill=frame)
        sheet.paste(picture, (left, 6))
    for number, (line, colour) in enumerate(lines):
        draw.text((6, height + 14 + 16 * number), line, fill=colour, font=font)
    return sheet


out = Path("out/playground")
out.mkdir(parents=True, exist_ok=True)
canvas = (height // 2, width // 2)
for task in given.tasks:
    found = [episode(task, k, given.seed, given.split, canvas, given.level) for k in range(given.count)]
    cards = [card(one) for one in found]
    w, h = max(c.width for c in cards), max(c.height for c in cards)
    columns = max(1, min(4, 1500 // w))
    page = Image.new("RGB", (columns * w, -(-len(cards) // columns) * h), "white")
    for number, one in enumerate(cards):
        page.paste(one, (number % columns * w, number // columns * h))
    page.save(out / f"{task}.png")
    print(out / f"{task}.png")
