"""Checkpoint folders are whole or absent, and damage is noticed."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.utils._python_dispatch import TorchDispatchMode

from nextflow_ar import storage
from nextflow_ar.app.cli import run
from nextflow_ar.model.checkpoint import Bundle, check_output, load_bundle, save_bundle
from nextflow_ar.storage import (
    StorageError,
    pack_weights,
    weight_files,
    write_atomic,
    write_folder,
    write_weights,
)
from tests.conftest import TINY_MODEL, tiny_bundle


def saved(bundle: Bundle, folder: Path, card: str = "# card\n") -> Path:
    save_bundle(folder, bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, bundle.generation, card)
    return folder


def test_a_full_disk_leaves_the_old_checkpoint(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = saved(bundle, tmp_path / "model")
    before = {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    assert {"config.json", "model.safetensors", "README.md", "generation.json", "checksums.json"} <= {
        str(p) for p in before
    }

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(StorageError, match="No space left on device"):
        saved(bundle, folder, "# other\n")
    with pytest.raises(StorageError, match="No space left on device"):
        write_atomic(folder / "config.json", b"{}")
    monkeypatch.undo()
    assert {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before
    assert [p.name for p in tmp_path.iterdir()] == ["model"]
    assert load_bundle(folder).generation == bundle.generation


def test_saving_again_replaces_the_folder(bundle: Bundle, tmp_path: Path) -> None:
    folder = saved(bundle, tmp_path / "model")
    (folder / "stale.txt").write_text("an earlier version's")
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps(sums | {"stale.txt": ""}))
    saved(bundle, folder, "# second\n")
    assert (folder / "README.md").read_text() == "# second\n"
    assert not (folder / "stale.txt").exists()


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "text_tokenizer/tokenizer.json",
        "image_tokenizer/model.safetensors",
    ],
)
def test_a_flipped_byte_is_found(bundle: Bundle, tmp_path: Path, name: str) -> None:
    path = saved(bundle, tmp_path / "model") / name
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))
    with pytest.raises(StorageError, match="damaged") as caught:
        load_bundle(tmp_path / "model")
    assert path.name in str(caught.value) and "\n" not in str(caught.value)


def test_weights_are_written_as_safetensors_writes_them(tmp_path: Path) -> None:
    tensors = {
        "b": torch.randn(3, 5),
        "a": torch.randn(4).bfloat16(),
        "d": torch.tensor(2.5),
        "c é": torch.arange(6).view(2, 3).T,
        "e": torch.zeros(0, 3),
    }
    write_weights(tmp_path, "w.safetensors", tensors, lambda names: (tensors[name] for name in names))
    assert (tmp_path / "w.safetensors").read_bytes() == pack_weights(tensors)
    found = load_file(tmp_path / "w.safetensors")
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
    with pytest.raises(ValueError, match="is not"):
        write_weights(tmp_path, "w.safetensors", tensors, lambda names: (torch.zeros(2) for _ in names))
    assert (tmp_path / "w.safetensors").read_bytes() == pack_weights(tensors)  # the old file stays


def test_large_weights_are_in_parts_that_are_verified(bundle: Bundle, tmp_path: Path) -> None:
    folder = saved(bundle, tmp_path / "whole")
    generation, tokenizer = bundle.generation, bundle.vocab.tokenizer
    parts = tmp_path / "parts"
    save_bundle(parts, bundle.model, bundle.image_tokenizer, tokenizer, generation, "# card\n", 40_000)
    files = weight_files(parts, "model.safetensors")
    assert len(files) > 2 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert not (parts / "model.safetensors").exists()
    assert all((parts / file).stat().st_size < 42_000 for file in files)
    index = json.loads((parts / "model.safetensors.index.json").read_text())
    whole = load_bundle(folder).model.state_dict()
    assert index["metadata"]["total_size"] == 2 * sum(value.numel() for value in whole.values())
    assert {name: file for file in files for name in load_file(parts / file)} == index["weight_map"]
    for name, value in load_bundle(parts).model.state_dict().items():
        assert torch.equal(value, whole[name]), name
    data = bytearray((parts / files[1]).read_bytes())
    data[-3] ^= 4
    (parts / files[1]).write_bytes(bytes(data))
    with pytest.raises(StorageError, match=f"{files[1]} is damaged"):
        load_bundle(parts)
    (parts / files[1]).unlink()
    with pytest.raises(StorageError, match=f"lacks the file {files[1]}"):
        load_bundle(parts)


class Allocated(TorchDispatchMode):
    """Counts the bytes of what is copied or made on the CPU; a view, and what lies in a file, is neither."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        made = func.overloadpacket.__name__ in (
            "_to_copy",
            "clone",
            "empty",
            "zeros",
            "ones",
            "empty_strided",
        )
        if made and isinstance(out, torch.Tensor) and out.device.type == "cpu":
            self.total += out.nbytes
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_loading_holds_no_second_copy(tmp_path: Path, dtype: torch.dtype) -> None:
    small = tiny_bundle(
        replace(TINY_MODEL, hidden=192, rope_sections=(8, 12, 12), intermediate=1024, layers=4)
    )
    folder = saved(small, tmp_path / "model")
    own = sum(p.numel() for p in small.model.parameters()) * dtype.itemsize
    rest = sum(p.nbytes for p in small.image_tokenizer.state_dict().values())
    with Allocated() as seen:
        loaded = load_bundle(folder, dtype=dtype)
    assert own < seen.total < 1.1 * own + 8 * rest
    assert {p.dtype for p in loaded.model.parameters()} == {dtype}
    assert loaded.model.backbone.rotary_emb.inv_freq.dtype == torch.float32
    saved(loaded, tmp_path / "again")
    assert (tmp_path / "again/model.safetensors").read_bytes() == (folder / "model.safetensors").read_bytes()


@pytest.mark.parametrize("name", ["model.safetensors", "generation.json", "text_tokenizer/tokenizer.json"])
def test_a_missing_file_is_named(bundle: Bundle, tmp_path: Path, name: str) -> None:
    path = saved(bundle, tmp_path / "model") / name
    path.unlink()
    with pytest.raises(StorageError, match=f"lacks the file {path.name}"):
        load_bundle(tmp_path / "model")


def test_weights_of_another_shape_do_not_fit(bundle: Bundle, tmp_path: Path) -> None:
    folder = saved(bundle, tmp_path / "model")
    config = (folder / "config.json").read_text().replace('"layers": 2', '"layers": 3')
    (folder / "config.json").write_text(config)
    (folder / "checksums.json").unlink()
    with pytest.raises(StorageError, match="the weights do not fit the configuration"):
        load_bundle(folder)


def test_places_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written"):
        write_atomic(tmp_path / "file" / "x", b"")
    with pytest.raises(StorageError, match="cannot be written"):
        write_folder(tmp_path / "file" / "x", lambda _: None)
    with pytest.raises(StorageError, match="no such checkpoint folder"):
        load_bundle(tmp_path / "none")


def test_what_dead_processes_began_is_removed(tmp_path: Path) -> None:
    home, gone = storage._home(), subprocess.Popen(["sleep", "60"])
    life = storage._life(gone.pid)
    gone.kill()
    gone.wait()
    assert storage._life(gone.pid) == "" != life
    dead, reborn = (tmp_path / f".model.{who}@{home}.abc" for who in (life, f"{os.getpid()}_1"))
    alive, other = (
        tmp_path / f".model.{storage._life(os.getpid())}@{home}.abc",
        tmp_path / f".model.{life}@else.abc",
    )
    reborn.mkdir()
    for left in (dead, alive, other, tmp_path / ".model.old"):
        left.mkdir()
    write_atomic(tmp_path / ".model.old" / "a", b"before")  # killed between the two moves
    sums = {"a": hashlib.sha256(b"before").hexdigest()}
    write_atomic(tmp_path / ".model.old" / "checksums.json", json.dumps(sums).encode())

    def broken(target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(StorageError, match="No space left"):
        write_folder(tmp_path / "model", broken)
    assert (tmp_path / "model" / "a").read_bytes() == b"before"
    assert {p.name for p in tmp_path.iterdir()} == {"model", alive.name, other.name}
    write_folder(tmp_path / "model", lambda target: write_atomic(target / "b", b"after"))
    assert {p.name for p in (tmp_path / "model").iterdir()} == {"b", "checksums.json"}


def test_the_card_is_anybodys_to_edit(bundle: Bundle, tmp_path: Path) -> None:
    folder = saved(bundle, tmp_path / "model")
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# mine\n")
    assert load_bundle(folder).card.endswith("# mine\n")
    assert run(["export", str(folder), "-o", str(tmp_path / "again")]) == 0
    assert (tmp_path / "again" / "README.md").read_text().endswith("# mine\n")
    (folder / "README.md").unlink()
    assert run(["export", str(folder), "-o", str(tmp_path / "again")]) == 0


@pytest.mark.parametrize(
    ("name", "content", "why"),
    [
        ("checksums.json", "[]", "no mapping of files to checksums"),
        ("generation.json", "[]", "no mapping of keys to values"),
    ],
)
def test_small_files_of_another_kind_are_one_line(
    name: str, content: str, why: str, bundle: Bundle, tmp_path: Path
) -> None:
    folder = saved(bundle, tmp_path / "model")
    if name != "checksums.json":
        (folder / "checksums.json").unlink()
    (folder / name).write_text(content)
    with pytest.raises(StorageError, match=why):
        load_bundle(folder)


def test_parts_lie_in_their_folder(bundle: Bundle, tmp_path: Path) -> None:
    folder = saved(bundle, tmp_path / "model")
    index = json.dumps({"weight_map": {"a": "../other.safetensors"}})
    (folder / "model.safetensors.index.json").write_text(index)
    with pytest.raises(StorageError, match="is no index of weights"):
        weight_files(folder, "model.safetensors")


def test_a_checkpoint_replaces_nothing_but_a_checkpoint(tmp_path: Path) -> None:
    """Replacing removes all that is in a folder: a run, or notes, would be lost with it."""

    def fill(target: Path) -> None:
        (target / "sub").mkdir()
        (target / "sub" / "weights").write_text("new")

    mine = tmp_path / "mine"
    write_folder(mine, fill)
    write_folder(mine, fill)  # an earlier checkpoint is replaced
    (mine / "sub" / "__pycache__").mkdir()
    (mine / "sub" / "__pycache__" / "x.pyc").write_text("")
    write_folder(mine, fill)
    (mine / "sub" / "checkpoint.pt").write_text("a run's")
    with pytest.raises(StorageError, match=r"holds what is no part of a checkpoint \(sub/checkpoint\.pt\)"):
        write_folder(mine, fill)
    assert (mine / "sub" / "checkpoint.pt").read_text() == "a run's"
    (tmp_path / "other").mkdir()
    write_folder(tmp_path / "other", fill)  # an empty one is taken
    (tmp_path / "notes.md").write_text("mine")
    with pytest.raises(StorageError, match=r"notes\.md is a file: name a folder"):
        write_folder(tmp_path / "notes.md", fill)
    assert (tmp_path / "notes.md").read_text() == "mine"
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("made", ["checkpoint.pt", "metrics.jsonl", "checkpoints"])
def test_a_command_replaces_neither_a_runs_result_nor_what_it_reads(
    made: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fill(target: Path) -> None:
        (target / "image_tokenizer").mkdir()
        (target / "image_tokenizer" / "weights").write_text("new")

    mine, run, final = tmp_path / "mine", tmp_path / "run", tmp_path / "run" / "final"
    write_folder(final, fill)
    check_output(final)  # "final" by its name alone is nobody's
    (run / made).write_text("")
    check_output(final)
    (run / "recipe.yaml").write_text("")
    for folder in (final, run / "adapter"):
        with pytest.raises(StorageError, match=r"is what the run in .*run trained: name a folder outside"):
            check_output(folder)
    monkeypatch.chdir(final)
    with pytest.raises(StorageError, match="is what the run in"):
        check_output(Path("."))
    monkeypatch.chdir(tmp_path)
    check_output(run / "mean", [final])
    write_folder(final, fill)  # a training writes its own
    write_folder(mine, fill)
    check_output(mine, [final, "nano", "Qwen/Qwen2.5-VL-7B-Instruct"])  # its own earlier output
    for read in (mine, mine / "image_tokenizer", str(mine)):
        with pytest.raises(
            StorageError, match=r"mine would replace .*mine.*, which is read from: name another"
        ):
            check_output(mine, ["nano", read])
    mine.rename("nano")
    check_output(Path("nano"), ["nano"])  # the bundled one is read
