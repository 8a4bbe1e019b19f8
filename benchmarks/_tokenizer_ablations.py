"""Short equal trainings of the image tokenizer, one setting changed at a time, and one table. One seed each: differences
of a few tenths of a decibel are within what another seed would change.

    python benchmarks/_tokenizer_ablations.py --steps 300 [--only dual,single] [--out runs/ablations]

Finished runs are kept and not trained again. The judge's column: share of held-out scenes' things it can name.
"""

import argparse
import copy
import json
import time
from pathlib import Path

from nextflow_ar.config import from_dict, load_yaml, to_dict
from nextflow_ar.evaluation.tokenizer_suite import evaluate_tokenizer_suite
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pictures import picture_files
from nextflow_ar.training.tokenizer_stage import TokenizerRecipe, train_tokenizer

RECIPES = Path(__file__).parents[1] / "recipes"


def variants(steps: int, out: Path) -> dict[str, dict]:
    """Name -> recipe values."""
    dual = load_yaml(RECIPES / "nano_tokenizer.yaml") | {"steps": steps, "start": None, "sheet_seconds": 1e9}
    pixel = load_yaml(RECIPES / "nano_pixel.yaml") | {"steps": steps, "sheet_seconds": 1e9}

    def changed(base: dict, **changes) -> dict:
        values = copy.deepcopy(base)
        for key, value in changes.items():
            node, *inner = key.split("__")
            if inner:
                target = values[node]
                for part in inner[:-1]:
                    target = target[part]
                target[inner[-1]] = value
            else:
                values[node] = value
        return values

    first = changed(pixel, steps=steps // 3)
    return {
        "dual, from scratch (the base)": dual,
        "single branch": pixel,
        "staged, part 1: pixel": first,
        "staged, part 2: joint": changed(
            dual, steps=steps - steps // 3, start=str(out / slug("staged, part 1: pixel") / "final")
        ),
        "no scale dropout": changed(dual, dropout={"kind": "nested", "share": 0.0}),
        "independent scale dropout": changed(dual, dropout={"kind": "independent", "share": 0.5}),
        "VAR's convolutions": changed(dual, tokenizer__quantizer__refine=0.5, loss__codebook=1.0),
        "l2-normalised halves": changed(dual, tokenizer__quantizer__normalize=True),
    }


def slug(name: str) -> str:
    """A folder's name."""
    return "".join(c if c.isalnum() else "_" for c in name)


def main() -> None:
    """Train what is missing, measure all, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--out", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--only", default="")
    parser.add_argument("--photos", type=Path, default=None)
    given = parser.parse_args()
    rows = []
    for name, values in variants(given.steps, given.out).items():
        if given.only and not any(part in name for part in given.only.split(",")):
            continue
        folder = given.out / slug(name)
        report = folder / "report.json"
        if not report.is_file():
            values["out"] = str(folder)
            recipe = from_dict(TokenizerRecipe, values, name)
            began = time.time()
            train_tokenizer(recipe, to_dict(recipe))
            minutes = (time.time() - began) / 60
            photos = picture_files([given.photos]) if given.photos else []
            tokenizer = ImageTokenizer.from_pretrained(folder / "final")
            found = evaluate_tokenizer_suite(tokenizer, folder, photos, per_type=20, crops=(256,))
            report.write_text(json.dumps(found | {"minutes": minutes}))
        found = json.loads(report.read_text())
        scenes = found["playground"]["by_scales"]
        photo = found["photos"].get("crop_256", {}).get("tokenizer", {}).get("psnr", float("nan"))
        rows.append((name, scenes, photo, found["usage"]["all"], found["minutes"]))
    print(f"{given.steps} steps each")
    print(
        "| setting | scenes dB | named after 3 / 4 / 6 / 8 scales | photographs 256 px dB | codes used | minutes |"
    )
    print("|---|---|---|---|---|---|")
    for name, scenes, photo, used, minutes in rows:
        named = " / ".join(f"{scenes['named'][k]:.2f}" for k in (2, 3, 5, 7))
        print(f"| {name} | {scenes['psnr'][-1]:.2f} | {named} | {photo:.2f} | {used:.2f} | {minutes:.1f} |")


if __name__ == "__main__":
    main()
