"""Seconds per 64 px picture: alone, in a batch of 16, with and without a plan; beside a raster-scan loop that emits as
many tokens as the final grid has, one by one, over the same backbone with the same guidance. One run, one machine.

    python benchmarks/generation.py [--model nano] [--repeats 7]
"""

import argparse
import statistics
import time

import torch

from nextflow_ar import NextFlowPipeline
from nextflow_ar.app.stages import SHEET_PROMPTS
from nextflow_ar.generation.sampling import draw, guide
from nextflow_ar.model.backbone import new_cache
from nextflow_ar.model.steady import steady_scores
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import image_prefix
from nextflow_ar.types import Document, Text


@torch.inference_mode()
def raster(pipeline, prompt, tokens):
    """``tokens`` codes one after the other, each fed back, conditional and unconditional row side by side."""
    model, engine, schedule = pipeline.bundle.model, pipeline.engine, pipeline.schedule_for()
    documents = [Document((Text(prompt),)), Document(())]
    samples = [image_prefix(d, schedule, engine.vocab, engine.layout) for d in documents]
    batch = collate(samples, 16, align="right")
    cache, generator = new_cache(), torch.Generator().manual_seed(0)
    seen = batch.documents >= 0
    hidden = model.step(
        model.embed(batch), batch.positions, block_mask(batch.blocks, batch.documents), cache
    )[:, -1]
    first = engine.vocab.text_size
    for step in range(tokens):
        logits = steady_scores(hidden[:, None], model.head.weight[first : first + engine.vocab.codes])[:, 0]
        code = draw(guide(logits[:1], logits[1:], 3.0), 1.0, 0, 0.95, generator)
        x = model.scale_inputs.connector(model.scale_inputs.code_embed(code) * model.scale_inputs.code_scale)
        seen = torch.cat([seen, seen.new_ones(2, 1)], 1)
        places = torch.full((3, 2, 1), float(20 + step))
        hidden = model.step(x.expand(2, 1, -1), places, seen[:, None, None], cache)[:, -1]


def timed(work, repeats):
    """(median, least, largest) seconds of ``work``, the first call left out."""
    work()
    seconds = []
    for _ in range(repeats):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds), min(seconds), max(seconds)


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    parser.add_argument("--repeats", type=int, default=7)
    given = parser.parse_args()
    began = time.perf_counter()
    pipeline = NextFlowPipeline.from_pretrained(given.model)
    schedule, prompt = pipeline.schedule_for(), SHEET_PROMPTS[0]
    sixteen = [SHEET_PROMPTS[i % len(SHEET_PROMPTS)] for i in range(16)]
    final = schedule.sizes[-1]
    print(
        f"{torch.get_num_threads()} threads, {pipeline.bundle.model.head.weight.dtype}, "
        f"loaded in {time.perf_counter() - began:.1f} s"
    )
    settings = pipeline.defaults.changed(guidance=3.0)

    def scales(prompts, think):
        return lambda: pipeline.generate(prompts, settings=settings, think=think)

    rows = {
        "one picture": (timed(scales(prompt, False), given.repeats), 1),
        "one picture, plan first": (timed(scales(prompt, True), given.repeats), 1),
        "batch of 16": (timed(scales(sixteen, False), given.repeats), 16),
        "batch of 16, plans first": (timed(scales(sixteen, True), given.repeats), 16),
        f"raster scan, {final} tokens": (timed(lambda: raster(pipeline, prompt, final), given.repeats), 1),
    }
    print(f"{'':26}{'s/picture':>10}{'least':>8}{'largest':>9}")
    for name, ((median, least, largest), count) in rows.items():
        print(f"{name:<26}{median / count:>10.3f}{least / count:>8.3f}{largest / count:>9.3f}")
    one, raster_time = rows["one picture"][0][0], rows[f"raster scan, {final} tokens"][0][0]
    batch = rows["batch of 16"][0][0] / 16
    print(
        f"raster scan / scale by scale: {raster_time / one:.2f} (for {schedule.num_tokens} tokens against {final})"
    )
    print(f"batch of 16 / alone, per picture: {batch / one:.2f}")


if __name__ == "__main__":
    main()
