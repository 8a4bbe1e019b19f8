"""transformers' Qwen2.5-VL text stack as the transformer, with the frequency layout as the one thing added."""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import AutoConfig, AutoTokenizer, Cache, DynamicCache, PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLConfig, Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import (
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLTextModel,
)

from nextflow_ar.config import ModelConfig
from nextflow_ar.model import attention
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.semantic import quiet_transformers

_CACHE = (
    "cache" if "cache" in inspect.signature(Qwen2_5_VLTextModel.forward).parameters else "past_key_values"
)
"""transformers 5.24 renamed the argument."""


def new_cache() -> Cache:
    """An empty KV cache that grows with what it is given."""
    return DynamicCache()


def text_config(config: ModelConfig) -> Qwen2_5_VLTextConfig:
    """The stack's own configuration."""
    return Qwen2_5_VLTextConfig(
        vocab_size=config.text_vocab,
        hidden_size=config.hidden,
        intermediate_size=config.intermediate,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        max_position_embeddings=config.max_positions,
        rms_norm_eps=config.rms_eps,
        rope_parameters={
            "rope_type": "default",
            "rope_theta": config.rope_theta,
            "mrope_section": list(config.rope_sections),
        },
        attn_implementation=attention.NAME,  # pyright: ignore[reportCallIssue]
        use_cache=False,
        bos_token_id=None,
        eos_token_id=None,
    )


def axis_frequencies(config: ModelConfig) -> Float[Tensor, " half"]:
    """Inverse frequencies of half a head, where every axis has its own ladder from 1 down towards 1 / theta.

    Qwen deals one ladder out in contiguous sections, which leaves the columns only its slowest part; a small model that
    starts from nothing needs fast and slow frequencies on each axis.
    """
    ladders = [config.rope_theta ** (-torch.arange(n, dtype=torch.float32) / n) for n in config.rope_sections]
    return torch.cat(ladders)


class Backbone(Qwen2_5_VLTextModel):
    """The text stack fed with embeddings, Multiscale 3D RoPE coordinates and a block mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(text_config(config))
        self.one_axis = config.positions == "learned_1d"
        if config.rope == "per_axis":
            self._set_frequencies(axis_frequencies(config))

    def compute_frequencies(self, config: ModelConfig) -> None:
        """What a stack made on the meta device lacks beside its weights: frequencies, which no file holds."""
        if config.rope == "per_axis":
            self._set_frequencies(axis_frequencies(config))
        else:
            rope: Any = type(self.rotary_emb)
            self._set_frequencies(rope(text_config(config)).inv_freq)

    def _set_frequencies(self, frequencies: Tensor) -> None:
        self.rotary_emb.register_buffer("inv_freq", frequencies, persistent=False)
        self.rotary_emb.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """Move or cast the stack; frequencies stay in fp32: rounded to bf16 they are 0.4 % off, radians at far places."""
        rope = self.rotary_emb
        kept = {name: getattr(rope, name) for name in ("inv_freq", "original_inv_freq")}
        moved = super()._apply(fn, recurse)
        for name, old in kept.items():
            new = getattr(rope, name)
            if new.dtype in (torch.bfloat16, torch.float16):
                setattr(rope, name, old.to(new.device))
        return moved

    def run(
        self,
        embeddings: Float[Tensor, "b l d"],
        positions: Float[Tensor, "3 b l"],
        mask: Bool[Tensor, "b 1 l k"] | attention.RowGroups | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Hidden states after the last norm.

        ``positions``: (row, column, scale), as the layout makes them; of one axis, the scale coordinate is all three.
        ``mask``: None when every query may see every cached and new key.
        """
        row, column, scale = positions.unbind(0)
        if self.one_axis:
            row = column = scale
        out = super().forward(
            inputs_embeds=embeddings,  # pyright: ignore[reportArgumentType]
            position_ids=torch.stack([scale, row, column]),  # pyright: ignore[reportArgumentType]
            attention_mask={"full_attention": mask},  # pyright: ignore[reportArgumentType]
            **{_CACHE: cache},  # pyright: ignore[reportArgumentType]
            use_cache=cache is not None,
            is_causal=False,  # pyright: ignore[reportCallIssue]
        )
        return out.last_hidden_state  # pyright: ignore[reportReturnType]


@dataclass(frozen=True, eq=False)
class LanguageModel:
    """What a Qwen2.5-VL checkpoint gives: its text stack's weights, its head (V, D), its settings, its text tokenizer."""

    weights: dict[str, Tensor]
    head: Tensor
    config: Qwen2_5_VLTextConfig
    tokenizer: PreTrainedTokenizerFast


def load_language_model(name: str | Path, dtype: torch.dtype) -> LanguageModel:
    """The text stack of a Qwen2.5-VL of any size, from a folder or a Hub id, sharded or not; its ViT is left out.

    Raises StorageError, one line, when it is missing, damaged or another model.
    """
    _check_name(str(name))
    try:
        with quiet_transformers():
            found = AutoConfig.from_pretrained(name)
            if not isinstance(found, Qwen2_5_VLConfig):
                raise StorageError(f"{name}: a {found.model_type} is no Qwen2.5-VL")
            _known_settings(found.text_config)
            loaded: Any = Qwen2_5_VLForConditionalGeneration.from_pretrained(
                name, dtype=dtype, output_loading_info=True, ignore_mismatched_sizes=True
            )
            whole, report = loaded
            tokenizer = AutoTokenizer.from_pretrained(name)
    except StorageError:
        raise
    except Exception as error:  # safetensors and the Hub raise kinds of their own
        reason = textwrap.shorten(str(error), 200, placeholder=" ...")
        raise StorageError(f"{name}: no Qwen2.5-VL to load: {reason}") from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise StorageError(f"{name}: its text tokenizer is not a fast one (tokenizer.json)")
    # what is missing, or of another shape, transformers draws at random
    for what, names in (("lack", report["missing_keys"]), ("do not fit", report["mismatched_keys"])):
        wrong = sorted(key for key in map(_key, names) if ".visual." not in key)
        if wrong:
            raise StorageError(f"{name}: its weights {what} {wrong[0]} ({len(wrong)} in all)")
    stack = whole.model.language_model
    text = found.text_config
    assert isinstance(text, Qwen2_5_VLTextConfig)
    return LanguageModel(stack.state_dict(), whole.lm_head.weight.detach(), text, tokenizer)


def _check_name(name: str) -> None:
    """Raises StorageError for what is no folder and no Hub id either: the Hub would be asked, again and again."""
    if not Path(name).is_dir() and (
        name.count("/") != 1 or name.startswith((".", "/")) or Path(name).exists()
    ):
        raise StorageError(f"{name}: no Qwen2.5-VL to load: neither a folder here nor a Hub id OWNER/NAME")


def _key(told: Any) -> str:
    """The parameter's name: of one of another shape transformers tells both shapes, too."""
    return told if isinstance(told, str) else told[0]


def _known_settings(text: Any) -> None:
    """Raises ValueError for settings of a Qwen2.5-VL that change what it computes and that our text stack lacks."""
    kind = (text.rope_parameters or {}).get("rope_type", "default")
    layers = set(getattr(text, "layer_types", None) or ["full_attention"])
    for key, value, accepted in (
        ("rope_scaling", kind, ("default", "mrope")),
        ("hidden_act", text.hidden_act, ("silu",)),
        ("layer_types", "sliding_attention" if len(layers) > 1 else min(layers), ("full_attention",)),
    ):
        if value not in accepted:
            raise ValueError(f"its {key} is {value}, {' or '.join(accepted)} is accepted")


__all__ = [
    "Backbone",
    "Cache",
    "LanguageModel",
    "axis_frequencies",
    "load_language_model",
    "new_cache",
    "text_config",
]
