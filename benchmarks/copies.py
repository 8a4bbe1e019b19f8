"""What an edit leaves alone, as codes: how many of a changed picture's codes are those that would copy the picture before
it, without and with `kept_features`, and what that costs in dB; then how well a model with `copies` tells the two apart.

    python benchmarks/copies.py [--model nano] [--edits 6]        # of every kind of edit
"""

import argparse
from collections import defaultdict
from itertools import pairwise

import numpy as np
import torch
from torch.nn import functional as F

from nextflow_ar import NextFlowPipeline
from nextflow_ar.data.playground.curriculum import GROUPED, episode
from nextflow_ar.data.tasks import to_document
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import build
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import kept_features
from nextflow_ar.types import Codes

WHOLE = {"background", "mood", "light", "style", "zoom_in", "zoom_out", "view_rotate"}
"""Edits that change the picture everywhere."""


def decibels(found, wanted, mask):
    """Mean PSNR over pictures of what `mask` marks."""
    error = (found.float() - wanted.float()).square().mean(-1)
    each = (error * mask).sum((1, 2)) / mask.sum((1, 2)).clamp_min(1)
    return float((10 * torch.log10(255**2 / each.clamp_min(1e-3)))[mask.any(2).any(1)].mean())


def by_scale(right, schedule):
    """Means of (N, T) bool for every scale."""
    parts = [right[:, a:b] for a, b in pairwise(schedule.offsets)]
    return " ".join(f"{float(part.float().mean()):.2f}" for part in parts)


@torch.inference_mode()
def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--model", default="nano")
    parser.add_argument("--edits", type=int, default=6)
    given = parser.parse_args(arguments)
    pipeline = NextFlowPipeline.from_pretrained(given.model)
    tokenizer, schedule = pipeline.image_tokenizer, pipeline.schedule_for()
    quantizer, size = tokenizer.quantizer, pipeline.schedule_for().image_size(tokenizer.config.downsample)
    kinds = [name for name in GROUPED["edit"] for _ in range(given.edits)]
    episodes = [episode(name, i % given.edits, 991, "train", size) for i, name in enumerate(kinds)]
    pairs = [[torch.from_numpy(p.render().copy()) for p in e.pictures] for e in episodes]
    before, after = (torch.stack([pair[k] for pair in pairs]) for k in (0, -1))
    old, new = (
        torch.cat([tokenizer.embed(to_unit(x)).float() for x in y.split(16)]) for y in (before, after)
    )
    source = quantizer.quantize(old, schedule).target
    same = (before == after).all(-1)
    touched = F.max_pool2d((~same)[:, None].float(), tokenizer.config.downsample)
    local = torch.tensor([name.removeprefix("edit_") not in WHOLE for name in kinds])
    share = float((touched == 0).float().mean())
    print(f"{len(kinds)} edits, {int(local.sum())} of them of a part; untouched cells {share:.2f}")
    kept = kept_features(new, quantizer.accumulate(source, schedule), same)
    targets = {}
    for name, features in (("plain", new), ("kept", kept)):
        codes = quantizer.quantize(features, schedule).target
        copies = quantizer.copied(source, codes, schedule, 0, len(schedule))
        drawn = tokenizer.decode_bytes(codes, schedule)
        right = codes == copies
        print(
            f"{name}: copies by scale {by_scale(right, schedule)}; of a part {by_scale(right[local], schedule)}"
        )
        whole, inside = decibels(drawn, after, torch.ones_like(same)), decibels(drawn, after, ~same)
        around = decibels(drawn[local], after[local], same[local])
        print(f"  PSNR {whole:.2f}, where it changed {inside:.2f}, elsewhere (of a part) {around:.2f}")
        targets[name] = codes, copies
    if not pipeline.bundle.layout.copies:
        print(f"{given.model} has no copies")
        return None
    codes, copies = targets["kept"]
    found = defaultdict(list)
    first = pipeline.bundle.vocab.text_size
    for number, one in enumerate(episodes):
        if len(one.pictures) != 2:
            continue
        both = [Codes.plain(schedule, c) for c in (source[number], codes[number])]
        document = to_document(one, both, dialogue=pipeline.manner.dialogue)
        sample = build(document, pipeline.bundle.vocab, pipeline.bundle.layout)
        hidden = pipeline.bundle.model.hidden(collate([sample]).to(pipeline.engine.device))[0]
        boi = sample.images[-1].boi
        scores = pipeline.bundle.model.logits(hidden[boi + 1 : boi + schedule.num_tokens])[:, first:].float()
        wanted, copy = codes[number, 1:], copies[number, 1:]
        for name, where in (("a copy", wanted == copy), ("another", wanted != copy)):
            found[name, "right"] += (scores.argmax(-1) == wanted)[where].tolist()
            found[name, "nats"] += F.cross_entropy(scores, wanted, reduction="none")[where].tolist()
    for name in ("a copy", "another"):
        right, nats = (np.mean(found[name, what]) for what in ("right", "nats"))
        print(
            f"the code is {name}: {right:.2f} of {len(found[name, 'right'])} right, {nats:.2f} nats (no plan)"
        )
    return found


if __name__ == "__main__":
    main()
