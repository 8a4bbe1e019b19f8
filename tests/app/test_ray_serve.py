"""The Ray Serve deployment: two replicas of the tiny model on this machine, asked by OpenAI's client; where Ray Serve is
installed. What it says without Ray is tested everywhere.
"""

from __future__ import annotations

import base64
import io
import socket
import sys
from pathlib import Path

import openai
import pytest
from PIL import Image

from nextflow_ar.app.ray_serve import deployment
from nextflow_ar.app.serve_command import ServeError
from nextflow_ar.generation.pipeline import NextFlowPipeline

GOLDEN = Path(__file__).parent.parent / "golden" / "bundle"


def test_without_ray_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(
        ServeError, match=r"Ray Serve is missing \(ray\): pip install 'nextflow-ar\[serve,ray\]'"
    ):
        deployment()


@pytest.mark.slow
def test_two_replicas_answer_openais_client(monkeypatch: pytest.MonkeyPatch) -> None:
    ray, serve = pytest.importorskip("ray"), pytest.importorskip("ray.serve")
    with pytest.raises(ServeError, match="unknown argument 'modle': model, replicas"):
        deployment({"modle": "nano"})
    monkeypatch.setenv("RAY_worker_niceness", "0")  # workers are as important as this test
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    monkeypatch.setenv("RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "120")  # of a busy machine
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(
        num_cpus=2,
        include_dashboard=False,
        object_store_memory=100_000_000,
        log_to_driver=False,
        configure_logging=False,
    )
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = deployment({"model": str(GOLDEN), "replicas": "2", "cpus": "0.4", "queue": "4"})
        serve.run(app, name="tiny", route_prefix="/")
        running = serve.status().applications["tiny"].deployments["nextflow-ar"]
        assert running.replica_states == {"RUNNING": 2}
        client = openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=0)
        wanted = NextFlowPipeline.from_pretrained(GOLDEN).generate("two dogs", seed=5)[0]
        for _ in range(4):  # whichever replica answers, the picture is the pipeline's
            found = client.images.generate(prompt="two dogs", extra_body={"seed": 5})
            assert found.data is not None
            picture = Image.open(io.BytesIO(base64.b64decode(str(found.data[0].b64_json))))
            assert picture.convert("RGB").tobytes() == wanted.tobytes()
        kinds = [e.type for e in client.images.generate(prompt="dogs", stream=True, partial_images=2)]
        assert kinds == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
        with pytest.raises(openai.BadRequestError, match="the prompt is empty"):
            client.images.generate(prompt=" ")
    finally:
        serve.shutdown()
        ray.shutdown()
