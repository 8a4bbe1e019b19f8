"""An image tokenizer that starts from the weights of another one, perhaps a smaller one."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import deeper


@torch.no_grad()
def without_semantics(old: ImageTokenizer) -> ImageTokenizer:
    """The pixel branch of a dual tokenizer as a tokenizer by itself; what its decoder read from semantics is lost."""
    dim, half = old.config.quantizer.pixel_dim, old.config.quantizer.semantic_dim
    quantizer = replace(old.config.quantizer, semantic_dim=0)
    config = replace(old.config, semantic=None, quantizer=quantizer)
    model = ImageTokenizer(config)
    state = {k: v for k, v in old.state_dict().items() if not k.startswith("semantic_")}
    state["quantizer.codebook"] = state["quantizer.codebook"][:, half:]
    if old.config.decoder_sees_semantic:
        state["decoder.layers.0.weight"] = state["decoder.layers.0.weight"][:, -dim:]
    model.load_state_dict(state)
    return model


@torch.no_grad()
def start_from(model: ImageTokenizer, old: ImageTokenizer, larger: tuple[str, ...] = ()) -> None:
    """Take over ``old``'s weights. A tokenizer of the pixel branch alone becomes the pixel half of a dual one: the
    codebook's and the decoder's semantic channels start at zero, so the first pictures are the old ones. ``larger``:
    of "encoder" and "decoder", what may be larger than ``old``'s: one of more blocks starts by doing what the old one
    does, a wider one starts anew. The codebook goes on from where it is, but with an encoder that starts anew, whose
    features have nothing to do with it, learns anew. Raises ConfigError when anything else differs.
    """
    state, target = old.state_dict(), model.state_dict()
    extra = model.config.quantizer.semantic_dim - old.config.quantizer.semantic_dim
    if extra:
        wider = target["quantizer.codebook"].new_zeros(target["quantizer.codebook"].shape)
        wider[:, extra:] = state["quantizer.codebook"]
        state["quantizer.codebook"] = wider
        if model.config.decoder_sees_semantic:
            first = torch.zeros_like(target["decoder.layers.0.weight"])
            first[:, extra:] = state["decoder.layers.0.weight"]
            state["decoder.layers.0.weight"] = first
    for part in larger:
        state = _grown(part, model, old, state)
    wrong = [k for k, v in state.items() if k not in target or target[k].shape != v.shape]
    allowed = ("semantic_", "quantizer.refiner.", *(f"{part}." for part in larger))
    missing = [k for k in target if k not in state and not k.startswith(allowed)]
    if wrong or missing:
        raise ConfigError(f"the tokenizer to start from does not fit this recipe's: {(wrong + missing)[0]}")
    model.load_state_dict(state, strict=False)
    if any(name.startswith("encoder.") for name in state):
        model.quantizer.keep_trained()


def _grown(
    part: str, model: ImageTokenizer, old: ImageTokenizer, state: dict[str, Tensor]
) -> dict[str, Tensor]:
    """``state`` with the weights of ``part`` under the names that a deeper one has for them; without, for a wider one."""
    channels, theirs = (getattr(t.config, f"{part}_channels") for t in (model, old))
    blocks, fewer = (getattr(t.config, f"{part}_blocks") for t in (model, old))
    if channels == theirs and blocks == fewer:
        return state
    prefix = part + "."
    kept = {k: v for k, v in state.items() if not k.startswith(prefix)}
    if channels == theirs and blocks > fewer:
        own = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        between = 1 if part == "encoder" else 2
        kept |= {prefix + k: v for k, v in deeper(own, len(channels), fewer, blocks, between).items()}
        for (
            name,
            value,
        ) in model.state_dict().items():  # a new block adds nothing: its last kernel is zero already
            if name.startswith(prefix) and name not in kept and name.endswith("conv2.bias"):
                kept[name] = torch.zeros_like(value)
    return kept
