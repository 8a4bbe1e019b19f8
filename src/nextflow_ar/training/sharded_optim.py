"""The optimiser of sharded runs: AdamW on shards, and Muon, which needs whole matrices, shared out among the processes.

It serves whole (unsharded) parameters as well and names its state after them, so that a run may go on with any number of
processes.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nextflow_ar.precision import best_dtype
from nextflow_ar.training.optim import _NOT_HIDDEN, OptimizerConfig
from nextflow_ar.training.sharded import local, local_rows, row_spans, shard_group, whole

_STEPS, _COEFFICIENTS = 5, (3.4445, -4.7750, 2.0315)


def orthogonalise(matrix: Tensor) -> Tensor:
    """The nearest orthogonal matrix, roughly: five quintic Newton-Schulz steps (Jordan et al., Muon).

    Singular values end between 0.5 and 1.5. In bf16, as torch.optim.Muon does it, where the device is fast at that.
    """
    a, b, c = _COEFFICIENTS
    tall = matrix.shape[0] > matrix.shape[1]
    x = matrix.to(best_dtype(matrix.device))
    x = x.T if tall else x
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(_STEPS):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if tall else x


class ShardedMuon:
    """Muon over matrices whose rows are spread over processes (or whole).

    Momentum and weights stay in shards. Of every round of as many matrices as there are processes, each process gets
    one whole update, orthogonalises it and returns everyone's rows: two messages of one matrix each, and no work
    done twice.
    """

    def __init__(
        self, matrices: dict[str, nn.Parameter], weight_decay: float, momentum: float = 0.95
    ) -> None:
        self.matrices, self.weight_decay, self.momentum = matrices, weight_decay, momentum
        self.buffers = {name: torch.zeros_like(p.detach()) for name, p in matrices.items()}
        for name, p in matrices.items():
            rows = local_rows(p)
            if len(local(p.detach())) != rows.stop - rows.start:
                raise ValueError(f"{name}: this process holds other rows than expected")

    @torch.no_grad()
    def step(self, lr: float) -> None:
        """Update every matrix that has a gradient. ``lr`` is in AdamW's units."""
        known = [(name, p) for name, p in self.matrices.items() if p.grad is not None]
        size = shard_group(known[0][1])[1] if known else 1
        for start in range(0, len(known), size):
            together = known[start : start + size]
            updates = [self._momentum(name, p) for name, p in together]
            parameters = [p for _, p in together]
            for p, update in zip(parameters, _orthogonal_rows(parameters, updates), strict=True):
                mine = local(p)
                mine.mul_(1 - lr * self.weight_decay)
                mine.add_(update, alpha=-lr * 0.2 * max(p.shape) ** 0.5)

    def _momentum(self, name: str, p: nn.Parameter) -> Tensor:
        assert p.grad is not None
        grad, buffer = local(p.grad), local(self.buffers[name])
        buffer.lerp_(grad, 1 - self.momentum)
        return grad.lerp(buffer, self.momentum)


def _orthogonal_rows(parameters: list[nn.Parameter], updates: list[Tensor]) -> list[Tensor]:
    """This process's rows of every orthogonalised update, given its rows of every update."""
    place, size, group = shard_group(parameters[0])
    if size == 1:
        return [orthogonalise(update) for update in updates]
    spans = [row_spans(p) for p in parameters]
    widths = [p.shape[1] for p in parameters]

    def held(matrix: int, by: int) -> int:
        if matrix >= len(parameters):
            return 0
        return (spans[matrix][by].stop - spans[matrix][by].start) * widths[matrix]

    sent = [held(matrix, place) for matrix in range(size)]
    received = [held(place, rank) for rank in range(size)]
    compute = best_dtype(updates[0].device)
    out = torch.cat([update.to(compute).flatten() for update in updates])
    mine = out.new_empty(sum(received))
    dist.all_to_all_single(mine, out, received, sent, group=group)
    if place < len(parameters):
        mine = orthogonalise(mine.view(-1, widths[place])).flatten()
    dist.all_to_all_single(out, mine.contiguous(), sent, received, group=group)
    parts = out.split(sent[: len(parameters)])
    return [part.view_as(update) for part, update in zip(parts, updates, strict=True)]


class ShardedOptimizer:
    """AdamW, and Muon for the hidden matrices, over what trains of one model: ``StageOptimizer`` for shards.

    ``rows``: name of a table -> the rows of it that train. The others keep their bits: they are given neither gradient nor
    weight decay.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self.parameters = {name: p for name, p in named if p.requires_grad}
        rows = rows or {}
        unknown = sorted(set(rows) - set(self.parameters))
        if unknown:
            raise ValueError(f"{unknown[0]} does not train, so no rows of it can")
        self._rows = {name: _trained_here(self.parameters[name], index) for name, index in rows.items()}
        matrices = {name: p for name, p in self.parameters.items() if p.ndim > 1 and name not in rows}
        hidden = {
            name: p
            for name, p in matrices.items()
            if config.muon_lr > 0 and not any(word in name for word in _NOT_HIDDEN)
        }
        decayed = [p for name, p in matrices.items() if name not in hidden]
        plain = [p for name, p in self.parameters.items() if name not in matrices]
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=True)
        self.muon = ShardedMuon(hidden, config.weight_decay)
        for p in (*decayed, *plain):  # as AdamW would at its first step; a checkpoint is read into it
            self.adamw.state[p] = {
                "step": torch.tensor(0.0),
                "exp_avg": torch.zeros_like(p.detach()),
                "exp_avg_sq": torch.zeros_like(p.detach()),
            }

    @property
    def names(self) -> list[str]:
        """Names of all that trains."""
        return list(self.parameters)

    @torch.no_grad()
    def step(self, factor: float, idle: Container[str] = ()) -> float:
        """Clip, update with every rate times ``factor``, clear gradients; returns the gradient norm before clipping.

        Parameters named in ``idle`` are left alone, moments and decay included. The norm is that of all processes' shards.
        """
        for name, p in self.parameters.items():
            if name in idle:
                p.grad = None
            elif name in self._rows and p.grad is not None:
                local(p.grad).mul_(self._rows[name])
        known = [p for p in self.parameters.values() if p.grad is not None]
        norm = nn.utils.get_total_norm([p.grad for p in known if p.grad is not None])
        ((_, norm),) = whole([("norm", norm)])
        nn.utils.clip_grads_with_norm_(known, self.config.clip, norm)
        for group in self.adamw.param_groups:
            group["lr"] = self.config.lr * factor
        for name, trains in self._rows.items():  # AdamW itself would decay the other rows, too
            if self.parameters[name].grad is not None:
                decay = self.config.lr * factor * self.config.weight_decay
                local(self.parameters[name].detach()).mul_(1 - decay * trains)
        self.adamw.step()
        self.muon.step(self.config.muon_lr * factor)
        for p in self.parameters.values():
            p.grad = None
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """The state by name, in the parameters' shards; a checkpoint is read into these very tensors."""
        found = {f"momentum.{name}": buffer for name, buffer in self.muon.buffers.items()}
        for name, p in self.parameters.items():
            found |= {f"{kind}.{name}": value for kind, value in self.adamw.state.get(p, {}).items()}
        return found


def _trained_here(table: nn.Parameter, index: Tensor) -> Tensor:
    """(rows, 1) of this process's part of a table: 1 where a row trains, else 0."""
    marks = torch.zeros(table.shape[0], 1)
    marks[index.cpu()] = 1.0
    return marks[local_rows(table)].to(local(table.detach()).device)
