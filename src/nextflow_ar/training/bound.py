"""What a run's checkpoints go with beside their recipe: the weights and tokenizers in the folders that it names.

A recipe names folders. What is in them may be another model by the time a run is resumed, and would be trained on.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from nextflow_ar.model.checkpoint import checkpoint_folder
from nextflow_ar.sequence.vocab import PreTrainedTokenizerFast
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.adapters import weights_print
from nextflow_ar.training.recipe import ModelRecipe

START, TEACHER, IMAGES, TEXT = "start", "distillation.teacher", "image_tokenizer", "text tokenizer"
ROWS = "choice of new words"
SEMANTIC = "teacher"
"""Of an image tokenizer's run: the frozen semantic encoder."""


def bindings(
    recipe: ModelRecipe,
    text_tokenizer: PreTrainedTokenizerFast,
    image_tokenizer: ImageTokenizer,
    rows: Mapping[str, Tensor],
) -> dict[str, str]:
    """Digests by what they are of: both tokenizers; the weights of ``start`` where a checkpoint does not hold them, of
    adapters, or they teach; those of another teacher; the ``rows`` of tables that train. Raises StorageError.
    """
    words = json.dumps(sorted(text_tokenizer.get_vocab().items()))
    found = {IMAGES: image_tokenizer.fingerprint(), TEXT: hashlib.sha256(words.encode()).hexdigest()}
    teacher = None if recipe.distillation is None else recipe.distillation.teacher or recipe.start
    if recipe.start is not None and (recipe.lora is not None or teacher == recipe.start):
        found[START] = weights_print(checkpoint_folder(recipe.start))
    if teacher is not None and teacher != recipe.start:
        found[TEACHER] = weights_print(checkpoint_folder(teacher))
    if rows:
        chosen = json.dumps({name: index.tolist() for name, index in sorted(rows.items())})
        found[ROWS] = hashlib.sha256(chosen.encode()).hexdigest()
    return found


def module_print(module: nn.Module) -> str:
    """Digest of a module's tensors, by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(name.encode() + tensor.detach().float().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def check_bound(saved: dict[str, str], now: dict[str, str], out: Path) -> None:
    """Raises StorageError where a checkpoint in ``out`` was made with another of these. Older ones tell of none."""
    for what in saved.keys() & now.keys():
        if saved[what] != now[what]:
            raise StorageError(
                f"{out}: its checkpoint was made with another {what} than the recipe's folder holds by now: put that one "
                "back, or begin anew with --set out=FOLDER"
            )
