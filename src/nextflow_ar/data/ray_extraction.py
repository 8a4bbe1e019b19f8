"""Extraction on a Ray cluster: every actor of a Ray Data pipeline holds a tokenizer and writes shards.

The unit of work is a shard's number, so the files are the very ones that ``extract`` writes, and a stopped job goes on with
those that are missing. The data and the output folder lie where every machine sees them (a shared file system).
"""

from __future__ import annotations

import logging
import platform
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nextflow_ar.config import ConfigError
from nextflow_ar.data.code_shards import MANIFEST
from nextflow_ar.data.extraction import ShardWriter, none_behind, settled
from nextflow_ar.data.sources import SourceError, open_source
from nextflow_ar.data.workers import Extraction, one_thread
from nextflow_ar.model import checkpoint
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer import image_tokenizer
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

_LOG = logging.getLogger(__name__)
_SHARED = "every machine must see the folder at this place (a shared file system)"
_WAITS = (0.0, 1.0, 4.0, 15.0, 40.0)
"""Seconds before every look for shards of other machines: network file systems may show new files late."""


class ShardActor:
    """Holds the tokenizer and the source; called with batches of shard numbers, it writes those shards.

    What goes wrong is an answer, not an error: of errors Ray passes on a traceback, and not always the reason.
    """

    def __init__(self, job: Extraction) -> None:
        self.failed = ""
        try:
            if not (job.out / MANIFEST).is_file():  # the driver has written it
                raise StorageError(f"{job.out}: what the command wrote there is not here: {_SHARED}")
            tokenizer = ImageTokenizer.from_pretrained(job.tokenizer, job.device)
            source = open_source(job.place, job.video)
            counter = job.counter()
            self.writer = ShardWriter(source, tokenizer, job.out, job.config, job.place, counter, job.again)
        except Exception as error:
            self.failed = _told(error)

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, list[Any]]:
        """{"shard": numbers} to what was written: rows, and the rows left out with their reasons; and "failed": why nothing
        was, or "". After a failure the actor writes nothing more.
        """
        found: dict[str, list[Any]] = {
            "shard": [], "rows": [], "broken_rows": [], "broken_why": [], "failed": []
        }  # fmt: skip
        for number in batch["shard"].tolist():
            told = self._write(int(number)) or {"rows": 0, "broken": {}}
            found["shard"].append(int(number))
            found["rows"].append(told["rows"])
            found["broken_rows"].append(list(told["broken"]))
            found["broken_why"].append(list(told["broken"].values()))
            found["failed"].append(self.failed)
        return found

    def _write(self, number: int) -> dict[str, Any] | None:
        if self.failed:
            return None
        try:
            with one_thread():
                return self.writer.write(number, f"ray_{number:06d}")
        except Exception as error:
            self.failed = _told(error)
            return None


def _told(error: Exception) -> str:
    """One line: on which machine, and what. The traceback of what nobody expected is logged there."""
    kind = ""
    if not isinstance(error, StorageError | SourceError | ConfigError):
        _LOG.error("extraction with Ray", exc_info=error)
        kind = f"{type(error).__name__}: "
    return f"{platform.node()}: {kind}{' '.join(str(error).split())}"


def extract_with_ray(job: Extraction, actors: int, *, gpus: float = 0.0) -> dict[str, Any]:
    """Write the missing shards with ``actors`` actors, ``gpus`` of a GPU each; returns what ``extract`` returns.

    Uses the cluster that Ray is connected to, or starts one on this machine; relative paths are meant from here. Raises
    SourceError when Ray is not installed or the source does not know its length, StorageError when the folder holds an
    extraction of another source, setting or tokenizer, a machine cannot write or does not see it, or Ray fails.
    """
    try:
        import ray.data  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise SourceError("extraction with Ray needs it: pip install 'nextflow-ar[ray]'") from None
    job = _from_here(job)
    source = open_source(job.place, job.video)
    shards = -(-source.count() // job.config.rows)
    tokenizer = ImageTokenizer.from_pretrained(job.tokenizer)
    # claims the folder: what does not fit is refused here, where nothing is missing, too
    fingerprint = ShardWriter(source, tokenizer, job.out, job.config, job.place).fingerprint
    none_behind(job.out, shards)
    missing = [
        n
        for n in range(shards)
        if n in job.again or not settled(job.out, n, source, job.config.rows, fingerprint)
    ]
    if not missing:
        return {"rows": 0, "broken": {}}
    options: dict[str, Any] = {"num_gpus": gpus} if gpus else {"num_cpus": 1}
    try:
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
    except Exception as error:
        raise StorageError(f"Ray: {_reason(error)}; whole shards stay") from error
    return _gathered(job.out, missing, sorted(found, key=lambda each: each["shard"]))


def _from_here(job: Extraction) -> Extraction:
    """A job whose relative paths mean the same in every working directory. Links stay: machines may have their own."""

    def whole(name: str, bundled: Any) -> str:
        return str(Path(name).absolute()) if name and name not in bundled and Path(name).exists() else name

    return replace(
        job,
        place=whole(job.place, ()),
        tokenizer=whole(job.tokenizer, image_tokenizer.BUNDLED),
        out=job.out.absolute(),
        model=whole(job.model, checkpoint.BUNDLED),
    )


def _gathered(out: Path, numbers: list[int], found: list[dict[str, Any]]) -> dict[str, Any]:
    """What ``extract`` returns, of the actors' answers in order. Raises StorageError for a failure, and for shards that are
    not here.
    """
    for each in found:
        if each["failed"]:
            raise StorageError(f"{each['failed']}; whole shards stay")
    names = [f"{number:06d}.parquet" for number in numbers]
    for wait in _WAITS:
        time.sleep(wait)
        names = [name for name in names if not (out / name).is_file()]
        if not names:
            break
    if names:
        raise StorageError(
            f"{out / names[0]}: written by another machine, but not here ({len(names)} in all): {_SHARED}"
        )
    broken = {
        row: why for each in found for row, why in zip(each["broken_rows"], each["broken_why"], strict=True)
    }
    return {"rows": sum(int(each["rows"]) for each in found), "broken": broken}


def _reason(error: Exception) -> str:
    """The last line of Ray's: those before are a traceback of what happened elsewhere."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {' '.join(lines[-1].split())[:300]}" if lines else type(error).__name__
