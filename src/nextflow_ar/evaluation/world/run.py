"""Runs PlaygroundBench in the wide world: asks a model, lets the judge look, keeps a journal, sums up.

Every batch's results are appended to ``results.jsonl``; a run that was killed goes on behind its last whole batch. Beside
the model stand two ceilings (true renders; true renders through the image tokenizer) on the first items of every line
that draws, and a floor: what came for one item, scored against the others.
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
from PIL import Image
from pydantic import ConfigDict
from pydantic.dataclasses import dataclass

from nextflow_ar.data.episodes import canvas_size
from nextflow_ar.data.playground.curriculum import episode
from nextflow_ar.data.playground.episodes import Said
from nextflow_ar.data.playground.looks import render
from nextflow_ar.evaluation.playground import BenchError, Journal
from nextflow_ar.evaluation.playground_tasks import BENCH_SEED
from nextflow_ar.evaluation.world.asking import Answers, Ask, Reads, Reply, pictures_of, texts_of
from nextflow_ar.evaluation.world.judge import WorldJudge
from nextflow_ar.evaluation.world.lines import LINES, SPLITS, BenchSplit, Item, Line, item
from nextflow_ar.evaluation.world.oracle import Oracle
from nextflow_ar.evaluation.world.preservation import behind
from nextflow_ar.evaluation.world.scoring import Observed, score

Through = Callable[[Sequence[np.ndarray]], list[np.ndarray]]
Progress = Callable[[str, int, int], None]
PROBE = "probe"
CEILINGS = ("renders", "tokenizer")
_LEAST = 16
"""Pixels of a canvas's side: on a smaller one not every line has an item."""


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class WorldBenchSettings:
    """Size of a run; the defaults are the benchmark as it is reported (recipes/world_bench.yaml).

    ``items``: per line and split; ``ceiling``: how many of them are scored as true renders too. ``lines``: names of lines,
    "probe" for the language model's; none is all. ``canvases``: WIDTHxHEIGHT -> weight. ``batch``: items asked at once.
    ``kept``: items per line and split whose pictures are kept.
    """

    items: int = 1000
    ceiling: int = 250
    splits: tuple[Literal["train", "test"], ...] = ("train", "test")
    lines: tuple[str, ...] = ()
    level: Literal["world", "blocks", "wide"] = "world"
    canvases: dict[str, float] = field(
        default_factory=lambda: {"64x64": 0.6, "72x56": 0.1, "56x72": 0.1, "80x48": 0.1, "48x80": 0.1}
    )
    batch: int = 32
    kept: int = 60
    seed: int = BENCH_SEED

    def __post_init__(self) -> None:
        unknown = [name for name in self.lines if name not in LINES and name != PROBE]
        if unknown:
            raise ValueError(f"unknown line {unknown[0]!r}: one of {', '.join(LINES)}, {PROBE}")
        if self.items < 2 or self.batch < 1 or self.ceiling < 0:
            raise ValueError("a run has at least two items per line, in batches of at least one")
        if not self.canvases or min(self.canvases.values()) < 0 or sum(self.canvases.values()) <= 0:
            raise ValueError("canvases needs at least one canvas with a weight above 0")
        for name in self.canvases:
            if min(canvas_size(name)) < _LEAST:
                raise ValueError(f"a canvas has sides of at least {_LEAST} pixels, got {name}")

    @property
    def chosen(self) -> tuple[Line, ...]:
        """The lines of the run."""
        return tuple(line for name, line in LINES.items() if not self.lines or name in self.lines)

    def item(self, line: Line, split: BenchSplit, number: int) -> Item:
        """Item ``number`` (any beyond the last begins anew) of a line on a canvas of the run. Where nothing fits a narrow
        canvas, another is taken.
        """
        number %= self.items
        rng = random.Random(f"bench canvas {line.pick(number)} {number}")
        names, weights = tuple(self.canvases), tuple(self.canvases.values())
        for _ in range(20):
            canvas = canvas_size(rng.choices(names, weights)[0])
            try:
                return item(line, split, number, canvas, self.level, self.seed)
            except RuntimeError:
                continue
        raise BenchError(f"no item of {line.name} fits the canvases {', '.join(names)}")


class WorldRun:
    """One run, or what is left of it, in the folder ``out``.

    ``about``: stored with the results (model, guidance, seed): a journal of another model, judge or settings is refused.
    ``through``: pictures through the model's image tokenizer (None: edits are compared with the source itself).
    """

    def __init__(
        self,
        settings: WorldBenchSettings,
        judge: WorldJudge,
        out: Path,
        *,
        through: Through | None = None,
        about: Mapping[str, Any] | None = None,
        progress: Progress | None = None,
    ) -> None:
        self.settings, self.judge, self.out = settings, judge, out
        self.through, self.progress = through, progress
        self.record = (
            {"benchmark": "world 1"} | asdict(settings) | {"judge": judge.sha256, "about": dict(about or {})}
        )
        self.journal = Journal(out / "results.jsonl", self.record)
        (out / "pictures").mkdir(exist_ok=True)
        self._items: dict[tuple[str, str, int], Item] = {}

    def join(self, folder: Path) -> None:
        """Take over what another run, of the same settings but for its lines, has found, and its pictures. Raises
        BenchError.
        """
        path = folder / "results.jsonl"
        try:
            lines = json.loads(path.open().readline())["settings"]["lines"]
        except OSError as error:
            raise BenchError(f"{path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError):
            raise BenchError(f"{path} is not a journal of this benchmark") from None
        self.journal.join(path, self.record | {"lines": lines})
        for picture in (folder / "pictures").glob("*"):
            if not (self.out / "pictures" / picture.name).exists():
                shutil.copy(picture, self.out / "pictures")

    def item_of(self, key: tuple[str, str, int]) -> Item:
        """The item that an ask's key names."""
        name, split, number = key
        number %= self.settings.items
        if (name, split, number) not in self._items:
            if len(self._items) > 4 * self.settings.items:
                self._items.clear()
            found = self.settings.item(LINES[name], "train" if split == "train" else "test", number)
            self._items[name, split, number] = found
        return self._items[name, split, number]

    def _batches(
        self, part: str, count: int, work: Callable[[Sequence[int]], Sequence[dict[str, Any]]]
    ) -> None:
        """Give ``work`` the numbers of every batch that the journal does not hold in full, and store its rows."""
        size = self.settings.batch
        for start in range(0, count, size):
            numbers = range(start, min(start + size, count))
            if any((part, number) not in self.journal.rows for number in numbers):
                rows = work(numbers)
                self.journal.add(
                    [{"part": part, "index": k} | row for k, row in zip(numbers, rows, strict=True)]
                )
            if self.progress is not None:
                self.progress(part, numbers[-1] + 1, count)

    def answered(self, model: Answers, line: Line, split: BenchSplit) -> None:
        """All items of a line, asked, judged and scored."""

        def work(numbers: Sequence[int]) -> list[dict[str, Any]]:
            items = [self.item_of((line.name, split, number)) for number in numbers]
            asks = [one.ask() for one in items]
            replies = model(asks)
            if len(replies) != len(asks):
                raise BenchError(f"{line.name}: asked {len(asks)} times, answered {len(replies)} times")
            rows = self.rows(items, asks, replies)
            for one, ask, reply, row in zip(items, asks, replies, rows, strict=True):
                if one.number < self.settings.kept:
                    row["picture"] = self._keep(one, ask, reply)
            return rows

        self._batches(f"{line.name} {split}", self.settings.items, work)

    def ceiling(self, line: Line, split: BenchSplit, through: Through | None) -> None:
        """The first items of a line that draws, answered with true renders."""
        oracle = Oracle(self.item_of)

        def work(numbers: Sequence[int]) -> list[dict[str, Any]]:
            items = [self.item_of((line.name, split, number)) for number in numbers]
            asks = [one.ask() for one in items]
            replies = oracle(asks)
            if through is not None:
                replies = _all_through(replies, through)
            kept = ("right", "grade", "fault", "tag", "extra")
            return [{key: row[key] for key in kept} for row in self.rows(items, asks, replies)]

        name = CEILINGS[through is not None]
        self._batches(f"{name} {line.name} {split}", min(self.settings.ceiling, self.settings.items), work)

    def rows(
        self, items: Sequence[Item], asks: Sequence[Ask], replies: Sequence[Reply]
    ) -> list[dict[str, Any]]:
        """Rows of judged and scored replies."""
        pictures = [_checked(picture) for reply in replies for picture in pictures_of(reply)]
        verdicts = iter(self.judge(pictures))
        gaps = self._behind(items, asks, replies)
        rows = []
        for one, reply, gap in zip(items, replies, gaps, strict=True):
            seen = tuple(next(verdicts) for _ in pictures_of(reply))
            order = tuple("text" if isinstance(part, str) else "picture" for part in reply)
            observed = Observed(seen, texts_of(reply), order, gap)
            found = score(one, observed)
            rows.append({"tag": one.tag, "asked": one.asked, "observed": observed.to_json()} | asdict(found))
        return rows

    def _behind(
        self, items: Sequence[Item], asks: Sequence[Ask], replies: Sequence[Reply]
    ) -> list[float | None]:
        gaps: list[float | None] = [None] * len(items)
        edits = [k for k, one in enumerate(items) if one.line.kind == "edit" and pictures_of(replies[k])]
        sources = [_last_shown(asks[k]) for k in edits]
        again = self.through(sources) if self.through is not None and sources else sources
        for k, source, trip in zip(edits, sources, again, strict=True):
            box = items[k].episode.truth.region
            if box is not None:
                gaps[k] = behind(source, trip, pictures_of(replies[k])[-1], box)
        return gaps

    def _keep(self, one: Item, ask: Ask, reply: Reply) -> str:
        """Save what was shown, what came and what would have been right side by side; returns the file's name."""
        shown = [part for _, part in ask.parts if not isinstance(part, str)]
        truth = [render(canvas) for canvas in one.expected]
        strip = _strip([shown, list(pictures_of(reply)), truth])
        name = f"{one.line.name}-{one.split}-{one.number:04d}.png"
        strip.save(self.out / "pictures" / name)
        return name

    def probe(self, read: Reads, split: BenchSplit) -> None:
        """How well the model foresees the assistant's words in exchanges without pictures."""

        def work(numbers: Sequence[int]) -> list[dict[str, Any]]:
            texts = [exchange(number, split, self.settings.seed) for number in numbers]
            letters = [sum(len(text) for role, text in one if role == "assistant") for one in texts]
            return [
                {"nats": nats, "tokens": tokens, "letters": count}
                for (nats, tokens), count in zip(read(texts), letters, strict=True)
            ]

        self._batches(f"{PROBE} {split}", self.settings.items, work)

    def run(self, model: Answers | None, read: Reads | None = None) -> None:
        """Everything that the settings name: ceilings, then the model's lines, then the probe."""
        for line in self.settings.chosen:
            for split in SPLITS:
                if split not in self.settings.splits:
                    continue
                if line.want != "text" and line.kind != "turn_worded" and self.settings.ceiling:
                    self.ceiling(line, split, None)
                    if self.through is not None:
                        self.ceiling(line, split, self.through)
                if model is not None:
                    self.answered(model, line, split)
        if read is not None and (not self.settings.lines or PROBE in self.settings.lines):
            for split in self.settings.splits:
                self.probe(read, split)


def exchange(number: int, split: BenchSplit, seed: int) -> list[tuple[str, str]]:
    """An episode of words alone, as (role, text)."""
    found = episode("plain", number * 3 + 1 + number % 2, seed, split)  # every third asks for a picture
    return [(part.role, part.text) for part in found.parts if isinstance(part, Said)]


def _checked(picture: np.ndarray) -> np.ndarray:
    if picture.dtype != np.uint8 or picture.ndim != 3 or picture.shape[2] != 3:
        raise BenchError(f"expected uint8 pictures (H, W, 3), got {picture.dtype} {picture.shape}")
    return picture


def _last_shown(ask: Ask) -> np.ndarray:
    return [part for _, part in ask.parts if not isinstance(part, str)][-1]


def _all_through(replies: Sequence[Reply], through: Through) -> list[Reply]:
    passed = iter(through([picture for reply in replies for picture in pictures_of(reply)]))
    return [tuple(part if isinstance(part, str) else next(passed) for part in reply) for reply in replies]


def _strip(groups: Sequence[Sequence[np.ndarray]], gap: int = 3, between: int = 10) -> Image.Image:
    """Groups of pictures in a row on grey, a wider gap between groups."""
    tallest = max((p.shape[0] for group in groups for p in group), default=1)
    width = sum(p.shape[1] + gap for group in groups for p in group) + between * (len(groups) - 1)
    page, x = Image.new("RGB", (max(1, width), tallest), (200, 200, 200)), 0
    for group in groups:
        for picture in group:
            page.paste(Image.fromarray(picture), (x, 0))
            x += picture.shape[1] + gap
        x += between
    return page


def run_record(out: Path) -> dict[str, Any]:
    """The settings that a run's journal was begun with."""
    with (out / "results.jsonl").open() as file:
        return json.loads(file.readline())["settings"]
