"""Small extractions for tests: textures with words, of every kind of document."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from PIL import Image as PILImage

from nextflow_ar.data.extraction import ExtractionConfig, extract
from nextflow_ar.data.sources import open_source
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

COLOURS = ("red", "blue", "green", "white", "black")


def captions(count: int, start: int = 0) -> list[dict[str, Any]]:
    """Rows of a picture and its caption."""
    return [
        {"image": f"{i}.png", "caption": f"{COLOURS[i % 5]} leaves number {i}"}
        for i in range(start, start + count)
    ]


def mixed(count: int) -> list[dict[str, Any]]:
    """Captions, edits, questions, plain texts, in turn."""
    rows: list[dict[str, Any]] = captions(count)
    for i in range(count):
        if i % 4 == 1:
            rows[i] = {"source": f"{i}.png", "instruction": f"make it {i}", "target": "0.png"}
        if i % 4 == 2:
            rows[i] = {"image": f"{i}.png", "question": "which number?", "answer": f"number {i}"}
        if i % 4 == 3:
            rows[i] = {"text": f"a text about number {i}"}
    return rows


def make_shards(
    folder: Path,
    rows: list[dict[str, Any]],
    tokenizer: ImageTokenizer,
    *,
    per_shard: int = 3,
    scales: int = 4,
    tokens: float = 0.3,
    counter: TokenCounter | None = None,
) -> Path:
    """Extract ``rows`` into ``folder``/shards; returns that. Every third picture is wide."""
    folder.mkdir(parents=True, exist_ok=True)
    for i in range(len(rows)):
        PILImage.fromarray(dead_leaves((i,), 40, 40 if i % 3 else 80)).save(folder / f"{i}.png")
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    config = ExtractionConfig(num_scales=scales, rows=per_shard, tokens=tokens, top_k=4)
    extract(open_source(folder / "rows.jsonl"), tokenizer, folder / "shards", config, counter=counter)
    return folder / "shards"
