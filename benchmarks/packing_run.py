"""What packing is worth in real training steps on data-parallel processes (gloo, one thread each): useful places per second
of padding, rows of a fixed length and rows of a fixed compute, and how long the slower process keeps the other waiting.

    python benchmarks/packing_run.py [--documents 400] [--processes 2] [--rows 4] [--repeats 1]

The mixture is that of benchmarks/packing.py (text, T2I, I2T, edits, interleaved), at resolutions of 91, 304 and 900 places
in place of 900, 3,684 and 10,084, texts shorter by ten, in a model of 4 layers and 128 hidden units. Padding: ``--rows``
documents a process, padded to its longest. Fixed length: a row as long as the longest document; fixed compute: as costly
as the costliest; every batch has a width that training would give it. Attention is computed document by document, as in
every training on a CPU (here of short rows, too), and logits where something is predicted: padding pays for its other
projections only. "plain padding" is the same batches as a trainer computes them that knows of no packing: attention over
whole padded rows under a mask, logits of all places.

The modes take turns, step by step, so that all meet the machine as fast or as slow; ``--repeats`` has as many mixtures
drawn, each with its own ratios. "processor": a step lasts as long as its slower process computes, by its own time, so that
a busy machine changes little; "clock": as it happened, for a quiet one.
"""

import argparse
import os
import random
import socket
import time
from collections import namedtuple
from queue import Empty

import torch
import torch.nn.functional as F
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
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, build
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
MODES = ("plain padding", "padding", "fixed length", "fixed compute")
APART = dict.fromkeys(attention.APART, 0)


Told = namedtuple("Told", "repeat mode rank used useful places taken")
Summary = namedtuple("Summary", "steps filled speed idle clock")


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
    each = rows if mode.endswith("padding") else 1
    step = each * processes
    starts = range(0, len(numbers) - step + 1, step)
    return width, [[numbers[s + i * each : s + (i + 1) * each] for i in range(processes)] for s in starts]


def plain_loss(model, batch):
    """The same weighted mean of losses, by logits of all places."""
    logits = model.head(model.hidden(batch)).flatten(0, 1).float()
    losses = F.cross_entropy(logits, batch.targets.flatten(), ignore_index=IGNORED, reduction="none")
    weights = batch.weights.flatten()
    return (losses * weights).sum() / weights.sum()


def in_turns(steps):
    """(mode, step) of all modes, evenly: the next step is of the mode that is behind."""
    places = [
        ((n + 0.5) / len(mine), mode, shares) for mode, mine in steps.items() for n, shares in enumerate(mine)
    ]
    return [(mode, shares) for _, mode, shares in sorted(places, key=lambda place: place[:2])]


def run(rank, port, options, queue):
    """One process: a step of this mode, a step of that."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(options.processes)}
    torch.set_num_threads(1)
    keep_freed_memory()
    world = World.join()
    _, tokenizer = load_architecture(find_checkpoint("nano"))
    vocab = Vocabulary(tokenizer, MODEL.text_vocab, MODEL.codes)
    model = NextFlowModel(MODEL)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = StageOptimizer(model.named_parameters(), RATES)

    def step(batch, plain=False):
        attention.APART.clear() if plain else attention.APART.update(APART)
        with mixed_precision(torch.device("cpu")):
            report = None if plain else model.losses(batch)
            loss = plain_loss(model, batch) if report is None else report.total / report.weight
        loss.backward()
        used = time.process_time()
        world.average_gradients(model.parameters())
        optimizer.step(1.0)
        return used

    step(collate(samples(2, options.seed, vocab)))  # warms up
    for repeat in range(options.repeats):
        found = samples(options.documents, options.seed + repeat, vocab)
        plans = {mode: steps_of(mode, found, options.processes, options.rows) for mode in MODES}
        for mode, shares in in_turns({mode: steps for mode, (_, steps) in plans.items()}):
            began = time.perf_counter()
            rows = [pack([found[n] for n in row]) for row in shares[rank]]
            batch = collate(rows, plans[mode][0](max(map(len, rows))))
            start = time.process_time()
            used = step(batch, mode == "plain padding") - start
            useful = int((batch.documents >= 0).sum())
            taken = time.perf_counter() - began
            queue.put(Told(repeat, mode, rank, used, useful, batch.documents.numel(), taken))
    world.leave()


def drain(queue):
    """What lies in the queue."""
    found = []
    while True:
        try:
            found.append(queue.get(timeout=0.1))
        except Empty:
            return found


def summary(told):
    """Of one mode's steps: how many, share of places of use, these a second (processor), idle share, a second (clock)."""
    ranks = [[t for t in told if t.rank == rank] for rank in sorted({t.rank for t in told})]
    useful, places = sum(t.useful for t in told), sum(t.places for t in told)
    slowest = sum(max(t.used for t in step) for step in zip(*ranks, strict=True))
    clock = sum(max(t.taken for t in step) for step in zip(*ranks, strict=True))
    busy = sum(t.used for t in told) / len(ranks)
    return Summary(len(ranks[0]), useful / places, useful / slowest, 1 - busy / slowest, useful / clock)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=400)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = torch.multiprocessing.get_context("spawn")
    queue = context.Queue()
    workers = torch.multiprocessing.spawn(run, (port, options, queue), nprocs=options.processes, join=False)
    told = []
    while not workers.join(timeout=0.1):
        told += drain(queue)
    told += drain(queue)
    print(
        f"{options.documents} documents, {options.processes} processes, padding {options.rows} documents a process, "
        f"{options.repeats} times"
    )
    print(
        f"{'':16}{'steps':>6}{'filled':>8}{'places/s, processor':>21}{'times plain, padding':>22}{'idle':>7}"
        f"{'places/s, clock':>17}{'times plain, padding':>22}  times padding of each repeat, processor"
    )
    whole = {mode: summary([t for t in told if t.mode == mode]) for mode in MODES}
    plain, padding = whole[MODES[0]], whole[MODES[1]]
    for mode, of in whole.items():
        each = [
            [summary([t for t in told if t[:2] == (n, m)]).speed for n in range(options.repeats)]
            for m in (mode, MODES[1])
        ]
        several = ", ".join(f"{mine / its:.2f}" for mine, its in zip(*each, strict=True))
        speeds, clocks = (
            f"{mine / a:.2f}, {mine / b:.2f}"
            for mine, a, b in ((of.speed, plain.speed, padding.speed), (of.clock, plain.clock, padding.clock))
        )
        print(
            f"{mode:16}{of.steps:>6}{of.filled:>8.1%}{of.speed:>21,.0f}{speeds:>22}{of.idle:>7.1%}{of.clock:>17,.0f}"
            f"{clocks:>22}  {several}"
        )


if __name__ == "__main__":
    main()
