"""Sweep of sampling settings on prompts of the *training* split (own seed), so that the held-out prompts stay unseen.

python benchmarks/_sampling_settings.py [--model FOLDER] [--prompts 16]
"""

import argparse
import time

import numpy as np

from nextflow_ar import NextFlowPipeline
from nextflow_ar.evaluation.judge import Judge
from nextflow_ar.evaluation.playground_tasks import BENCH_SEED, questions, score
from nextflow_ar.generation.sampling import SamplingSettings

SETTINGS = {
    "no plan, guidance 3": (SamplingSettings(guidance=3.0, top_p=0.95), False),
    "guidance 1": (SamplingSettings(guidance=1.0, top_p=0.95), True),
    "guidance 1.5": (SamplingSettings(guidance=1.5, top_p=0.95), True),
    "guidance 2": (SamplingSettings(guidance=2.0, top_p=0.95), True),
    "guidance 3": (SamplingSettings(guidance=3.0, top_p=0.95), True),
    "guidance 3, top-p 0.8": (SamplingSettings(guidance=3.0, top_p=0.8), True),
    "guidance 2, temperature 0.7": (SamplingSettings(guidance=2.0, temperature=0.7, top_p=0.95), True),
    "guidance 2, best code only": (SamplingSettings(guidance=2.0, temperature=0.0), True),
    "guidance 5 to 1": (SamplingSettings(guidance=(5.0, 1.0), top_p=0.9), True),
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default="nano")
    parser.add_argument("--prompts", type=int, default=16, help="per task type")
    given = parser.parse_args()
    pipeline, judge = NextFlowPipeline.from_pretrained(given.model), Judge.load()
    asked = questions(given.prompts, "train", BENCH_SEED + 500_000)
    texts = [question.metadata["prompt"] for question in asked]
    for name, (settings, think) in SETTINGS.items():
        began = time.perf_counter()
        pictures = pipeline.generate(texts, seed=77, settings=settings, think=think)
        seconds = time.perf_counter() - began
        verdicts = judge(np.stack([np.asarray(p) for p in pictures]))
        right = [score(q.metadata, v).exact for q, v in zip(asked, verdicts, strict=True)]
        by_type = {q.metadata["tag"]: [] for q in asked}
        for q, r in zip(asked, right, strict=True):
            by_type[q.metadata["tag"]].append(r)
        cells = " ".join(f"{tag} {np.mean(values):.2f}" for tag, values in by_type.items())
        print(f"{name:<30}{np.mean(right):.3f}  {cells}  {seconds / len(texts) * 1000:.0f} ms", flush=True)


if __name__ == "__main__":
    main()
