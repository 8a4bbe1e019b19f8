"""The architecture as a transformers configuration."""

from __future__ import annotations

from dataclasses import fields
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from nextflow_ar.config import ModelConfig, from_dict
from nextflow_ar.model.checkpoint import FOR_TRANSFORMERS


class NextFlowConfig(PreTrainedConfig):
    """``config.json`` of a checkpoint folder. The fields of :class:`nextflow_ar.config.ModelConfig` are its attributes,
    also under the names that transformers uses.
    """

    model_type = FOR_TRANSFORMERS["model_type"]
    attribute_map: ClassVar[dict[str, str]] = {
        "hidden_size": "hidden",
        "num_hidden_layers": "layers",
        "num_attention_heads": "heads",
        "num_key_value_heads": "kv_heads",
        "intermediate_size": "intermediate",
        "max_position_embeddings": "max_positions",
    }

    @property
    def architecture(self) -> ModelConfig:
        """The strict configuration. Raises ConfigError, one line, when a field is missing or of another kind."""
        found: dict[str, Any] = {
            field.name: getattr(self, field.name)
            for field in fields(ModelConfig)
            if hasattr(self, field.name)
        }
        return from_dict(ModelConfig, found, "config.json")

    @property
    def vocab_size(self) -> int:
        """Text entries and codes."""
        return self.architecture.vocab
