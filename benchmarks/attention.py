"""Attention in training on a CPU: torch's fused kernel, the two products of ``model/attention.py``, and those document by
document (``model/document_attention.py``).

Both directions of the backbone of a world recipe, compiled, in the precision that this machine trains in, for rows as the
recipes have them, filled with documents of one length:

    python benchmarks/attention.py [--threads 1] [--repeats 8]
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from unittest import mock

import torch

from nextflow_ar.config import ModelConfig, from_dict, load_yaml
from nextflow_ar.model import attention
from nextflow_ar.model.backbone import Backbone
from nextflow_ar.precision import mixed_precision
from nextflow_ar.sequence.blocks import block_mask

ROWS = ((5, 256, 128), (4, 320, 320), (4, 320, 160), (4, 320, 80), (2, 640, 213), (1, 1280, 426))
NEVER = 1 << 30
RECIPE = Path(__file__).parents[1] / "recipes" / "world_read.yaml"


def seconds(stack: Backbone, batch: int, length: int, each: int, repeats: int) -> float:
    """CPU seconds of one forward and backward pass, the quickest of several."""
    hidden = torch.randn(batch, length, stack.config.hidden_size, requires_grad=True)
    positions = torch.randint(0, 8, (3, batch, length)).float()
    documents = (torch.arange(length) // each).expand(batch, -1).contiguous()
    mask = block_mask(torch.arange(length).expand(batch, -1), documents)
    torch._dynamo.reset()
    run = torch.compile(stack.run)
    taken = []
    for number in range(repeats + 3):
        begun = time.process_time()
        with mixed_precision(torch.device("cpu")):
            out = run(hidden, positions, attention.mask_of_rows(mask, hidden, documents))
        out.float().square().mean().backward()
        if number >= 3:
            taken.append(time.process_time() - begun)
    return min(taken)


def main() -> None:
    """Print the three times for every shape, and which way training goes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--repeats", type=int, default=8)
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    torch.manual_seed(0)
    stack = Backbone(from_dict(ModelConfig, load_yaml(RECIPE)["model"], str(RECIPE)))
    hidden = torch.zeros(1, requires_grad=True)
    with mixed_precision(torch.device("cpu")):
        dtype = attention._dtype(hidden)
    print(f"{given.threads} threads, {dtype}; seconds of a forward and backward pass of the backbone")
    print(f"{'rows x places':16}{'documents of':>13}{'fused':>9}{'in full':>9}{'apart':>9}   trained")
    ways = {"fused": (0, NEVER), "in full": (NEVER, NEVER), "apart": (NEVER, 0)}
    for batch, length, each in ROWS:
        found = []
        for longest, apart in ways.values():
            with (
                mock.patch.object(attention, "LONGEST", longest),
                mock.patch.object(attention, "APART", dict.fromkeys(attention.APART, apart)),
            ):
                found.append(seconds(stack, batch, length, each, given.repeats))
        taken = "apart" if length >= attention.APART[dtype] else "in full"
        taken = taken if taken == "apart" or length <= attention.LONGEST else "fused"
        shape = f"{batch} x {length}"
        print(f"{shape:16}{each:>13}{''.join(f'{s:>9.3f}' for s in found)}   {taken}")


if __name__ == "__main__":
    main()
