"""Checkpoint folders: everything generation needs, architecture included, in one place.

``config.json`` (ModelConfig), ``model.safetensors`` (bf16; a large model has it in parts, and
``model.safetensors.index.json``), ``text_tokenizer/``, ``image_tokenizer/``,
``generation.json`` (sampling defaults), ``README.md`` (model card), ``checksums.json``. For transformers' Auto classes,
``config.json`` also says which class loads the folder, and ``nextflow_hub.py`` imports that class from this package.
"""

from __future__ import annotations

import importlib.resources
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, ModelConfig, from_dict, to_dict
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.sequence.layout import LayoutOptions
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast, Vocabulary, load_text_tokenizer
from nextflow_ar.storage import (
    PART_BYTES,
    StorageError,
    check_replaceable,
    find_folder,
    read_checked,
    stream_weights,
    write_atomic,
    write_folder,
    write_weights,
)
from nextflow_ar.tokenizer.image_tokenizer import CONFIG_FILE, WEIGHTS_FILE, ImageTokenizer

GENERATION_FILE = "generation.json"
CARD_FILE = "README.md"
SHIM_FILE = "nextflow_hub.py"
SHIM = '''"""Lets transformers load this folder (trust_remote_code=True).

The model itself is in the package: pip install nextflow-ar.
"""

from nextflow_ar.hub import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowProcessor

__all__ = ["NextFlowConfig", "NextFlowForConditionalGeneration", "NextFlowProcessor"]
'''
_MODEL_CLASS = "nextflow_hub.NextFlowForConditionalGeneration"
FOR_TRANSFORMERS: dict[str, Any] = {
    "model_type": "nextflow_ar",
    "architectures": ["NextFlowForConditionalGeneration"],
    "auto_map": {
        "AutoConfig": "nextflow_hub.NextFlowConfig",
        "AutoModel": _MODEL_CLASS,
        "AutoModelForMultimodalLM": _MODEL_CLASS,
        "AutoProcessor": "nextflow_hub.NextFlowProcessor",
    },
}
"""What ``config.json`` holds beside the architecture."""
BUNDLED = ("nano",)
"""Models that come with the package."""
_OF_RUNS = ("final", "adapter")
"""Folders that a run ends with, in its own."""
_RUN_FILES = ("checkpoint.pt", "metrics.jsonl", "checkpoints")
"""A run's folder holds one of them at least, beside its recipe.yaml."""


@dataclass(eq=False)
class Bundle:
    """A loaded checkpoint folder."""

    model: NextFlowModel
    image_tokenizer: ImageTokenizer
    vocab: Vocabulary
    generation: dict[str, Any]
    card: str = ""

    @property
    def layout(self) -> LayoutOptions:
        """How this model's sequences are laid out."""
        config = self.model.config
        return LayoutOptions(config.rope_range, context_images=config.context_images, copies=config.copies)

    def __post_init__(self) -> None:
        self.model.scale_inputs.ask(self.image_tokenizer.quantizer)


def save_bundle(
    folder: Path,
    model: NextFlowModel,
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PreTrainedTokenizerFast,
    generation: dict[str, Any],
    card: str,
    part_bytes: int = PART_BYTES,
) -> None:
    """Write a checkpoint folder atomically, its weights in parts above ``part_bytes``.

    Raises StorageError; the old folder then stays.
    """
    bundle = Bundle(
        model,
        image_tokenizer,
        Vocabulary(text_tokenizer, model.config.text_vocab, model.config.codes),
        generation,
        card,
    )
    write_folder(folder, lambda target: fill_bundle(target, bundle, part_bytes))


def fill_bundle(target: Path, bundle: Bundle, part_bytes: int = PART_BYTES) -> None:
    """Write a bundle's files, weights in bf16, into a folder that is there; one tensor at a time is converted."""
    state = bundle.model.state_dict()
    like = {
        k: torch.empty(v.shape, dtype=torch.bfloat16 if v.is_floating_point() else v.dtype, device="meta")
        for k, v in state.items()
    }

    def read(names: list[str]) -> Iterator[Tensor]:
        return (state[name].to(like[name].dtype) for name in names)

    _fill(
        target,
        bundle.model.config,
        lambda folder: write_weights(folder, WEIGHTS_FILE, like, read, part_bytes),
        bundle.image_tokenizer,
        bundle.vocab.tokenizer,
        bundle.generation,
        bundle.card,
    )


def write_bundle(
    folder: Path,
    config: ModelConfig,
    weights: Callable[[Path], None],
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PreTrainedTokenizerFast,
    generation: dict[str, Any],
    card: str,
) -> None:
    """:func:`save_bundle` for weights that need not be in memory: ``weights(folder)`` writes their file, or their parts
    and an index.
    """
    write_folder(
        folder,
        lambda target: _fill(target, config, weights, image_tokenizer, text_tokenizer, generation, card),
    )


def _fill(
    target: Path,
    config: ModelConfig,
    weights: Callable[[Path], None],
    image_tokenizer: ImageTokenizer,
    text_tokenizer: PreTrainedTokenizerFast,
    generation: dict[str, Any],
    card: str,
) -> None:
    write_atomic(target / CONFIG_FILE, json.dumps(to_dict(config) | FOR_TRANSFORMERS, indent=1).encode())
    write_atomic(target / SHIM_FILE, SHIM.encode())
    weights(target)
    write_atomic(target / GENERATION_FILE, json.dumps(generation, indent=1).encode())
    write_atomic(target / CARD_FILE, card.encode())
    text_tokenizer.save_pretrained(target / "text_tokenizer")
    image_tokenizer.save_pretrained(target / "image_tokenizer")


def load_bundle(
    folder: Path, device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32
) -> Bundle:
    """Load a checkpoint folder for inference. Every tensor goes to ``device`` and ``dtype`` as it is read: a second copy
    of the weights is never held.

    Raises StorageError, one line, for a missing or damaged file or weights that do not fit the configuration.
    """
    config = _config(folder)
    model = NextFlowModel.empty(config)
    weights = {
        name: value.to(device, dtype if value.is_floating_point() else value.dtype, copy=True)
        for name, value in stream_weights(folder, WEIGHTS_FILE)
    }
    try:
        model.load_state_dict(weights, assign=True)
    except RuntimeError as error:
        raise StorageError(
            f"{folder}: the weights do not fit the configuration: {str(error)[:120]}"
        ) from None
    generation = load_generation(folder)
    vocab = Vocabulary(load_text_tokenizer(folder / "text_tokenizer"), config.text_vocab, config.codes)
    image_tokenizer = ImageTokenizer.from_pretrained(folder / "image_tokenizer")
    model = model.to(device=device, dtype=dtype).eval().requires_grad_(False)
    card = folder / CARD_FILE  # prose, which people edit: its checksum does not count
    told = card.read_text("utf-8", "replace") if card.is_file() else ""
    return Bundle(model, image_tokenizer.to(device), vocab, generation, told)


def find_checkpoint(name: Path | str) -> Path | None:
    """Folder of a bundled model, a checkpoint folder, or that of a Hub id (downloaded); None where there is none.

    Raises StorageError when a download fails.
    """
    if str(name) in BUNDLED:
        return Path(str(importlib.resources.files("nextflow_ar") / "checkpoints" / str(name)))
    return find_folder(name)


def checkpoint_folder(name: Path | str) -> Path:
    """:func:`find_checkpoint`; raises StorageError where there is none, too."""
    folder = find_checkpoint(name)
    if folder is None:
        raise StorageError(
            f"{name}: no such checkpoint folder; {', '.join(BUNDLED)} or a Hub id will do, too"
        )
    return folder


def check_output(folder: Path, read: Iterable[Path | str] = ()) -> None:
    """Whether a command may write a checkpoint of its own as ``folder``: as :func:`~nextflow_ar.storage.check_replaceable`
    says, but neither where a training writes its result nor over what the command reads from (``read``: names of models,
    folders). Raises StorageError.
    """
    check_replaceable(folder)
    place = folder.resolve()
    run = place.parent
    ran = (run / "recipe.yaml").is_file() and any((run / name).exists() for name in _RUN_FILES)
    if ran and place.name in _OF_RUNS:
        raise StorageError(f"{folder} is what the run in {run} trained: name a folder outside of the run")
    for name in read:
        source = Path(name).resolve()
        if str(name) not in BUNDLED and source.is_dir() and place in (source, *source.parents):
            raise StorageError(f"{folder} would replace {name}, which is read from: name another folder")


def load_generation(folder: Path) -> dict[str, Any]:
    """A checkpoint folder's sampling defaults. Raises StorageError."""
    try:
        found = json.loads(read_checked(folder, GENERATION_FILE))
        if not isinstance(found, dict):
            raise ValueError("no mapping of keys to values")
        return found
    except ValueError as error:
        raise StorageError(f"{folder}: {GENERATION_FILE} is not valid JSON: {error}") from None


def load_architecture(folder: Path) -> tuple[ModelConfig, PreTrainedTokenizerFast]:
    """A checkpoint folder's configuration and text tokenizer; no weights are read. Raises StorageError."""
    return _config(folder), load_text_tokenizer(folder / "text_tokenizer")


def _config(folder: Path) -> ModelConfig:
    try:
        found = json.loads(read_checked(folder, CONFIG_FILE))
        if isinstance(found, dict):
            found = {k: v for k, v in found.items() if k not in FOR_TRANSFORMERS}
        return from_dict(ModelConfig, found, str(folder / CONFIG_FILE))
    except (ValueError, ConfigError) as error:
        raise StorageError(
            f"{folder}: {CONFIG_FILE} does not fit: {' '.join(str(error).split())[:160]}"
        ) from None
