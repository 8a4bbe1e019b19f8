"""What a fine-tune is taught by the model that it starts from, so that it does not forget (learning without forgetting)."""

from __future__ import annotations

from nextflow_ar.config import ConfigError, to_dict
from nextflow_ar.model.checkpoint import checkpoint_folder, load_architecture, load_bundle
from nextflow_ar.model.nextflow import LossReport, NextFlowModel
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.recipe import ModelRecipe


class Taught:
    """The frozen model that a run starts from, as it is stored, or another checkpoint that reads and draws the same tokens,
    where the recipe says ``distillation``. Raises ConfigError for one that does not, StorageError.
    """

    def __init__(
        self, recipe: ModelRecipe, model: NextFlowModel, vocab: Vocabulary, image_tokenizer: ImageTokenizer
    ) -> None:
        self._config = recipe.distillation
        self._teacher: NextFlowModel | None = None
        if self._config is None:
            return
        assert recipe.start is not None  # as the recipe's check sees to
        folder = checkpoint_folder(self._config.teacher or recipe.start)
        config, text_tokenizer = load_architecture(folder)
        if (
            self._config.teacher is None and config != model.config
        ):  # it would be given another layout than its own
            keys = [k for k, v in to_dict(config).items() if v != to_dict(model.config)[k]]
            raise ConfigError(
                f"distillation: {folder} cannot teach a model of another architecture (model: {', '.join(keys)})"
            )
        if self._config.teacher is not None:
            codes = ImageTokenizer.from_pretrained(folder / "image_tokenizer").fingerprint()
            same = config == model.config and codes == image_tokenizer.fingerprint()
            if not same or text_tokenizer.get_vocab() != vocab.tokenizer.get_vocab():
                raise ConfigError(
                    f"distillation.teacher: {folder} is of another architecture, vocabulary or image tokenizer"
                )
        self._teacher = load_bundle(folder, model.head.weight.device).model

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
