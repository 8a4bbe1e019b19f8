"""What a recipe's ``kind`` runs, and the benchmark with a pipeline behind it."""

from __future__ import annotations

import os
import re
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from nextflow_ar.config import ConfigError, ImageTokenizerConfig, from_dict, load_yaml, override, to_dict
from nextflow_ar.generation.sampling import SamplingSettings, SettingError, at_scale
from nextflow_ar.storage import StorageError
from nextflow_ar.types import ImageReady

if TYPE_CHECKING:
    from nextflow_ar.evaluation.playground import BenchSettings
    from nextflow_ar.evaluation.playground_report import Report
    from nextflow_ar.generation.pipeline import NextFlowPipeline
    from nextflow_ar.model.checkpoint import Bundle
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
    from nextflow_ar.training.tokenizer_recipe import TokenizerRecipe

KINDS = ("teacher", "tokenizer", "model", "judge", "world_judge")
_CANVAS = re.compile(r"[1-9]\d*x[1-9]\d*")
SHEET_PROMPTS = (
    "a red circle on a blue background",
    "a dog on a white background",
    "three frogs on an orange background",
    "a blue triangle on a yellow background",
    "a cat left of a rocket on a green background",
    "a green square and a white ring on a black background",
    "four strawberries on a white background",
    "a house above a car on a yellow background",
    "a penguin and a pizza on a purple background",
    "two yellow crosses on a red background",
    "a turtle below a red square on a white background",
    "a purple ring and an orange cross on a black background",
)


def run_recipe(path: Path, changes: list[str], minutes: float | None = None) -> Path:
    """Train what a recipe file says; returns the finished folder. ``minutes``: as many steps as fit, instead of
    the recipe's number.

    Raises ConfigError for a recipe that does not fit.
    """
    seconds = None if minutes is None else 60 * minutes
    values = override(load_yaml(path), changes)
    kind = values.get("kind")
    if kind not in KINDS:
        raise ConfigError(f"{path}: 'kind' is one of {', '.join(KINDS)}, got {kind!r}")
    where = str(path)
    if minutes is not None and kind not in ("tokenizer", "model"):
        raise ConfigError(f"{path}: --minutes is for the kinds tokenizer and model, this is a {kind}")
    if kind not in ("tokenizer", "model") and (processes := os.environ.get("WORLD_SIZE", "1")) != "1":
        raise ConfigError(
            f"{path}: a {kind} is trained by one process, not by {processes}: start it without torchrun"
        )
    if kind == "teacher":
        from nextflow_ar.training.teacher import TeacherRecipe, train_teacher

        teacher = from_dict(TeacherRecipe, values, where)
        return train_teacher(teacher, to_dict(teacher))
    if kind == "tokenizer":
        from nextflow_ar.training.tokenizer_stage import TokenizerRecipe, train_tokenizer

        tokenizer = from_dict(TokenizerRecipe, values, where)
        _named_folders(tokenizer, changes)
        return train_tokenizer(tokenizer, to_dict(tokenizer), seconds)
    if kind == "model":
        from nextflow_ar.model.checkpoint import load_generation
        from nextflow_ar.tokenizer.image_tokenizer import tokenizer_config
        from nextflow_ar.training.model_stage import ModelRecipe, train_model

        model = from_dict(ModelRecipe, values, where)
        _known_defaults(model.generation, f"{path}: generation")
        inherited = {} if model.base is None else load_generation(model.base)
        image = tokenizer_config(model.image_tokenizer)
        _fitting_defaults(inherited | model.generation, image, f"{path}: generation")
        return train_model(model, to_dict(model), preview_sheet, seconds)
    if kind == "world_judge":
        from nextflow_ar.app.world_command import train_judge_of

        return train_judge_of(values, where)
    return _judge(values, where)


def _named_folders(recipe: TokenizerRecipe, changes: Sequence[str]) -> None:
    """Raises ConfigError for a folder of pictures that ``--set`` names and that is not there: ``optional`` is for those of
    the recipe.
    """
    asked = {change.partition("=")[0] for change in changes}
    for group, sources in (("data", recipe.data), ("heldout", recipe.heldout)):
        for name, source in sources.items():
            key = f"{group}.{name}.folder"
            if key in asked and source.folder is not None and not source.folder.is_dir():
                raise ConfigError(f"{key}: {source.folder}: no such folder of pictures")


def _judge(values: dict[str, Any], where: str) -> Path:
    from rich.console import Console

    from nextflow_ar.evaluation.judge_training import JudgeSettings, train_judge

    plain = {k: v for k, v in values.items() if k not in ("kind", "out")}
    if "out" not in values:
        raise ConfigError(f"{where}: missing key 'out'")
    out = Path(values["out"])
    console = Console(stderr=True)
    train_judge(
        from_dict(JudgeSettings, plain, where), out, lambda line: console.print(line, highlight=False)
    )
    return out


def initialise_model(
    language_model: str, image_tokenizer: str, out: Path, seed: int, wiring: Mapping[str, Any]
) -> None:
    """A checkpoint folder whose text stack is a Qwen2.5-VL's. ``wiring``: what is not the paper's, by the keys of
    :class:`~nextflow_ar.model.importing.Wiring`. Raises ConfigError, StorageError.
    """
    import torch

    from nextflow_ar.model.checkpoint import check_output, save_bundle
    from nextflow_ar.model.importing import Wiring, initialise_from
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

    check_output(out, [language_model, image_tokenizer])
    chosen = from_dict(Wiring, dict(wiring), "init")  # before anything large is read
    tokenizer = ImageTokenizer.from_pretrained(image_tokenizer)
    bundle = initialise_from(language_model, tokenizer, chosen, dtype=torch.bfloat16, seed=seed)
    parts = f"Text stack of {language_model}, image tokenizer {image_tokenizer}."
    card = f"# {out.name}\n\n{parts} Not aligned: it cannot draw yet.\n"
    save_bundle(out, bundle.model, tokenizer, bundle.vocab.tokenizer, {}, card)


def _known_defaults(generation: Mapping[str, Any], where: str) -> None:
    """Raises ConfigError, one line, for a key that generation.json does not have, or a value that it cannot have there."""
    from nextflow_ar.generation.pipeline import OPTIONS

    settings = SamplingSettings.__dataclass_fields__
    accepted = [*settings, *OPTIONS]
    unknown = sorted(set(generation) - set(accepted))
    if unknown:
        raise ConfigError(
            f"{where}: unknown sampling default {unknown[0]!r}; accepted: {', '.join(accepted)}"
        )
    for key, value in generation.items():
        said = _wrongly(key, value)
        if said:
            raise ConfigError(f"{where}: {key} is {said}, got {value!r}")
    numbers = {k: tuple(v) if isinstance(v, list) else v for k, v in generation.items() if k in settings}
    alike = {"thought_temperature": "temperature", "answer_guidance": "guidance"}
    tried = [("", numbers), *((f"{k}: ", {s: generation[k]}) for k, s in alike.items() if k in generation)]
    for key, values in tried:
        try:
            SamplingSettings(**values)
        except SettingError as error:
            raise ConfigError(f"{where}: {key}{error}") from None


def _fitting_defaults(generation: Mapping[str, Any], tokenizer: ImageTokenizerConfig, where: str) -> None:
    """Raises ConfigError, one line, for a canvas that is no size of the image tokenizer, and for a list of neither two
    values nor one for each of the default's scales: at the first picture it would be too late.
    """
    from nextflow_ar.generation.pipeline import canvases_of, default_of

    try:
        scales = len(default_of(generation, tokenizer))
        canvases_of(generation, tokenizer)
        for key in SamplingSettings.__dataclass_fields__.keys() & generation.keys():
            value = generation[key]
            at_scale(tuple(value) if isinstance(value, list) else value, 0, scales, key)
    except (StorageError, SettingError) as error:
        raise ConfigError(f"{where}: {str(error).removeprefix('generation.json: ')}") from None


def _wrongly(key: str, value: Any) -> str:
    """What the value of a sampling default should be, or nothing where it is of that kind."""
    if key in ("think", "think_edits", "think_told", "dialogue"):
        return "" if isinstance(value, bool) else "true or false"
    if key == "size":
        return "" if isinstance(value, str) and _CANVAS.fullmatch(value) else "a size in pixels such as 96x64"
    if key == "fit":
        return "" if value in ("crop", "pad") else "crop or pad"
    if key in ("caption", "video", "next_frame"):
        return "" if isinstance(value, str) else "a text"
    if key == "canvases":
        sizes = value if isinstance(value, list) else [None]
        fit = all(isinstance(size, str) and _CANVAS.fullmatch(size) for size in sizes)
        return "" if fit else "a list of sizes in pixels such as [64x64, 96x64]"
    several = isinstance(value, list) and value and key in SamplingSettings.__dataclass_fields__
    for number in value if several else [value]:
        if isinstance(number, bool) or not isinstance(number, (int, float)):
            return "a number" + (
                ", or a list of them" if key in SamplingSettings.__dataclass_fields__ else ""
            )
    return ""


def export_bundle(
    model: str,
    out: Path,
    card: str | None,
    changes: list[str],
    adapter: Path | None = None,
    image_tokenizer: str | None = None,
    average: Sequence[str] = (),
    share: float | None = None,
) -> None:
    """Write a checkpoint folder anew. ``changes``: KEY=VALUE of its sampling defaults. ``adapter``: folder of one, trained
    on these weights, to merge in. ``image_tokenizer``: one of the same codes with another decoder. ``average``: checkpoints
    of the same architecture and vocabulary; the weights become the mean of all, in which those count for ``share`` together
    (None: every one as much as this). Raises ConfigError, StorageError.
    """
    import torch

    from nextflow_ar.generation.pipeline import NextFlowPipeline, resolve_model
    from nextflow_ar.model.checkpoint import check_output, load_bundle, save_bundle

    check_output(out, [name for name in (model, adapter, image_tokenizer, *average) if name is not None])
    if share is not None and not (average and 0 < share < 1):
        raise ConfigError(f"a share of the mean is above 0 and below 1 and needs --average, got {share:g}")
    folder = resolve_model(model)
    # computed with in fp32; else what is stored is only copied
    bundle = load_bundle(folder, dtype=torch.float32 if adapter is not None or average else torch.bfloat16)
    if adapter is not None:
        from nextflow_ar.training.adapters import merge_adapter

        bundle = merge_adapter(bundle, folder, adapter)
    if average:
        _average(bundle, average, share)
    if image_tokenizer is not None:
        bundle.image_tokenizer = _same_codes(bundle.image_tokenizer, image_tokenizer)
    generation = override(bundle.generation, changes)
    _known_defaults(generation, "--set")
    _fitting_defaults(generation, bundle.image_tokenizer.config, "--set")
    bundle.generation = generation
    NextFlowPipeline(bundle)  # senseless settings are an error here, not at the next load
    text = card if card is not None else bundle.card
    save_bundle(out, bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, generation, text)


def _average(bundle: Bundle, names: Sequence[str], share: float | None) -> None:
    """The mean of the bundle's weights and those of checkpoints that read and draw the same tokens. Theirs are read tensor
    by tensor.
    """
    import torch

    from nextflow_ar.generation.pipeline import resolve_model
    from nextflow_ar.model.checkpoint import WEIGHTS_FILE, load_architecture
    from nextflow_ar.storage import StorageError, stream_weights
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

    theirs = (len(names) / (1 + len(names)) if share is None else share) / len(names)
    weights = {name: value for name, value in bundle.model.state_dict().items() if value.is_floating_point()}
    with torch.no_grad():
        for value in weights.values():
            value.mul_(1 - theirs * len(names))
    for name in names:
        folder = resolve_model(name)
        config, text_tokenizer = load_architecture(folder)
        if config != bundle.model.config:
            raise ConfigError(
                f"{name} has another architecture: only weights of the same one can be averaged"
            )
        if text_tokenizer.get_vocab() != bundle.vocab.tokenizer.get_vocab():
            raise ConfigError(f"{name} has another text vocabulary: its weights stand for other words")
        images = ImageTokenizer.from_pretrained(folder / "image_tokenizer")
        if images.fingerprint() != bundle.image_tokenizer.fingerprint():
            raise ConfigError(f"{name} draws with other codes: its weights stand for other pictures")
        missing = set(weights)
        with torch.no_grad():
            for key, value in stream_weights(folder, WEIGHTS_FILE):
                if key in weights:
                    weights[key].add_(value.float(), alpha=theirs)
                    missing.discard(key)
        if missing:
            raise StorageError(f"{name}: its weights lack {min(missing)}")


def _same_codes(old: ImageTokenizer, name: str) -> ImageTokenizer:
    """The tokenizer ``name``, if it makes the codes that ``old`` makes."""
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

    found = ImageTokenizer.from_pretrained(name)
    if found.fingerprint() != old.fingerprint():
        raise ConfigError(
            f"{name} makes other codes than the model was trained on: only a tokenizer that differs in its decoder fits"
        )
    return found


def preview_sheet(bundle: Bundle, step: int) -> list[np.ndarray]:
    """Rows of pictures for a training's sample sheet: fixed prompts, two seeds each; and the coarse scales of the first.

    Drawn in fp32 or bf16 as the machine prefers, from the averaged weights.
    """
    import torch

    from nextflow_ar.generation.pipeline import NextFlowPipeline, best_dtype

    bundle.model.to(best_dtype(bundle.model.head.weight.device))
    pipeline = NextFlowPipeline(bundle)
    rows = []
    for seed in (1, 2):
        try:
            pictures = pipeline.generate(SHEET_PROMPTS, seed=seed)
        except torch.OutOfMemoryError:  # beside a training: the same pictures, one by one
            pictures = [pipeline.generate(prompt, seed=seed)[0] for prompt in SHEET_PROMPTS]
        rows.append(np.stack([np.asarray(picture) for picture in pictures]))
    return rows


def evaluate_tokenizer(
    model: str, out: Path, photos: list[Path], per_type: int, judge_folder: Path | None, as_json: bool
) -> str:
    """The suite ``tokenizer``: tables into ``out``/report.json and .txt, sheets beside them; returns what to print."""
    import json

    from nextflow_ar.evaluation.judge import Judge
    from nextflow_ar.evaluation.tokenizer_suite import evaluate_tokenizer_suite, table
    from nextflow_ar.storage import write_atomic
    from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
    from nextflow_ar.tokenizer.pictures import picture_files
    from nextflow_ar.training.runs import progress_bar

    files = picture_files(photos, strict=True)  # before anything is loaded
    tokenizer = ImageTokenizer.from_pretrained(model)
    judge = Judge.load(judge_folder) if judge_folder is not None else Judge.load()
    with progress_bar("tokenizer", 1) as update:

        def show(part: str, done: int, total: int) -> None:
            update(done / total, part)

        found = evaluate_tokenizer_suite(tokenizer, out, files, per_type=per_type, judge=judge, progress=show)
    found["model"] = model
    text = json.dumps(found, indent=1)
    write_atomic(out / "report.json", text.encode())
    write_atomic(out / "report.txt", (table(found) + "\n").encode())
    return text if as_json else table(found)


def evaluate_playground(
    pipeline: NextFlowPipeline,
    settings: SamplingSettings,
    seed: int,
    out: Path,
    size: BenchSettings,
    judge_folder: Path | None,
    model: str,
) -> Report:
    """PlaygroundBench for a pipeline: drawing, captions, and reconstructions as the ceiling."""
    from nextflow_ar.evaluation.judge import Judge
    from nextflow_ar.evaluation.playground import check_canvas, evaluate
    from nextflow_ar.training.runs import progress_bar

    check_canvas(pipeline.schedule_for().image_size(pipeline.image_tokenizer.config.downsample), model)

    def draw(prompts: list[str]) -> np.ndarray:
        # Every prompt has a seed of its own, which follows from its words: pictures are independent of each other.
        seeds = [(seed + zlib.crc32(text.encode())) % 2**63 for text in prompts]
        found: dict[int, np.ndarray] = {}
        for event in pipeline.stream(pipeline.requests(prompts, seeds, settings)):
            if isinstance(event, ImageReady):
                found[event.row] = np.asarray(event.image)
        return np.stack([found[i] for i in range(len(prompts))])

    def describe(pictures: np.ndarray) -> list[str]:
        return pipeline.describe(list(pictures))

    def through(pictures: np.ndarray) -> np.ndarray:
        return np.stack([np.asarray(pipeline.reconstruct(picture)) for picture in pictures])

    about: dict[str, Any] = {"think": pipeline.thinks, "model": model, "seed": seed} | {
        k: list(v) if isinstance(v, tuple) else v for k, v in asdict(settings).items()
    }
    with progress_bar("playground", 1) as update:

        def show(part: str, done: int, total: int) -> None:
            update(done / total, part)

        judge = Judge.load(judge_folder) if judge_folder is not None else None
        return evaluate(
            draw, describe, through, out=out, settings=size, judge=judge, about=about, progress=show
        )
