"""What packing is worth in real training steps on data-parallel processes (gloo, one thread each): useful places per second
of padding, rows of a fixed length and rows of a fixed compute, and how long the slower process keeps the other waiting.

    python benchmarks/packing_run.py [--documents 400] [--processes 2] [--rows 4]

The mixture is that of benchmarks/packing.py (text, T2I, I2T, edits, interleaved), at resolutions of 91, 304 and 900 places
in place of 900, 3,684 and 10,084, texts shorter by ten, in a model of 4 layers and 128 hidden units. Padding: ``--rows``
documents a process, padded to its longest. Fixed length: a row as long as the longest document; fixed compute: as costly
as the costliest; every batch has a width that training would give it. Attention is computed document by document, as in
every training on a CPU (here of short rows, too): padding pays for its projections only. "processor": a step lasts as
long as its slower process computes, by its own time, so that a busy machine changes little; "clock": as it happened, for
a quiet one.
"""

import argparse
import os
import random
import socket
import statistics
import time

import torch
from packing import document

from nextflow_ar.config import ModelConfig
from nextflow_ar.data.loader import Packing
from nextflow_ar.data.packing import Packer
from nextflow_ar.model import attention
from nextflow_ar.model.checkpoint import find_checkpoint, load_architecture
from nextflow_ar.model.costs import TextShape
from nextflow_ar.model.flops import sample_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.precision import mixed_precision
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import OptimizerConfig, StageOptimizer
from nextflow_ar.training.parallel import World
from nextflow_ar.types import Codes, Document, Image, Text

LEVELS = {6: 0.6, 9: 0.3, 12: 0.1}
SHORTER = 10.0
WIDTHS = 24  # a doubling, of rows of fixed compute, as in the 7B recipes
MODEL = ModelConfig(
    text_vocab=2048, codes=512, code_dim=32, hidden=128, layers=4, heads=2, kv_heads=2, intermediate=352,
    max_positions=8192, rms_eps=1e-6, rope="per_axis", rope_theta=100.0, rope_sections=(8, 12, 12), rope_range=12.0,
    max_scales=18, scale_input="residual", closing_input="accumulated", context_images="scales", positions="rope",
)  # fmt: skip
RATES = OptimizerConfig(
    lr=1e-3, muon_lr=0.0, weight_decay=0.01, beta1=0.9, beta2=0.95, warmup=1, schedule="constant", decay=0.0,
    final=1.0, clip=1.0,
)  # fmt: skip
MODES = ("padding", "fixed length", "fixed compute")


def samples(count, seed, vocab):
    """The mixture's documents with random codes, laid out."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    word = next(w for w in (" red", " a", " dog") if len(vocab.encode(w * 7)) == 7)
    found = []
    for _ in range(count):
        parts = []
        for shape in document(rng, LEVELS, SHORTER):
            if isinstance(shape, TextShape):
                parts.append(Text(word * shape.tokens, shape.supervised))
            else:
                cells = shape.schedule.num_tokens
                codes = Codes.plain(shape.schedule, torch.randint(512, (cells,), generator=generator))
                parts.append(Image(codes, shape.supervised))
        found.append(build(Document(tuple(parts)), vocab, LayoutOptions(MODEL.rope_range)))
    return found


def steps_of(mode, found, processes, rows):
    """Steps; each has for every process the rows of its batch. Before them, the width of a batch by its longest row."""
    lengths, costs = [len(s) for s in found], [sample_flops(s, MODEL) for s in found]
    numbers, width = [[n] for n in range(len(found))], Packing("pad", max(lengths)).width
    if mode == "fixed length":
        width = Packing("length", max(lengths)).width
        numbers = list(Packer(max(lengths), open_rows=32).pack((n, w, w) for n, w in enumerate(lengths)))
    if mode == "fixed compute":
        width = Packing("compute", 1.0, widths=WIDTHS).width
        numbers = list(Packer(max(costs), open_rows=32).pack((n, c, lengths[n]) for n, c in enumerate(costs)))
    each = rows if mode == "padding" else 1
    step = each * processes
    starts = range(0, len(numbers) - step + 1, step)
    return width, [[numbers[s + i * each : s + (i + 1) * each] for i in range(processes)] for s in starts]


def run(rank, port, options, queue):
    """One process: all modes one after the other."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(options.processes)}
    torch.set_num_threads(1)
    keep_freed_memory()
    world = World.join()
    _, tokenizer = load_architecture(find_checkpoint("nano"))
    found = samples(options.documents, options.seed, Vocabulary(tokenizer, MODEL.text_vocab, MODEL.codes))
    attention.APART.update(dict.fromkeys(attention.APART, 0))
    model = NextFlowModel(MODEL)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = StageOptimizer(model.named_parameters(), RATES)

    def step(batch):
        with mixed_precision(torch.device("cpu")):
            report = model.losses(batch)
        (report.total / report.weight).backward()
        used = time.process_time()
        world.average_gradients(model.parameters())
        optimizer.step(1.0)
        return used

    step(collate(found[:2]))  # warms up
    for mode in MODES:
        times, useful, places, began = [], 0, 0, time.perf_counter()
        width, steps = steps_of(mode, found, options.processes, options.rows)
        for shares in steps:
            rows = [pack([found[n] for n in row]) for row in shares[rank]]
            batch = collate(rows, width(max(map(len, rows))))
            start = time.process_time()
            times.append(step(batch) - start)
            useful += int((batch.documents >= 0).sum())
            places += batch.documents.numel()
        queue.put((mode, rank, times, useful, places, time.perf_counter() - began))
    world.leave()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.SimpleQueue()
    torch.multiprocessing.spawn(run, (port, options, queue), nprocs=options.processes, join=True)
    told = [queue.get() for _ in range(len(MODES) * options.processes)]
    print(
        f"{options.documents} documents, {options.processes} processes, padding {options.rows} documents a process"
    )
    print(
        f"{'':16}{'steps':>6}{'filled':>8}{'places/s, processor':>21}{'times':>7}{'idle':>7}"
        f"{'places/s, clock':>17}{'times':>7}"
    )
    first = None
    for mode in MODES:
        mine = [t for t in told if t[0] == mode]
        useful, places = sum(t[3] for t in mine), sum(t[4] for t in mine)
        slowest = [max(several) for several in zip(*(t[2] for t in mine), strict=True)]
        busy = statistics.mean(sum(t[2]) for t in mine)
        speed, clock = useful / sum(slowest), useful / max(t[5] for t in mine)
        first = first or (speed, clock)
        print(f"{mode:16}{len(slowest):>6}{useful / places:>8.1%}{speed:>21,.0f}{speed / first[0]:>7.2f}"
              f"{1 - busy / sum(slowest):>7.1%}{clock:>17,.0f}{clock / first[1]:>7.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
