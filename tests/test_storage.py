"""Checkpoint folders are whole or absent, and damage is noticed."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import pytest

from nextflow_ar.model.checkpoint import Bundle, load_bundle, save_bundle
from nextflow_ar.storage import StorageError, write_atomic, write_folder


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
