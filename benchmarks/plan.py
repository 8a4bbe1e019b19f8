"""Prediction of a nano recipe's step on this machine, and the step itself: goal within 25 % of each other.

    OMP_NUM_THREADS=1 taskset -c 0 python benchmarks/plan.py [--rows 16] [--length 284] [--repeats 3] [--eager]

The model of recipes/nano_finish.yaml on rows of random places, compiled, in the precision that this machine trains in. On
one thread the processor's own time is measured, so other programs disturb it little; on more, the clock.
"""

import argparse
import dataclasses
from pathlib import Path

import torch

from nextflow_ar.config import load_yaml
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.precision import mixed_precision
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.layout import TEXT_SCALE
from nextflow_ar.training.hardware import seconds_of
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import StageOptimizer
from nextflow_ar.training.plan import measured_plan, read_stage


def random_batch(rows, length, entries):
    """Text rows: every place predicts, as in the costliest recipe."""
    generator = torch.Generator().manual_seed(0)
    shape = (rows, length)
    places = torch.arange(length).expand(shape)
    return Batch(
        tokens=torch.randint(0, entries, shape, generator=generator),
        targets=torch.randint(0, entries, shape, generator=generator),
        weights=torch.ones(shape), positions=places.float().expand(3, *shape).clone(), blocks=places,
        scales=torch.full(shape, TEXT_SCALE), lengths=torch.zeros(shape, dtype=torch.long),
        documents=torch.zeros(shape, dtype=torch.long), images=(),
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--length", type=int, default=284)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--eager", action="store_true", help="do not compile, as the recipe says to")
    given = parser.parse_args()
    keep_freed_memory()
    path = Path(__file__).parent.parent / "recipes" / "nano_finish.yaml"
    values = load_yaml(path)
    whole = values["sources"][1] | {"rows": given.rows, "length": given.length}
    values["sources"] = [whole]
    stage = read_stage(values, str(path), cuda=torch.cuda.is_available())
    stage = dataclasses.replace(stage, averaged=False)
    plan = measured_plan(stage)
    model = NextFlowModel(stage.model)
    model.initialise(torch.Generator().manual_seed(0))
    optimizer = StageOptimizer(model.named_parameters(), stage.optimizer)
    if not given.eager:
        model.compile_backbone()
    batch = random_batch(given.rows, given.length, stage.model.text_vocab)

    def step():
        with mixed_precision(torch.device("cpu")):
            report = model.losses(batch)
        (report.total / report.weight).backward()
        optimizer.step(1.0)

    measured = seconds_of(step, given.repeats)
    t = plan.times
    print(f"{torch.get_num_threads()} threads, {given.rows} rows of {given.length}")
    print(f"peak {plan.gpu.flops / 1e12:.2f} TFLOP/s, {plan.efficiency:.2f} of it at the model's shapes; elementwise "
          f"{plan.gpu.bandwidth / 1e9:.1f} GB/s")  # fmt: skip
    print(f"{'':12}{'products':>10}{'elementwise':>12}{'optimiser':>10}{'step':>8}")
    print(f"{'predicted s':12}{t.products:10.3f}{t.elementwise:12.3f}{t.optimizer:10.3f}{t.step:8.3f}")
    print(f"{'measured s':12}{'':32}{measured:8.3f}")
    useful = given.rows * given.length * plan.flops / plan.tokens
    print(f"predicted / measured: {t.step / measured:.2f}; model TFLOP/s {useful / measured / 1e12:.2f}")


if __name__ == "__main__":
    main()
