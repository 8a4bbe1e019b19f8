"""Low-rank adapters through peft: put in, trained, saved on their own, merged into a full checkpoint (extra ``train``)."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.model.checkpoint import WEIGHTS_FILE, Bundle, checkpoint_folder
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
from nextflow_ar.training.recipe import LoraConfig

ADAPTER_WEIGHTS, ADAPTER_CONFIG, BASE_FILE = "adapter_model.safetensors", "adapter_config.json", "base.json"
"""The first two are peft's own form; the third names the weights that the adapter was trained on."""


def _peft() -> Any:
    try:
        import peft  # pyright: ignore[reportMissingImports]
    except ImportError:
        raise ConfigError("adapters need the package peft: pip install 'nextflow-ar[train]'") from None
    return peft


def add_adapters(model: NextFlowModel, config: LoraConfig, generator: torch.Generator) -> None:
    """Put adapters that change nothing yet into ``model``, and freeze all else. Raises ConfigError for unknown targets."""
    peft = _peft()
    linear = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    for target in config.targets:
        found = [name for name in linear if name == target or name.endswith(f".{target}")]
        if not found or "head" in found:
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
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_A" in name:  # peft draws from the global generator
                parameter.uniform_(-1.0, 1.0, generator=generator).mul_(parameter.shape[1] ** -0.5)


def adapter_weights(named: dict[str, Tensor]) -> dict[str, Tensor]:
    """Of a model's parameters those of its adapters, by peft's names."""
    return {
        f"base_model.model.{name.replace('.default.', '.')}": value.detach()
        for name, value in named.items()
        if "lora_" in name
    }


def save_adapter(folder: Path, named: dict[str, Tensor], config: LoraConfig, start: Path) -> None:
    """Write an adapter's folder, in the form that peft reads too. ``named``: parameters by the adapted model's names.
    ``start``: what it was trained on, as a recipe names it. Raises StorageError.
    """
    peft = _peft()
    settings = peft.LoraConfig(
        r=config.rank,
        lora_alpha=config.alpha,
        target_modules=list(config.targets),
        base_model_name_or_path=str(start),
        inference_mode=True,
    )

    def fill(target: Path) -> None:
        settings.save_pretrained(str(target))
        write_atomic(target / ADAPTER_WEIGHTS, pack_weights(adapter_weights(named)))
        write_atomic(
            target / BASE_FILE, json.dumps({"weights": weights_print(checkpoint_folder(start))}).encode()
        )

    write_folder(folder, fill)


def weights_print(folder: Path) -> str:
    """Digest of a checkpoint folder's weights: of its file, or of its parts one after the other. Raises StorageError."""
    digest = hashlib.sha256()
    for name in weight_files(folder, WEIGHTS_FILE):
        for block in stream_checked(folder, name):
            digest.update(block)
    return digest.hexdigest()


@torch.no_grad()
def merge_into(model: NextFlowModel, weights: dict[str, Tensor], scaling: float) -> NextFlowModel:
    """Add adapters' products to the layers that they sit on, in place; ``weights`` by peft's names. Returns the model.

    Raises StorageError when they do not fit.
    """
    layers = dict(model.named_modules())
    for name, down in weights.items():
        if not name.endswith(".lora_A.weight"):
            continue
        place = name.removeprefix("base_model.model.").removesuffix(".lora_A.weight")
        layer, up = layers.get(place), weights.get(name.replace(".lora_A.", ".lora_B."))
        if not isinstance(layer, torch.nn.Linear) or up is None:
            raise StorageError(f"the adapter is of another model: no linear layer {place} here")
        if layer.weight.shape != (up.shape[0], down.shape[1]):
            raise StorageError(f"the adapter is of another model: {place} has another shape here")
        layer.weight += scaling * (up.float() @ down.float()).to(layer.weight.dtype)
    return model


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
    told = {name: value.to(device) for name, value in adapter_weights(averages).items()}
    return merge_into(found, told, config.alpha / config.rank)


def merge_adapter(bundle: Bundle, base: Path, adapter: Path) -> Bundle:
    """``bundle``, loaded from ``base``, with an adapter's folder merged in (in place).

    Raises StorageError when the adapter is damaged or was trained on other weights.
    """
    try:
        settings = json.loads(read_checked(adapter, ADAPTER_CONFIG))
        known = json.loads(read_checked(adapter, BASE_FILE))["weights"]
        scaling = float(settings["lora_alpha"]) / int(settings["r"])
    except (ValueError, KeyError, TypeError) as error:
        raise StorageError(f"{adapter}: not an adapter of this project ({error})") from None
    if known != weights_print(base):
        raise StorageError(f"{adapter}: it was trained on other weights than those of {base}")
    merge_into(bundle.model, read_weights(adapter, ADAPTER_WEIGHTS), scaling)
    return bundle
