"""Low-rank adapters through peft: put in, trained, saved on their own, merged into a full checkpoint (extra ``train``)."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import Embedding, Linear

from nextflow_ar.config import ConfigError, ModelConfig, from_dict, to_dict
from nextflow_ar.model.checkpoint import WEIGHTS_FILE, Bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.storage import (
    StorageError,
    pack_weights,
    read_checked,
    read_weights,
    stream_checked,
    weight_files,
    write_atomic,
    write_folder,
)
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.recipe import LoraConfig, ModelRecipe
from nextflow_ar.training.trainable import begin_with

_LOG = logging.getLogger(__name__)
_PREFIX = "base_model.model."
ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE_FILE = "adapter_model.safetensors", "adapter_config.json", "base.json"
"""The first two are peft's own form; the third names the weights that the adapter was trained on."""


def _peft() -> Any:
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("adapters need the package peft: pip install 'nextflow-ar[train]'") from None
    return peft


def add_adapters(model: NextFlowModel, config: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters that change nothing yet into ``model``, and freeze all else but ``modules_to_save``. Raises ConfigError
    for unknown targets.
    """
    peft = _peft()
    modules = dict(model.named_modules())
    linear = [name for name, module in modules.items() if isinstance(module, Linear)]
    for target in config.targets:
        found = [name for name in modules if name == target or name.endswith(f".{target}")]
        if not found or "head" in found or not set(found) <= set(linear):
            accepted = sorted({name.rpartition(".")[2] for name in linear if name.startswith("backbone.")})
            raise ConfigError(
                f"lora.targets: {target!r} is no layer that takes adapters; accepted: {', '.join(accepted)}"
            )
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        lora_dropout=0.0,
        bias="none",
    )
    peft.inject_adapter_in_model(settings, model)
    for name in config.modules_to_save:
        _table(model, name).requires_grad_(True)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # peft draws from the global generator
                parameter.uniform_(-1.0, 1.0, generator=generator).mul_(parameter.shape[1] ** -0.5)


def _table(model: NextFlowModel, name: str) -> Embedding | Linear:
    """What ``modules_to_save`` calls so."""
    table = model.head if name == "head" else model.backbone.embed_tokens
    assert isinstance(table, Embedding | Linear)
    return table


def adapter_weights(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Parameters that train beside a frozen model, by peft's names: adapters', and those of ``modules_to_save``."""
    return {f"{_PREFIX}{name.replace('.default.', '.')}": value.detach() for name, value in named.items()}


def save_adapter(
    folder: Path, named: dict[str, Tensor], recipe: ModelRecipe, bound: dict[str, str], whole: Bundle
) -> None:
    """Write an adapter's folder, in the form that peft reads too, with what else makes it the model ``whole``: its
    configuration, sampling defaults and pixel decoder's digest. ``named``: trained parameters by the adapted model's names.
    ``bound``: digests, of ``start`` among them (:mod:`bound`). Raises StorageError.
    """
    peft, config = _peft(), recipe.lora
    assert config is not None
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        modules_to_save=list(config.modules_to_save) or None,
        base_model_name_or_path=str(recipe.start),
        inference_mode=True,
    )
    base = {
        "weights": bound["start"], "config": to_dict(whole.model.config), "generation": whole.generation,
        "image_tokenizer": str(recipe.image_tokenizer), "codes": bound["image_tokenizer"],
        "decoder": decoder_print(whole.image_tokenizer),
    }  # fmt: skip

    def fill(target: Path) -> None:
        settings.save_pretrained(str(target))
        write_atomic(target / ADAPTER_WEIGHTS, pack_weights(adapter_weights(named)))
        write_atomic(target / BASE_FILE, json.dumps(base, indent=1).encode())

    write_folder(folder, fill)


def decoder_print(tokenizer: ImageTokenizer) -> str:
    """Digest of what :meth:`ImageTokenizer.fingerprint` leaves out, as it is saved (bf16)."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tokenizer.state_dict().items()):
        if name.startswith("decoder."):
            digest.update(name.encode() + tensor.bfloat16().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def weights_print(folder: Path) -> str:
    """Digest of a checkpoint folder's weights: of its file, or of its parts one after the other. Raises StorageError."""
    digest = hashlib.sha256()
    for name in weight_files(folder, WEIGHTS_FILE):
        for block in stream_checked(folder, name):
            digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def merge_into(model: NextFlowModel, weights: dict[str, Tensor], scaling: float) -> NextFlowModel:
    """Add adapters' products to the layers that they sit on, and take over tables that trained whole, in place; ``weights``
    by peft's names. Returns the model.

    Raises StorageError when they do not fit.
    """
    layers = dict(model.named_modules())
    for name, down in weights.items():
        if "lora_" not in name:
            _take_over(layers, name.removeprefix(_PREFIX), down)
        if not name.endswith(".lora_A.weight"):
            continue
        place = name.removeprefix(_PREFIX).removesuffix(".lora_A.weight")
        layer, up = layers.get(place), weights.get(name.replace(".lora_A.", ".lora_B."))
        if not isinstance(layer, Linear) or up is None:
            raise StorageError(f"the adapter is of another model: no linear layer {place} here")
        if layer.weight.shape != (up.shape[0], down.shape[1]):
            raise StorageError(f"the adapter is of another model: {place} has another shape here")
        layer.weight += scaling * (up.float() @ down.float()).to(layer.weight.dtype)
    return model


def _take_over(layers: Mapping[str, torch.nn.Module], name: str, weight: Tensor) -> None:
    """Put ``weight`` into the table of this name. Raises StorageError when the model has none, or of another shape."""
    place = name.removesuffix(".weight")
    table = layers.get(place)
    if not isinstance(table, Embedding | Linear):
        raise StorageError(f"the adapter is of another model: no table {place} here")
    if table.weight.shape != weight.shape:
        raise StorageError(f"the adapter is of another model: {place} has another shape here")
    table.weight.copy_(weight)


def averaged(
    model: NextFlowModel,
    averages: dict[str, Tensor],
    config: LoraConfig | None,
    device: torch.device,
    dtype: torch.dtype = torch.float32,
) -> NextFlowModel:
    """A frozen model of its own: ``model`` with its averages in place of the weights that have them, adapters merged. Every
    tensor goes to ``device`` and ``dtype`` by itself, so that nothing is held twice there.
    """
    weights: dict[str, Tensor] = dict(model.state_dict()) | averages
    found = NextFlowModel.empty(model.config)
    copies = {
        name.replace(".base_layer.", "."): value.detach().to(device, dtype, copy=True)
        for name, value in weights.items()
        if "lora_" not in name
    }
    found.load_state_dict(copies, assign=True)
    found = found.to(device).eval().requires_grad_(False)
    if config is None:
        return found
    told = {k: v.to(device) for k, v in adapter_weights(averages).items() if "lora_" in k}  # tables are there
    return merge_into(found, told, config.alpha / config.rank)


def merge_adapter(bundle: Bundle, base: Path, adapter: Path) -> Bundle:
    """``bundle``, loaded from ``base``, with an adapter's folder merged in: the model that the adapter was trained as, its
    configuration and sampling defaults included. The pixel decoder stays that of ``base``; a warning says so where the
    adapter's run had another.

    Raises StorageError when the adapter is damaged or was trained on other weights or codes.
    """
    try:
        settings = json.loads(read_checked(adapter, ADAPTER_CONFIG))
        known = json.loads(read_checked(adapter, BASE_FILE))
        scaling, weights = float(settings["lora_alpha"]) / int(settings["r"]), known["weights"]
        config = from_dict(ModelConfig, known["config"], str(adapter)) if "config" in known else None
        generation = dict(known.get("generation", bundle.generation))
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{adapter}: not an adapter of this project ({error})") from None
    if weights != weights_print(base):
        raise StorageError(f"{adapter}: it was trained on other weights than those of {base}")
    if known.get("codes", mine := bundle.image_tokenizer.fingerprint()) != mine:
        raise StorageError(
            f"{adapter}: it was trained with the codes of another image tokenizer than {base} has"
        )
    if "decoder" in known and known["decoder"] != decoder_print(bundle.image_tokenizer):
        _LOG.warning(
            "%s was trained beside another pixel decoder than %s has: --image-tokenizer %s takes it over",
            adapter, base, known["image_tokenizer"],
        )  # fmt: skip
    model = bundle.model
    if config is not None and config != model.config:
        model = NextFlowModel.empty(config)
        begin_with(model, bundle.model)
        model = model.eval().requires_grad_(False)
    merge_into(model, read_weights(adapter, ADAPTER_WEIGHTS), scaling)
    return replace(bundle, model=model, generation=generation)
