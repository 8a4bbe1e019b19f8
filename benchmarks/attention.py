"""Attention in training on a CPU: torch's fused kernel against the two products of ``model/attention.py``.

Both directions of the backbone of a world recipe, compiled, in the precision that this machine trains in, for rows as the
recipes have them:

    python benchmarks/attention.py [--threads 1] [--repeats 8]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from nextflow_ar.config import ModelConfig, from_dict, load_yaml
from nextflow_ar.model import attention
from nextflow_ar.model.backbone import Backbone
from nextflow_ar.precision import mixed_precision

ROWS = ((8, 256), (5, 320), (2, 576))
RECIPE = Path(__file__).parents[1] / "recipes" / "world_read.yaml"


def seconds(stack: Backbone, batch: int, length: int, repeats: int) -> float:
    """CPU seconds of one forward and backward pass, the quickest of several."""
    hidden = torch.randn(batch, length, stack.config.hidden_size, requires_grad=True)
    positions = torch.randint(0, 8, (3, batch, length)).float()
    mask = torch.ones(batch, 1, length, length, dtype=torch.bool).tril()
    torch._dynamo.reset()
    run = torch.compile(stack.run)
    taken = []
    for number in range(repeats + 3):
        begun = time.process_time()
        with mixed_precision(torch.device("cpu")):
            out = run(hidden, positions, attention.mask_of_rows(mask, hidden))
        out.float().square().mean().backward()
        if number >= 3:
            taken.append(time.process_time() - begun)
    return min(taken)


def main() -> None:
    """Print both times and their ratio for every shape."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    stack = Backbone(from_dict(ModelConfig, load_yaml(RECIPE)["model"], str(RECIPE)))
    longest = attention.LONGEST
    print(f"{given.threads} threads; seconds of a forward and backward pass of the backbone")
    for batch, length in ROWS:
        attention.LONGEST = 0
        fused = seconds(stack, batch, length, given.repeats)
        attention.LONGEST = longest
        own = seconds(stack, batch, length, given.repeats)
        print(f"{batch} x {length}: fused {fused:.3f}, in full {own:.3f}, ratio {fused / own:.2f}")


if __name__ == "__main__":
    main()
