"""What a stage trains: whole parameters, rows of two tables, or adapters and tables beside them. All else is frozen."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, ModelConfig, to_dict
from nextflow_ar.model.flops import Passes
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.training.recipe import ModelRecipe

_LOG = logging.getLogger(__name__)
_CODES = "scale_inputs.code_embed.weight"
NO_WEIGHT = (
    "closing_input", "scale_input", "rope_range", "rope_theta", "rope", "max_positions", "rms_eps", "copies",
)  # fmt: skip
"""Keys of the architecture in which a stage may differ from what it starts from."""
_WORDS, _HEAD = "backbone.embed_tokens.weight", "head.weight"


@dataclass(frozen=True)
class Trainable:
    """``rows``: name of a table -> the rows of it that train (tables not named train whole). ``connector``: names of what
    brings code vectors to the hidden size. ``connector_steps``: as in the recipe.
    """

    rows: dict[str, Tensor]
    connector: frozenset[str]
    connector_steps: int

    def idle(self, step: int, names: list[str]) -> set[str]:
        """Of ``names``, the parameters that rest at ``step``."""
        if not self.connector_steps:
            return set()
        first = step < self.connector_steps
        return {name for name in names if (name in self.connector) != first}


def passes(recipe: ModelRecipe, parameters: Mapping[str, Tensor]) -> Passes:
    """What of a step's products the training does. ``parameters``: those that train."""
    adapters = sum(p.numel() for name, p in parameters.items() if "lora_" in name)
    return Passes(3 if recipe.trains == "everything" else 2, 3 if _HEAD in parameters else 2, adapters)


def agreed(recipe: ModelRecipe, stored: ModelConfig, *, tell: bool = True) -> ModelConfig:
    """The architecture of a stage that starts from ``stored``: the recipe's own, if it has one; with ``tell``, a line is
    logged of what it has otherwise. Raises ConfigError where other weights would be needed, or some would never train.
    """
    if recipe.model is None or stored == recipe.model:
        return stored
    ours, theirs = to_dict(recipe.model), to_dict(stored)
    differ = sorted(k for k in ours if ours[k] != theirs[k])
    # What is fed to the closing block is no weight: a stage may change it.
    if any(k not in NO_WEIGHT for k in differ):
        raise ConfigError(
            f"{recipe.start}: its architecture is not the recipe's (differs in {', '.join(differ)})"
        )
    if recipe.trains == "lora" and ours["copies"] and not theirs["copies"]:
        raise ConfigError(
            f"{recipe.start} has no copies, and adapters do not train them: set copies: false, or trains: everything"
        )
    if tell:
        changes = ", ".join(f"{k} {ours[k]} (was {theirs[k]})" for k in differ)
        _LOG.warning("%s goes on with what it was not trained with: %s", recipe.start, changes)
    return recipe.model


def begin_with(model: NextFlowModel, old: NextFlowModel) -> None:
    """Take over the weights of a model of the same shapes, its very tensors: there is no second copy. Where the old one had
    no ``copies``, they begin at zero, so that the new one does what the old one did. Raises ConfigError where they would be
    lost.
    """
    if old.config.copies and not model.config.copies:
        raise ConfigError("the model to start from has copies, the recipe's has not: set copies: true")
    state = old.state_dict()
    if model.config.copies and not old.config.copies:
        state |= {k: torch.zeros(v.shape) for k, v in model.state_dict().items() if ".copy_" in k}
    model.load_state_dict(state, assign=True)


def choose(model: NextFlowModel, vocab: Vocabulary, recipe: ModelRecipe) -> Trainable:
    """Freeze what the recipe does not train (``requires_grad``) and say which rows of which table do.

    Alignment (paper section 3): the connector, with the scale and scale-length embeddings beside it; the embeddings of the
    vision codes; ``<boi>`` and ``<eoi>`` in the text embeddings; and the head's rows for all of these. Adapters are
    there already when this is called: they and ``modules_to_save`` alone have gradients then.
    """
    if recipe.trains in ("everything", "lora"):
        return Trainable({}, frozenset(), 0)
    names = [name for name, _ in model.named_parameters()]
    connector = frozenset(n for n in names if n.startswith("scale_inputs.") and n != _CODES)
    marks = torch.tensor(sorted((vocab.boi, vocab.eoi)))
    codes = torch.arange(vocab.text_size, vocab.text_size + vocab.codes)
    rows = {_WORDS: marks, _HEAD: torch.cat([marks, codes])}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in connector or name in rows or name == _CODES)
    return Trainable(rows, connector, recipe.connector_steps)
