"""What the page shows, as HTML: growing pictures with a strip of their scales, and lines of status."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from PIL import Image as PILImage
from PIL import PngImagePlugin
from torch import Tensor

from nextflow_ar.generation.spoken import MARK
from nextflow_ar.types import Event, ImageReady, Planned, ScaleReady, TextDelta

LONGEST_STEP = 512
"""Pixels of the longer side of a step's picture; only the finished one is shown as it is."""

Preview = Callable[[int, Tensor, int], PILImage.Image]
"""Picture of row ``row`` from its codes so far and how many scales these are."""


def data_uri(picture: PILImage.Image, longest: int | None = None, note: dict[str, str] | None = None) -> str:
    """A picture as a ``data:`` address: PNG with ``note`` as text chunks, or WebP where it had to be made smaller."""
    shown, kind, options = picture, "PNG", {}
    if longest is not None and max(picture.size) > longest:
        shown, kind, options = picture.copy(), "WEBP", {"quality": 85}
        shown.thumbnail((longest, longest))
    if note and kind == "PNG":
        chunks = PngImagePlugin.PngInfo()
        for key, value in note.items():
            chunks.add_itxt(key, value)
        options = {"pnginfo": chunks}
    buffer = io.BytesIO()
    shown.save(buffer, format=kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"


def status(text: str, *, failed: bool = False) -> str:
    """A line of status; nothing for no text."""
    kind = "nf-failed" if failed else "nf-said"
    return f'<p class="nf-status {kind}">{html.escape(text)}</p>' if text else ""


def planned(thought: str) -> str:
    """A line with what the model wrote before a picture; nothing where it wrote nothing."""
    said = thought.strip()
    return f"Plan: {said.removeprefix(MARK).strip()}" if said else ""


@dataclass
class Figure:
    """One picture on its way. ``steps``: addresses of its scales so far. ``total``: how many there will be (0: not known
    yet). ``picture``: the finished one. ``before``: address of what it was made from, to be compared with it.
    """

    title: str
    note: str = ""
    steps: list[str] = field(default_factory=list)
    total: int = 0
    picture: PILImage.Image | None = None
    address: str = ""
    before: str = ""

    def finish(self, picture: PILImage.Image, note: dict[str, str] | None = None) -> None:
        """Set the finished picture."""
        self.picture, self.address = picture, data_uri(picture, note=note)


class Growing:
    """Figures that grow with the engine's events, row by row."""

    def __init__(self, titles: Sequence[str], preview: Preview | None, notes: Sequence[str] = ()) -> None:
        blank = [""] * len(titles)
        self.figures = [Figure(title, note) for title, note in zip(titles, list(notes) or blank, strict=True)]
        self.thoughts = list(blank)
        self.preview = preview

    def take(self, events: Iterable[Event]) -> None:
        """Take events on; rows that are not shown here are passed over."""
        for event in events:
            if event.row >= len(self.figures):
                continue
            figure = self.figures[event.row]
            if isinstance(event, TextDelta):
                self.thoughts[event.row] += event.text
            elif isinstance(event, ScaleReady):
                figure.total = event.num_scales
                if self.preview is not None:
                    picture = self.preview(event.row, event.codes, event.scale + 1)
                    figure.steps.append(data_uri(picture, LONGEST_STEP))
            elif isinstance(event, ImageReady) and event.image is not None:
                figure.finish(event.image)

    @property
    def progress(self) -> str:
        """How far the slowest picture is."""
        figure = min(self.figures, key=lambda f: (f.picture is not None, len(f.steps)))
        if figure.picture is not None or not figure.steps:
            return ""
        return f"scale {len(figure.steps)} of {figure.total}"

    def html(self) -> str:
        """All figures."""
        return stage(self.figures)


class Telling:
    """Texts and figures in turn, as one row's events bring them."""

    def __init__(self, title: str, preview: Preview | None) -> None:
        self.title, self.preview = title, preview
        self.parts: list[str | Figure] = []
        self.plan = ""

    def take(self, events: Iterable[Event]) -> None:
        """Take events on."""
        for event in events:
            if isinstance(event, TextDelta):
                if self.parts and isinstance(last := self.parts[-1], str):
                    self.parts[-1] = last + event.text
                else:
                    self.parts.append(event.text)
            elif isinstance(event, Planned):
                self.plan = planned(event.text)
            elif isinstance(event, ScaleReady):
                figure = self._open()
                figure.total = event.num_scales
                if self.preview is not None:
                    picture = self.preview(event.row, event.codes, event.scale + 1)
                    figure.steps.append(data_uri(picture, LONGEST_STEP))
            elif isinstance(event, ImageReady) and event.image is not None:
                self._open().finish(event.image)

    def _open(self) -> Figure:
        """The figure that is being drawn; a new one behind a text or a finished one. Named by the sentence before it, with
        the plan that was made for it.
        """
        last = self.parts[-1] if self.parts else None
        if isinstance(last, Figure) and last.picture is None:
            return last
        figure = Figure(last.strip() if isinstance(last, str) and last.strip() else self.title, self.plan)
        self.plan = ""
        self.parts.append(figure)
        return figure

    def html(self) -> str:
        """Paragraphs and figures, one below the other."""
        number, inside = 0, []
        for part in self.parts:
            if isinstance(part, Figure):
                number += 1
                inside.append(_figure(part, number))
            elif part.strip():
                inside.append(f"<p>{html.escape(part.strip())}</p>")
        return f'<article class="nf-story">{"".join(inside)}</article>'


def film(title: str, frames: Sequence[PILImage.Image], speed: float, file: str) -> str:
    """Frames as one figure that plays (stage.js). ``file``: address of the file to save."""
    figure = Figure(title, f"{len(frames)} frames, {speed:g} a second", total=len(frames))
    figure.steps = [data_uri(frame, LONGEST_STEP) for frame in frames]
    figure.picture, figure.address = frames[-1], figure.steps[-1]
    text = _figure(figure, 1, kind="frame", file=(file, file_name(title, 1, ".gif")))
    text = text.replace(
        '<figure class="nf-figure">', f'<figure class="nf-figure nf-film" data-speed="{speed:g}">'
    )
    return f'<div class="nf-stage nf-of-1">{text}</div>'


def stage(figures: Sequence[Figure]) -> str:
    """Figures side by side, each with its strip of scales; choosing a scale shows it large (stage.js)."""
    inside = "".join(_figure(figure, number) for number, figure in enumerate(figures, 1))
    return f'<div class="nf-stage nf-of-{min(len(figures), 4)}">{inside}</div>'


def _figure(figure: Figure, number: int, kind: str = "scale", file: tuple[str, str] | None = None) -> str:
    """``kind``: what its steps are. ``file``: (address, name) of what is saved, if not the picture."""
    title, done = html.escape(figure.title, quote=True), figure.picture is not None
    big = figure.address if done else (figure.steps[-1] if figure.steps else "")
    if done:
        alt = f"Picture {number}: {title}"
    else:
        alt = f"Picture {number}, not finished, after scale {len(figure.steps)}: {title}"
    image = f'<img class="nf-big" src="{big}" alt="{alt}">' if big else '<div class="nf-big nf-wait"></div>'
    bar = ""
    if not done:
        share = f'value="{len(figure.steps)}" max="{figure.total}"' if figure.total else ""
        bar = f'<progress {share} aria-label="Picture {number} is being drawn"></progress>'
    if done and figure.before:
        label = "Before and after: how far the picture from before reaches, in percent"
        image = (
            f'<div class="nf-compare"><img class="nf-before" src="{figure.before}" alt="Before">{image}'
            f'<input type="range" min="0" max="100" value="50" aria-label="{label}"></div>'
        )
    note = f'<span class="nf-note">{html.escape(figure.note)}</span>' if figure.note else ""
    save = '<button type="button" class="nf-save nf-play">Pause</button>' if kind == "frame" else ""
    if done:
        address, name = file or (figure.address, file_name(figure.title, number))
        what = "animation" if kind == "frame" else f"picture {number}"
        save += f'<a class="nf-save" download="{name}" href="{address}" aria-label="Save {what}">Save</a>'
    caption = f'<figcaption><span class="nf-title">{title}</span>{note}{save}</figcaption>'
    return f'<figure class="nf-figure"><div class="nf-picture">{image}{bar}</div>{_strip(figure, kind)}{caption}</figure>'


def _strip(figure: Figure, kind: str) -> str:
    if not figure.steps:
        return ""
    total = max(figure.total, len(figure.steps))
    cells = []
    for k in range(total):
        if k < len(figure.steps):
            final = k + 1 == total and figure.address
            source = figure.address if final else figure.steps[k]
            pressed = "true" if k + 1 == len(figure.steps) else "false"
            label = f"{'after ' if kind == 'scale' else ''}{kind} {k + 1} of {total}"
            cells.append(
                f'<button type="button" class="nf-step" aria-pressed="{pressed}" aria-label="{label}" title="{label}">'
                f'<img src="{source}" alt=""></button>'
            )
        else:
            cells.append('<span class="nf-step nf-wait"></span>')
    label = "The picture after each scale, coarse to fine; choose one to see it large"
    if kind == "frame":
        label = "The frames in order; choose one to see it large"
    return f'<div class="nf-strip" role="group" aria-label="{label}">{"".join(cells)}</div>'


def file_name(title: str, number: int, suffix: str = ".png") -> str:
    """A file name made of a title's letters and digits."""
    words = "".join(c if c.isascii() and c.isalnum() else " " for c in title).split()
    return "-".join(["nextflow", *words[:8], str(number)]) + suffix


def enlarged(picture: PILImage.Image, least: int = 512) -> PILImage.Image:
    """A small picture a whole number of times larger, every pixel a square, so that its longer side is about ``least``."""
    factor = least // max(picture.size)
    if factor <= 1:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), PILImage.Resampling.NEAREST)
