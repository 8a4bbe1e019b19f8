"""transformers' Auto classes over checkpoint folders of this package (docs/integrations.md).

A folder names these classes in its ``config.json``, so ``trust_remote_code=True`` finds them; :func:`register` makes them
known without it. ``<boi><eoi>`` stands for a picture in token ids.
"""

from nextflow_ar.hub.configuration import NextFlowConfig
from nextflow_ar.hub.modeling import NextFlowForConditionalGeneration
from nextflow_ar.hub.processing import NextFlowProcessor
from nextflow_ar.hub.registration import register

__all__ = ["NextFlowConfig", "NextFlowForConditionalGeneration", "NextFlowProcessor", "register"]
