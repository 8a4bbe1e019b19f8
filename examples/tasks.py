"""All that a checkpoint of every task does, on one page (out/tasks.html), and its parts as pictures (out/tasks/*.png).

Usage: python examples/tasks.py [MODEL] [SEED]
"""

import sys
import textwrap
import time
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from nextflow_ar import NextFlowPipeline
from nextflow_ar.app.gallery import Card, Section, write_page
from nextflow_ar.types import TextDelta

model = sys.argv[1] if len(sys.argv) > 1 else "nano"
seed = int(sys.argv[2]) if len(sys.argv) > 2 else 4
out = Path("out/tasks.html")
pipeline = NextFlowPipeline.from_pretrained(model)
if not pipeline.manner.dialogue:
    sys.exit(f"{model} has learnt to draw and to describe only: try examples/demo.py")
began = time.perf_counter()


def scene(ground, *shapes):
    """A picture drawn with Pillow: (form, colour, left, top, side) each, on 64 x 64."""
    picture = Image.new("RGB", (256, 256), ground)
    draw = ImageDraw.Draw(picture)
    for form, colour, left, top, side in shapes:
        box = [4 * x for x in (left, top, left + side, top + side)]
        if form == "circle":
            draw.ellipse(box, fill=colour)
        elif form == "square":
            draw.rectangle(box, fill=colour)
        else:
            draw.polygon([((box[0] + box[2]) / 2, box[1]), (box[2], box[3]), (box[0], box[3])], fill=colour)
    return picture.resize((64, 64), Image.Resampling.LANCZOS)


red, blue, green, white, yellow = "#dc2828", "#2d5fd2", "#32a046", "#f5f5f5", "#fad732"
circle = scene(blue, ("circle", red, 16, 16, 30))
pair = scene(white, ("square", green, 2, 18, 28), ("triangle", blue, 33, 18, 28))


def sheet(section, name, side=112, gap=8):
    """A section as one picture: every card's pictures in a row, its title and note beside them."""
    widest = max(len(card.strip) or 1 for card in section.cards)
    text = (side + gap) * widest + gap
    page = Image.new("RGB", (text + 430, (side + gap) * len(section.cards) + gap), "white")
    draw, bold, plain = ImageDraw.Draw(page), ImageFont.load_default(15), ImageFont.load_default(13)
    for row, card in enumerate(section.cards):
        top = gap + (side + gap) * row
        for column, picture in enumerate(card.strip or [card.picture]):
            width = round(side * picture.width / picture.height)
            shown = picture.resize(
                (min(width, side), round(side * min(1, side / width))), Image.Resampling.NEAREST
            )
            page.paste(shown, (gap + (side + gap) * column, top))
        title = textwrap.fill(card.title, 54)
        draw.multiline_text((text, top), title, "black", bold)
        below = top + 22 * (title.count("\n") + 1)
        note = textwrap.fill(card.note, 68, max_lines=max(1, (top + side - below) // 17))
        draw.multiline_text((text, below), note, "#555", plain)
    folder = out.with_suffix("")
    folder.mkdir(parents=True, exist_ok=True)
    page.quantize(128, dither=Image.Dither.NONE).save(folder / f"{name}.png", optimize=True)


def strips(title, pictures, note=""):
    """A card with the last picture large and all of them small."""
    return Card(pictures[-1], title, note, pictures)


print("drawing ...")
asked = [
    "a small red square and a large yellow circle on a black background", "a cat in the top left corner",
    'the word "HELLO" in red letters on a white background', "a line drawing of a house",
    "the flat silhouette of a dog on a green background", "two bananas on a blue background, in the dark",
]  # fmt: skip
plans = {}


def listen(event):
    if isinstance(event, TextDelta):
        plans[event.row] = plans.get(event.row, "") + event.text


pictures = pipeline.generate(asked, seed=seed, on_event=listen)
drawn = [
    Card(one, words, plans.get(row, "")) for row, (one, words) in enumerate(zip(pictures, asked, strict=True))
]

print("editing ...")
wanted = [
    (circle, "make the circle green"), (circle, "put it on a white background"), (pair, "remove the triangle"),
    (pair, "replace the square with a cat"), (pair, "make it a line drawing"), (circle, "add a star below"),
]  # fmt: skip
changed = []
for before, words in wanted:
    (after,) = pipeline.edit(before, words, seed=seed)
    changed.append(strips(words, [before, after]))
shown = scene(yellow, ("square", red, 18, 18, 28))
(after,) = pipeline.edit(
    pair, "now this one", seed=seed, examples=[(shown, scene(yellow, ("square", blue, 18, 18, 28)))]
)
changed.append(strips("now this one", [pair, after], "shown before: a red square that became a blue one"))

print("answering ...")
questions = [
    (circle, "what colour is the circle?"), (pair, "how many squares are there?"), (pair, "is there a dog in the picture?"),
    (pair, "is the square left or right of the triangle?"), (pair, "describe this picture in detail"),
    (circle, "which of these is in the picture?\nA. cat\nB. circle\nC. house\nD. star"),
]  # fmt: skip
told = [Card(one, words, pipeline.describe(one, question=words)[0]) for one, words in questions]

print("telling ...")
tales = []
for words in ("tell me a story about a dog in three pictures", "how do i bake a pizza with a carrot?"):
    parts = pipeline.story(words, seed=seed)
    images = [one for one in parts if not isinstance(one, str)]
    if images:
        tales.append(strips(words, images, " ".join(one for one in parts if isinstance(one, str))))
for words in ("a red circle moves left", "a dog moves down"):
    frames = pipeline.video(words, frames=4, seed=seed)
    if frames:
        tales.append(strips(words, frames))

print("thinking ...")
thoughts = []
for words in ("the animal that says moo", "it rains. draw what i need", "two plus two yellow stars"):
    plans.clear()
    (one,) = pipeline.generate(words, seed=seed, think=True, on_event=listen)
    thoughts.append(Card(one, words, plans.get(0, "")))

sections = {
    "draw": Section("Drawn", "The plan in words that it made first stands below.", drawn),
    "edit": Section("Changed", "Before and after.", changed),
    "answer": Section("Answered", "Pictures drawn with Pillow.", told),
    "tell": Section("Told and moved", "The model decides when a picture comes.", tales),
    "think": Section("Thought about", "Reasoning first.", thoughts),
}
for name, section in sections.items():
    if section.cards:
        sheet(section, name)
write_page(
    out,
    "NextFlow-AR: every task",
    "One set of weights. Nothing on this page was chosen: whatever the model gave with this seed is shown.",
    list(sections.values()),
    f"Checkpoint {model}, seed {seed}. {time.perf_counter() - began:.1f} s.",
)
print(f"open {out}")
