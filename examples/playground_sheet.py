"""Contact sheets of the playground: out/playground/TASK.png, episodes with their pictures and texts.

python examples/playground_sheet.py [--level wide] [--size 96x64] [--split test] [--tasks story chat]
"""

import argparse
from pathlib import Path
from textwrap import wrap

from PIL import Image, ImageDraw, ImageFont

from nextflow_ar.data.playground.curriculum import TASK_NAMES, episode
from nextflow_ar.data.playground.episodes import Said

parser = argparse.ArgumentParser()
parser.add_argument("--level", default="world")
parser.add_argument("--size", default="64x64")
parser.add_argument("--split", default="train")
parser.add_argument("--seed", type=int, default=7)
parser.add_argument("--count", type=int, default=12)
parser.add_argument("--tasks", nargs="*", default=TASK_NAMES)
given = parser.parse_args()
width, height = (int(side) for side in given.size.split("x"))
font = ImageFont.load_default(13)
COLOURS = {"user": "#204080", "assistant": "#205020"}


def card(found, scale=2):
    """One episode: pictures side by side (drawn ones framed in green), texts beneath."""
    lines, pictures = [], 0
    for part in found.parts:
        pictures += not isinstance(part, Said)
        said = part.text if isinstance(part, Said) else f"[picture {pictures}]"
        lines += [(line, COLOURS[part.role]) for line in wrap(f"{part.role}: {said}", 50)]
    step = width * scale + 8
    sheet = Image.new("RGB", (max(360, step * len(found.pictures) + 8), height * scale + 24 + 16 * len(lines)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, shown in enumerate(found.pictures):
        picture = Image.fromarray(shown.render()).resize((width * scale, height * scale), Image.Resampling.NEAREST)
        left = 6 + number * step
        draw.rectangle((left - 3, 3, left + width * scale + 2, height * scale + 8), fill="#40b060" if shown.supervised else "#bbb")
        sheet.paste(picture, (left, 6))
    for number, (line, colour) in enumerate(lines):
        draw.text((6, height * scale + 14 + 16 * number), line, fill=colour, font=font)
    return sheet


out = Path("out/playground")
out.mkdir(parents=True, exist_ok=True)
for task in given.tasks:
    cards = [card(episode(task, k, given.seed, given.split, (height, width), given.level)) for k in range(given.count)]
    w, h = max(c.width for c in cards), max(c.height for c in cards)
    columns = max(1, min(4, 1500 // w))
    page = Image.new("RGB", (columns * w, -(-len(cards) // columns) * h), "white")
    for number, one in enumerate(cards):
        page.paste(one, (number % columns * w, number // columns * h))
    page.save(out / f"{task}.png")
    print(out / f"{task}.png")
