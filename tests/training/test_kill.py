"""Runs that are killed, or cannot write, lose nothing but time."""

from __future__ import annotations

import errno
import json
import logging
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from nextflow_ar.app.cli import run
from nextflow_ar.config import from_dict, to_dict
from nextflow_ar.storage import StorageError
from nextflow_ar.training.meters import Board
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer
from nextflow_ar.training.runs import RunFolder, stop_request
from tests.conftest import tiny_image_tokenizer
from tests.shards import captions, make_shards
from tests.training.test_from_shards import recipe
from tests.training.test_sharded_stage import sharded_recipe

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


def test_only_a_second_interrupt_stops_at_once() -> None:
    """A cluster's signal reaches every process and comes again from torchrun, which passes on its own."""
    with stop_request() as stop:
        assert not stop()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGUSR1, signal.SIGTERM, signal.SIGINT):
            os.kill(os.getpid(), number)
            assert stop()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    with stop_request() as stop:
        assert not stop()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop()


def test_a_run_that_is_stopped_says_where_it_goes_on(
    values: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Stopped by a signal, and begun again with fewer steps than it has."""
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(values))
    step = ModelTrainer.advance

    def signalled(trainer: ModelTrainer, **more: bool) -> dict[str, float]:
        if trainer.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(trainer, **more)

    with monkeypatch.context() as patched:
        patched.setattr(ModelTrainer, "advance", signalled)
        assert run(["train", str(tmp_path / "recipe.yaml")]) == 130
        line = f"nextflow-ar: stopped and saved at step 2: the same command goes on ({tmp_path / 'run'})"
        assert capsys.readouterr().err.splitlines()[-1] == line
        patched.setenv("RANK", "1")  # the first process has told it
        patched.setattr(ModelTrainer, "fit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        assert run(["train", str(tmp_path / "recipe.yaml")]) == 130
        assert not capsys.readouterr().err
        patched.setenv("RANK", "0")
        assert run(["train", str(tmp_path / "recipe.yaml")]) == 130
        assert capsys.readouterr().err == "nextflow-ar: interrupted\n"
    assert run(["train", str(tmp_path / "recipe.yaml"), "--set", "steps=1"]) == 0
    assert "at step 2 already, the recipe ends at 1: nothing is trained" in caplog.text


SLOW = """
import sys, time
import nextflow_ar.training.distributed_checkpoint as parts
import nextflow_ar.training.runs as runs
from nextflow_ar.app.cli import run

def slowly(owner, name):
    whole = getattr(owner, name)
    def method(*arguments):
        time.sleep(4)
        return whole(*arguments)
    setattr(owner, name, method)

slowly(runs, "_save")
slowly(parts.Checkpoints, "_finish")
sys.exit(run(["train", sys.argv[1]]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
@pytest.mark.parametrize("sharded", [False, True])
def test_a_signal_to_every_process_and_once_more_from_torchrun_saves(tmp_path: Path, sharded: bool) -> None:
    """As where Slurm preempts a job, or systemd stops a unit; the first process takes its time to write."""
    out, path = sharded_recipe(tmp_path, steps=100_000)
    if not sharded:
        values = yaml.safe_load(path.read_text())
        path.write_text(yaml.safe_dump(values | {"sharding": None}))
    (tmp_path / "slow.py").write_text(SLOW)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with (tmp_path / "told").open("w") as told:
        started = subprocess.Popen(
            [*launch, str(tmp_path / "slow.py"), str(path)],
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdout=told,
            stderr=told,
            start_new_session=True,
        )
    workers: list[int] = []
    try:
        for _ in range(1800):
            if (out / "metrics.jsonl").exists() or started.poll() is not None:
                break
            time.sleep(0.1)
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children")
        workers = [int(number) for number in children.read_text().split()]
        assert len(workers) == 2, (tmp_path / "told").read_text()
        for number in (*workers, started.pid):
            os.kill(number, signal.SIGTERM)
        assert started.wait(120) != 0
        saved = list(out.glob("checkpoints/step_*")) if sharded else list(out.glob("checkpoint.pt"))
        assert saved, (tmp_path / "told").read_text()
    finally:
        for number in (started.pid, *workers):
            try:
                os.kill(number, signal.SIGKILL)
            except ProcessLookupError:
                continue
        started.wait()


def test_a_board_that_cannot_be_written_is_left_out(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    """As on a full disk: one line, and neither a traceback nor an end of the run before it is saved."""
    pytest.importorskip("tensorboard")
    board, before = Board(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (200, before[1]))
        for step in range(1, 9):
            board.log(step, {"loss": 1.0, "text": 2.0})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    board.log(9, {"loss": 1.0})
    board.close()
    (record,) = caplog.records
    line = f"{tmp_path / 'tensorboard'}: cannot be written: File too large; the run goes on without it"
    assert record.levelno == logging.WARNING and record.getMessage() == line
    assert "Traceback" not in capfd.readouterr().err
    caplog.clear()
    (tmp_path / "file").write_text("")
    Board(tmp_path / "file").log(1, {"loss": 1.0})
    (record,) = caplog.records
    assert "cannot be written: Not a directory" in record.getMessage()


def test_a_board_shows_every_step_once(tmp_path: Path) -> None:
    """A run that was killed after step 60, whose checkpoint is of step 20."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first = Board(tmp_path)
    for step in (20, 40, 60):
        first.log(step, {"loss": float(step), "caption_right": 0.5, "name": "x"})
    second = Board(tmp_path, 21)
    for step in (40, 60, 80):
        second.log(step, {"loss": step + 0.5})
    second.close()
    shown = EventAccumulator(str(tmp_path / "tensorboard"))
    shown.Reload()
    assert shown.Tags()["scalars"] == ["run/loss", "right/caption_right"]
    told = [(event.step, event.value) for event in shown.Scalars("run/loss")]
    assert told == [(20, 20.0), (40, 40.5), (60, 60.5), (80, 80.5)]
    assert [event.step for event in shown.Scalars("right/caption_right")] == [20]
