"""What machines can do: a table of GPUs, and measuring the machine at hand."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.attention import attend, mask_of_rows
from nextflow_ar.precision import Precision, chosen_dtype, precision_name


@dataclass(frozen=True)
class Gpu:
    """``flops``: dense products per second in bf16 (or what ``products`` says), ``single``: in fp32 (without TF32, as torch
    has it by default). ``memory``: bytes that a program can use. ``bandwidth``: of its memory,
    bytes per second. ``link``: to the others of its node, one way. ``network``: to other nodes, per GPU, one way.
    ``node``: GPUs of a node. ``source``: where the figures are from.
    """

    name: str
    flops: float
    single: float
    memory: float
    bandwidth: float
    link: float
    network: float
    node: int
    source: str
    products: str = "bf16"

    def of(self, size: int) -> Gpu:
        """The same for products of numbers of ``size`` bytes."""
        return self if size == 2 else replace(self, flops=self.single, products="fp32")


_GIB = 2.0**30

GPUS: dict[str, Gpu] = {
    gpu.name: gpu
    for gpu in (
        Gpu("a100", 312e12, 19.5e12, 79 * _GIB, 2.039e12, 300e9, 25e9, 8,
            "A100 80GB SXM data sheet: 312 TFLOPS, fp32 19.5, 2,039 GB/s, "
            "NVLink 600 GB/s both ways; DGX A100: 200 Gb/s per GPU"),
        Gpu("h100", 989e12, 67e12, 79 * _GIB, 3.35e12, 450e9, 50e9, 8,
            "H100 SXM data sheet: 1,979 TFLOPS sparse, fp32 67, 3.35 TB/s, "
            "NVLink 900 GB/s both ways; DGX H100: 400 Gb/s per GPU"),
        Gpu("h200", 989e12, 67e12, 139 * _GIB, 4.8e12, 450e9, 50e9, 8,
            "H200 SXM data sheet: 1,979 TFLOPS sparse, fp32 67, 141 GB, 4.8 TB/s, "
            "NVLink 900 GB/s both ways; 400 Gb/s per GPU"),
        Gpu("b200", 2250e12, 75e12, 178 * _GIB, 8.0e12, 900e9, 50e9, 8,
            "DGX B200 data sheet: 36 PFLOPS sparse bf16, fp32 75 a GPU (HGX) and 1,440 GB by 8, "
            "8 TB/s, NVLink 1.8 TB/s both ways; 400 Gb/s"),
        Gpu("l40s", 362e12, 91.6e12, 44 * _GIB, 0.864e12, 32e9, 25e9, 8,
            "L40S data sheet: 733 TFLOPS sparse, fp32 91.6, 48 GB, 864 GB/s, "
            "PCIe 4 x16; network 200 Gb/s per GPU assumed"),
    )
}  # fmt: skip
"""Dense figures: half of what the data sheets give with sparsity."""


def seconds_of(work: Callable[[], object], repeats: int = 3) -> float:
    """Least seconds of ``work`` after one call to warm up: the processor's own time on one CPU thread, where what else
    runs on the machine does not count, else by the clock.
    """
    cuda = torch.cuda.is_available()
    clock = time.process_time if torch.get_num_threads() == 1 and not cuda else time.perf_counter
    least = float("inf")
    for number in range(repeats + 1):
        began = clock()
        work()
        if cuda:
            torch.cuda.synchronize()
        if number:
            least = min(least, clock() - began)
    return least


def _device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _normal(*shape: int, products: Precision = "auto") -> Tensor:
    device = _device()
    drawn = torch.randn(*shape, generator=torch.Generator(device).manual_seed(0), device=device)
    return drawn.to(chosen_dtype(device, products))


def measure_machine(size: int = 2048, products: Precision = "auto") -> Gpu:
    """The machine at hand as a row of the table: products of ``size`` squared in the precision that is trained in, and
    elementwise work as a layer has it (the gated product of the feed-forward part), bytes read and written per second.
    """
    a, b = (_normal(size, size, products=products) for _ in range(2))
    flops = 2 * size**3 / seconds_of(lambda: a @ b)
    x, y = (_normal(4096, 704, products=products) for _ in range(2))
    out = torch.empty_like(x)
    # silu reads and writes once, the product reads two and writes one
    bandwidth = 5 * x.nbytes / seconds_of(lambda: torch.mul(torch.nn.functional.silu(x), y, out=out), 10)
    if torch.cuda.is_available():
        memory = float(torch.cuda.get_device_properties(0).total_memory)
    else:
        memory = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    name, source = precision_name(_device(), products), "measured on this machine"
    return Gpu("this", flops, flops, memory, bandwidth, bandwidth, bandwidth, 1, source, name)


def product_flops(config: ModelConfig, tokens: int, products: Precision = "auto") -> float:
    """Products per second in a layer of this shape over ``tokens`` places, forward and backward, measured."""
    hidden, wide = config.hidden, config.intermediate
    work, seconds = 0.0, 0.0
    for many, rows, columns in ((2, hidden, hidden), (3, hidden, wide)):
        shapes = (tokens, rows), (columns, rows), (tokens, columns)
        x, weight, slope = (_normal(*shape, products=products) for shape in shapes)

        def passes(x: Tensor = x, weight: Tensor = weight, slope: Tensor = slope) -> None:
            _ = x @ weight.T, slope @ weight, slope.T @ x

        work += many * 6 * tokens * rows * columns
        seconds += many * seconds_of(passes)
    return work / seconds


def muon_rate(config: ModelConfig) -> float:
    """Products per second of Muon's iterations over a layer's matrices, one at a time, measured: they are too small to
    reach what a batch's products do.
    """
    hidden, work, seconds = config.hidden, 0.0, 0.0
    for many, columns in ((4, hidden), (3, config.intermediate)):
        x = _normal(hidden, columns)

        def iteration(x: Tensor = x) -> None:
            gram = x @ x.T
            torch.addmm(x, torch.addmm(gram, gram, gram), x)

        work += many * (4 * hidden**2 * columns + 2 * hidden**3)
        seconds += many * seconds_of(iteration)
    return work / seconds


def attention_flops(config: ModelConfig, rows: int, length: int, products: Precision = "auto") -> float:
    """Products per second of masked attention as training runs it, forward and backward, over whole (length, length)
    squares, measured.
    """
    head = config.hidden // config.heads
    shape = rows, config.heads, length, head
    q, k, v = (_normal(*shape, products=products).requires_grad_() for _ in range(3))
    causal = torch.ones(rows, 1, length, length, dtype=torch.bool, device=q.device).tril()
    mask = mask_of_rows(causal, q, torch.zeros(rows, length, dtype=torch.long))
    layer = torch.nn.Identity()

    def passes() -> None:
        out, _ = attend(layer, q, k, v, mask, scaling=head**-0.5)
        torch.autograd.grad(out, (q, k, v), out)

    return 3 * 4 * rows * length**2 * config.hidden / seconds_of(passes)
