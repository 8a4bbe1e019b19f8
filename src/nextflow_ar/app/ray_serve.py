"""The server as a Ray Serve deployment: one pipeline and queue in each replica, on any number of machines.

``serve run nextflow_ar.app.ray_serve:deployment model=nano replicas=2``
"""

from __future__ import annotations

from typing import Any

from nextflow_ar.app.serve_command import ServeError, load, read_keys

DEFAULTS = {
    "model": "nano",
    "replicas": "1",
    "cpus": "1",
    "gpus": "0",
    "rows": "64",
    "queue": "128",
    "keep": "256",
}


def deployment(given: dict[str, str] | None = None) -> Any:
    """A Ray Serve application. ``given``: ``model``, ``replicas``, ``cpus`` and ``gpus`` of each, ``rows``, ``queue``,
    ``keep`` as ``nextflow-ar serve`` has them.

    API keys come from the environment of each replica. Raises ServeError for an unknown argument or where Ray is missing.
    """
    try:
        from ray import serve
    except ImportError as error:
        raise ServeError(
            f"Ray Serve is missing ({error.name}): pip install 'nextflow-ar[serve,ray]'"
        ) from None
    unknown = set(given or ()) - set(DEFAULTS)
    if unknown:
        raise ServeError(f"unknown argument {sorted(unknown)[0]!r}: {', '.join(DEFAULTS)}")
    told = DEFAULTS | (given or {})

    def build() -> Any:  # runs in the replica
        return replica_app(told)

    made = serve.deployment(
        serve.ingress(build)(),
        name="nextflow-ar",
        num_replicas=int(told["replicas"]),
        max_ongoing_requests=2 * int(told["queue"]),  # refusing is the app's own business
        ray_actor_options={"num_cpus": float(told["cpus"]), "num_gpus": float(told["gpus"])},
        graceful_shutdown_timeout_s=40,
    )
    return made.bind()


def replica_app(told: dict[str, str]) -> Any:
    """The app of one replica, its model loaded."""
    from nextflow_ar.app.serving.app import create_app
    from nextflow_ar.app.serving.settings import ServerSettings
    from nextflow_ar.generation.tidying import settle_in

    settings = ServerSettings(
        name=told["model"].rstrip("/").rsplit("/", 1)[-1], keys=read_keys(None), max_open=int(told["queue"])
    )
    device = "cuda" if float(told["gpus"]) else "cpu"
    app = create_app(load(told["model"], device, int(told["rows"]), int(told["keep"])), settings)
    settle_in()
    return app
