"""Where the time of a recipe's step goes: the data that is waited for, pictures to codes, forward, backward, update.

python benchmarks/gpu_step.py --set start=nano         # recipes/gpu_nano.yaml, a minute or two on an H200
python benchmarks/gpu_step.py --set start=nano --set workers=8 --set flex=false
python benchmarks/gpu_step.py --set start=nano --steps 1 --set compile=false --set workers=1     # on a CPU, minutes
"""

import argparse
import tempfile
import time
from pathlib import Path

import torch

from nextflow_ar.config import from_dict, load_yaml, override, to_dict
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.training.crew import Crew
from nextflow_ar.training.episode_feed import TOGETHER, Filler
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer

PARTS = {
    "the data, waited for": (Crew, "get"),
    "pictures to codes": (Filler, "filled"),
    "of it, the encoder": (Filler, "_features"),
    "forward and loss": (NextFlowModel, "losses"),
    "backward": (torch.Tensor, "backward"),
    "update": (ModelTrainer, "_update"),
}


def wait():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def timed(owner, name, spent):
    """Replace a method by one that waits for the device before and behind it; returns the method as it was."""
    whole = getattr(owner, name)

    def method(*arguments, **named):
        wait()
        began = time.perf_counter()
        found = whole(*arguments, **named)
        wait()
        spent[name] = spent.get(name, 0.0) + time.perf_counter() - began
        return found

    setattr(owner, name, method)
    return whole


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--recipe", type=Path, default=Path(__file__).parent.parent / "recipes/gpu_nano.yaml")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument(
        "--steps", type=int, default=32, help="of each of three rounds: warm, timed, in parts"
    )
    given = parser.parse_args(arguments)
    steps = -(-given.steps // TOGETHER) * TOGETHER if torch.cuda.is_available() else given.steps
    with tempfile.TemporaryDirectory() as folder:
        mine = [f"out={folder}/run", f"steps={3 * steps}"]
        values = override(load_yaml(given.recipe), [*mine, *given.set])
        recipe = from_dict(ModelRecipe, values, str(given.recipe))
        trainer = ModelTrainer(recipe, to_dict(recipe))
        try:
            return rounds(trainer, steps)
        finally:
            trainer.episodes.close()


def rounds(trainer, steps):
    """Seconds of a step, as it is trained and by parts; prints them."""

    def several():
        wait()
        began, seen = time.perf_counter(), trainer.tokens
        for _ in range(steps):
            trainer.advance(told=False)
        wait()
        each = (time.perf_counter() - began) / steps
        return each, (trainer.tokens - seen) / steps

    first, _ = several()
    each, places = several()
    print(f"the first {steps} steps: {first * 1e3:.0f} ms each, compilation included")
    print(f"then {each * 1e3:.0f} ms a step of {places:.0f} places: {places / each:.0f} places a second")
    spent: dict[str, float] = {}
    kept = {name: timed(owner, name, spent) for owner, name in PARTS.values()}
    try:
        whole, _ = several()
    finally:
        for owner, name in PARTS.values():
            setattr(owner, name, kept[name])
    found = {part: spent.get(name, 0.0) / steps for part, (_, name) in PARTS.items()}
    print(f"each part waited for: {whole * 1e3:.0f} ms a step")
    for part, seconds in found.items():
        print(f"  {part:<22} {seconds * 1e3:7.1f} ms")
    return {"step": each, "places": places, "whole": whole, **found}


if __name__ == "__main__":
    main()
