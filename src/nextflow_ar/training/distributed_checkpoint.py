"""Checkpoints of sharded runs: every process writes and reads its own part (torch.distributed.checkpoint).

``checkpoints/step_00001000/``: one file per process, ``.metadata`` (which process wrote which rows of what),
``facts.json`` (what the loop wants to remember) and ``digests.json`` (of the two before). A folder of that name is
whole: it is written beside its place and moved there in one step, after every process has written its part. Any number
of processes may read it, one alone too. All processes must see the same file system.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import re
import shutil
import warnings
import zipfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner
from torch.distributed.checkpoint.state_dict_loader import load as load_state
from torch.distributed.checkpoint.state_dict_saver import async_save as save_state_later
from torch.distributed.checkpoint.state_dict_saver import save as save_state

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.checkpoint import write_bundle
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast
from nextflow_ar.storage import PART_BYTES, StorageError, write_atomic, write_weights
from nextflow_ar.tokenizer.image_tokenizer import WEIGHTS_FILE, ImageTokenizer
from nextflow_ar.training.parallel import World

FACTS_FILE, METADATA_FILE, DIGESTS_FILE = "facts.json", ".metadata", "digests.json"
_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"step_(\d{8,})")


class _WholeFolderWriter(FileSystemWriter):
    """Writes into ``beside``; the first process moves it to its place once all have written."""

    def __init__(self, beside: Path, finished: Callable[[], None]) -> None:
        super().__init__(beside)
        self._finished = finished

    def finish(self, metadata: Metadata, results: Any) -> None:
        super().finish(metadata, results)
        self._finished()


class _CheckingReader(FileSystemReader):
    """Reads nothing whose bits have changed. torch writes checksums of tensors, and reads without a look at them."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        _check_digests(Path(self.path))
        return super().read_metadata(*args, **kwargs)

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Any:
        wanted: dict[str, dict[int, Any]] = {}
        for item in plan.items:
            stored = self.storage_data[item.storage_index]
            wanted.setdefault(stored.relative_path, {})[stored.offset] = stored
        for name, parts in wanted.items():
            with (Path(self.path) / name).open("rb") as file:
                for start, stored in parts.items():
                    file.seek(start)
                    _check_part(name, file.read(stored.length))
        return super().read_data(plan, planner)


def _check_part(name: str, part: bytes) -> None:
    try:
        with zipfile.ZipFile(io.BytesIO(part)) as stored:
            whole = stored.testzip() is None
    except Exception:  # a flipped bit may say how it is packed, and zipfile raises kinds of its own
        whole = False
    if not whole:
        raise ValueError(f"{name} is damaged")


def _check_digests(folder: Path) -> None:
    """Raises ValueError where the index or the facts are not what was written. Older checkpoints have no digests."""
    if not (folder / DIGESTS_FILE).is_file():
        return
    told = json.loads((folder / DIGESTS_FILE).read_text())
    if not isinstance(told, dict):
        raise ValueError(f"{DIGESTS_FILE} is damaged")
    for name, digest in told.items():
        if _digest(folder / name) != digest:
            raise ValueError(f"{name} is damaged")


def _digest(file: Path) -> str:
    return hashlib.sha256(file.read_bytes()).hexdigest()


def _apart(tensor: Tensor, alone: bool) -> Tensor:
    """What a writer in the background may read while training goes on. Several processes' GPU tensors are staged on the CPU
    by torch itself before it returns; a single process's writer would read them one by one while they change.
    """
    if tensor.device.type == "cpu":
        return tensor.detach().clone()
    return tensor.detach().to("cpu", copy=True) if alone else tensor


class Checkpoints:
    """The checkpoints of one run, the newest ``keep`` of them. To be made by all processes together."""

    def __init__(self, folder: Path, world: World, keep: int = 2) -> None:
        self.folder, self.world, self.keep = folder, world, keep
        # A background save must not mix its messages with those of the training.
        self._group: Any = dist.new_group(backend="gloo") if world.size > 1 else None
        self._saving: Future[Any] | None = None
        self._told = False  # that the save in the background has failed

    def steps(self) -> list[int]:
        """Steps of which there is a whole checkpoint, rising."""
        if not self.folder.is_dir():
            return []
        names = (_NAME.fullmatch(path.name) for path in self.folder.iterdir())
        return sorted(int(found[1]) for found in names if found)

    def place(self, step: int) -> Path:
        """The folder of a step's checkpoint."""
        return self.folder / f"step_{step:08d}"

    def save(
        self, step: int, tensors: dict[str, Tensor], facts: dict[str, Any], *, background: bool = False
    ) -> None:
        """Write a checkpoint; all processes call this together. The former ones stay until it is whole.

        ``tensors``: by name, in shards (DTensors) or the same everywhere. ``facts``: JSON values, those of the first
        process. ``background``: return once the tensors are copied; :meth:`wait`, :meth:`look` or the next save tells of a
        failure. After one, the next save is not in the background, and only its own failure is raised.
        A step that has a checkpoint is not written again. Raises StorageError, on every process, when any of them fails.
        """
        if self._lost():
            background = False
        if not self._prepare(step):
            return
        alone = self.world.size == 1
        if background:
            tensors = {k: _apart(v, alone) for k, v in tensors.items()}
        told = json.dumps(facts, indent=1)  # now: in the background what they are made of has moved on
        writer = _WholeFolderWriter(self._beside(step), lambda: self._finish(step, told))

        def write() -> None:
            with _quietly():
                save_state(tensors, storage_writer=writer, process_group=self._group, no_dist=alone)

        try:
            if background and alone:  # torch's own thread would make its remark there
                thread = ThreadPoolExecutor(1)
                self._saving = thread.submit(write)
                thread.shutdown(wait=False)
            elif background:
                future = save_state_later(tensors, storage_writer=writer, process_group=self._group)
                self._saving = cast("Future[Any]", future)
            else:
                write()
        except (CheckpointException, OSError, RuntimeError) as error:
            self._fail(error)

    def wait(self) -> None:
        """Wait for a save in the background. Raises StorageError when it failed; the former checkpoint stays."""
        if (error := self._ended()) is not None:
            self._fail(error)

    def look(self) -> None:
        """Tell, without waiting, that a save in the background has failed: the next one may be half an hour away. For the
        first process alone.
        """
        if self._saving is not None and self._saving.done() and (error := self._saving.exception()):
            self._tell(error)

    def _ended(self) -> BaseException | None:
        """Wait for a save in the background; what it failed of."""
        future, self._saving = self._saving, None
        try:
            if future is not None:
                future.result()
        except (CheckpointException, OSError, RuntimeError) as error:
            return error
        return None

    def _lost(self) -> bool:
        """Wait for a save in the background; whether it failed on any process."""
        if self._saving is None:
            return False
        error = self._ended()
        if error is not None and self.world.rank == 0:
            self._tell(error)
        self._told = False
        return self.world.any(error is not None)

    def _tell(self, error: BaseException) -> None:
        if not self._told:
            told = "%s: a checkpoint could not be written: %s; the next one is tried all the same"
            _LOG.warning(told, self.folder, _reason(error))
        self._told = True

    def load(self, tensors: dict[str, Tensor], step: int | None = None) -> dict[str, Any]:
        """Read a checkpoint (the newest) into ``tensors``, in place, whatever number of processes wrote it; its facts.

        All processes call this together. Raises StorageError for one that is missing, damaged, or of other tensors.
        """
        steps = self.steps()
        if step is None and not steps:
            raise StorageError(f"{self.folder}: no checkpoint")
        where = self.place(steps[-1] if step is None else step)
        try:
            _check_digests(where)
            facts = json.loads((where / FACTS_FILE).read_text())
            if not isinstance(facts, dict):
                raise ValueError(f"{FACTS_FILE} is no mapping")
            reader, alone = _CheckingReader(where), self.world.size == 1
            with _quietly():
                load_state(tensors, storage_reader=reader, process_group=self._group, no_dist=alone)
        except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
            reason = _reason(error)
            if "Missing key" in reason:
                reason = (
                    f"it holds other tensors than the recipe trains ({reason}): muon_lr stays 0, or above it"
                )
            raise StorageError(f"{where}: the checkpoint cannot be read: {reason}") from None
        return facts

    def _beside(self, step: int) -> Path:
        return self.folder / f".step_{step:08d}.part"

    def _prepare(self, step: int) -> bool:
        """Clear what dead runs left; whether this step is still to be written (as the first process sees it)."""
        needed, trouble = torch.tensor(0), ""
        if self.world.rank == 0 and not self.place(step).is_dir():
            needed.fill_(1)
            try:
                self.folder.mkdir(parents=True, exist_ok=True)
                for left in self.folder.glob(".step_*"):
                    shutil.rmtree(left)
                self._beside(step).mkdir()
            except OSError as error:
                needed.fill_(2)
                trouble = f": {error.strerror}"
        if self._group is not None:
            dist.broadcast(needed, 0, group=self._group)
        if int(needed) == 2:
            raise StorageError(f"{self.folder}: checkpoints cannot be written{trouble}")
        return bool(needed)

    def _finish(self, step: int, facts: str) -> None:
        beside = self._beside(step)
        write_atomic(beside / FACTS_FILE, facts.encode())
        digests = {name: _digest(beside / name) for name in (FACTS_FILE, METADATA_FILE)}
        write_atomic(beside / DIGESTS_FILE, json.dumps(digests, indent=1).encode())
        _sync(beside)
        beside.rename(self.place(step))
        _sync(self.folder)
        for old in self.steps()[: -self.keep]:
            doomed = self._beside(old)  # a half-removed folder must not look whole
            self.place(old).rename(doomed)
            shutil.rmtree(doomed, ignore_errors=True)

    def _fail(self, error: BaseException) -> None:
        if self.world.rank == 0:
            for left in self.folder.glob(".step_*"):
                shutil.rmtree(left, ignore_errors=True)
        raise StorageError(f"{self.folder}: the checkpoint cannot be written: {_reason(error)}") from None


@contextlib.contextmanager
def _quietly() -> Iterator[None]:
    """Without torch's remark, at every save and load, that one process is alone."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        yield


def _sync(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _reason(error: BaseException) -> str:
    """One line: what the first process to fail said."""
    if isinstance(error, CheckpointException) and error.failures:
        rank, (cause, _) = sorted(error.failures.items())[0]
        return f"process {rank}: {_reason(cause)}"
    text = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return " ".join(text.split())[:160] or type(error).__name__


def export_weights(checkpoint: Path, target: Path, part_bytes: int = PART_BYTES) -> None:
    """Write a checkpoint's model as bf16 safetensors into the folder ``target``, in parts with an index when large.

    Tensors ``averages.NAME`` are taken where there are any, ``model.NAME`` elsewhere. One process does it alone, from the
    files; it holds one part at a time. Raises StorageError.
    """
    try:
        metadata = _CheckingReader(checkpoint).read_metadata().state_dict_metadata
    except (OSError, RuntimeError, ValueError, EOFError) as error:
        raise StorageError(f"{checkpoint}: the checkpoint cannot be read: {_reason(error)}") from None
    stored = cast(dict[str, TensorStorageMetadata], metadata)  # only tensors are saved
    names = sorted(key.removeprefix("model.") for key in stored if key.startswith("model."))
    keys = {name: f"averages.{name}" if f"averages.{name}" in stored else f"model.{name}" for name in names}
    like = {
        name: torch.empty(stored[key].size, dtype=_kept(stored[key].properties.dtype), device="meta")
        for name, key in keys.items()
    }

    def read(group: list[str]) -> Iterator[Tensor]:
        found = _read(checkpoint, {keys[name]: stored[keys[name]] for name in group})
        return (found.pop(keys[name]).to(like[name].dtype) for name in group)

    write_weights(target, WEIGHTS_FILE, like, read, part_bytes, {"format": "pt"})


def _kept(dtype: torch.dtype) -> torch.dtype:
    """What a tensor of a run is exported as."""
    return torch.bfloat16 if dtype.is_floating_point else dtype


def _read(checkpoint: Path, wanted: dict[str, TensorStorageMetadata]) -> dict[str, Tensor]:
    tensors = {key: torch.empty(entry.size, dtype=entry.properties.dtype) for key, entry in wanted.items()}
    try:
        with _quietly():
            load_state(
                cast(dict[str, Any], tensors), storage_reader=_CheckingReader(checkpoint), no_dist=True
            )
    except (CheckpointException, OSError, RuntimeError, ValueError, EOFError) as error:
        raise StorageError(f"{checkpoint}: the checkpoint cannot be read: {_reason(error)}") from None
    return tensors


def export_bundle(
    checkpoint: Path,
    folder: Path,
    config: ModelConfig,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PreTrainedTokenizerFast,
    generation: dict[str, Any],
    card: str,
    part_bytes: int = PART_BYTES,
) -> Path:
    """A checkpoint folder (:func:`~nextflow_ar.model.checkpoint.save_bundle`) from a sharded run's checkpoint.

    For one process, while the others wait. Raises StorageError; an old folder then stays.
    """
    write_bundle(
        folder,
        config,
        lambda target: export_weights(checkpoint, target, part_bytes),
        image_tokenizer,
        text_tokenizer,
        generation,
        card,
    )
    return folder
