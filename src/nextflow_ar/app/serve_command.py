"""The command ``nextflow-ar serve``."""

from __future__ import annotations

import logging
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextflow_ar.app.terminal import Model

if TYPE_CHECKING:
    from nextflow_ar.app.serving.settings import ServerSettings
    from nextflow_ar.generation.engines import Engines
    from nextflow_ar.generation.pipeline import NextFlowPipeline

KEYS_VARIABLE = "NEXTFLOW_AR_API_KEYS"
_MEGA = 1_000_000
SMALL = 50_000_000
"""Weights below which one processor is taken. Measured with 8M alone (docs/serving.md)."""


class ServeError(RuntimeError):
    """The server cannot start: one line."""


def serve(
    model: Model = "nano",
    host: Annotated[str, typer.Option("--host", help="Address to listen at; 0.0.0.0: all.")] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0: any free one.")] = 8000,
    name: Annotated[
        str | None, typer.Option("--name", help="What clients call the model. Default: as --model.")
    ] = None,
    key_file: Annotated[
        Path | None,
        typer.Option(
            "--api-keys", help=f"File with an API key a line. Or joined by commas in {KEYS_VARIABLE}."
        ),
    ] = None,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1, ...")] = "cpu",
    rows: Annotated[
        int, typer.Option("--rows", min=2, help="Sequences in work at once; a guided picture takes two.")
    ] = 64,
    engines: Annotated[
        int, typer.Option("--engines", min=1, help="Processes that compute, each with the model and --rows.")
    ] = 1,
    threads: Annotated[
        int,
        typer.Option(
            "--threads", min=0, help="Processors of each on a CPU. 0: one for a small model, else all."
        ),
    ] = 0,
    queue: Annotated[
        int, typer.Option("--queue", min=1, help="Pictures and texts in work or waiting, at most.")
    ] = 128,
    keep: Annotated[
        int,
        typer.Option(
            "--keep", min=0, help="Megabytes of caches kept for conversations that go on. 0: nothing."
        ),
    ] = 256,
    most: Annotated[int, typer.Option("--max-n", min=1, help="Pictures of one request.")] = 10,
    body: Annotated[float, typer.Option("--max-body", min=0.001, help="Megabytes of a request.")] = 20,
    pixels: Annotated[
        float, typer.Option("--max-pixels", min=0.0001, help="Megapixels of a given picture.")
    ] = 16,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="Seconds of a request.")] = 300,
    grace: Annotated[
        float, typer.Option("--grace", min=0, help="Seconds that running work gets when told to stop.")
    ] = 30,
    fetch: Annotated[
        bool, typer.Option("--fetch/--no-fetch", help="Fetch http(s) pictures from public addresses.")
    ] = False,
    origins: Annotated[
        list[str] | None, typer.Option("--cors", help="Origin of a web page that may call. May be repeated.")
    ] = None,
    page: Annotated[bool, typer.Option("--ui/--no-ui", help="The web page too, at /ui.")] = False,
) -> None:
    """Serve a model with OpenAI's API: pictures (streamed as they sharpen), edits, chat."""
    given = {
        "name": name or Path(model).name, "keys": read_keys(key_file), "max_open": queue, "max_n": most,
        "max_body": round(body * _MEGA), "max_pixels": round(pixels * _MEGA), "timeout": timeout, "grace": grace,
        "fetch": fetch, "origins": tuple(origins or ()),
    }  # fmt: skip

    _serve(lambda: loaded(model, device, rows, keep, engines, threads), host, port, given, page=page)


def _serve(
    begin: Callable[[], tuple[NextFlowPipeline, Engines | None]],
    host: str,
    port: int,
    given: dict[str, Any],
    *,
    page: bool,
) -> None:
    """Listen first, so that an address in use is told before the model is loaded. ``given``: of ServerSettings."""
    try:
        from nextflow_ar.app.serving.app import create_app, make_server
        from nextflow_ar.app.serving.settings import ServerSettings
        from nextflow_ar.generation.tidying import settle_in
    except ImportError as error:
        raise ServeError(
            f"more packages are needed ({error.name}): pip install 'nextflow-ar[serve]'"
        ) from None
    settings = ServerSettings(**given)
    with listen(host, port) as listening:
        pipeline, engines = begin()
        start_logs()
        app = create_app(pipeline, settings, engines)
        if page:
            app = with_page(app, pipeline, settings)
        settle_in()
        about = {
            "model": settings.name, "url": _url(host, listening), "keys": len(settings.keys),
            "engines": 1 if engines is None else engines.count,
        }  # fmt: skip
        logging.getLogger("nextflow_ar.serving").info("serving", extra=about)
        make_server(app, host, listening.getsockname()[1]).run(sockets=[listening])


def _url(host: str, listening: socket.socket) -> str:
    shown = f"[{host}]" if ":" in host else host
    return f"http://{shown}:{listening.getsockname()[1]}"


def read_keys(file: Path | None) -> tuple[str, ...]:
    """API keys of a file and of the environment. Raises ServeError for a file that gives none."""
    keys = [key.strip() for key in os.environ.get(KEYS_VARIABLE, "").split(",") if key.strip()]
    if file is not None:
        try:
            lines = file.read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ServeError(
                f"{file}: cannot be read: {getattr(error, 'strerror', None) or 'no text'}"
            ) from None
        found = [line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#")]
        if not found:  # an empty file must not open the server to everybody
            raise ServeError(f"{file}: holds no key")
        keys += found
    return tuple(keys)


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, before the model is loaded. Raises ServeError."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family, backlog=2048)
    except (OSError, OverflowError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (while")[0]
        raise ServeError(f"cannot listen at {host}:{port}: {reason}") from None


def start_logs() -> None:
    """One JSON object a line on stderr, ours and uvicorn's."""
    from nextflow_ar.app.serving.gate import JsonLines

    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("nextflow_ar", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)


def load(model: str, device: str, rows: int, keep: int) -> NextFlowPipeline:
    """The pipeline, with so many rows, which keeps so many megabytes for conversations that go on.

    Raises ServeError for a device that there is not, and as ``from_pretrained``.
    """
    import torch

    from nextflow_ar.generation.pipeline import NextFlowPipeline, best_dtype, resolve_model
    from nextflow_ar.model.checkpoint import load_bundle
    from nextflow_ar.storage import first_line

    folder = resolve_model(model)
    try:
        place = torch.device(device)
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ServeError(f"--device {device}: {first_line(error, 200)}") from None
    return NextFlowPipeline(load_bundle(folder, place, best_dtype(place)), rows, keep * _MEGA)


def loaded(
    model: str, device: str, rows: int, keep: int, engines: int, threads: int
) -> tuple[NextFlowPipeline, Engines | None]:
    """The pipeline, and processes that compute in place of its own engine; None where one is enough.

    A step of a small model is many short pieces of work, which several threads share at a loss. Raises ServeError, and as
    :func:`load`.
    """
    import torch

    from nextflow_ar.generation.engines import Engines, EnginesError, Home
    from nextflow_ar.generation.pipeline import resolve_model

    pipeline = load(model, device, rows, keep)
    small = sum(weight.numel() for weight in pipeline.bundle.model.parameters()) < SMALL
    each = threads or (1 if small else max(1, torch.get_num_threads() // engines))
    if torch.device(device).type == "cpu":
        torch.set_num_threads(each)
    if engines == 1:
        return pipeline, None
    try:
        return pipeline, Engines(Home(resolve_model(model), device, rows, keep * _MEGA, each), engines)
    except EnginesError as error:
        raise ServeError(f"--engines {engines}: {error}") from None


def with_page(app: Any, pipeline: NextFlowPipeline, settings: ServerSettings) -> Any:
    """The app with the web page at /ui. Raises ServeError where gradio is missing."""
    try:
        from nextflow_ar.app.ui import mount_page
    except ImportError as error:
        raise ServeError(f"--ui needs more packages ({error.name}): pip install 'nextflow-ar[ui]'") from None
    return mount_page(app, pipeline, name=settings.name)
