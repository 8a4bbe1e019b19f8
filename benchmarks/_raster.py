"""What the benchmarks of generation share: a raster-scan loop over our own backbone, and timing. Imported, not run."""

import statistics
import time
from typing import cast

import torch

from nextflow_ar.generation.cache import Caches, RowCache
from nextflow_ar.generation.sampling import draw, guide
from nextflow_ar.model.backbone import Cache
from nextflow_ar.model.steady import steady_scores
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import image_prefix, next_clock
from nextflow_ar.types import Document, Text


@torch.inference_mode()
def raster(engine, schedule, prompt, tokens, guidance=3.0):
    """``tokens`` codes one after the other, each fed back over a cache that is written in place; conditional and
    unconditional row side by side (``guidance`` 1: the one row alone). Returns the codes.
    """
    model, device = engine.model, engine.device
    documents = [Document((Text(prompt),)), Document(())][: 1 if guidance == 1.0 else 2]
    samples = [image_prefix(d, schedule, engine.vocab, engine.layout) for d in documents]
    batch = collate(samples, -(-max(map(len, samples)) // 16) * 16).to(device)
    rows, generator = len(samples), torch.Generator().manual_seed(0)
    cache = Caches([RowCache(rows)])
    mask = cache.mask(batch.shape[1], block_mask(batch.blocks, batch.documents), device)
    hidden = model.step(model.embed(batch), batch.positions, mask, cast(Cache, cache))
    cache.advance([len(s) for s in samples])
    hidden = hidden[torch.arange(rows), torch.tensor([len(s) - 1 for s in samples])]
    first = engine.vocab.text_size
    clocks = torch.tensor([float(next_clock(s)[0]) for s in samples], device=device)
    codes = []
    for step in range(tokens):
        logits = steady_scores(hidden[:, None], model.head.weight[first : first + engine.vocab.codes])[:, 0]
        scores = logits if rows == 1 else guide(logits[:1], logits[1:], guidance)
        codes.append(draw(scores, 1.0, 0, 0.95, generator))
        x = model.scale_inputs.code_embed(codes[-1]) * model.scale_inputs.code_scale
        places = (clocks + step).expand(3, rows)[..., None]
        x = model.scale_inputs.connector(x).expand(rows, 1, -1)
        hidden = model.step(x, places, cache.mask(1, None, device), cast(Cache, cache))[:, -1]
        cache.advance([1] * rows)
    return torch.cat(codes)


def timed(work, repeats):
    """(median, least, largest) seconds of ``work``, the first call left out."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), min(seconds), max(seconds)
