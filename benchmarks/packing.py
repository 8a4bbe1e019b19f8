"""What packing is worth: useful work per second for padding, rows of a fixed length, and rows of a fixed compute, on a
mixture like the paper's 7B pretraining (text, T2I, I2T, edits, interleaved; 256, 512 and 1024 px), and how long the slower
of the data-parallel processes keeps the others waiting. Paper: 620, 2,110 and 2,517 tokens/s, 4.1 times.

    python benchmarks/packing.py [--documents 20000] [--processes 8]

Analytic: the FLOPs of every row under the block mask on the 7B shape, so a busy machine changes nothing. Padded places
cost their projections. Samples of a step go to the processes as rows; a step lasts as long as its costliest row.
benchmarks/packing_run.py has real steps.
"""

import argparse
import random
import statistics
from pathlib import Path

from nextflow_ar.config import ModelConfig, from_dict, load_yaml
from nextflow_ar.data.loader import Packing
from nextflow_ar.data.packing import Packer
from nextflow_ar.model.costs import ImageShape, TextShape, count, forward_flops
from nextflow_ar.model.flops import token_flops
from nextflow_ar.scales import FINAL_GRIDS, ScaleSchedule

SHARES = {"text": 25, "text_to_image": 45, "image_to_text": 14, "edit": 8, "interleaved": 8}
"""Of the documents, in per cent. A quarter is text, as the paper mixes it; the other shares are assumed."""
LEVELS = {12: 0.6, 16: 0.3, 18: 0.1}
"""Share of the documents at 256, 512 and 1024 px (assumed)."""


def document(rng, levels=LEVELS, shorter=1.0):
    """Shapes of one document of the mixture. ``shorter``: texts have so many times fewer tokens."""
    kind = rng.choices(list(SHARES), weights=SHARES.values())[0]
    scales = rng.choices(list(levels), weights=levels.values())[0]
    schedule = ScaleSchedule.from_final(rng.choice(FINAL_GRIDS), scales)
    drawn, seen = ImageShape(schedule, True), ImageShape(schedule)

    def words(mean):
        return max(4, min(round(2000 / shorter), round(rng.lognormvariate(0, 0.8) * mean / shorter)))

    if kind == "text":
        return [TextShape(words(220), True)]
    if kind == "text_to_image":
        return [TextShape(words(75)), drawn]
    if kind == "image_to_text":
        return [seen, TextShape(words(75), True)]
    if kind == "edit":
        return [seen, TextShape(words(25)), drawn]
    return [TextShape(words(40), True), drawn] * (
        rng.randint(2, 5) if scales < max(levels) else rng.randint(2, 3)
    )


def steps(rows, processes):
    """Rows dealt out in order, ``processes`` to a step."""
    return [rows[i : i + processes] for i in range(0, len(rows) - processes + 1, processes)]


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--documents", type=int, default=20000)
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--open-rows", type=int, default=64)
    parser.add_argument(
        "--widths", type=int, nargs="+", default=[7, 24], help="of rows of fixed compute, a doubling"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    path = Path(__file__).parent.parent / "recipes" / "7b_pretrain_512.yaml"
    config = from_dict(ModelConfig, load_yaml(path)["model"])
    rng = random.Random(given.seed)
    counts = [count(document(rng)) for _ in range(given.documents)]
    costs = [sum(forward_flops(c, config)) for c in counts]
    lengths = [int(c.tokens) for c in counts]
    longest = max(lengths)
    place = token_flops(config)

    def row(numbers, width=0):
        """(useful tokens, FLOPs) of a row, padded up to ``width``."""
        used = sum(lengths[n] for n in numbers)
        return used, sum(costs[n] for n in numbers) + max(0, width - used) * place

    padded = []
    for start in range(0, given.documents - given.processes + 1, given.processes):
        batch = range(start, start + given.processes)
        padded += [row([n], max(lengths[m] for m in batch)) for n in batch]
    by_length = Packer(float(longest), open_rows=given.open_rows)
    equal = [row(r, longest) for r in by_length.pack((n, length, length) for n, length in enumerate(lengths))]
    by_cost = Packer(max(costs), open_rows=given.open_rows)
    packed = list(by_cost.pack((n, c, lengths[n]) for n, c in enumerate(costs)))
    balanced, few = [row(r) for r in packed], {}
    for n in given.widths:
        width = Packing("compute", 1.0, widths=n).width
        widths = [width(sum(lengths[n] for n in r)) for r in packed]
        few[f"... in {len(set(widths))} widths"] = [row(r, w) for r, w in zip(packed, widths, strict=True)]
    whole = [row([n], longest) for n in range(given.documents)]
    print(
        f"{given.documents} documents, mean {statistics.mean(lengths):,.0f} places, longest {longest:,}; "
        f"{given.processes} processes, {given.open_rows} open rows"
    )
    print(f"{'':28}{'useful places / PFLOP':>22}{'times padding':>15}{'idle':>8}{'filled':>8}")
    base, best = None, sum(costs) / sum(lengths)  # FLOPs of a useful place
    cases = {
        "padded to the step's longest": padded,
        "padded to the longest of all": whole,
        "fixed length": equal,
        "fixed compute": balanced,
    } | few
    for name, rows in cases.items():
        useful = paid = work = 0.0
        for step in steps(rows, given.processes):
            useful += sum(tokens for tokens, _ in step)
            paid += given.processes * max(cost for _, cost in step)
            work += sum(cost for _, cost in step)
        base = base or useful / paid
        print(
            f"{name:28}{1e15 / 3 * useful / paid:>22,.0f}{useful / paid / base:>15.2f}{1 - work / paid:>8.1%}"
            f"{useful * best / paid:>8.1%}",
            flush=True,
        )


if __name__ == "__main__":
    main()
