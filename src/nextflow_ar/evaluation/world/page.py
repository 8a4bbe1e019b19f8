"""The report as one HTML file with pictures in it: figures against their goals, every line, the worst and best items."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nextflow_ar.evaluation.world.lines import LINES, SPLIT_NAMES
from nextflow_ar.evaluation.world.report import LineScore, Share, WorldReport
from nextflow_ar.evaluation.world.run import WorldRun
from nextflow_ar.evaluation.world.verdict import Verdict

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; margin: 2rem auto; max-width: 72rem; padding: 0 1rem; color: #1c1c1c; }
table { border-collapse: collapse; margin: .6rem 0 1.2rem; } td, th { padding: .15rem .7rem; text-align: right; }
th { border-bottom: 1px solid #999; } td:first-child, th:first-child, td.t { text-align: left; }
.bar { background: #eee; width: 9rem; height: .7rem; display: inline-block; }
.bar i { background: #3b7; height: 100%; display: block; }
.items { display: flex; flex-wrap: wrap; gap: .8rem; }
.item { width: 16rem; font-size: 12px; overflow-wrap: anywhere; }
.item img { image-rendering: pixelated; width: 100%; object-fit: contain; background: #ccc; }
.bad { border-top: 3px solid #c33; }
.good { border-top: 3px solid #3a3; } .dim { color: #777; } .missed { color: #b22; } .met { color: #282; }
"""


def _text(value: object) -> str:
    return html.escape(str(value))


def _share(share: Share | None) -> str:
    return "-" if share is None else f"{share.value:.3f}"


def _interval(share: Share) -> str:
    return f"[{share.low:.3f}, {share.high:.3f}]"


def _bar(value: float) -> str:
    return f'<span class="bar"><i style="width:{100 * min(1.0, max(0.0, value)):.1f}%"></i></span>'


def _figures(report: WorldReport) -> list[str]:
    rows = []
    for figure in report.figures:
        met = ""
        if figure.goal is not None:
            good = (
                figure.value.value <= figure.goal
                if figure.note == "at most"
                else figure.value.value >= figure.goal
            )
            sign = "≤ " if figure.note == "at most" else ""
            met = f'<span class="{"met" if good else "missed"}">{sign}{figure.goal:.2f}</span>'
        rows.append(
            f'<tr><td>{_text(figure.name)}</td><td class="t">{SPLIT_NAMES[figure.split]}</td><td>{figure.value.n}</td>'
            f"<td>{figure.value.value:.3f}</td><td>{_interval(figure.value)}</td><td>{met}</td></tr>"
        )
    head = "<tr><th>figure</th><th>split</th><th>items</th><th>value</th><th>95 %</th><th>goal</th></tr>"
    return ["<h2>Figures and goals</h2>", "<table>", head, *rows, "</table>"] if rows else []


def _lines(report: WorldReport) -> list[str]:
    head = (
        "<tr><th>line</th><th>split</th><th>items</th><th>right</th><th>95 %</th><th></th><th>grade</th>"
        "<th>true renders</th><th>through the tokenizer</th><th>floor</th></tr>"
    )
    rows = [
        f'<tr><td><a href="#{name}">{_text(name)}</a></td><td class="t">{SPLIT_NAMES[split]}</td><td>{s.right.n}</td>'
        f"<td>{s.right.value:.3f}</td><td>{_interval(s.right)}</td><td>{_bar(s.right.value)}</td><td>{s.grade:.3f}</td>"
        f"<td>{_share(s.renders)}</td><td>{_share(s.tokenizer)}</td>"
        f"<td>{'-' if s.floor is None else f'{s.floor:.3f}'}</td></tr>"
        for name, splits in report.lines.items()
        for split, s in splits.items()
    ]
    return ["<h2>Lines</h2>", "<table>", head, *rows, "</table>"]


def _probe(report: WorldReport) -> list[str]:
    if not report.probe:
        return []
    rows = [
        f"<tr><td>{SPLIT_NAMES[split]}</td><td>{found['n']}</td><td>{found['perplexity']:.3f}</td>"
        f"<td>[{found['low']:.3f}, {found['high']:.3f}]</td><td>{found['nats_per_letter']:.4f}</td></tr>"
        for split, found in report.probe.items()
    ]
    head = "<tr><th>split</th><th>exchanges</th><th>perplexity</th><th>95 %</th><th>nats per letter</th></tr>"
    return ["<h2>Words alone</h2>", "<table>", head, *rows, "</table>"]


def _tags(found: LineScore) -> str:
    rows = "".join(
        f"<tr><td>{_text(tag)}</td><td>{s.n}</td><td>{s.value:.3f}</td><td>{_interval(s)}</td></tr>"
        for tag, s in (found.tags | {f"({key})": s for key, s in found.extra.items()}).items()
    )
    faults = ", ".join(f"{_text(what)} {count}" for what, count in found.faults.items()) or "none"
    return f'<table>{rows}</table><p class="dim">first faults: {faults}</p>'


def _item(row: Mapping[str, Any], pictures: Path) -> str:
    path = pictures / str(row.get("picture", ""))
    image = ""
    if row.get("picture") and path.is_file():
        image = f'<img alt="" src="data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}">'
    observed = row["observed"]
    seen = "; ".join(Verdict.from_json(one).words() for one in observed["seen"])
    said = " ".join(observed["said"])
    lines = [f"<b>{_text(row['asked'])}</b>"]
    lines += [f"said: {_text(said[:300])}"] if said else []
    lines += [f'<span class="dim">seen: {_text(seen[:400])}</span>'] if seen else []
    lines += [f'<span class="missed">{_text(row["fault"])}</span>'] if row["fault"] else []
    mark = "good" if row["right"] else "bad"
    return f'<div class="item {mark}">{image}<div>{"<br>".join(lines)}</div></div>'


def _examples(rows: Sequence[Mapping[str, Any]], pictures: Path, each: int) -> list[str]:
    """The worst, then the best of the items whose pictures were kept."""
    kept = [row for row in rows if row.get("picture")] or list(rows[: 4 * each])
    ranked = sorted(kept, key=lambda row: (row["grade"], row["index"]))
    worst = [row for row in ranked if not row["right"]][:each]
    best = [row for row in reversed(ranked) if row["right"]][:each]
    out: list[str] = []
    for title, several in (("worst", worst), ("best", best)):
        if several:
            out += [
                f"<h4>{title}</h4>",
                '<div class="items">',
                *(_item(row, pictures) for row in several),
                "</div>",
            ]
    return out


def page(run: WorldRun, report: WorldReport, each: int = 8) -> str:
    """The whole page; ``each``: worst and best items per line and split. Strips show, from left to right, what was shown,
    what came, and what would have been right.
    """
    body = ["<h1>PlaygroundBench: the wide world</h1>"]
    body += [
        f'<p class="dim">judge {_text(report.settings["judge"])}</p>',
        *_figures(report),
        *_lines(report),
    ]
    body += _probe(report)
    for name, splits in report.lines.items():
        body.append(
            f'<h2 id="{name}">{_text(name)} <span class="dim">({_text(LINES[name].group)})</span></h2>'
        )
        for split, found in splits.items():
            body += [
                f"<h3>{SPLIT_NAMES[split]}: {found.right.value:.3f} {_interval(found.right)}</h3>",
                _tags(found),
            ]
            body += _examples(run.journal.part(f"{name} {split}"), run.out / "pictures", each)
    settings = _text(json.dumps(report.settings, indent=1))
    body += ["<h2>Settings</h2>", f"<pre>{settings}</pre>"]
    head = f'<meta charset="utf-8"><title>PlaygroundBench</title><style>{_STYLE}</style>'
    return f'<!doctype html><html lang="en"><head>{head}</head><body>{"".join(body)}</body></html>\n'
