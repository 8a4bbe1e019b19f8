"""Extraction on a Ray cluster: every actor of a Ray Data pipeline holds a tokenizer and writes shards.

The unit of work is a shard's number, so the files are the very ones that ``extract`` writes, and a stopped job goes on with
those that are missing. The data and the output folder lie where every machine sees them (a shared file system).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from nextflow_ar.data.code_shards import MANIFEST, read_manifest
from nextflow_ar.data.extraction import ShardWriter, none_behind, note_broken, same_source, settled
from nextflow_ar.data.sources import SourceError, open_source
from nextflow_ar.data.workers import Extraction, one_thread
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer


class ShardActor:
    """Holds the tokenizer and the source; called with batches of shard numbers, it writes those shards."""

    def __init__(self, job: Extraction) -> None:
        tokenizer = ImageTokenizer.from_pretrained(job.tokenizer, job.device)
        source = open_source(job.place, job.video)
        out = Path(job.out)
        self.writer = ShardWriter(source, tokenizer, out, job.config, job.place, job.counter(), job.again)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """{"shard": numbers} to what was written: rows, and the rows left out with their reasons."""
        found: dict[str, list[Any]] = {"shard": [], "rows": [], "broken_rows": [], "broken_why": []}
        for number in batch["shard"].tolist():
            with one_thread():
                told = self.writer.write(int(number)) or {"rows": 0, "broken": {}}
            rows = self.writer.config.rows  # noted with its shard: a stop loses neither
            note_broken(self.writer.out, f"ray_{number:06d}", told["broken"], int(number) * rows, rows)
            found["shard"].append(int(number))
            found["rows"].append(told["rows"])
            found["broken_rows"].append(list(told["broken"]))
            found["broken_why"].append(list(told["broken"].values()))
        return found


def extract_with_ray(job: Extraction, actors: int, *, gpus: float = 0.0) -> dict[str, Any]:
    """Write the missing shards with ``actors`` actors, ``gpus`` of a GPU each; returns what ``extract`` returns.

    Uses the cluster that Ray is connected to, or starts one on this machine. Raises SourceError when Ray is not installed
    or the source does not know its length, StorageError when the folder holds an extraction of another source.
    """
    try:
        import ray  # pyright: ignore[reportMissingImports]
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("extraction with Ray needs it: pip install 'nextflow-ar[ray]'") from None
    same_source(job.out, job.place)  # also where nothing is missing
    source = open_source(job.place, job.video)
    shards = -(-source.count() // job.config.rows)
    none_behind(job.out, shards)
    claimed = job.out / MANIFEST
    made = read_manifest(claimed)["tokenizer"] if claimed.is_file() else ""
    missing = [
        n for n in range(shards) if n in job.again or not settled(job.out, n, source, job.config.rows, made)
    ]
    if not missing:
        return {"rows": 0, "broken": {}}
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
    found = (
        ray.data.from_items([{"shard": number} for number in missing], override_num_blocks=len(missing))
        .map_batches(
            ShardActor,
            fn_constructor_args=(job,),
            batch_size=1,
            compute=ray.data.ActorPoolStrategy(size=actors),
            **options,
        )
        .take_all()
    )
    broken = {
        row: why
        for each in sorted(found, key=lambda each: each["shard"])
        for row, why in zip(each["broken_rows"], each["broken_why"], strict=True)
    }
    return {"rows": sum(int(each["rows"]) for each in found), "broken": broken}
