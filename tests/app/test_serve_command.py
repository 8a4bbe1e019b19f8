"""The command ``nextflow-ar serve`` as a process: the bundled model, SIGTERM under load, and what cannot start."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from nextflow_ar.app.cli import run
from nextflow_ar.app.serve_command import KEYS_VARIABLE, ServeError, read_keys


def test_keys_come_from_a_file_and_from_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "keys"
    file.write_text("# who\none\n\n two \n")
    monkeypatch.setenv(KEYS_VARIABLE, "three, ")
    assert read_keys(file) == ("three", "one", "two")
    monkeypatch.delenv(KEYS_VARIABLE)
    assert read_keys(None) == ()
    file.write_text("# nobody\n")
    with pytest.raises(ServeError, match="holds no key"):
        read_keys(file)


def test_what_cannot_start_says_so_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["serve", "--port", port]) == 1
        assert (
            capsys.readouterr().err
            == f"nextflow-ar: cannot listen at 127.0.0.1:{port}: Address already in use\n"
        )
    assert run(["serve", "--port", "0", "--api-keys", str(tmp_path / "none")]) == 1
    assert capsys.readouterr().err.endswith("none: cannot be read: No such file or directory\n")
    assert run(["serve", "--port", "0", "-m", "nothing"]) == 2
    assert "unknown model 'nothing'" in capsys.readouterr().err.splitlines()[-1]
    assert run(["serve", "--port", "0", "--device", "abacus"]) == 1
    assert "--device abacus: " in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.parametrize("engines", ["1", "2"])
def test_sigterm_under_load(tmp_path: Path, engines: str) -> None:
    """Pictures under way are finished, newcomers are told; the exit status is 0 and every log line is JSON."""
    log = (tmp_path / "log").open("w+")
    command = [sys.executable, "-m", "nextflow_ar.app.cli", "serve", "--port", "0", "--grace", "60"]
    command += ["--engines", engines]
    environment = os.environ | {"OMP_NUM_THREADS": "1", KEYS_VARIABLE: "secret"}
    process = subprocess.Popen(command, stderr=log, env=environment)
    try:
        url = _url(Path(log.name), process)
        client = openai.OpenAI(base_url=url + "/v1", api_key="secret", max_retries=0)
        first = client.images.generate(prompt="a red circle on a blue background", extra_body={"seed": 1})
        found: list[object] = []

        def ask(seed: int) -> None:
            try:
                prompt = "three frogs on an orange background"
                found.append(client.images.generate(prompt=prompt, n=2, extra_body={"seed": seed}).data)
            except openai.OpenAIError as error:
                found.append(error)

        asking = [threading.Thread(target=ask, args=(seed,)) for seed in range(6)]
        [thread.start() for thread in asking]
        _until(lambda: httpx.get(url + "/health").json()["open"] == 12)
        process.send_signal(signal.SIGTERM)
        [thread.join() for thread in asking]
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
    assert first.data is not None and first.data[0].b64_json and first.size == "64x64"
    done = [one for one in found if isinstance(one, list)]
    assert len(done) == 6 and all(len(one) == 2 for one in done)
    told = [json.loads(line) for line in Path(log.name).read_text().splitlines()]
    served = [one for one in told if one["event"] == "request" and one["route"] == "/v1/images/generations"]
    assert [one["status"] for one in served] == [200] * 7 and "secret" not in Path(log.name).read_text()
    with pytest.raises(httpx.ConnectError):
        httpx.get(url + "/health")


def _url(log: Path, process: subprocess.Popen[bytes]) -> str:
    found: list[str] = []

    def started() -> bool:
        assert process.poll() is None, log.read_text()
        lines = [
            json.loads(line) for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")
        ]
        found[:] = [line["url"] for line in lines if line["event"] == "serving"]
        return any(line["event"].startswith("Application startup complete") for line in lines)

    _until(started)
    return found[0]


def _until(what: object, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not what() and time.monotonic() < end:  # type: ignore[operator]
        time.sleep(0.05)
    assert what()  # type: ignore[operator]
