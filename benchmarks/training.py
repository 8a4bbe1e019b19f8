"""Seconds of a training step, model FLOP/s and their share of what this machine's matrix products reach, in the precision
that it trains in (bf16 where that is fast, else fp32); beside it, in the same run, transformers' own Qwen2 with the same
backbone on equally many places of text.

    python benchmarks/training.py [--recipe recipes/world_read5.yaml] [--threads 1 2] [--ways eager compiled] [--repeats 5]
    OMP_NUM_THREADS=1 taskset -c 1 python benchmarks/training.py --threads 1 --ways eager --repeats 2     # one core
    python benchmarks/training.py --processes 2 --threads 1 --times 2 --ways compiled     # as torchrun runs on two cores

"recipe": one step of the recipe, all of its batches, forward, backward, optimiser and averages; the making of its data is
told apart. "text": rows of random text in our model and in theirs, forward, backward, optimiser (ours: Muon and AdamW;
theirs: AdamW). FLOPs are of the model: three times the forward pass, masked attention, no padding. Every number of threads
is a process of its own. One thread is timed by the processor's own time, which other programs disturb little; more by the
clock. With several processes each computes its share of the rows, gradients are averaged as in training, the step ends when
all have ended, and the peak is the sum of what all reach at the same time.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from nextflow_ar.config import from_dict, load_yaml, to_dict
from nextflow_ar.model.costs import Counts, forward_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.precision import best_dtype, mixed_precision
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.layout import TEXT_SCALE
from nextflow_ar.training import model_stage
from nextflow_ar.training.hardware import measure_machine, seconds_of
from nextflow_ar.training.memory import keep_freed_memory
from nextflow_ar.training.optim import StageOptimizer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.sharded import move_averages

ROOT = Path(__file__).parent.parent
LENGTH = 284
WHAT = ("recipe", "text, ours", "text, transformers")


def trainer_of(recipe, folder, times):
    """The recipe's trainer, with bundled parts in place of those that earlier stages make, and ``times`` as many rows."""
    model_stage._CORPUS = 300  # enough for a text tokenizer whose words do not matter
    values = load_yaml(recipe)
    values["model"]["codes"] = 2048  # the bundled image tokenizer's; the recipe's own is made by another run
    values |= {"image_tokenizer": "nano", "out": str(folder), "start": None, "compile": False, "peak": None}
    # The data is made here, for one step, and its time told apart.
    values |= {"workers": 0, "prefetch": False, "steps": 1}
    if times > 1:
        values["together"] = True
        for source in values["sources"]:
            source["rows"] *= times
    built = from_dict(model_stage.ModelRecipe, values)
    return model_stage.ModelTrainer(built, to_dict(built))


def recipe_step(trainer):
    """(work of one step, its FLOPs, its places, seconds that its data took)."""
    began = time.process_time()
    parts = trainer._parts()
    data = time.process_time() - began
    batches, weight = [part.batch for part in parts], sum(part.weight for part in parts)

    def work():
        for batch in batches:
            with mixed_precision(torch.device("cpu")):
                report = trainer.model.losses(batch)
            (report.total / weight).backward()
        trainer.world.average_gradients(trainer.model.parameters())
        trainer.optimizer.step(1.0)
        move_averages(trainer.averages, trainer.parameters, 0.99)

    return work, sum(part.flops for part in parts), sum(part.seen for part in parts), data


def text_batch(rows, entries):
    """Rows of random text, every place predicts."""
    shape = (rows, LENGTH)
    places = torch.arange(LENGTH).expand(shape)
    tokens = torch.randint(0, entries, shape, generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens=tokens, targets=tokens.roll(-1, 1), weights=torch.ones(shape),
        positions=places.float().expand(3, *shape).clone(), blocks=places,
        scales=torch.full(shape, TEXT_SCALE), lengths=torch.zeros(shape, dtype=torch.long),
        documents=torch.zeros(shape, dtype=torch.long), images=(),
    )  # fmt: skip


def our_text_step(recipe, rows, compiled, world):
    """Work of a step on text in our model."""
    model = NextFlowModel(recipe.model)
    model.initialise(torch.Generator().manual_seed(0))
    if compiled:
        model.compile_backbone()
    optimizer = StageOptimizer(model.named_parameters(), recipe.optimizer)
    batch = text_batch(rows, recipe.model.text_vocab)

    def work():
        with mixed_precision(torch.device("cpu")):
            report = model.losses(batch)
        (report.total / report.weight).backward()
        world.average_gradients(model.parameters())
        optimizer.step(1.0)

    return work


def their_text_step(recipe, rows, compiled, world):
    """Work of a step on the same text in transformers' Qwen2 of the same size, as its users train it."""
    ours = recipe.model
    config = Qwen2Config(
        vocab_size=ours.vocab, hidden_size=ours.hidden, intermediate_size=ours.intermediate,
        num_hidden_layers=ours.layers, num_attention_heads=ours.heads, num_key_value_heads=ours.kv_heads,
        max_position_embeddings=ours.max_positions, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = Qwen2ForCausalLM(config).train()
    run = torch.compile(model, dynamic=False) if compiled else model
    optimizer = torch.optim.AdamW(model.parameters(), 1e-4, fused=True)
    tokens = text_batch(rows, ours.text_vocab).tokens

    def work():
        with mixed_precision(torch.device("cpu")):
            loss = run(input_ids=tokens, labels=tokens).loss
        loss.backward()
        world.average_gradients(model.parameters())
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return work


def seconds_together(work, repeats, world):
    """Least seconds of a step of all processes; of one alone, see seconds_of."""
    if world.size == 1:
        return seconds_of(work, repeats)
    least = float("inf")
    for number in range(repeats + 1):
        world.any(False)  # all begin together
        began = time.perf_counter()
        work()
        world.any(False)
        if number:
            least = min(least, time.perf_counter() - began)
    return least


def measure(options, world, folder):
    """Rows of the table for this process's number of threads; counts and the peak are of all processes."""
    keep_freed_memory()
    threads = torch.get_num_threads()
    rows = []
    peak = sum(world.gather(max(measure_machine(size).flops for size in (1024, 2048))))
    trainer = trainer_of(options.recipe, Path(folder) / "run", options.times)
    work, flops, places, data = recipe_step(trainer)
    flops, places = sum(world.gather(flops)), sum(world.gather(places))
    recipe, config = trainer.recipe, trainer.config
    share = max(1, round(places / LENGTH / world.size))
    many = share * world.size
    text = Counts(many * LENGTH, many * LENGTH * (LENGTH + 1) / 2, many * LENGTH)
    text_flops = 3 * sum(forward_flops(text, config))
    for way in options.ways:
        compiled = way == "compiled"
        if compiled:
            trainer.model.compile_backbone()
        cases = {
            "recipe": (lambda: work, flops, places),
            "text, ours": (lambda c=compiled: our_text_step(recipe, share, c, world), text_flops, text.tokens),
            "text, transformers": (lambda c=compiled: their_text_step(recipe, share, c, world), text_flops, text.tokens),
        }  # fmt: skip
        for name in options.what:
            make, cost, count = cases[name]
            seconds = seconds_together(make(), options.repeats, world)
            rows.append({
                "threads": threads, "what": name, "way": way, "places": int(count), "seconds": seconds,
                "tflops": cost / seconds / 1e12, "share": cost / seconds / peak,
            })  # fmt: skip
            torch._dynamo.reset()
    return {"peak": peak, "dtype": str(best_dtype(torch.device("cpu"))), "data": data, "rows": rows}


def measured_apart(options, threads):
    """What measure returns, in a process of its own, or in several that torchrun starts."""
    start = [sys.executable]
    if options.processes > 1:
        start += ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(options.processes)]
    with tempfile.TemporaryDirectory() as folder:
        command = [*start, __file__, "--one", "--threads", str(threads), "--repeats", str(options.repeats)]
        command += ["--recipe", str(options.recipe), "--times", str(options.times), "--folder", folder]
        command += ["--ways", *options.ways, "--what", *options.what]
        subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": str(threads)}, check=True)
        return json.loads((Path(folder) / "found.json").read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=ROOT / "recipes" / "world_read5.yaml")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--ways", nargs="+", choices=("eager", "compiled"), default=["eager", "compiled"])
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument(
        "--times",
        type=int,
        default=1,
        help="so many times the recipe's rows, those of one width in one batch",
    )
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--what", nargs="+", choices=WHAT, default=WHAT)
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(options.threads[0])
        world = World.join()
        found = measure(options, world, options.folder)
        if world.rank == 0:
            (options.folder / "found.json").write_text(json.dumps(found))
        world.leave()
        return
    print(f"{options.recipe.name}\n{'threads':>7}  {'what':20}{'way':10}{'places':>7}{'s/step':>8}{'places/s':>10}"
          f"{'TFLOP/s':>9}{'of peak':>9}", flush=True)  # fmt: skip
    for threads in options.threads:
        found = measured_apart(options, threads)
        seconds = {(row["what"], row["way"]): row["seconds"] for row in found["rows"]}
        for row in found["rows"]:
            print(f"{row['threads']:>7}  {row['what']:20}{row['way']:10}{row['places']:>7}{row['seconds']:>8.2f}"
                  f"{row['places'] / row['seconds']:>10,.0f}{row['tflops']:>9.3f}{row['share']:>9.1%}")  # fmt: skip
        told = f"{found['dtype']} products reach {found['peak'] / 1e12:.2f} TFLOP/s; "
        told += f"making the recipe's data {found['data']:.2f} s"
        for way in options.ways if set(WHAT[1:]) <= set(options.what) else ():
            ratio = seconds["text, transformers", way] / seconds["text, ours", way]
            told += f"; on text, {way}, ours is {ratio:.2f} times as fast as transformers"
        print(f"{threads:>7}  {told}", flush=True)


if __name__ == "__main__":
    main()
