"""One self-contained HTML page of pictures: no scripts, no files beside it."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from nextflow_ar.storage import write_atomic

_STYLE = """
:root { color-scheme: light dark; --ink: #1d1f24; --soft: #6a6f7a; --page: #f6f5f2; --card: #fff; --line: #e4e1da; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #eceae5; --soft: #a09d96; --page: #17181b; --card: #202226; --line: #33353a; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 40px 24px 80px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 30px; margin: 0 0 4px; } h2 { margin: 48px 0 4px; font-size: 21px; }
p { margin: 0 0 18px; color: var(--soft); max-width: 72ch; }
.grid { display: grid; gap: 18px; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 12px; padding: 14px; }
.card img { image-rendering: pixelated; display: block; border-radius: 6px; }
.big { width: 100%; } .strip { display: flex; gap: 3px; margin: 8px 0 10px; }
.strip img { flex: 1; min-width: 0; border-radius: 3px; }
.title { font-weight: 600; } .note { color: var(--soft); font-size: 14px; }
footer { margin-top: 56px; color: var(--soft); font-size: 14px; }
"""


@dataclass(frozen=True)
class Card:
    """One picture, a strip of smaller ones below it, a title and a note."""

    picture: Image.Image
    title: str
    note: str = ""
    strip: Sequence[Image.Image] = field(default_factory=tuple)


@dataclass(frozen=True)
class Section:
    """A heading, a sentence and cards."""

    title: str
    text: str
    cards: Sequence[Card]


def _source(picture: Image.Image) -> str:
    buffer = io.BytesIO()
    picture.save(buffer, format="PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _card(card: Card) -> str:
    small = "".join(f'<img src="{_source(picture)}" alt="">' for picture in card.strip)
    strip = f'<div class="strip">{small}</div>' if small else ""
    title, note = html.escape(card.title), html.escape(card.note)
    picture = f'<img class="big" src="{_source(card.picture)}" alt="{title}">'
    return f'<div class="card">{picture}{strip}<div class="title">{title}</div><div class="note">{note}</div></div>'


def write_page(path: Path, title: str, text: str, sections: Sequence[Section], footer: str) -> None:
    """Write the page, whole or not at all. Raises StorageError."""
    body = [f"<h1>{html.escape(title)}</h1><p>{html.escape(text)}</p>"]
    for section in sections:
        cards = "".join(_card(card) for card in section.cards)
        body.append(f"<h2>{html.escape(section.title)}</h2><p>{html.escape(section.text)}</p>")
        body.append(f'<div class="grid">{cards}</div>')
    body.append(f"<footer>{html.escape(footer)}</footer>")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{html.escape(title)}</title>'
    page = f"<!doctype html><html lang=en><head>{head}<style>{_STYLE}</style></head><body>{''.join(body)}</body></html>"
    write_atomic(path, page.encode())
