"""Rewrites the committed tiny checkpoint and the numbers expected of it: ``python -m tests.golden.make``.

Run it only when a change of these numbers is meant, and say why in the commit.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import load_bundle, save_bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import build
from nextflow_ar.types import Codes, Document, Image, Text
from tests.conftest import tiny_bundle

HERE = Path(__file__).parent
SQUARE = ScaleSchedule.square(5)


def picture() -> np.ndarray:
    """A smooth colour ramp with an edge, (40, 40, 3) uint8."""
    ramp = np.linspace(0, 255, 40)
    out = np.stack([np.add.outer(ramp, ramp) / 2, np.outer(ramp, ramp) / 255, np.tile(ramp, (40, 1))], -1)
    out[10:20, 15:30] = (250, 20, 40)
    return out.astype(np.uint8)


def measure() -> dict:
    """Every number that the golden test compares."""
    bundle = load_bundle(HERE / "bundle")
    found = bundle.image_tokenizer.encode_bytes(torch.from_numpy(picture())[None])
    pixels = bundle.image_tokenizer.decode_pixels(found.target, SQUARE)
    image = Image(Codes.plain(SQUARE, found.target[0]), True)
    document = Document((Text("two dogs"), image, Text("a red circle", True)))
    batch = collate([build(document, bundle.vocab, bundle.layout)])
    logits = bundle.model.logits(bundle.model.hidden(batch))[0]
    report = bundle.model.losses(batch)
    pipeline = NextFlowPipeline(bundle)
    settings = SamplingSettings(guidance=2.0, temperature=8.0, top_k=20)
    drawn = np.asarray(pipeline.generate("two dogs and a cat", seed=7, settings=settings)[0], float)
    return {
        "codes": found.target[0].tolist(),
        "pixels": pixels[0, :, ::8, ::8].flatten().tolist(),
        "logits": logits[::5, ::37].flatten().tolist(),
        "loss": float(report.total),
        "drawn": drawn[::8, ::8].flatten().tolist(),
    }


def main() -> None:
    """Write bundle/ and expected.json."""
    bundle = tiny_bundle()
    save_bundle(
        HERE / "bundle",
        bundle.model,
        bundle.image_tokenizer,
        bundle.vocab.tokenizer,
        bundle.generation,
        "# tiny\n",
    )
    rounded = {
        k: [round(x, 5) if isinstance(x, float) else x for x in v] if isinstance(v, list) else round(v, 4)
        for k, v in measure().items()
    }
    (HERE / "expected.json").write_text(json.dumps(rounded) + "\n")


if __name__ == "__main__":
    main()
