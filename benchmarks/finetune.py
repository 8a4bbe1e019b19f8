"""What a fine-tune learned of a folder of captioned pictures: drawn from their captions, and described; one row a model.

    python benchmarks/finetune.py nano runs/emoji_lora/final runs/emoji_full/final --data my_emoji_held_out -o out/finetune

"drawn": of the folder's pictures, the asked one is the nearest (32 px) to what was drawn; "ending": its caption ends
with the same two words ("blue background"). "of all": the asked one is the most alike (64 px, structural similarity)
of all pictures of the folder; "alike": that similarity, whose ceiling is "kept": of the pictures through the model's
image tokenizer (dB, similarity). "told": the caption word by word; "name": its first part, up to the comma. sheet.png:
true pictures, and for every model as its tokenizer keeps them and as it draws them.
"""

import argparse
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nextflow_ar.data.rows import PicturePart, Row, TextPart
from nextflow_ar.data.sources import open_source
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.tokenizer.metrics import ssim

SHOWN = 16


def read(folder, count):
    """(captions, pictures) of a folder data set, and the places of ``count`` of them spread over it."""
    rows = [row for row in open_source(folder).rows() if isinstance(row, Row)]
    chosen = np.linspace(0, len(rows) - 1, min(count, len(rows))).astype(int)
    texts = [next(p.text for p in row.parts if isinstance(p, TextPart)) for row in rows]
    return (
        texts,
        [next(p.picture for p in row.parts if isinstance(p, PicturePart)).open() for row in rows],
        chosen,
    )


def pixels(pictures, side):
    """(N, side, side, 3) floats."""
    resized = [p.convert("RGB").resize((side, side), Image.Resampling.BOX) for p in pictures]
    return np.stack([np.asarray(p, np.float64) for p in resized])


def kept(true, again):
    """Mean dB."""
    error = ((pixels(true, 64) - pixels(again, 64)) ** 2).mean((1, 2, 3))
    return float((10 * np.log10(255**2 / error)).mean())


def likeness(some, others):
    """(N, M) structural similarity of each with each."""
    a, b = (torch.from_numpy(pixels(pictures, 64)) for pictures in (some, others))
    return torch.stack([ssim(one.expand_as(b), b) for one in a]).numpy()


def share(hits):
    return f"{np.mean(hits):8.3f}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--count", type=int, default=144)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("-o", "--out", type=Path, required=True)
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    every, whole, chosen = read(options.data, options.count)
    texts, true = [every[i] for i in chosen], [whole[i] for i in chosen]
    flat, sheet = pixels(true, 32).reshape(len(true), -1), [pixels(true[:SHOWN], 64)]
    print(f"{len(true)} pictures of {options.data}, seed {options.seed}")
    heads = "kept dB", "kept", "drawn", "ending", "of all", "alike", "told", "name"
    print(f"{'':28}" + "".join(f"{head:>8}" for head in heads))
    for name in options.models:
        pipeline = NextFlowPipeline.from_pretrained(name)
        again = [pipeline.reconstruct(picture) for picture in true]
        drawn = pipeline.generate(texts, seed=options.seed)
        words = pipeline.describe(true)
        alike = likeness(drawn, whole)
        distance = ((pixels(drawn, 32).reshape(len(true), 1, -1) - flat) ** 2).sum(2)
        nearest = [texts[i] for i in distance.argmin(1)]
        print(
            f"{name[-28:]:28}{kept(true, again):>8.2f}"
            + share(likeness(again, true).diagonal())
            + share([a == b for a, b in zip(nearest, texts, strict=True)])
            + share([a.split()[-2:] == b.split()[-2:] for a, b in zip(nearest, texts, strict=True)])
            + share(alike.argmax(1) == chosen)
            + share(alike[range(len(chosen)), chosen])
            + share([a == b for a, b in zip(words, texts, strict=True)])
            + share([a.split(",")[0] == b.split(",")[0] for a, b in zip(words, texts, strict=True)]),
            flush=True,
        )
        (options.out / f"captions_{len(sheet) // 2}.txt").write_text(
            "\n".join(f"{a}  |  {b}" for a, b in zip(texts, words, strict=True))
        )
        sheet += [pixels(again[:SHOWN], 64), pixels(drawn[:SHOWN], 64)]
    rows = [np.concatenate(list(row), 1) for row in sheet]
    Image.fromarray(np.concatenate(rows, 0).astype(np.uint8)).save(options.out / "sheet.png")


if __name__ == "__main__":
    main()
