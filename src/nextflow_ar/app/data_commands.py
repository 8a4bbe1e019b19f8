"""The commands ``nextflow-ar data ...`` and ``nextflow-ar extract``."""

from __future__ import annotations

import json
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nextflow_ar.data.check import CheckReport
    from nextflow_ar.data.sources import Source
    from nextflow_ar.data.video import VideoConfig
    from nextflow_ar.data.workers import Extraction

data_app = typer.Typer(
    help="Look at training data before it is trained on, and convert it.", no_args_is_help=True
)

Place = Annotated[
    str,
    typer.Argument(
        help="Folder, .jsonl, .json, .parquet, .tar or video file, or hf://OWNER/NAME (then @CONFIG, /SPLIT)."
    ),
]
Given = Annotated[
    bool, typer.Option("--correct-given", help="Self-correct given pictures (of questions, edits) too.")
]
Batch = Annotated[
    int, typer.Option("--batch", min=1, help="Pictures encoded together; above 1 a few codes may differ.")
]
Kept = Annotated[
    int | None,
    typer.Option(
        "--kept",
        min=0,
        max=255,
        help="For copies: pixels of an edit that differ by no more are unchanged (0; JPEG: 12).",
    ),
]
TextTokenizer = Annotated[
    str,
    typer.Option(
        "--text-tokenizer",
        metavar="MODEL",
        help="Checkpoint that will be trained: shards tell how many tokens texts have, so that no training counts them.",
    ),
]
Retry = Annotated[
    bool, typer.Option("--retry", help="Make the shards again that lack rows: their pictures are whole now.")
]
Video = Annotated[
    list[str] | None,
    typer.Option("--video", help="How clips become rows: rate=1, frames=3, filter=false, motion.area=0.01."),
]


def _video(changes: list[str] | None) -> VideoConfig:
    """Raises ConfigError, which names the option."""
    from nextflow_ar.config import ConfigError, from_dict, override, to_dict
    from nextflow_ar.data.video import VideoConfig

    for change in changes or []:
        key, equals, _ = change.partition("=")
        if not key or not equals:
            raise ConfigError(f"--video takes KEY=VALUE such as rate=1, got {change!r}")
    try:
        values = override(to_dict(VideoConfig()), changes or [])
    except ConfigError as error:
        raise ConfigError(str(error).replace("--set", "--video", 1)) from None
    return from_dict(VideoConfig, values, "--video")


@data_app.command()
def check(
    place: Place,
    model: Annotated[
        str, typer.Option("--model", "-m", help="Model whose text tokenizer, level and context count.")
    ] = "nano",
    scales: Annotated[
        int | None,
        typer.Option("--scales", min=1, max=18, help="Level of the pictures (default: the model's)."),
    ] = None,
    most: Annotated[
        int | None,
        typer.Option("--max-tokens", min=1, help="Longest row accepted (default: the model's context)."),
    ] = None,
    headers: Annotated[
        bool, typer.Option("--headers", help="Read pictures' headers only: faster, misses truncated files.")
    ] = False,
    dialogue: Annotated[
        bool, typer.Option("--dialogue", help="Count the chat marks of dialogue training too.")
    ] = False,
    video: Video = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Read every row of a data set, or of the codes that extract made, and say which are broken, how and where.

    Exit status 1 if any is.
    """
    from nextflow_ar.config import ConfigError
    from nextflow_ar.data.code_shards import is_extraction
    from nextflow_ar.data.sources import SourceError, open_source

    codes = is_extraction(Path(place))
    if codes and (scales is not None or headers or video):
        raise ConfigError(f"{place} holds codes: --scales, --headers and --video are for pictures")
    source = Path(place) if codes else open_source(place, _video(video))
    report = _checked(source, model, scales, most, headers=headers, dialogue=dialogue)
    typer.echo(json.dumps(report.as_dict()) if as_json else report.table())
    if not report.rows and not report.problems:
        raise SourceError(f"{place}: no rows")
    if report.problems:
        raise typer.Exit(1)


def _checked(
    source: Source | Path, model: str, scales: int | None, most: int | None, *, headers: bool, dialogue: bool
) -> CheckReport:
    """What is wrong with a source's rows, or with the codes in a folder."""
    from nextflow_ar.data.check import check_rows
    from nextflow_ar.data.check_codes import check_codes
    from nextflow_ar.data.extraction import rows_there
    from nextflow_ar.data.sources import SourceError
    from nextflow_ar.generation.pipeline import resolve_model
    from nextflow_ar.model.checkpoint import load_architecture
    from nextflow_ar.sequence.vocab import Vocabulary
    from nextflow_ar.storage import StorageError
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer, tokenizer_config
    from nextflow_ar.training.runs import progress_bar

    total = 0
    with suppress(SourceError, StorageError):  # a stream; a damaged shard, which the report names
        total = (rows_there(source) or 0) if isinstance(source, Path) else source.count()
    if not isinstance(source, Path):
        _tell_clips(source)
    folder = resolve_model(model)
    config, tokenizer = load_architecture(folder)
    vocab = Vocabulary(tokenizer, config.text_vocab, config.codes)
    with progress_bar("check", total) as update:
        same: dict[str, Any] = {
            "most_tokens": most or config.max_positions,
            "count_text": lambda text: len(vocab.encode(text)),
            "dialogue": dialogue,
            "context_images": config.context_images,
            "progress": lambda rows: update(rows, ""),
        }
        if isinstance(source, Path):
            own = ImageTokenizer.from_pretrained(folder / "image_tokenizer").fingerprint()
            known = {"fingerprint": own, "codes": config.codes, "max_scales": config.max_scales}
            return check_codes(source, **known, **same)
        level = scales or tokenizer_config(folder).num_scales
        return check_rows(source, num_scales=level, deep=not headers, **same)


@data_app.command()
def convert(
    place: Place,
    out: Annotated[
        Path,
        typer.Option("-o", "--out", help="File to write: .jsonl (pictures beside it), .parquet or .tar."),
    ],
    shard: Annotated[
        int | None,
        typer.Option("--shard-mb", min=1, help="Several numbered files of about so many MB; resumable."),
    ] = None,
    video: Video = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Write a data set in our format as JSONL and pictures, as parquet, or as WebDataset shards."""
    from nextflow_ar.data.convert import convert as run_conversion
    from nextflow_ar.data.sources import open_source
    from nextflow_ar.training.runs import progress_bar

    source = open_source(place, _video(video))
    _tell_clips(source)
    told = f"stopped; the same command {'begins anew' if shard is None else 'goes on'}"
    with _ended_by_signal(told), progress_bar("convert", 1) as update:
        most = None if shard is None else shard * 1_000_000
        found = run_conversion(
            source,
            out,
            most_bytes=most,
            place=place,
            progress=lambda rows: update(0, f"{rows} rows"),
        )
        update(1, f"{found.rows} rows")
    if as_json:
        files = [str(path) for path in found.files]
        typer.echo(json.dumps({"files": files, "rows": found.rows, "broken": found.broken}))
        return
    typer.echo("\n".join(map(str, found.files)))
    _tell_left_out(found.rows, found.broken, "")


@contextmanager
def _ended_by_signal(told: str) -> Iterator[None]:
    """SIGTERM within ends the command with the line ``told`` and exit status 143, after all that waits for an end of the
    work.
    """

    def stop(number: int, frame: object) -> None:
        raise _Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except _Terminated:
        typer.echo(f"nextflow-ar: {told}", err=True)
        raise typer.Exit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if before is None else before)


class _Terminated(BaseException):
    """SIGTERM has come. No Exception: nothing on the way takes it for a failure of its own."""


def _tell_left_out(rows: int, broken: dict[str, str], where: str) -> None:
    typer.echo(f"{rows} rows written{where}, {len(broken)} left out")
    for why in broken.values():
        typer.echo(f"  {why}")


def extract(
    place: Place,
    out: Annotated[
        Path, typer.Option("-o", "--out", help="Folder of shards; a stopped extraction goes on there.")
    ],
    tokenizer: Annotated[
        str, typer.Option("--image-tokenizer", help="Bundled name, folder or Hub id.")
    ] = "nano",
    scales: Annotated[
        int | None, typer.Option("--scales", min=1, max=18, help="Level (default: the tokenizer's).")
    ] = None,
    fit: Annotated[
        str, typer.Option("--fit", help="crop: fill the canvas; pad: keep the whole picture.")
    ] = "crop",
    rows: Annotated[int, typer.Option("--rows", min=1, help="Rows of the source per shard.")] = 1000,
    samples: Annotated[
        float, typer.Option("--correct-samples", min=0, max=1, help="Share of pictures with self-correction.")
    ] = 1.0,
    tokens: Annotated[
        float, typer.Option("--correct-tokens", min=0, max=1, help="Share of their tokens that is sampled.")
    ] = 0.6,
    given: Given = False,
    top_k: Annotated[int, typer.Option("--top-k", min=1, help="Sampled among so many nearest codes.")] = 8,
    temperature: Annotated[float, typer.Option("--temperature", min=0.01)] = 1.0,
    seed: Annotated[int, typer.Option("--seed", min=0)] = 0,
    batch: Batch = 1,
    kept: Kept = None,
    text_tokenizer: TextTokenizer = "",
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes on this machine, one thread each.")
    ] = 1,
    ray: Annotated[int, typer.Option("--ray", min=0, help="Actors on a Ray cluster instead (0: none).")] = 0,
    process: Annotated[int, typer.Option("--process", min=0, help="Number of this process.")] = 0,
    processes: Annotated[int, typer.Option("--processes", min=1, help="Processes that share the work.")] = 1,
    device: Annotated[str, typer.Option("--device", help="cpu or cuda.")] = "cpu",
    retry: Retry = False,
    video: Video = None,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Turn a data set into shards of codes, once, for any number of trainings."""
    from nextflow_ar.config import from_dict
    from nextflow_ar.data.extraction import ExtractionConfig
    from nextflow_ar.data.workers import Extraction
    from nextflow_ar.tokenizer.image_tokenizer import tokenizer_config

    _check_shares(workers, ray, process, processes, retry=retry)
    values = {
        "num_scales": scales or tokenizer_config(tokenizer).num_scales, "fit": fit, "rows": rows, "samples": samples,
        "tokens": tokens, "top_k": top_k, "temperature": temperature, "seed": seed, "given": given,
        "batch": batch, "kept": kept,
    }  # fmt: skip
    config = from_dict(ExtractionConfig, values, "extract")
    job = Extraction(place, tokenizer, out, config, _video(video), device, text_tokenizer)
    with _ended_by_signal("stopped; the same command goes on"):
        found = _extract(job, workers, ray, process, processes, retry=retry)
    _tell_extracted(place, out, found, as_json=as_json, whole=processes == 1)


def _tell_extracted(place: str, out: Path, found: dict[str, Any], *, as_json: bool, whole: bool) -> None:
    """What an extraction did and what is there. ``whole``: no other process has a part in it. Raises SourceError where
    nothing is there in the end.
    """
    from nextflow_ar.data.extraction import left_out, rows_there
    from nextflow_ar.data.sources import SourceError

    there = rows_there(out)
    if there is None and whole:
        raise SourceError(f"{place}: no rows to extract")
    if as_json:
        typer.echo(json.dumps(found))
    else:
        before = (there or 0) - found["rows"]
        _tell_left_out(
            found["rows"],
            found["broken"],
            f" to {out}" + (f" ({before} there already)" if before > 0 else ""),
        )
        if earlier := left_out(out).keys() - found["broken"].keys():
            typer.echo(f"{len(earlier)} left out earlier ({out}/broken_*.json): --retry tries them again")
    if not there and whole:
        raise SourceError(f"{place}: no row could be extracted, all were left out")


def _check_shares(workers: int, ray: int, process: int, processes: int, *, retry: bool) -> None:
    """Raises ConfigError for ways to share the work that do not go together."""
    from nextflow_ar.config import ConfigError

    if process >= processes:
        raise ConfigError(f"--process is from 0 to {processes - 1}, got {process}")
    if sum((workers > 1, ray > 0, processes > 1)) > 1:
        raise ConfigError("--workers, --ray and --processes are three ways to share the work: take one")
    if retry and processes > 1:
        raise ConfigError("--retry is for one call, which may have --workers: leave --processes out")


def _check_device(device: str) -> None:
    """Raises ConfigError for a device that is none, or that is not here."""
    import torch

    from nextflow_ar.config import ConfigError

    try:
        kind = torch.device(device)
    except RuntimeError:
        kind = torch.device("meta")
    if kind.type == "meta":  # on which nothing is computed
        raise ConfigError(f"--device is cpu, cuda or one of several such as cuda:1, got {device!r}")
    if kind.type == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError(f"--device {device}: there is no CUDA device here")
        if (kind.index or 0) >= torch.cuda.device_count():
            raise ConfigError(
                f"--device {device}: there are cuda:0 to cuda:{torch.cuda.device_count() - 1} here"
            )
        return
    try:
        torch.zeros(1, device=device)
    except Exception:  # every kind of device fails in its own way
        raise ConfigError(f"--device {device}: there is no such device here; cpu is, or cuda") from None


def _tell_clips(source: Source) -> None:
    """Say so where pictures are taken for the frames of clips."""
    from nextflow_ar.data.clips import Clip
    from nextflow_ar.data.video import VideoSource

    if isinstance(source, VideoSource):
        clips = [clip for clip in source.clips if isinstance(clip, Clip)]
        told = sum(clip.caption is not None or bool(clip.texts) for clip in clips)
        frames = sum(clip.path.is_dir() for clip in clips)
        typer.echo(
            f"read as {len(clips)} clips, {frames} of them folders of numbered frames; {told} have words (docs/data.md)",
            err=True,
        )


def _extract(
    job: Extraction, workers: int, ray: int, process: int, processes: int, *, retry: bool
) -> dict[str, Any]:
    from nextflow_ar.data.extraction import apart, forget_left_out, lacking
    from nextflow_ar.data.sources import open_source
    from nextflow_ar.training.runs import progress_bar

    _tell_clips(open_source(job.place, job.video))  # one line now instead of one from every worker
    _check_device(job.device)
    apart(job.out, job.place)
    job.counter()
    if retry:
        job = replace(job, again=lacking(job.out))
    with progress_bar("extract", 1) as update:
        if ray:
            from nextflow_ar.data.ray_extraction import extract_with_ray

            found = extract_with_ray(job, ray, gpus=1.0 if job.device.startswith("cuda") else 0.0)
        elif workers > 1:
            from nextflow_ar.data.workers import extract_with_workers

            found = extract_with_workers(job, workers, lambda rows: update(0, f"{rows} rows"))
        else:
            found = job.run(process, processes, lambda shard, rows: update(0, f"shard {shard}, {rows} rows"))
        update(1, f"{found['rows']} rows")
    if job.again:
        forget_left_out(job.out, job.again, found["broken"])
    return found
