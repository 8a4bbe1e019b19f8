"""Making transformers' Auto classes know checkpoint folders of this package without ``trust_remote_code``."""

from __future__ import annotations

from nextflow_ar.hub.configuration import NextFlowConfig
from nextflow_ar.hub.modeling import NextFlowForConditionalGeneration
from nextflow_ar.hub.processing import NextFlowProcessor


def register() -> None:
    """Register configuration, model and processor, and the model for ``pipeline("any-to-any")``. May be called again."""
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor
    from transformers.models.auto import modeling_auto

    AutoConfig.register(NextFlowConfig.model_type, NextFlowConfig, exist_ok=True)
    AutoModel.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
    AutoModelForMultimodalLM.register(NextFlowConfig, NextFlowForConditionalGeneration, exist_ok=True)
    AutoProcessor.register(NextFlowConfig, NextFlowProcessor, exist_ok=True)
    # The pipeline compares class names with this table only, and calls all others unsupported.
    names = getattr(modeling_auto, "MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES", None)
    if names is not None:
        names[NextFlowConfig.model_type] = NextFlowForConditionalGeneration.__name__
