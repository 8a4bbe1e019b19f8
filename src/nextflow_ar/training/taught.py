"""What a fine-tune is taught by the model that it starts from, so that it does not forget (learning without forgetting)."""

from __future__ import annotations

import copy

from nextflow_ar.config import ConfigError
from nextflow_ar.model.checkpoint import WEIGHTS_FILE, checkpoint_folder, load_architecture
from nextflow_ar.model.nextflow import LossReport, NextFlowModel
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.storage import stream_weights
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.recipe import ModelRecipe


class Taught:
    """The frozen copy of a model that has just been started, or another checkpoint that reads and draws the same tokens,
    where the recipe says ``distillation``. Raises ConfigError for one that does not, StorageError.
    """

    def __init__(
        self, recipe: ModelRecipe, model: NextFlowModel, vocab: Vocabulary, image_tokenizer: ImageTokenizer
    ) -> None:
        self._config = recipe.distillation
        self._teacher: NextFlowModel | None = None
        if self._config is None:
            return
        self._teacher = copy.deepcopy(model).eval().requires_grad_(False)
        if self._config.teacher is not None:
            folder = checkpoint_folder(self._config.teacher)
            config, text_tokenizer = load_architecture(folder)
            codes = ImageTokenizer.from_pretrained(folder / "image_tokenizer").fingerprint()
            same = config == model.config and codes == image_tokenizer.fingerprint()
            if not same or text_tokenizer.get_vocab() != vocab.tokenizer.get_vocab():
                raise ConfigError(
                    f"distillation.teacher: {folder} is of another architecture, vocabulary or image tokenizer"
                )
            self._teacher.load_state_dict(dict(stream_weights(folder, WEIGHTS_FILE)))

    @property
    def shards(self) -> bool:
        """Whether documents in shards are replayed ones, too."""
        return self._config is not None and self._config.shards

    def compile(self, *, flex: bool) -> None:
        """Compile the copy as the model itself."""
        if self._teacher is not None:
            self._teacher.compile_backbone(flex=flex)

    def losses(self, model: NextFlowModel, batch: Batch, *, replays: bool) -> LossReport:
        """The losses of ``model``, the copy's pupil where the batch ``replays`` what that knows."""
        if self._config is None or self._teacher is None or not replays:
            return model.losses(batch)
        return model.losses(batch, self._teacher, self._config.share)
