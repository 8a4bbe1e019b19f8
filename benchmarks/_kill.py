"""A training from shards, killed (SIGKILL) at random moments and in mid-save, must end with the weights of one that
never stopped, bit for bit.

    python benchmarks/_kill.py --kills 50                                # the tests' tiny model
    python benchmarks/_kill.py --kills 50 --base nano --steps 20          # nano: its weights, tokenizer, picture size
    python benchmarks/_kill.py --kills 50 --sharded                       # checkpoints in parts, written in the background

Prints one JSON line; exit status 1 when a weight differs or a killed run cannot go on.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

from nextflow_ar.config import from_dict, to_dict
from nextflow_ar.data.extraction import ExtractionConfig, extract
from nextflow_ar.data.sources import open_source
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.generation.pipeline import resolve_model
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.distributed_checkpoint import FACTS_FILE
from nextflow_ar.training.model_stage import ModelRecipe, train_model
from nextflow_ar.training.sharded_stage import SHARDED

GOLDEN = Path(__file__).parent.parent / "tests" / "golden" / "bundle"


def child(work: Callable[[], int], log: Path) -> int:
    """Run ``work`` in a process of its own; returns its id. Forked, so that the imports are paid for once."""
    pid = os.fork()
    if pid:
        return pid
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    status = 1
    try:
        status = work()
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(pid: int, wait: bool = False) -> int | None:
    """Exit status of a child (negative: killed by that signal), or None while it runs."""
    found, status = os.waitpid(pid, 0 if wait else os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def prepare(folder: Path, base: Path) -> int:
    """Twelve textures with captions as shards of ``base``'s image tokenizer, of two aspect ratios."""
    torch.set_num_threads(1)
    tokenizer = ImageTokenizer.from_pretrained(base)
    side, scales = (48, 4) if base == GOLDEN else (64, tokenizer.config.num_scales)
    rows = [{"image": f"{i}.png", "caption": f"leaves number {i}"} for i in range(12)]
    for i in range(12):
        Image.fromarray(dead_leaves((i,), side, side if i % 2 else 2 * side)).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = ExtractionConfig(num_scales=scales, rows=3, tokens=0.5)
    extract(open_source(folder / "rows.jsonl"), tokenizer, folder / "shards", config)
    return 0


def recipe(folder: Path, base: Path, name: str, steps: int, sharded: bool) -> dict[str, Any]:
    """A training of ``base``'s weights into ``folder``/``name``, with a checkpoint after every step."""
    folders = [{"folder": str(folder / "shards"), "invert": 0.5, "condition_dropout": 0.1}]
    sharding = {
        "replicas": 1, "params": "float32", "reduce": "float32", "reshard": True, "recompute": False,
        "compile": False, "reduce_each": False,
    }  # fmt: skip
    return ({"sharding": sharding} if sharded else {}) | {
        "kind": "model", "out": str(folder / name), "seed": 1, "image_tokenizer": str(base), "text_entries": 300,
        "start": str(base), "steps": steps, "alpha": 0.9, "text_weight": 1.0, "ema": 0.9, "compile": False,
        "sheet_seconds": 1e9, "save_seconds": 0.0, "model": None,
        "optimizer": {
            "lr": 3e-3, "muon_lr": 3e-3, "weight_decay": 0.01, "beta1": 0.9, "beta2": 0.98, "warmup": 3,
            "schedule": "cosine", "decay": 0.0, "final": 0.1, "clip": 1.0,
        },
        "correction": {"share": 0.0, "top_k": 1, "temperature": 1.0, "start": 0, "ramp": 1},
        "sources": [{
            "kind": "shards", "rows": 2, "folders": folders,
            "packing": {"mode": "length", "budget": 200 if base == GOLDEN else 300, "open_rows": 4},
        }],
    }  # fmt: skip


def train(folder: Path, base: Path, name: str, steps: int, sharded: bool) -> int:
    """Start or go on with a run; returns the process."""
    values = recipe(folder, base, name, steps, sharded)

    def work() -> int:
        torch.set_num_threads(1)
        stage = from_dict(ModelRecipe, values)
        train_model(stage, to_dict(stage))
        return 0

    return child(work, folder / "log.txt")


def saving(folder: Path) -> bool:
    """Whether a checkpoint is being written right now."""
    for place, begin in ((folder, ".checkpoint.pt."), (folder / SHARDED, ".step_")):
        try:
            if any(entry.name.startswith(begin) for entry in os.scandir(place)):
                return True
        except FileNotFoundError:
            pass
    return False


def kill_once(
    pid: int, folder: Path, rng: random.Random, longest: float, in_save: bool
) -> tuple[int | None, bool]:
    """Kill a run after a random time, or in the middle of a random save. Returns its exit status if it had ended by itself,
    and whether a save was cut.
    """
    deadline, sightings, before = time.time() + rng.uniform(0, longest), rng.randint(1, 4), False
    while True:
        status = ended(pid)
        if status is not None:
            return status, False
        now = saving(folder)
        sightings -= now and not before
        before = now
        if (in_save and sightings <= 0 and now) or (not in_save and time.time() > deadline):
            os.kill(pid, signal.SIGKILL)
            ended(pid, wait=True)
            return None, saving(folder)
        time.sleep(0.0002)


def equal(one: Path, two: Path) -> bool:
    """Whether two runs ended with the same weights, averages and moments, and the same exported file."""
    files = [(folder / "final" / "model.safetensors").read_bytes() for folder in (one, two)]
    states = [state_of(folder) for folder in (one, two)]
    return files[0] == files[1] and same(states[0], states[1])


def state_of(folder: Path) -> object:
    """All that a run's last checkpoint holds."""
    if (folder / "checkpoint.pt").exists():
        return torch.load(folder / "checkpoint.pt", weights_only=True)
    last = max((folder / SHARDED).glob("step_*"))
    dcp_to_torch_save(last, folder / "whole.pt")
    facts = json.loads((last / FACTS_FILE).read_text())
    return facts, torch.load(folder / "whole.pt", weights_only=True)


def same(a: object, b: object) -> bool:
    """Equality of nested values, tensors bit for bit."""
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def main() -> int:
    """Kill and compare."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", help="a checkpoint folder, or nano; default: the tests' tiny one")
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--sharded", action="store_true", help="in parts and in the background (one process)")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    rng = random.Random(options.seed)
    base = resolve_model(options.base) if options.base else GOLDEN
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        if ended(child(lambda: prepare(folder, base), folder / "log.txt"), wait=True):
            raise SystemExit((folder / "log.txt").read_text())
        began = time.time()
        if ended(train(folder, base, "whole", options.steps, options.sharded), wait=True):
            raise SystemExit((folder / "log.txt").read_text())
        longest, kills, cut, runs, identical = time.time() - began, 0, 0, 0, 0
        name = "killed-0"
        while True:
            pid = train(folder, base, name, options.steps, options.sharded)
            if kills < options.kills:
                status, in_save = kill_once(pid, folder / name, rng, longest, in_save=kills % 2 == 1)
            else:
                status, in_save = ended(pid, wait=True), False
            if status is None:
                kills, cut = kills + 1, cut + in_save
                continue
            if status:
                raise SystemExit(f"a killed run does not go on: {(folder / 'log.txt').read_text()[-500:]}")
            runs += 1
            identical += equal(folder / "whole", folder / name)
            if kills >= options.kills:
                break
            name = f"killed-{runs}"
    told = {
        "base": options.base or "tiny",
        "sharded": options.sharded,
        "kills": kills,
        "in_mid_save": cut,
        "runs": runs,
        "identical": identical,
        "steps": options.steps,
    }
    print(json.dumps(told))
    return 0 if identical == runs else 1


if __name__ == "__main__":
    sys.exit(main())
