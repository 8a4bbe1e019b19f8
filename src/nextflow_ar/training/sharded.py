"""The transformer over many GPUs: weights, gradients and averages in shards, gathered one layer at a time (FSDP2).

The model knows nothing of it: :func:`shard` wraps a NextFlowModel from outside, every decoder layer as a group of its own
and all the rest (embeddings, inputs, last norm, head) as one more. ``model.losses(batch)`` is called as before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import ConfigDict
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from nextflow_ar.config import ConfigError, ModelConfig
from nextflow_ar.model.embeddings import ScaleInputs
from nextflow_ar.model.nextflow import LossReport, NextFlowModel
from nextflow_ar.storage import StorageError, open_weights
from nextflow_ar.tokenizer.image_tokenizer import WEIGHTS_FILE
from nextflow_ar.training.parallel import World

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class ShardingConfig:
    """How a model is spread.

    ``replicas``: groups of processes that each hold a whole set of shards (1: every process holds a part of one set;
    the number of nodes keeps the gathering inside a node). ``params``: dtype that layers are gathered in and compute in;
    the shards stay fp32. ``reduce``: dtype that gradients are summed in. ``reshard``: free a layer's weights after its
    forward and gather them once more in the backward. ``recompute``: keep only each layer's input and run it once more in
    the backward. ``compile``: compile every layer by itself. ``reduce_each``: sum gradients after every part of a step
    instead of once, so that no process ever holds a whole gradient.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    replicas: int
    params: Literal["float32", "bfloat16"]
    reduce: Literal["float32", "bfloat16"]
    reshard: bool
    recompute: bool
    compile: bool
    reduce_each: bool


def device_mesh(world: World, config: ShardingConfig) -> DeviceMesh:
    """The processes as (replicas, shards), or in one line. Raises ConfigError when they cannot be divided so."""
    if config.replicas < 1 or world.size % config.replicas:
        raise ConfigError(f"replicas: {world.size} processes cannot be divided into {config.replicas} groups")
    if config.replicas == 1:
        return init_device_mesh(world.device.type, (world.size,), mesh_dim_names=("shards",))
    shape = (config.replicas, world.size // config.replicas)
    return init_device_mesh(world.device.type, shape, mesh_dim_names=("replicas", "shards"))


def shard(model: NextFlowModel, mesh: DeviceMesh, config: ShardingConfig, *, flex: bool = True) -> None:
    """Spread a model over the processes of ``mesh``, in place: its parameters become shards (DTensors).

    Every process must hold the same weights, or all of them none (the meta device). Freeze what does not train before
    this, and make the optimiser after it. ``flex``: compiled layers on GPUs attend by FlexAttention.
    """
    # Uncompiled FlexAttention would be slower than all scores of a row, and hold as many.
    model.sparse = flex and config.compile and mesh.device_type == "cuda"
    params = _DTYPES[config.params]
    precision = MixedPrecisionPolicy(param_dtype=params, reduce_dtype=_DTYPES[config.reduce])
    for layer in model.backbone.layers:
        _wrap_forward(cast(nn.Module, layer), config)
        fully_shard(
            cast(nn.Module, layer), mesh=mesh, reshard_after_forward=config.reshard, mp_policy=precision
        )
    # A batch's positions and weights are fp32 on purpose, so the root leaves its inputs as they are.
    precision = replace(precision, cast_forward_inputs=False)
    fully_shard(model, mesh=mesh, mp_policy=precision)
    _register_losses(model)


def _wrap_forward(layer: nn.Module, config: ShardingConfig) -> None:
    # Set on the instance, under FSDP's hooks: names of weights stay, and gathering happens outside of both.
    if config.compile:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    if config.recompute:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)


def _register_losses(model: NextFlowModel) -> None:
    """Let ``model.losses`` gather the root's group, which serves everything that is no decoder layer."""
    plain = model.losses

    def tensors(batch: Any) -> tuple[Tensor, ...]:
        report = plain(batch)
        # A batch without pictures leaves inputs out, and each process has a batch of its own: were a gradient missing on
        # one of them, the processes would sum different lists. Zero is what it adds.
        total = report.total
        if torch.is_grad_enabled():
            trained = (p for p in model.scale_inputs.parameters() if p.requires_grad)
            total = total + sum(p.flatten()[:1].sum().to(total.dtype) * 0 for p in trained)
        return (total, *(getattr(report, field.name) for field in fields(report)[1:]))

    module = cast(Any, model)
    module.sharded_losses = tensors
    register_fsdp_forward_method(model, "sharded_losses")  # its hooks look for tensors in tuples
    module.losses = lambda batch: LossReport(*module.sharded_losses(batch))


def build(
    config: ModelConfig,
    mesh: DeviceMesh,
    sharding: ShardingConfig,
    freeze: Callable[[NextFlowModel], None] | None,
    *,
    flex: bool = True,
) -> NextFlowModel:
    """A sharded model of which no process ever held more than its part; its weights are not set yet.

    Follow with :func:`load_weights` or :func:`initialise`. ``freeze``: switches off what does not train.
    ``flex``: see :func:`shard`.
    """
    with torch.device("meta"):
        model = NextFlowModel(config)
    if freeze is not None:
        freeze(model)
    shard(model, mesh, sharding, flex=flex)
    model.to_empty(device=mesh.device_type)
    # Buffers depend on neither depth nor tables, and a model of one layer without tables is small.
    small = NextFlowModel(replace(config, layers=1, intermediate=8, text_vocab=8, codes=8))
    computed = dict(small.named_buffers())
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(computed[name])
    return model


@torch.no_grad()
def initialise(model: NextFlowModel, generator: torch.Generator, codebook: Tensor | None = None) -> None:
    """Start a sharded model from nothing, with the very numbers of :meth:`NextFlowModel.initialise`.

    Every process draws every matrix, one at a time, and keeps its part. ``generator``: equal on all processes, CPU.
    ``codebook``: (K, C), what the code embeddings start as.
    """

    class OneByOne:
        """What ``NextFlowModel.initialise`` sees of a model: whole parameters, of which each is gone before the next."""

        config, head = model.config, model.head

        def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
            for name, parameter in model.named_parameters():
                whole = torch.empty(parameter.shape)
                yield name, whole
                local(parameter).copy_(whole[local_rows(parameter)])

    NextFlowModel.initialise(cast(Any, OneByOne()), generator)
    if codebook is not None:
        inputs = ScaleInputs(model.config)
        inputs.start_from(codebook)
        table = model.scale_inputs.code_embed.weight
        local(table).copy_(inputs.code_embed.weight[local_rows(table)])
        model.scale_inputs.code_scale.copy_(inputs.code_scale)


@torch.no_grad()
def load_weights(model: NextFlowModel, folder: Path) -> None:
    """Fill a sharded (or whole) model from a checkpoint folder, every process reading its own rows only.

    Checksums are not verified, since no process reads whole files. Raises StorageError, one line, for weights that are
    missing, damaged or of another shape.
    """
    with open_weights(folder, WEIGHTS_FILE) as stored:
        wanted = model.state_dict()
        strange = sorted(set(wanted) ^ set(stored))
        if strange:
            where = "lack" if strange[0] in wanted else "have beside the model's"
            raise StorageError(f"{folder}: the weights {where} {strange[0]}")
        for name, tensor in wanted.items():
            piece = stored[name]
            if tuple(piece.get_shape()) != tuple(tensor.shape):
                raise StorageError(
                    f"{folder}: {name} is {tuple(piece.get_shape())}, not {tuple(tensor.shape)}"
                )
            local(tensor).copy_(piece[local_rows(tensor)] if tensor.ndim else piece[...])


def local(tensor: Tensor) -> Tensor:
    """This process's part of a tensor, sharing its memory; a plain tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def row_spans(tensor: Tensor) -> list[slice]:
    """Which rows each process of the shards' line holds; one span for a plain tensor."""
    rows = tensor.shape[0] if tensor.ndim else 0
    count = shard_group(tensor)[1]
    size = -(-rows // count)
    return [slice(min(rows, size * rank), min(rows, size * (rank + 1))) for rank in range(count)]


def local_rows(tensor: Tensor) -> slice:
    """Which rows of the whole tensor :func:`local` holds."""
    return row_spans(tensor)[shard_group(tensor)[0]]


def shard_group(tensor: Tensor) -> tuple[int, int, torch.distributed.ProcessGroup | None]:
    """(place, size, group) of this process among those that hold one tensor's parts; (0, 1, None) for a plain tensor."""
    if not isinstance(tensor, DTensor):
        return 0, 1, None
    for axis, placement in enumerate(tensor.placements):
        if isinstance(placement, Shard):
            if placement.dim != 0:
                raise ValueError("only rows are sharded here")
            mesh = tensor.device_mesh
            return mesh.get_local_rank(axis), mesh.size(axis), mesh.get_group(axis)
    return 0, 1, None


def sum_gradients(model: nn.Module, last: bool, config: ShardingConfig) -> None:
    """To be called before every part of a step: whether the next backward sums gradients over all processes.

    With ``reduce_each`` every one does, else only the ``last``: until then each process keeps its own whole gradients.
    """
    if isinstance(model, FSDPModule):
        model.set_requires_gradient_sync(last or config.reduce_each)


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters that train, by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def start_averages(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Moving averages of parameters at their beginning, in the same shards."""
    return {name: p.detach().clone() for name, p in parameters.items()}


@torch.no_grad()
def move_averages(averages: dict[str, Tensor], parameters: dict[str, nn.Parameter], decay: float) -> None:
    """Move every average towards its parameter by 1 - ``decay``; no process needs another for it."""
    if not averages:
        return
    ours = [local(average) for average in averages.values()]
    torch._foreach_lerp_(ours, [local(parameters[name]).detach() for name in averages], 1 - decay)  # pyright: ignore[reportPrivateImportUsage]


def whole(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
    """Gathered tensors one at a time, on every process (all must iterate in step)."""
    for name, tensor in tensors:
        yield name, tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def room(model: NextFlowModel, dtype: torch.dtype, device: torch.device) -> dict[str, Tensor]:
    """Memory for a sharded model's whole tensors, by name; what is no floating-point number keeps its kind."""
    return {
        name: torch.empty(t.shape, dtype=dtype if t.is_floating_point() else t.dtype, device=device)
        for name, t in model.state_dict().items()
    }


@torch.no_grad()
def gather(
    model: NextFlowModel, averages: Mapping[str, Tensor], dtype: torch.dtype, room: dict[str, Tensor]
) -> NextFlowModel | None:
    """A sharded model as a whole one that draws, in ``room``, with ``averages`` in place of the weights that have them.

    To be called by all processes together; those without ``room`` hold one gathered tensor at a time, and get None.
    ``dtype``: what tensors are gathered in.
    """
    chosen = {name: averages.get(name, tensor).detach() for name, tensor in model.state_dict().items()}
    parts = ((name, t.to(dtype) if t.is_floating_point() else t) for name, t in chosen.items())
    for name, tensor in whole(parts):
        if room:
            room[name].copy_(tensor)
    if not room:
        return None
    found = NextFlowModel.empty(model.config)
    found.load_state_dict(room, assign=True)
    return found.to(next(iter(room.values())).device).eval().requires_grad_(False)
