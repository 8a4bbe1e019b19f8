"""The image tokenizer's training by several processes: they stop, save, count and log as one."""

from __future__ import annotations

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

from nextflow_ar.config import to_dict
from nextflow_ar.data.pictures import PictureMixture
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training import runs
from nextflow_ar.training.parallel import World
from nextflow_ar.training.tokenizer_stage import TokenizerTrainer
from tests.training.test_tokenizer_stages import LEAVES, OPTIMIZER, PIXEL, SCENES, trainer


class _Both(World):
    """One of two processes, in this one: what the other one would say is ``theirs``."""

    def __init__(self, rank: int, theirs: Any = None, heard: bool = False) -> None:
        super().__init__(rank, 2)
        self.theirs, self.heard, self.asked = theirs, heard, 0

    def add(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def share(self, x: torch.Tensor) -> torch.Tensor:
        return x

    def average_gradients(self, parameters: Any) -> None:
        return

    def any(self, said: bool) -> bool:
        self.asked += 1
        return bool(said) or self.heard

    def gather(self, said: Any) -> list[Any]:
        return [said, self.theirs] if self.rank == 0 else [self.theirs, said]

    def leave(self) -> None:
        return


def of_two(monkeypatch: pytest.MonkeyPatch, rank: int, out: Path, **changes: Any) -> TokenizerTrainer:
    monkeypatch.setattr(World, "join", lambda: _Both(rank))
    return trainer(out, "pixel", PIXEL, **changes)


def test_every_process_goes_on_with_its_own_random_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    first, second = (of_two(monkeypatch, rank, tmp_path) for rank in (0, 1))
    for one in (first, second):
        one.advance()
    states = [one.generator.get_state() for one in (first, second)]
    assert not torch.equal(*states)
    assert isinstance(first.world, _Both) and isinstance(second.world, _Both)
    first.world.theirs = states[1], {}
    second.world.theirs = states[0], {}
    first.save()
    second.save()
    for rank in (0, 1):
        again = of_two(monkeypatch, rank, tmp_path)
        assert again.step == 1 and torch.equal(again.generator.get_state(), states[rank])
    # A checkpoint of a single generator: the second process has to draw other numbers than the first.
    old = torch.load(tmp_path / "checkpoint.pt")
    del old["generators"]
    torch.save(old, tmp_path / "checkpoint.pt")
    found = [of_two(monkeypatch, rank, tmp_path).generator.get_state() for rank in (0, 1)]
    assert not torch.equal(*found)


def test_every_batch_is_trained_once_whatever_the_number_of_processes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    alone = World.join
    given: list[int] = []
    batch = PictureMixture.batch
    monkeypatch.setattr(
        PictureMixture, "batch", lambda data, number: (given.append(number), batch(data, number))[1]
    )

    def run(rank: int, steps: int, **changes: Any) -> list[int]:
        training = of_two(monkeypatch, rank, tmp_path, **changes)
        given.clear()  # of the held-out sets
        for _ in range(steps):
            training.advance()
        if isinstance(training.world, _Both):
            training.world.theirs = training.generator.get_state(), {}
        training.save()
        return list(given)

    def run_alone(steps: int) -> list[int]:
        monkeypatch.setattr(World, "join", alone)
        monkeypatch.setattr(TokenizerTrainer, "save", save)
        training = trainer(tmp_path, "pixel", PIXEL)
        given.clear()
        for _ in range(steps):
            training.advance()
        training.save()
        return list(given)

    save = TokenizerTrainer.save
    assert run_alone(3) == [0, 1, 2]
    second = run(1, 2)  # it writes nothing
    assert run(0, 2) == [3, 5] and second == [4, 6]
    assert run_alone(2) == [7, 8]
    assert run(0, 1) == [9]
    # Processes that make batches know it as well.
    training = of_two(monkeypatch, 1, tmp_path, workers=1)
    found = training.batch()
    assert training._crew is not None
    training._crew.close()
    assert np.array_equal(found.pictures, batch(training.data, 12).pictures)


def test_the_log_is_of_all_processes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    one = of_two(monkeypatch, 0, tmp_path, steps=1)
    assert isinstance(one.world, _Both)
    advance, mine = one.advance, {}

    def step() -> dict[str, float]:
        assert isinstance(one.world, _Both)
        mine.update(advance())
        one.world.theirs = {k: v + 1 for k, v in mine.items()}, {"theirs.png": "bad"}
        return dict(mine)

    monkeypatch.setattr(one, "advance", step)
    state = one._state
    monkeypatch.setattr(one, "_state", lambda _: state([torch.zeros(1)] * 2))
    one.fit()
    found = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert found["mse"] == pytest.approx(mine["mse"] + 0.5, abs=1e-6) and found["broken"] == 1
    assert json.loads((tmp_path / "broken.json").read_text()) == {"theirs.png": "bad"}


def test_processes_stop_together_where_the_signal_reaches_one(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    one = of_two(monkeypatch, 1, tmp_path, save_seconds=0.0)
    assert isinstance(one.world, _Both)
    saved: list[int] = []
    monkeypatch.setattr(one, "save", lambda: saved.append(one.step))
    advance = one.advance

    def step() -> dict[str, float]:
        found = advance()
        assert isinstance(one.world, _Both)
        one.world.heard = one.step == 3  # the other one has been asked
        return found

    monkeypatch.setattr(one, "advance", step)
    with pytest.raises(KeyboardInterrupt):
        one.fit()
    assert one.step == 3 and saved == [3]  # by the first process's clock, not by its own
    one.world.heard = True  # that its loss is not finite: this one would wait for its gradients for ever
    with pytest.raises(FloatingPointError, match="not finite at step 3"):
        advance()


def two_process_recipe(out: Path, **changes: Any) -> Path:
    values = {
        "kind": "tokenizer", "out": str(out), "seed": 1, "trains": "pixel", "start": None, "teacher": None,
        "steps": 4, "pixels": 8192, "optimizer": OPTIMIZER, "ema": 0.9, "dropout": {"kind": "nested", "share": 0.5},
        "codebook": {"kind": "ema", "decay": 0.9, "revive_below": 0.05}, "compile": False, "sheet_seconds": 1e9,
        "save_seconds": 1e9, "loss": {"mse": 1.0, "l1": 0.1, "commitment": 0.25}, "data": {"a": SCENES, "b": LEAVES},
        "heldout": {"scenes": SCENES}, "heldout_pixels": 8192, "tokenizer": to_dict(PIXEL),
    } | changes  # fmt: skip
    path = out.with_suffix(".yaml")
    path.write_text(yaml.safe_dump(values))
    return path


def _save_in_two(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    training, write = trainer(Path(folder) / "run", "pixel", PIXEL), runs._save

    def slow(state: dict[str, Any], file: Any) -> None:
        time.sleep(1)
        write(state, file)

    def full(state: dict[str, Any], file: Any) -> None:
        time.sleep(1)
        raise OSError(errno.ENOSPC, "No space left on device")

    runs._save = slow
    training.save()
    whole, told = (Path(folder) / "run" / "checkpoint.pt").is_file(), ""
    runs._save = full
    try:
        training.save()
    except StorageError as error:
        told = str(error)
    (Path(folder) / f"{rank}.json").write_text(json.dumps([whole, told]))
    training.world.leave()


@pytest.mark.slow
def test_no_process_leaves_before_the_checkpoint_is_written(tmp_path: Path) -> None:
    """Torchrun ends all when one has left; and where the checkpoint cannot be written, nobody waits for ever."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_save_in_two, (port, str(tmp_path)), nprocs=2)  # type: ignore[attr-defined]
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert first[0] and second[0]
    path = tmp_path / "run" / "checkpoint.pt"
    assert first[1] == second[1] == f"{path}: cannot be written: No space left on device"


@pytest.mark.slow
def test_two_processes_train_one_tokenizer(tmp_path: Path) -> None:
    programs = Path(sys.executable).parent
    command = [
        str(programs / "torchrun"), "--nproc-per-node", "2", "--standalone", "--no-python",
        str(programs / "nextflow-ar"), "train", str(two_process_recipe(tmp_path / "run")),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == 2  # one process writes
    ImageTokenizer.from_pretrained(tmp_path / "run" / "final")


@pytest.mark.slow
def test_two_processes_stopped_by_one_signal_end_as_if_never_stopped(tmp_path: Path) -> None:
    """Only the second process hears it: both save and leave together, and go on with what each had drawn from."""

    def start(path: Path) -> list[subprocess.Popen[str]]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        shared = os.environ | {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        return [
            subprocess.Popen(
                [sys.executable, "-m", "nextflow_ar.app.cli", "train", str(path)],
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank), "OMP_NUM_THREADS": "1"},
                stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip

    def end(processes: list[subprocess.Popen[str]], status: int) -> None:
        for process in processes:
            told = process.communicate(timeout=240)[1]
            assert process.returncode == status, told[-2000:]

    end(start(two_process_recipe(tmp_path / "whole", steps=40)), 0)
    path = two_process_recipe(tmp_path / "stopped", steps=40, save_seconds=0.0)
    processes = start(path)
    while not (tmp_path / "stopped" / "checkpoint.pt").is_file():
        assert processes[0].poll() is None
        time.sleep(0.01)
    processes[1].send_signal(signal.SIGTERM)
    end(processes, 130)
    step = torch.load(tmp_path / "stopped" / "checkpoint.pt")["step"]
    assert 0 < step < 40
    end(start(path), 0)
    found = [(tmp_path / name / "final" / "model.safetensors").read_bytes() for name in ("whole", "stopped")]
    assert found[0] == found[1]
