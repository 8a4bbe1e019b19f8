"""Why a CPU without bf16 instructions computes in fp32: the products of training in both precisions, with what
``nextflow_ar.precision`` takes here.

    OMP_NUM_THREADS=1 python benchmarks/precision.py [--repeats 3]

On one thread the processor's own time is measured. Shapes are the bundled model's (256 x 704, rows of 320 places) and its
image tokenizer's (64 channels at 64 x 64).
"""

import argparse

import torch
from torch.nn import functional as F

from nextflow_ar.precision import best_dtype
from nextflow_ar.training.hardware import seconds_of


def both_ways(make, *shapes):
    """A function of a dtype that makes the work of a forward and a backward pass over tensors of ``shapes``."""

    def prepare(dtype):
        inputs = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]

        def work():
            out = make(*inputs)
            torch.autograd.grad(out, inputs, out.detach())

        return work

    return prepare


WORK = {
    "product 2,560 x 256 x 704": both_ways(lambda x, w: x @ w.T, (2560, 256), (704, 256)),
    "attention 8 x 320": both_ways(lambda q, k, v: F.scaled_dot_product_attention(q, k, v), *3 * [(8, 4, 320, 64)]),
    "convolution 2 x 64 x 64 x 64": both_ways(
        lambda x, w: F.conv2d(x, w, padding=1), (2, 64, 64, 64), (64, 64, 3, 3)
    ),
}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    print(f"{torch.backends.cpu.get_cpu_capability()}, {torch.get_num_threads()} threads: "
          f"{best_dtype(torch.device('cpu'))} is taken")  # fmt: skip
    print(f"{'forward and backward, ms':32}{'fp32':>10}{'bf16':>10}{'bf16 / fp32':>13}")
    for name, prepare in WORK.items():
        full, half = (1000 * seconds_of(prepare(t), options.repeats) for t in (torch.float32, torch.bfloat16))
        print(f"{name:32}{full:10.1f}{half:10.1f}{half / full:13.2f}", flush=True)


if __name__ == "__main__":
    main()
