"""The command ``nextflow-ar chat``: a conversation in words and pictures, line by line."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nextflow_ar.app.terminal import (
    Guidance,
    Model,
    Seed,
    Size,
    Temperature,
    TopK,
    TopP,
    UsageError,
    as_array,
    free_folder,
    load_pipeline,
    sampling,
    size_of,
)

if TYPE_CHECKING:
    from nextflow_ar.generation.pipeline import NextFlowPipeline
    from nextflow_ar.generation.sampling import SamplingSettings
    from nextflow_ar.types import Event

_HELP = """/image PATH   show a picture with your next words
/new          forget the conversation
/help         this list
/quit         end (so does Ctrl-D; Ctrl-C stops an answer)"""


def chat(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the pictures that are drawn.")] = Path(
        "chat"
    ),
    size: Size = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", min=1, max=4096, help="Longest answer in tokens of text.")
    ] = 96,
    most: Annotated[
        int, typer.Option("--max-pictures", min=0, max=64, help="Most pictures of an answer.")
    ] = 3,
    seed: Seed = 0,
    guidance: Guidance = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    model: Model = "nano",
) -> None:
    """Talk with the model: it answers in words and pictures. /image PATH shows it a picture, /help tells the rest.

    Lines come from the terminal, or from a pipe, one message a line.
    """
    free_folder(out)
    wanted = size_of(size)
    pipeline = load_pipeline(model)
    settings = sampling(pipeline, guidance=guidance, temperature=temperature, top_k=top_k, top_p=top_p)
    talk = Talk(pipeline, out, settings, wanted, max_tokens, most, seed, typer.echo)
    terminal = sys.stdin.isatty()
    if terminal:
        with_history()
        typer.echo(_HELP)
    while True:
        try:
            line = input("> " if terminal else "")
        except (EOFError, KeyboardInterrupt):
            typer.echo("", nl=terminal)
            return
        if not talk.hear(line):
            return


def with_history() -> None:
    """Arrow keys at the prompt, where Python has readline."""
    import contextlib

    with contextlib.suppress(ImportError):
        import readline  # noqa: F401


class Talk:
    """A conversation. ``tell``: shows a line (``nl=False``: a piece of one)."""

    def __init__(
        self,
        pipeline: NextFlowPipeline,
        out: Path,
        settings: SamplingSettings,
        size: tuple[int, int] | None,
        max_tokens: int,
        max_pictures: int,
        seed: int,
        tell: Callable[..., None],
    ) -> None:
        self.pipeline, self.out, self.settings, self.size = pipeline, out, settings, size
        self.max_tokens, self.max_pictures, self.seed, self.tell = max_tokens, max_pictures, seed, tell
        self.messages: list[dict[str, Any]] = []
        self.shown: list[Any] = []  # pictures that wait for words
        self.turn = 0

    def hear(self, line: str) -> bool:
        """Take one line; False ends the conversation. Mistakes are told in one line and change nothing."""
        from nextflow_ar.generation.engine import ContextError
        from nextflow_ar.generation.pipeline import RequestError
        from nextflow_ar.tokenizer.pictures import PictureError

        word, _, rest = line.strip().partition(" ")
        try:
            if word == "/quit":
                return False
            if word == "/help":
                self.tell(_HELP)
            elif word == "/new":
                self.messages, self.shown = [], []
            elif word == "/image":
                self._show(rest.strip())
            elif word.startswith("/"):
                raise UsageError(f"unknown command {word}: /image PATH, /new, /help or /quit")
            elif word or self.shown:
                self._answer(line.strip())
        except ContextError as error:
            self.tell(f"{error}; /new forgets what was said", err=True)
        except (UsageError, PictureError, RequestError) as error:
            self.tell(str(error), err=True)
        except KeyboardInterrupt:
            self.tell("\n(stopped; your last message is forgotten)", err=True)
        return True

    def _show(self, path: str) -> None:
        from nextflow_ar.tokenizer.pictures import open_picture

        if not path:
            raise UsageError("/image takes the path of a picture")
        self.shown.append(self.pipeline.encode(open_picture(path)))

    def _answer(self, text: str) -> None:
        from nextflow_ar.generation.pipeline import fold_seed

        asked = {"role": "user", "content": [*self.shown, text]}
        answer: list[Any] = []
        open_line = False

        def event(found: Event) -> None:
            nonlocal open_line
            open_line = self._tell_event(found, answer, open_line)

        try:
            self.pipeline.chat(
                [*self.messages, asked], max_tokens=self.max_tokens, max_pictures=self.max_pictures,
                seed=fold_seed(self.seed, self.turn), settings=self.settings, size=self.size, on_event=event,
            )  # fmt: skip
        finally:
            if open_line:
                self.tell("")
        self.messages += [asked, {"role": "assistant", "content": answer}]
        self.shown, self.turn = [], self.turn + 1

    def _tell_event(self, event: Event, answer: list[Any], open_line: bool) -> bool:
        """Show an event and keep it for the answer; returns whether a line of text is unfinished."""
        from nextflow_ar.tokenizer.pictures import save_picture
        from nextflow_ar.types import ImageReady, TextDelta

        if isinstance(event, TextDelta):
            self.tell(event.text, nl=False)
            if answer and isinstance(answer[-1], str):
                answer[-1] += event.text
            else:
                answer.append(event.text)
            return True
        if isinstance(event, ImageReady) and event.image is not None:
            if open_line:
                self.tell("")
            path = self._next_path()
            save_picture(as_array(event.image), path)
            self.tell(str(path))
            answer.append(event.codes)
            return False
        return open_line

    def _next_path(self) -> Path:
        """The next free number: pictures of earlier conversations stay."""
        taken = [int(path.stem) for path in self.out.glob("*.png") if path.stem.isdigit()]
        return self.out / f"{max(taken, default=0) + 1:03d}.png"
