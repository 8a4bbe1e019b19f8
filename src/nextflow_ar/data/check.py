"""Finding every broken row of a data set before a training does: what is wrong, and where."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from nextflow_ar.data.rows import LeftOut, PicturePart, Row, RowError, TextPart, printable
from nextflow_ar.data.sources import Source
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.tokenizer.pictures import MAX_PIXELS, PictureError


@dataclass
class CheckReport:
    """``rows`` read; ``problems``: one line each, with file and place; ``left_out``: likewise, rows that a filter drops on
    purpose; ``kinds``: how many rows draw, read, or only write;
    ``ignored``: keys that nothing reads, by rows; ``ratios``: pictures by nearest final grid;
    ``tokens``: least, mean and most per good row; ``warnings``: of all of it, no row's fault.
    """

    rows: int = 0
    problems: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    ignored: Counter[str] = field(default_factory=Counter)
    ratios: Counter[str] = field(default_factory=Counter)
    lengths: list[int] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    @property
    def tokens(self) -> tuple[int, float, int]:
        """Least, mean and most tokens of the rows without a problem (zeros without any)."""
        if not self.lengths:
            return 0, 0.0, 0
        return min(self.lengths), sum(self.lengths) / len(self.lengths), max(self.lengths)

    @property
    def all_warnings(self) -> list[str]:
        """``warnings``, and one for each way that nothing teaches."""
        told = list(self.warnings)
        if self.kinds and not self.kinds["drawing"]:
            told.append("nothing in it teaches drawing")
        if self.kinds and self.ratios and not self.kinds["reading"]:
            told.append("nothing in it teaches reading pictures")
        return told

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "rows": self.rows,
            "problems": self.problems,
            "left_out": self.left_out,
            "kinds": dict(self.kinds),
            "ignored": dict(self.ignored.most_common()),
            "ratios": dict(self.ratios.most_common()),
            "tokens": dict(zip(("least", "mean", "most"), self.tokens, strict=True)),
            "warnings": self.all_warnings,
        }

    def table(self) -> str:
        """For people."""
        least, mean, most = self.tokens
        kinds = ", ".join(f"{n} {kind}" for kind, n in self.kinds.most_common()) or "none"
        lines = [
            f"{self.rows} rows, {len(self.problems)} problems",
            f"good rows: {kinds}; {least} to {most} tokens, {mean:.0f} on average",
        ]
        if self.ratios:
            lines.append(
                "pictures by final grid: " + ", ".join(f"{k} {n}" for k, n in self.ratios.most_common(12))
            )
        if self.ignored:
            some = ", ".join(f"{key!r} ({n})" for key, n in self.ignored.most_common(8))
            lines.append(f"keys that nothing reads (rows): {some}{', ...' * (len(self.ignored) > 8)}")
        if self.left_out:
            lines.append(f"{len(self.left_out)} left out on purpose, such as: {self.left_out[0]}")
        lines += [f"warning: {line}" for line in self.all_warnings]
        return "\n".join([*lines, *self.problems])


def check_rows(
    source: Source,
    *,
    num_scales: int,
    most_tokens: int,
    count_text: Callable[[str], int],
    deep: bool = True,
    dialogue: bool = False,
    context_images: str = "scales",
    progress: Callable[[int], None] = lambda rows: None,
) -> CheckReport:
    """Read all rows of a source. ``num_scales``: level that pictures are meant for. ``count_text``: tokens of a text.
    ``deep``: decode every picture (finds truncated files); otherwise read headers only. ``dialogue``: rows will be trained
    with chat marks around every turn, which count too. ``context_images``: how the model lays out given pictures
    (:class:`~nextflow_ar.config.ModelConfig`).
    """
    report = CheckReport()
    doubts: Counter[str] = Counter()
    for row in source.rows():
        report.rows += 1
        progress(report.rows)
        if isinstance(row, RowError):
            (report.left_out if isinstance(row, LeftOut) else report.problems).append(str(row))
            continue
        report.ignored.update(map(printable, row.ignored))
        doubts.update(row.doubts)
        length, told = _measure(row, num_scales, count_text, deep, dialogue, context_images, report)
        length += _marks(row, count_text) if dialogue else 0
        if length > most_tokens and not told:
            told.append(f"{row.where}: {length} tokens are too long, up to {most_tokens} are accepted")
        report.problems += told
        if not told:
            report.lengths.append(length)
            report.kinds[_kind(row)] += 1
    report.warnings += [f"{n} rows {doubt}" for doubt, n in doubts.items()]
    report.warnings += map(printable, getattr(source, "notes", ()))
    return report


def _measure(
    row: Row,
    num_scales: int,
    count_text: Callable[[str], int],
    deep: bool,
    dialogue: bool,
    context_images: str,
    report: CheckReport,
) -> tuple[int, list[str]]:
    """Tokens of a row as the layout lays it out, and what is wrong with its pictures."""
    length, told = 0, []
    for number, part in enumerate(row.parts):
        if isinstance(part, TextPart):
            length += count_text(part.text)
            continue
        try:
            if deep:
                picture = part.picture.open()
                height, width = picture.height, picture.width
            else:
                height, width = part.picture.size()
            if height * width > MAX_PIXELS:
                raise PictureError(f"{part.picture.name}: {width}x{height} pixels are too many")
            schedule = ScaleSchedule.nearest(height, width, num_scales)
        except PictureError as error:
            said = printable(str(error))
            told.append(said if row.where in said else f"{row.where}: {said}")
            continue
        except ValueError:
            told.append(
                f"{part.picture.name}: {width}x{height} pixels fit no bucket: aspect ratios from 1:4 to 4:1 are accepted"
            )
            continue
        closing = schedule.sizes[-1] + 1 if dialogue or number + 1 < len(row.parts) else 0
        short = closing and context_images == "closing" and not part.supervised
        length += (
            schedule.sizes[0] if short else schedule.num_tokens
        ) + closing  # <boi> stands for the first grid
        report.ratios["x".join(map(str, ScaleSchedule.nearest(height, width, 18).final))] += 1
    return length, told


def _marks(row: Row, count_text: Callable[[str], int]) -> int:
    """Tokens of the chat marks: every turn has one before it, its role, one after it, and a line's end between turns."""
    roles = [part.role for part in row.parts]
    turns = [role for i, role in enumerate(roles) if i == 0 or roles[i - 1] != role]
    return sum(2 + count_text(role + "\n") for role in turns) + (len(turns) - 1) * count_text("\n")


def _kind(row: Row) -> str:
    if any(isinstance(part, PicturePart) for part in row.supervised):
        return "drawing"
    return "reading" if row.pictures else "writing"
