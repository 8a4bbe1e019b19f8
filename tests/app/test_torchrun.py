"""The command under torchrun: a recipe on two processes (gloo), gone on with by one, exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import load_bundle
from tests.training.test_sharded_stage import sharded_recipe


@pytest.mark.slow
def test_two_processes_save_and_one_goes_on_and_exports(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out, path = sharded_recipe(tmp_path, steps=3, save_seconds=0.0)
    train = ["--no-python", sys.executable, "-m", "nextflow_ar.app.cli", "train", str(path)]
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *train]
    done = subprocess.run(
        launch, env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout == f"{out / 'final'}\n"  # once, not once a process
    with Image.open(
        out / "sheet_000003.png"
    ) as sheet:  # two rows of pictures of a model that no process holds
        assert sheet.width == 6 * sheet.height and np.asarray(sheet).std() > 0
    checkpoints = sorted(p.name for p in (out / "checkpoints").iterdir())
    assert checkpoints == ["step_00000002", "step_00000003"]
    assert len(list((out / "checkpoints" / "step_00000003").glob("*.distcp"))) == 2
    before = load_bundle(out / "final").model.head.weight

    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nor any remark of torch's that one process is alone
        assert run(["train", str(path), "--set", "steps=5"]) == 0
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [3, 5]
    assert lines[1]["documents"] > lines[0]["documents"] > 0
    assert run(["export", str(out / "final"), "-o", str(tmp_path / "mine"), "--set", "guidance=1.5"]) == 0
    after = NextFlowPipeline.from_pretrained(tmp_path / "mine").bundle
    assert after.generation["guidance"] == 1.5
    assert 0 < float((after.model.head.weight.float() - before.float()).abs().max()) < 1
    capfd.readouterr()
