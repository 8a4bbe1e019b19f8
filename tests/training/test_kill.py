"""Runs that are killed, or cannot write, lose nothing but time."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from nextflow_ar.app.cli import run
from nextflow_ar.config import from_dict, to_dict
from nextflow_ar.storage import StorageError
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer
from nextflow_ar.training.runs import RunFolder
from tests.conftest import tiny_image_tokenizer
from tests.shards import captions, make_shards
from tests.training.test_from_shards import recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize("way", [[], ["--sharded"]])
def test_killed_runs_end_with_the_weights_of_one_that_never_stopped(way: list[str]) -> None:
    script = [sys.executable, str(ROOT / "benchmarks" / "_kill.py"), "--kills", "5", "--steps", "12", *way]
    done = subprocess.run(script, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kills"] == 5 and told["identical"] == told["runs"] >= 1


@pytest.fixture
def values(tmp_path: Path) -> dict[str, object]:
    """A recipe from nothing over a small extraction."""
    from tests.conftest import TINY_MODEL

    tiny_image_tokenizer().save_pretrained(tmp_path / "tokenizer")
    make_shards(tmp_path / "a", captions(4), tiny_image_tokenizer())
    found = recipe(tmp_path, tmp_path / "run", start=None, model=to_dict(TINY_MODEL), steps=3)
    found["image_tokenizer"] = str(tmp_path / "tokenizer")
    found["sources"][0]["folders"] = [{"folder": str(tmp_path / "a" / "shards"), "invert": 0.5}]
    return found


def test_a_full_disk_leaves_the_last_checkpoint(
    values: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    stage = from_dict(ModelRecipe, values)
    trainer = ModelTrainer(stage, to_dict(stage))
    trainer.advance()
    trainer.save()
    weights = {k: v.clone() for k, v in trainer.model.state_dict().items()}
    (tmp_path / "run" / ".checkpoint.pt.1.tmp").write_bytes(b"cut")  # left by a kill in mid-save
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr("os.fsync", full)
        trainer.advance()
        with pytest.raises(StorageError, match=r"checkpoint\.pt: cannot be written: No space left on device"):
            trainer.save()
        assert run(["train", str(tmp_path / "recipe.yaml")]) == 1
        told = capsys.readouterr().err.splitlines()
        assert "No space left on device" in told[-1] and "Traceback" not in "".join(told)
    again = ModelTrainer(stage, to_dict(stage))
    assert again.step == 1
    assert all(torch.equal(weights[k], v) for k, v in again.model.state_dict().items())
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == '{"step": 1}\n'
    assert not list((tmp_path / "run").glob(".*.tmp"))


def test_a_place_that_cannot_be_written_is_one_line(
    values: dict[str, object], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values | {"out": str(tmp_path / "file" / "run")}))
    assert run(["train", str(tmp_path / "recipe.yaml")]) == 1
    told = capsys.readouterr().err
    assert "cannot be written" in told and told.count("\n") == 1
    with pytest.raises(StorageError, match="cannot be written"):
        RunFolder(tmp_path / "file" / "run", {})
