"""transformers' Qwen2.5-VL text stack as the transformer, with the frequency layout as the one thing added."""

from __future__ import annotations

import inspect

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from nextflow_ar.config import ModelConfig

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
        attn_implementation="sdpa",  # pyright: ignore[reportCallIssue]
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


__all__ = ["Backbone", "Cache", "axis_frequencies", "new_cache", "text_config"]


class Backbone(Qwen2_5_VLTextModel):
    """The text stack fed with embeddings, Multiscale 3D RoPE coordinates and a block mask."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(text_config(config))
        if config.rope == "per_axis":
            frequencies = axis_frequencies(config)
            self.rotary_emb.register_buffer("inv_freq", frequencies, persistent=False)
            self.rotary_emb.register_buffer("original_inv_freq", frequencies.clone(), persistent=False)

    def run(
        self,
        embeddings: Float[Tensor, "b l d"],
        positions: Float[Tensor, "3 b l"],
        mask: Bool[Tensor, "b 1 l k"] | None,
        cache: Cache | None = None,
    ) -> Float[Tensor, "b l d"]:
        """Hidden states after the last norm.

        ``positions``: (row, column, scale), as the layout makes them. ``mask``: None when every query may see every
        cached and new key.
        """
        row, column, scale = positions.unbind(0)
        out = super().forward(
            inputs_embeds=embeddings,  # pyright: ignore[reportArgumentType]
            position_ids=torch.stack([scale, row, column]),  # pyright: ignore[reportArgumentType]
            attention_mask={"full_attention": mask},  # pyright: ignore[reportArgumentType]
            **{_CACHE: cache},  # pyright: ignore[reportArgumentType]
            use_cache=cache is not None,
            is_causal=False,  # pyright: ignore[reportCallIssue]
        )
        return out.last_hidden_state  # pyright: ignore[reportReturnType]
