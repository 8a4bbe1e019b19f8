"""The command ``nextflow-ar ui``: the web page on this machine."""

from __future__ import annotations

import importlib.util
import os
from typing import Annotated

import typer

from nextflow_ar.app.terminal import Model


class PageError(RuntimeError):
    """The page cannot be served: one line that says why."""


def ui(
    model: Model = "nano",
    host: Annotated[
        str, typer.Option("--host", help="Address to listen on; 0.0.0.0 for other machines too.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=1, max=65535, help="Port to listen on.")] = 7860,
    places: Annotated[
        int, typer.Option("--places", min=1, max=64, help="Requests answered at once; others wait in line.")
    ] = 2,
    device: Annotated[str, typer.Option("--device", help="cpu, cuda, cuda:1 ...")] = "cpu",
    open_browser: Annotated[bool, typer.Option("--open", help="Open the page in a browser.")] = False,
) -> None:
    """Serve a web page to draw, edit, chat, tell stories, animate and describe."""
    if importlib.util.find_spec("gradio") is None:
        raise PageError("the page needs gradio: pip install 'nextflow-ar[ui]'")
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # read when gradio is imported
    from nextflow_ar.app.ui import build_page, launch_options
    from nextflow_ar.generation.pipeline import NextFlowPipeline

    page = build_page(NextFlowPipeline.from_pretrained(model, device=device), name=model, places=places)
    typer.echo(f"open http://{host}:{port} (Ctrl-C ends)", err=True)
    try:
        page.launch(
            server_name=host,
            server_port=port,
            inbrowser=open_browser,
            quiet=True,
            ssr_mode=False,
            **launch_options(),
        )
    except OSError as error:
        raise PageError(
            f"cannot listen on {host}:{port}: {' '.join(str(error).split())[:120]}; try another --port"
        ) from None
