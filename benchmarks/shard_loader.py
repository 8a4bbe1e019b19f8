"""What it takes a process to learn which rows of a step are its own: processor time of a step's packing, of one process of
many, over extracted shards of the mixture of benchmarks/packing.py (texts of its lengths in words, random codes).

    python benchmarks/shard_loader.py [--documents 12000] [--rows 1024] [--processes 1024] [--budget 16384]

Every process goes through all documents by what they cost and lays out its own rows. The shards tell how many tokens their
texts have (``extract --text-tokenizer``) unless ``--uncounted``; then the first pass counts them. The planned step of the
7B recipes is what it is to stay under (docs/scaling.md).
"""

import argparse
import json
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch
from packing import document

from nextflow_ar.config import ModelConfig, from_dict, load_yaml
from nextflow_ar.data.code_shards import MANIFEST, ExtractionConfig, encoded
from nextflow_ar.data.loader import Packing, ShardFolder, ShardLoader, ShardSource
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.model.checkpoint import find_checkpoint, load_bundle
from nextflow_ar.model.costs import TextShape
from nextflow_ar.scales import FINAL_GRIDS, ScaleSchedule
from nextflow_ar.sequence.layout import LayoutOptions
from nextflow_ar.storage import write_atomic

WORDS = """the a of and in on with red blue small large old young standing sitting under over beside photograph painting
mountain river house tree dog cat child woman street window evening morning light shadow bright quiet busy"""
LEVELS = {12: 0.6, 16: 0.4}


def records(count, seed):
    """Parts of ``count`` documents, as an extraction has them."""
    rng = random.Random(seed)
    finals = {ScaleSchedule.from_final(final, n): (final, n) for final in FINAL_GRIDS for n in LEVELS}
    for row in range(count):
        parts = []
        for shape in document(rng, LEVELS):
            common = {"role": "assistant" if shape.supervised else "user", "supervised": shape.supervised}
            if isinstance(shape, TextShape):
                parts.append(common | {"text": " ".join(rng.choices(WORDS.split(), k=shape.tokens))})
            else:
                final, scales = finals[shape.schedule]
                codes = torch.randint(512, (shape.schedule.num_tokens,)).tolist()
                parts.append(common | {"final": list(final), "scales": scales, "target": codes})
        yield {"row": row, "where": str(row), "parts": parts}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--documents", type=int, default=12000)
    parser.add_argument("--rows", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=1024)
    parser.add_argument("--budget", type=float, default=16384)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument(
        "--uncounted", action="store_true", help="shards that do not tell how many tokens texts have"
    )
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    bundle = load_bundle(find_checkpoint("nano"))
    counter = None if given.uncounted else TokenCounter(bundle.vocab.tokenizer)
    model = from_dict(
        ModelConfig, load_yaml(Path(__file__).parent.parent / "recipes" / "7b_pretrain_512.yaml")["model"]
    )
    with tempfile.TemporaryDirectory() as folder:
        setting = ExtractionConfig(num_scales=16, rows=-(-given.documents // 8))
        made = {"tokenizer": bundle.image_tokenizer.fingerprint(), "config": asdict(setting)}
        Path(folder, MANIFEST).write_text(json.dumps(made | {"codes": 2048}))
        found = list(records(given.documents, given.seed))
        for shard in range(8):
            part = found[shard * setting.rows : (shard + 1) * setting.rows]
            data = encoded(part, made["tokenizer"], len(part), counter)
            write_atomic(Path(folder, f"{shard:06d}.parquet"), data)
        del found
        source = ShardSource(
            "shards", given.rows, (ShardFolder(Path(folder), dialogue=True, invert=0.1, condition_dropout=0.1),),
            Packing("length", given.budget, open_rows=64), given.seed,
        )  # fmt: skip
        loader = ShardLoader(
            source, bundle.image_tokenizer, bundle.vocab, LayoutOptions(model.rope_range), model
        )
        print(
            f"{given.documents} documents, {given.rows} rows of {given.budget:,.0f} places, a process of {given.processes}"
        )
        print(f"{'step':>4}{'pass':>6}{'documents':>11}{'processor s':>13}{'clock s':>9}{'us/document':>13}")
        before = 0
        for step in range(given.steps):
            start, clock = time.process_time(), time.perf_counter()
            loader.rows(0, given.processes)
            took, state = time.process_time() - start, loader.state()
            clock = time.perf_counter() - clock
            documents, before = state["drawn"] - before, state["drawn"]
            print(f"{step + 1:>4}{state['folders'][0]['epoch'] + 1:>6}{documents:>11,}{took:>13.2f}{clock:>9.2f}"
                  f"{took / documents * 1e6:>13.0f}", flush=True)  # fmt: skip
        loader.close()


if __name__ == "__main__":
    main()
