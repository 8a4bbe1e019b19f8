"""A NextFlow model that starts from real language-model weights (paper section 3: initialised from Qwen2.5-VL).

The text stack, its embeddings and its head are taken over unchanged; ``<boi>``, ``<eoi>`` and the vision codes are new.
So on text alone the new model says what the old one said.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from tokenizers import Tokenizer
from torch import Tensor

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.backbone import LanguageModel, load_language_model
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import BASE_SIZES
from nextflow_ar.sequence.vocab import BOI, EOI, SPECIAL_TOKENS, Vocabulary, fast_tokenizer
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer

_ROW_STEP = 64
"""Rows of an embedding table are kept at a multiple of this, as matrix products like it."""


@dataclass(frozen=True)
class Wiring:
    """What a new model may have otherwise than the paper: keys of ModelConfig, with NextFlow's values as defaults.

    ``scale_input`` "accumulated" and ``positions`` "learned_1d" are TokenFlow's.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    rope_range: float = 64.0
    scale_input: Literal["residual", "accumulated"] = "residual"
    closing_input: Literal["residual", "accumulated"] = "accumulated"
    context_images: Literal["scales", "closing"] = "scales"
    positions: Literal["rope", "learned", "learned_1d"] = "rope"

    def __post_init__(self) -> None:
        if self.context_images == "closing" and self.closing_input != "accumulated":
            raise ValueError("context_images: closing needs closing_input: accumulated")


def initialise_from(
    name: str | Path,
    image_tokenizer: ImageTokenizer,
    wiring: Wiring = Wiring(),
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
) -> Bundle:
    """Model, text tokenizer and image tokenizer, ready to be aligned. ``name``: Qwen2.5-VL's folder or Hub id.

    Code embeddings start as the codebook's vectors, the connector at random, the head's rows for codes at zero, and
    ``<boi>`` and ``<eoi>`` as the mean of all text embeddings. Raises StorageError.
    """
    language = load_language_model(name, dtype)
    core = Tokenizer.from_str(language.tokenizer.backend_tokenizer.to_str())
    lacking = [
        token for token in SPECIAL_TOKENS if token not in (BOI, EOI) and core.token_to_id(token) is None
    ]
    if lacking:
        raise StorageError(f"{name}: its text tokenizer lacks {', '.join(lacking)}")
    known = core.get_vocab_size()
    core.add_special_tokens([BOI, EOI])
    rows = max(language.head.shape[0], core.get_vocab_size())
    rows = -(-rows // _ROW_STEP) * _ROW_STEP
    config = _config(language, image_tokenizer, rows, wiring)
    model = NextFlowModel.empty(config)
    model.scale_inputs.to_empty(device="cpu")
    model.initialise(torch.Generator().manual_seed(seed), prefix="scale_inputs.")
    model.scale_inputs.start_from(image_tokenizer.quantizer.codebook)
    model.scale_inputs.to(dtype)
    embeddings = _taller(language.weights["embed_tokens.weight"], rows, known)
    # the tensors that were loaded become the model's: there is no second copy
    model.backbone.load_state_dict(language.weights | {"embed_tokens.weight": embeddings}, assign=True)
    head = _taller(language.head, rows, known, below=config.codes)
    model.head.load_state_dict({"weight": head}, assign=True)
    vocab = Vocabulary(fast_tokenizer(core), rows, config.codes)
    return Bundle(model.eval().requires_grad_(False), image_tokenizer, vocab, {})


def _taller(table: Tensor, rows: int, known: int, below: int = 0) -> Tensor:
    """A (V, D) table with ``rows`` rows, of which those from ``known`` on are new: the mean of the others; ``below`` rows
    of zeros follow.
    """
    out = table.new_zeros(rows + below, table.shape[1])
    out[: min(known, len(table))] = table[:known]
    out[min(known, len(table)) : rows] = table[:known].float().mean(0).to(table.dtype)
    return out


def _config(
    language: LanguageModel, image_tokenizer: ImageTokenizer, rows: int, wiring: Wiring
) -> ModelConfig:
    text = language.config
    rope: Any = text.rope_parameters
    sections = rope["mrope_section"]
    return ModelConfig(
        text_vocab=rows,
        codes=image_tokenizer.config.quantizer.codebook_size,
        code_dim=image_tokenizer.config.quantizer.dim,
        hidden=text.hidden_size,
        layers=text.num_hidden_layers,
        heads=text.num_attention_heads,
        kv_heads=text.num_key_value_heads or text.num_attention_heads,
        intermediate=text.intermediate_size,
        max_positions=text.max_position_embeddings,
        rms_eps=text.rms_norm_eps,
        rope="qwen",
        rope_theta=float(rope["rope_theta"]),
        rope_sections=(sections[0], sections[1], sections[2]),
        max_scales=len(BASE_SIZES),
        **asdict(wiring),
    )
