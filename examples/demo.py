"""Every capability of the bundled checkpoint, shown on one page: out/index.html."""

import time
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nextflow_ar import NextFlowPipeline
from nextflow_ar.app.gallery import Card, Section, write_page
from nextflow_ar.app.stages import SHEET_PROMPTS
from nextflow_ar.types import ScaleReady

out = Path("out")
pipeline = NextFlowPipeline.from_pretrained("nano")

print("drawing from words ...")
steps = {}


def watch(event):
    if isinstance(event, ScaleReady):
        steps.setdefault(event.row, []).append(event.codes)


began = time.perf_counter()
pictures = pipeline.generate(SHEET_PROMPTS, seed=4, on_event=watch)
seconds = time.perf_counter() - began
schedule = pipeline.schedule_for()
said = pipeline.describe(pictures)
drawn = []
for row, (prompt, picture) in enumerate(zip(SHEET_PROMPTS, pictures, strict=True)):
    strip = [pipeline.preview(schedule, codes, k + 1) for k, codes in enumerate(steps[row])]
    drawn.append(Card(picture, prompt, f"The model reads its own picture as: {said[row]}", strip))
    (out / "drawn").mkdir(parents=True, exist_ok=True)
    picture.save(out / "drawn" / f"{prompt.replace(' ', '-')}.png")

print("describing pictures drawn with Pillow ...")
hand = [Image.new("RGB", (256, 256), colour) for colour in ("#2d5fd2", "#f5f5f5", "#1e1e1e", "#8741af")]
draw = [ImageDraw.Draw(picture) for picture in hand]
draw[0].ellipse((68, 68, 187, 187), fill="#dc2828")
for x, y in ((6, 6), (134, 6), (6, 134)):
    draw[1].ellipse((x, y, x + 116, y + 116), fill="#32a046")
draw[2].polygon([(128, 70), (188, 186), (68, 186)], fill="#f58c1e")
draw[3].rectangle((45, 6, 85, 122), fill="#fad732")
draw[3].rectangle((7, 45, 122, 85), fill="#fad732")
draw[3].ellipse((134, 134, 250, 250), fill="#2d5fd2")
read = [Card(picture, text) for picture, text in zip(hand, pipeline.describe(hand), strict=True)]

print("passing pictures through the image tokenizer ...")
through = []
for picture in hand:
    codes = pipeline.encode(picture)
    parts = [pipeline.decode(codes, k + 1) for k in range(len(schedule))]
    error = np.mean((pipeline.fit(picture).astype(float) - np.asarray(parts[-1], float)) ** 2)
    bits = schedule.num_tokens * np.log2(pipeline.bundle.vocab.codes)
    note = f"{schedule.num_tokens} codes, {bits / 8:.0f} bytes, {10 * np.log10(255**2 / error):.1f} dB"
    through.append(Card(parts[-1], "reconstruction", note, parts))

write_page(
    out / "index.html",
    "NextFlow-AR",
    "One transformer reads and writes text and pictures. A picture is predicted scale by scale, coarse to fine.",
    [
        Section(
            "Drawn from words",
            "Below each picture: what it looked like after each of its eight scales.",
            drawn,
        ),
        Section(
            "Described",
            "Drawn by hand with Pillow, which the model has never seen.",
            read,
        ),
        Section("Through the tokenizer", "From one code to all 204, one scale at a time.", through),
    ],
    f"Checkpoint nano. {len(pictures)} pictures drawn in {seconds:.1f} s in one batch.",
)
print(f"open {out / 'index.html'}")
