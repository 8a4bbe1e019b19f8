"""What a stage does otherwise when its recipe spreads the model: start in shards, and checkpoints by all processes.

One process alone holds whole tensors, but has the same optimiser and the same checkpoints, so that it can go on where many
stopped, and many where it did.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.nextflow import NextFlowModel, allow_shapes
from nextflow_ar.precision import best_dtype
from nextflow_ar.storage import StorageError
from nextflow_ar.training import sharded
from nextflow_ar.training.distributed_checkpoint import Checkpoints
from nextflow_ar.training.optim import OptimizerConfig
from nextflow_ar.training.parallel import World
from nextflow_ar.training.runs import SHARDED
from nextflow_ar.training.sharded import ShardingConfig
from nextflow_ar.training.sharded_optim import ShardedOptimizer

_LOG = logging.getLogger(__name__)


class Shards:
    """A sharded run's ways. To be made by all processes together.

    ``spread``: whether there are several processes, so that no tensor is whole.
    """

    def __init__(self, config: ShardingConfig, world: World, folder: Path) -> None:
        self.config, self.world = config, world
        self.checkpoints = Checkpoints(folder / SHARDED, world)
        self.spread = world.size > 1

    def model(
        self,
        config: ModelConfig,
        freeze: Callable[[NextFlowModel], None],
        start: Path | None,
        generator: torch.Generator,
        codebook: Tensor | None,
        *,
        flex: bool = True,
        shapes: int = 8,
    ) -> NextFlowModel:
        """The model in shards, from the checkpoint folder ``start`` or from nothing; it is whole nowhere.

        ``freeze``: switches off what does not train. ``codebook``: what the code embeddings of a new model start as.
        ``flex``: compiled layers on GPUs attend by FlexAttention. ``shapes``: of batches that they are compiled for.
        """
        allow_shapes(shapes)
        mesh = sharded.device_mesh(self.world, self.config)
        model = sharded.build(config, mesh, self.config, freeze, flex=flex)
        if start is not None:
            sharded.load_weights(model, start)
        else:
            sharded.initialise(model, generator, codebook)
        return model

    def optimizer(
        self, parameters: Mapping[str, nn.Parameter], config: OptimizerConfig, rows: Mapping[str, Tensor]
    ) -> ShardedOptimizer:
        """The optimiser of shards, or of whole parameters, with one way to name its state."""
        return ShardedOptimizer(parameters.items(), config, rows)

    def before_part(self, model: nn.Module, last: bool) -> None:
        """To be called before every part of a step."""
        if self.spread:
            sharded.sum_gradients(model, last, self.config)

    def before_update(self, parameters: Iterable[nn.Parameter]) -> None:
        """What a step without pictures never used gets a gradient of zero here, as it does in shards."""
        if not self.spread:
            for p in parameters:
                if p.grad is None:
                    p.grad = torch.zeros_like(p)

    def gather(
        self, model: NextFlowModel, averages: Mapping[str, Tensor], device: torch.device
    ) -> NextFlowModel | None:
        """The averaged model, whole, for the first process to draw with; None on the others, and where any has no room for
        its part in it (a warning says so). To be called by all together.
        """
        dtype, first = best_dtype(device), self.world.rank == 0
        room: dict[str, Tensor] = {}
        full = False
        try:
            if first:
                room = sharded.room(model, dtype, device)
            _try_room(model, dtype, device)  # what fails within the gathering would leave the others waiting
        except torch.OutOfMemoryError:
            full = True
        if self.world.any(full):
            if first:
                _LOG.warning("no sample sheet: the whole model does not fit beside a process's part of it")
            return None
        return sharded.gather(model, averages, dtype, room)

    def save(self, step: int, state: State, facts: dict[str, Any], *, background: bool) -> None:
        """Write a step's checkpoint, all processes together. Raises StorageError."""
        self.checkpoints.save(step, state.tensors(), facts, background=background)

    def load(self, state: State) -> dict[str, Any] | None:
        """Read the newest checkpoint, whatever number of processes wrote it; its facts, None at a run's beginning."""
        if not self.checkpoints.steps():
            return None
        tensors = state.tensors()
        facts = self.checkpoints.load(tensors)
        if "step" not in facts:
            raise StorageError(f"{self.checkpoints.folder}: the checkpoint's facts.json is no training's")
        state.generator.set_state(tensors["generator"])
        return facts


def _try_room(model: nn.Module, dtype: torch.dtype, device: torch.device) -> None:
    """Raises OutOfMemoryError where the largest gathered tensor, beside this process's part of it, does not fit."""
    largest = max(model.state_dict().values(), key=lambda t: t.numel())
    kind = dtype if largest.is_floating_point() else largest.dtype
    _ = [torch.empty(t.shape, dtype=kind, device=device) for t in (largest, sharded.local(largest))]


class State:
    """The tensors of a stage that a checkpoint holds, by name."""

    def __init__(
        self,
        model: NextFlowModel,
        averages: dict[str, Tensor],
        optimizer: ShardedOptimizer,
        generator: torch.Generator,
    ) -> None:
        self.model, self.averages, self.optimizer, self.generator = model, averages, optimizer, generator

    def tensors(self) -> dict[str, Tensor]:
        """``model.NAME``, ``averages.NAME``, ``optimizer.KIND.NAME`` share their memory; ``generator`` is a copy."""
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"averages.{k}": v for k, v in self.averages.items()}
        found |= {f"optimizer.{k}": v for k, v in self.optimizer.tensors().items()}
        return found | {"generator": self.generator.get_state()}
