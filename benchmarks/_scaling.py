"""The table of docs/scaling.md: every stage of the paper's 7B on so many GPUs, beside the paper's token counts.

python benchmarks/_scaling.py [--gpus 1024] [--gpu h100] [--efficiency 0.55]
"""

import argparse
from pathlib import Path

from nextflow_ar.config import load_yaml
from nextflow_ar.training.hardware import GPUS
from nextflow_ar.training.plan import make_plan, read_stage

STAGES = ("alignment", "pretrain_256", "pretrain_512", "pretrain_1024", "ct", "sft")
PAPER_RATE = 2517
"""Tokens per second and GPU, packed by compute."""


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--gpus", type=int, default=1024)
    parser.add_argument("--gpu", default="h100", choices=sorted(GPUS))
    parser.add_argument("--efficiency", type=float, default=0.55)
    given = parser.parse_args()
    print(
        "| stage | tokens | paper | FLOPs | a token | GiB per GPU | tokens/s per GPU | days | paper, days at its rate |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    days = theirs = 0.0
    for name in STAGES:
        path = Path(__file__).parent.parent / "recipes" / f"7b_{name}.yaml"
        plan = make_plan(
            read_stage(load_yaml(path), str(path)), GPUS[given.gpu], given.gpus, given.efficiency
        )
        paper = plan.paper_tokens / (PAPER_RATE * given.gpus) / 86400
        rate = plan.tokens / (plan.steps * plan.times.step * given.gpus)
        days, theirs = days + plan.days, theirs + paper
        print(
            f"| {name} | {plan.tokens / 1e12:.3f}T | {plan.paper_tokens / 1e12:g}T | {plan.flops:.2e} | "
            f"{plan.flops / plan.tokens / 1e9:.1f}G | {plan.memory.total / 2**30:.0f} | {rate:,.0f} | {plan.days:.2f} | "
            f"{paper:.2f} |"
        )
    print(f"| **all** | | | | | | | {days:.1f} | {theirs:.1f} |")


if __name__ == "__main__":
    main()
