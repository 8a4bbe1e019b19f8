"""What a fine-tune is taught by the model that it starts from, so that it does not forget (learning without forgetting)."""

from __future__ import annotations

import copy

from nextflow_ar.model.nextflow import LossReport, NextFlowModel
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.training.recipe import ModelRecipe


class Taught:
    """The frozen copy of a model that has just been started, where the recipe says ``distillation``."""

    def __init__(self, recipe: ModelRecipe, model: NextFlowModel) -> None:
        self._config = recipe.distillation
        self._teacher: NextFlowModel | None = None
        if self._config is not None:
            self._teacher = copy.deepcopy(model).eval().requires_grad_(False)

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
