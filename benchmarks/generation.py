"""Seconds per 64 px picture: alone, in a batch of 16, with and without a plan, in 16 stories told at once; beside a
raster-scan loop that emits as many tokens as the final grid has, one by one, over the same backbone with the same
guidance. One run, one machine.

    python benchmarks/generation.py [--model nano] [--repeats 7]
"""

import argparse
import time

import torch
from _raster import raster, timed

from nextflow_ar import NextFlowPipeline
from nextflow_ar.app.stages import SHEET_PROMPTS
from nextflow_ar.types import ImageReady


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

    stories = [
        pipeline.chat_requests(
            [{"role": "user", "content": f"tell a story about {what} in {number} pictures"}],
            settings=settings, seed=number,
        )
        for what in ("a fox", "a cat and a boat", "a red car", "a cow in the rain")
        for number in (2, 3, 4, 5)
    ]  # fmt: skip
    told = sum(isinstance(event, ImageReady) for event in pipeline.engine.run(stories))
    print(f"16 stories have {told} pictures")
    rows = {
        "one picture": (timed(scales(prompt, False), given.repeats), 1),
        "one picture, plan first": (timed(scales(prompt, True), given.repeats), 1),
        "batch of 16": (timed(scales(sixteen, False), given.repeats), 16),
        "batch of 16, plans first": (timed(scales(sixteen, True), given.repeats), 16),
        "16 stories, plans and words": (
            timed(lambda: list(pipeline.engine.run(stories)), given.repeats),
            max(1, told),
        ),
        f"raster scan, {final} tokens": (
            timed(lambda: raster(pipeline.engine, schedule, prompt, final), given.repeats),
            1,
        ),
    }
    print(f"{'':28}{'s/picture':>10}{'least':>8}{'largest':>9}")
    for name, ((median, least, largest), count) in rows.items():
        print(f"{name:<28}{median / count:>10.3f}{least / count:>8.3f}{largest / count:>9.3f}")
    one, raster_time = rows["one picture"][0][0], rows[f"raster scan, {final} tokens"][0][0]
    batch = rows["batch of 16"][0][0] / 16
    print(
        f"raster scan / scale by scale: {raster_time / one:.2f} (for {schedule.num_tokens} tokens against {final})"
    )
    print(f"batch of 16 / alone, per picture: {batch / one:.2f}")


if __name__ == "__main__":
    main()
