"""PlaygroundBench: whether a model draws what a prompt says, and says what a picture shows.

480 held-out prompts (six task types of GenEval, eighty each, combinations that training never showed), as
many from the training distribution, and 400 scenes to caption. Scores are read from pictures by the frozen
:class:`Judge`. Beside them stand two ceilings (true renders; true renders through the tokenizer) and a
floor (pictures scored against shuffled prompts), so that a number can be judged at all.

A run keeps a journal: every batch's results are appended to ``results.jsonl``, and a run that was killed
continues behind its last whole batch.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from PIL import Image

from nextflow_ar.data.playground.scenes import LEVELS, render
from nextflow_ar.evaluation.judge import Judge, Verdict
from nextflow_ar.evaluation.playground_report import Report, SetScore, caption_score, set_score, sheet
from nextflow_ar.evaluation.playground_tasks import (
    BENCH_SEED,
    BenchSplit,
    CaptionQuestion,
    CaptionResult,
    Question,
    Result,
    caption_questions,
    prompts,
    questions,
    score,
    score_caption,
)

__all__ = [
    "BENCH_SEED",
    "BenchError",
    "BenchSettings",
    "CaptionResult",
    "Report",
    "Result",
    "evaluate",
    "prompts",
    "score",
    "score_caption",
]

Generate = Callable[[list[str]], np.ndarray]
Describe = Callable[[np.ndarray], list[str]]
Reconstruct = Callable[[np.ndarray], np.ndarray]
Progress = Callable[[str, int, int], None]
_Item = TypeVar("_Item", Question, CaptionQuestion)
_SHUFFLES = 20
_CANVAS = LEVELS["easy"].canvas
_SPLITS: tuple[BenchSplit, BenchSplit] = ("test", "train")


class BenchError(RuntimeError):
    """The benchmark cannot go on; the message is one line."""


@dataclass(frozen=True)
class BenchSettings:
    """Size of a run; the defaults are the benchmark as it is reported.

    ``in_distribution``: prompts per type from the training split (0: none). ``captions``: scenes to caption.
    ``batch``: prompts per call of the model. ``per_type``: pictures per type on the sheet.
    """

    n_per_type: int = 80
    in_distribution: int = 80
    captions: int = 400
    batch: int = 16
    seed: int = BENCH_SEED
    level: str = "easy"
    per_type: int = 8


class Journal:
    """Results of a run, one JSON line each behind a line of settings; opening it again continues the run.

    Raises BenchError when the file was written with other settings, or is not a journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.rows: dict[tuple[str, int], dict[str, Any]] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        whole = path.read_bytes() if path.exists() else b""
        whole = whole[: whole.rfind(b"\n") + 1]  # a killed run may leave half a line
        if whole:
            self.rows = _journal_rows(path, whole, settings)
            with path.open("r+b") as file:
                file.truncate(len(whole))
        else:
            path.write_text(json.dumps({"settings": settings}) + "\n")

    def join(self, path: Path, settings: Mapping[str, Any]) -> None:
        """Take over the rows of another journal that are missing here; ``settings``: those that it has to have. Raises
        BenchError.
        """
        try:
            whole = path.read_bytes()
        except OSError as error:
            raise BenchError(f"{path}: {error.strerror}") from None
        rows = _journal_rows(path, whole[: whole.rfind(b"\n") + 1], settings)
        self.add([row for key, row in rows.items() if key not in self.rows])

    def add(self, rows: Sequence[dict[str, Any]]) -> None:
        """Append rows in one write."""
        with self.path.open("a") as file:
            file.write("".join(json.dumps(row) + "\n" for row in rows))
        self.rows |= {(row["part"], row["index"]): row for row in rows}

    def part(self, name: str) -> list[dict[str, Any]]:
        """All rows of one part, by index."""
        return [row for (part, _), row in sorted(self.rows.items()) if part == name]


def _journal_rows(
    path: Path, whole: bytes, settings: Mapping[str, Any]
) -> dict[tuple[str, int], dict[str, Any]]:
    try:
        header, *found = (json.loads(line) for line in whole.decode().splitlines())
        before = header["settings"]
        rows = {(row["part"], row["index"]): row for row in found}
    except (ValueError, KeyError, TypeError) as error:
        raise BenchError(f"{path} is not a journal of this benchmark") from error
    wanted = json.loads(json.dumps(settings))
    before, wanted = _flat(before), _flat(wanted)
    changed = sorted({k[1] for k in {*before, *wanted} if before.get(k) != wanted.get(k)})
    if changed:
        raise BenchError(f"{path} holds a run with another {', '.join(changed)}: choose another folder")
    return rows


def _flat(settings: Mapping[str, Any]) -> dict[tuple[str, str], Any]:
    """Settings by (group, key), those of ``about`` a group of their own: "seed" is in both."""
    about = settings.get("about")
    inner = about if isinstance(about, Mapping) else {"about": about}
    plain = {("", k): v for k, v in settings.items() if k != "about"}
    return plain | {("about", k): v for k, v in inner.items()}


def check_canvas(size: tuple[int, int], model: str) -> None:
    """Raises BenchError for a model that draws pictures of another ``size`` (height, width) than the benchmark's."""
    if size != (_CANVAS, _CANVAS):
        raise BenchError(
            f"{model} draws pictures of {size[1]}x{size[0]} pixels: the benchmark needs {_CANVAS}x{_CANVAS}"
        )


def _checked(pictures: np.ndarray, count: int, canvas: int) -> np.ndarray:
    pictures = np.asarray(pictures)
    if pictures.shape != (count, canvas, canvas, 3) or pictures.dtype != np.uint8:
        raise BenchError(
            f"expected uint8 pictures ({count}, {canvas}, {canvas}, 3), got {pictures.dtype} {pictures.shape}"
        )
    return pictures


@dataclass(frozen=True)
class _Run:
    """One run's fixed parts. Batches are cut at the same places whenever the run is continued."""

    journal: Journal
    judge: Judge
    settings: BenchSettings
    folder: Path
    progress: Progress | None

    def batches(
        self, part: str, items: Sequence[_Item], work: Callable[[Sequence[_Item]], list[dict[str, Any]]]
    ) -> None:
        """Give ``work`` every batch that the journal does not hold in full, and store its rows."""
        size = self.settings.batch
        for start in range(0, len(items), size):
            chunk = items[start : start + size]
            if any((part, item.index) not in self.journal.rows for item in chunk):
                rows = work(chunk)
                self.journal.add(
                    [{"part": part, "index": c.index} | r for c, r in zip(chunk, rows, strict=True)]
                )
            if self.progress is not None:
                self.progress(part, start + len(chunk), len(items))

    def scored(self, chunk: Sequence[Question], pictures: np.ndarray) -> list[dict[str, Any]]:
        """Rows of judged pictures."""
        rows = []
        checked = _checked(pictures, len(chunk), self.judge.config.canvas)
        for question, verdict in zip(chunk, self.judge(checked), strict=True):
            tag, text = question.metadata["tag"], question.metadata["prompt"]
            row = {"tag": tag, "prompt": text, "verdict": verdict.to_json()}
            rows.append(row | asdict(score(question.metadata, verdict)))
        return rows

    def drawn(self, split: str, generate: Generate) -> Callable[[Sequence[Question]], list[dict[str, Any]]]:
        """Work that draws a batch, keeps the pictures and scores them."""

        def work(chunk: Sequence[Question]) -> list[dict[str, Any]]:
            pictures = np.asarray(generate([question.metadata["prompt"] for question in chunk]))
            rows = self.scored(chunk, pictures)
            for question, picture, row in zip(chunk, pictures, rows, strict=True):
                row["picture"] = f"{split}-{question.index:04d}.png"
                Image.fromarray(picture).save(self.folder / "pictures" / row["picture"])
            return rows

        return work

    def rendered(self, through: Reconstruct | None) -> Callable[[Sequence[Question]], list[dict[str, Any]]]:
        """Work that scores true renders, passed through the tokenizer if one is given."""

        def work(chunk: Sequence[Question]) -> list[dict[str, Any]]:
            pictures = np.stack([render(question.scene) for question in chunk])
            return self.scored(chunk, pictures if through is None else through(pictures))

        return work


def _described(describe: Describe) -> Callable[[Sequence[CaptionQuestion]], list[dict[str, Any]]]:
    def work(chunk: Sequence[CaptionQuestion]) -> list[dict[str, Any]]:
        texts = describe(np.stack([render(item.scene) for item in chunk]))
        if len(texts) != len(chunk):
            raise BenchError(f"expected {len(chunk)} captions, got {len(texts)}")
        return [
            {"split": item.split, "tag": item.scene.task, "text": text}
            | asdict(score_caption(item.scene, text))
            for item, text in zip(chunk, texts, strict=True)
        ]

    return work


def shuffled_floor(asked: Sequence[Mapping[str, Any]], verdicts: Sequence[Verdict], seed: int = 0) -> float:
    """Share of pictures that satisfy a prompt drawn from the same set at random (exact rule, 20 shuffles)."""
    rng = np.random.default_rng(seed)
    hits = 0
    for _ in range(_SHUFFLES):
        order = rng.permutation(len(asked))
        hits += sum(score(dict(asked[k]), verdict).exact for k, verdict in zip(order, verdicts, strict=True))
    return hits / (_SHUFFLES * len(asked))


def evaluate(
    generate: Generate | None,
    describe: Describe | None = None,
    reconstruct: Reconstruct | None = None,
    *,
    out: Path,
    settings: BenchSettings | None = None,
    judge: Judge | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Progress | None = None,
) -> Report:
    """Run the benchmark, or continue it, in the folder ``out``.

    ``generate``: prompts -> (N, 64, 64, 3) uint8 (None: only ceilings and captions); its randomness is the
    caller's, calls come in the same batches in every run. ``describe``: (N, 64, 64, 3) uint8 -> captions.
    ``reconstruct``: uint8 pictures -> the same through the tokenizer. ``about``: what to store with the
    results (model, guidance, seed): a journal of another model, judge or size is refused. ``progress``:
    called as (part, done, total).

    Writes results.jsonl, report.json, report.txt, sheet.png and pictures/. Raises BenchError (one line) for
    results of the wrong shape or a journal of another run, SpritesMissing without the emoji font.
    """
    chosen = settings or BenchSettings()
    frozen = judge or Judge.load()
    record = asdict(chosen) | {"judge": frozen.sha256, "about": dict(about or {})}
    run = _Run(Journal(out / "results.jsonl", record), frozen, chosen, out, progress)
    (out / "pictures").mkdir(exist_ok=True)
    sizes = {"test": chosen.n_per_type, "train": chosen.in_distribution}
    asked = {
        split: questions(sizes[split], split, chosen.seed, chosen.level) for split in _SPLITS if sizes[split]
    }
    for split, items in asked.items():
        run.batches(f"renders {split}", items, run.rendered(None))
        if reconstruct is not None:
            run.batches(f"reconstructed {split}", items, run.rendered(reconstruct))
    if describe is not None and chosen.captions:
        scenes = caption_questions(chosen.captions, chosen.seed, chosen.level)
        run.batches("captions", scenes, _described(describe))
    if generate is not None:
        for split, items in asked.items():
            run.batches(f"prompts {split}", items, run.drawn(split, generate))
    return _finish(
        run, record, asked, {"prompts": generate, "reconstructed": reconstruct, "captions": describe}
    )


def _finish(
    run: _Run, record: dict[str, Any], asked: Mapping[str, Sequence[Question]], given: Mapping[str, object]
) -> Report:
    """Sum the journal up and write the report's files. Parts whose function was not given are left out."""

    def scores(part: str) -> dict[str, SetScore]:
        if given.get(part, True) is None:
            return {}
        return {split: set_score(run.journal.part(f"{part} {split}")) for split in asked}

    drawn = run.journal.part("prompts test") if given["prompts"] is not None else []
    floor = None
    if drawn:
        wanted = [question.metadata for question in asked["test"]]
        floor = shuffled_floor(wanted, [Verdict.from_json(row["verdict"]) for row in drawn])
    rows = run.journal.part("captions") if given["captions"] is not None else []
    captions = {s: caption_score([r for r in rows if r["split"] == s]) for s in _SPLITS if rows}
    if rows:
        captions["all"] = caption_score(rows)
    report = Report(record, scores("prompts"), scores("renders"), scores("reconstructed"), floor, captions)
    (run.folder / "report.json").write_text(report.to_json() + "\n")
    (run.folder / "report.txt").write_text(report.table() + "\n")
    if drawn:
        sheet(drawn, run.folder / "pictures", run.settings.per_type).save(run.folder / "sheet.png")
    return report
