"""Lets transformers load this folder (trust_remote_code=True).

The model itself is in the package: pip install nextflow-ar.
"""

from nextflow_ar.hub import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowProcessor

__all__ = ["NextFlowConfig", "NextFlowForConditionalGeneration", "NextFlowProcessor"]
