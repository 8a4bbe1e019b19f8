"""The Slurm example with stand-ins for Slurm's commands and torchrun: signals, exit statuses, requeueing; the Ray example
on two processes of this machine, one of which is killed, where Ray is installed.
"""

from __future__ import annotations

import ast
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from nextflow_ar.model.checkpoint import load_bundle
from tests.conftest import TINY_MODEL
from tests.training.test_sharded_stage import sharded_recipe

LAUNCH = Path(__file__).parent.parent.parent / "examples" / "launch"
pytestmark = pytest.mark.skipif(not LAUNCH.is_dir(), reason="needs the checkout")

STAND_INS = {
    "srun": 'shift; echo $$ > "$T/leader"; exec "$@"',
    "scontrol": '[ "$1" = show ] && echo first-node || echo "scontrol $*" >> "$T/calls"',
    "scancel": 'echo "scancel $*" >> "$T/calls"; kill -USR1 "$(cat "$T/leader")"',
    # dies of the signal unless it was told to ignore it, and starts one process as torchrun does
    "torchrun": 'echo "$*" > "$T/torchrun"; while [ "$1" != --no-python ]; do shift; done; shift; "$@" & wait $!',
    # listens (which a shell could not: it was told to ignore the signal), saves, ends as an interrupted training does
    "nextflow-ar": f"""exec {sys.executable} -S - "$@" <<END
import os, signal, sys, time
from pathlib import Path
here = Path(os.environ["T"])
def stop(*_):
    time.sleep(0.3)
    with (here / "calls").open("a") as calls:
        calls.write("saved\\n")
    os._exit(130)
signal.signal(signal.SIGUSR1, stop)
(here / "up.part").write_text(repr(sys.argv[1:]))
(here / "up.part").rename(here / "up")
while not (here / "done").exists():
    time.sleep(0.05)
sys.exit(int((here / "done").read_text()))
END""",
}


def wait_for(path: Path) -> None:
    for _ in range(600):
        if path.exists():
            return
        time.sleep(0.05)
    pytest.fail(f"{path} never came")


@pytest.fixture
def job(tmp_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    bin_folder = tmp_path / "bin"
    bin_folder.mkdir()
    for name, body in STAND_INS.items():
        (bin_folder / name).write_text(f"#!/usr/bin/env bash\n{body}\n")
        (bin_folder / name).chmod(0o755)
    slurm = {
        "SLURM_JOB_ID": "77",
        "SLURM_NNODES": "2",
        "SLURM_GPUS_ON_NODE": "8",
        "SLURM_JOB_NODELIST": "n[1-2]",
    }
    env = os.environ | slurm | {"T": str(tmp_path), "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    command = ["bash", str(LAUNCH / "slurm.sh"), "my recipe.yaml", "--set", "a=b"]
    started = subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL, start_new_session=True)
    wait_for(tmp_path / "up")
    yield started
    with contextlib.suppress(ProcessLookupError):
        os.killpg(started.pid, signal.SIGKILL)  # nothing stays where a test fails


def test_a_job_whose_time_is_up_saves_and_queues_itself_again(
    job: subprocess.Popen[bytes], tmp_path: Path
) -> None:
    assert (tmp_path / "up").read_text() == "['train', 'my recipe.yaml', '--set', 'a=b']"
    assert (
        (tmp_path / "torchrun")
        .read_text()
        .startswith(
            "--nnodes=2 --nproc-per-node=8 --rdzv-backend=c10d --rdzv-id=77 --rdzv-endpoint=first-node:29500 "
        )
    )
    job.send_signal(signal.SIGUSR1)
    assert job.wait(30) == 0
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls == ["scancel --signal=USR1 77", "saved", "scontrol requeue 77"]


@pytest.mark.parametrize("status", [0, 3])
def test_a_job_that_ends_by_itself_is_over(job: subprocess.Popen[bytes], tmp_path: Path, status: int) -> None:
    (tmp_path / "done.part").write_text(str(status))
    (tmp_path / "done.part").rename(tmp_path / "done")
    assert job.wait(30) == status
    assert not (tmp_path / "calls").exists()


def test_the_ray_example_is_short_and_imports_ray_late() -> None:
    source = (LAUNCH / "ray_train.py").read_text()
    assert source.count("\n") < 60
    top = [node for node in ast.parse(source).body if isinstance(node, ast.Import | ast.ImportFrom)]
    assert not any("ray" in ast.unparse(node) for node in top)


def _workers(started: int) -> list[int]:
    """Processes of Ray that train, of the session ``started``."""
    found = []
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            if (folder / "cmdline").read_bytes().startswith(b"ray::RayTrainWorker"):
                found.append(int(folder.name))
    return sorted(number for number in found if number > started)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds Ray's processes in /proc")
def test_ray_starts_the_processes_anew_and_they_go_on(tmp_path: Path) -> None:
    pytest.importorskip("ray.train")
    out, path = sharded_recipe(tmp_path, steps=80, save_seconds=2.0)
    settings = {"OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0", "RAY_USAGE_STATS_ENABLED": "0"}
    command = [sys.executable, str(LAUNCH / "ray_train.py"), str(path), "--workers", "2", "--cpu"]
    command += ["--storage", str(tmp_path / "ray")]
    with (tmp_path / "log").open("w") as log:
        launched = subprocess.Popen(command, env=os.environ | settings, stdout=log, stderr=log)
        try:
            saved: list[Path] = []
            for _ in range(1200):
                saved = list((out / "checkpoints").glob("step_*"))
                if saved or launched.poll() is not None:
                    break
                time.sleep(0.1)
            assert saved, (tmp_path / "log").read_text()[-2000:]
            os.kill(_workers(launched.pid)[-1], signal.SIGKILL)
            assert launched.wait(300) == 0, (tmp_path / "log").read_text()[-2000:]
        finally:
            launched.kill()
    assert (tmp_path / "log").read_text().count("Started training worker group of size 2") == 2
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [20, 40, 60, 80]  # none is missing, none told twice
    assert all(b["documents"] > a["documents"] for a, b in itertools.pairwise(lines))
    assert load_bundle(out / "final").model.config == TINY_MODEL
