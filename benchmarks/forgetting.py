"""What a fine-tune knows of new pictures, and how far it went from what it started from: by losses, nothing is drawn.

    python benchmarks/forgetting.py recipes/emoji_lora.yaml runs/emoji_lora/final --codes my_codes_held

The recipe's sources with other seeds, fewer rows a source; ``--codes`` takes the place of the shards' folder: codes that no
training saw (``nextflow-ar extract my_emoji_held_out -o my_codes_held --image-tokenizer runs/emoji_decoder/final``).
"new": loss of the shards, as the recipe weighs it. "divergence": of the replayed sources, how much more the model loses
against what the recipe's start says than the start itself (Kullback-Leibler, nats, as weighed), mean of the sources.
"""

import argparse
import tempfile
from pathlib import Path

import torch
import yaml

from nextflow_ar.config import from_dict
from nextflow_ar.model.checkpoint import checkpoint_folder, load_bundle
from nextflow_ar.precision import mixed_precision
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer

SEEDS = 1000
"""Added to the sources' seeds."""


def changed(values, codes, out):
    """The recipe's values for reading its sources alone."""
    values |= {"trains": "everything", "lora": None, "distillation": None, "out": str(out), "compile": False}
    values |= {"workers": 0, "together": False}
    values["optimizer"]["adapter_lr"] = None
    for source in values["sources"]:
        shards = source["kind"] == "shards"
        source["seed"] += SEEDS
        source["rows"] = 16 if shards else 8
        if shards:
            source["folders"] = [source["folders"][0] | {"folder": codes}]
    return values


@torch.no_grad()
def losses(model, parts, start, device):
    """Weighed loss of every part; ``start``: what is aimed at, or None."""
    found = []
    for part in parts:
        with mixed_precision(device):
            report = model.losses(part.batch) if start is None else model.losses(part.batch, start, 1.0)
        found.append(float(report.total) / part.weight)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("models", nargs="+", help="checkpoint folders, or nano")
    parser.add_argument("--codes", required=True, help="folder of shards that no training saw")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as out:
        values = changed(yaml.safe_load(asked.recipe.read_text()), asked.codes, out)
        recipe = from_dict(ModelRecipe, values, str(asked.recipe))
        trainer = ModelTrainer(recipe, values)
        shards = [source.kind == "shards" for source in recipe.sources]
        parts = [trainer.material(number)[0] for number in range(len(shards))]
    new = [part for part, one in zip(parts, shards, strict=True) if one]
    replayed = [part for part, one in zip(parts, shards, strict=True) if not one]
    start = load_bundle(recipe.base).model.eval()
    least = losses(start, replayed, start, trainer.device)
    print(f"{'':40}     new  divergence")
    for name in asked.models:
        model = load_bundle(checkpoint_folder(name)).model.eval()
        told = sum(losses(model, new, None, trainer.device)) / len(new)
        more = [a - b for a, b in zip(losses(model, replayed, start, trainer.device), least, strict=True)]
        print(f"{name:40} {told:7.3f}  {sum(more) / len(more):10.4f}", flush=True)


if __name__ == "__main__":
    main()
