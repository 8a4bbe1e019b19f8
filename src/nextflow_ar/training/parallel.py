"""Several processes as one: started by torchrun, or alone.

Beside it, :mod:`~nextflow_ar.training.sharded` and what builds on it know torch.distributed; nothing else does.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_PATIENCE = timedelta(hours=2)
"""How long processes wait for one: the first writes the finished model alone, which of a large one on a slow file system
takes longer than NCCL's own ten minutes.
"""


class World:
    """``rank`` of ``size`` processes. Alone, every method is the identity."""

    def __init__(self, rank: int = 0, size: int = 1) -> None:
        self.rank, self.size = rank, size

    @classmethod
    def join(cls) -> World:
        """The processes that torchrun started (its environment variables say so), or one alone."""
        size = int(os.environ.get("WORLD_SIZE", "1"))
        if size == 1:
            return cls()
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        if not dist.is_initialized():
            # gloo beside nccl: counts and checkpoints travel as CPU tensors
            backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
            dist.init_process_group(backend, timeout=_PATIENCE)
        return cls(dist.get_rank(), size)

    @property
    def device(self) -> torch.device:
        """Where this process computes: its own GPU, or the CPU."""
        if not torch.cuda.is_available():
            return torch.device("cpu")
        return torch.device("cuda", torch.cuda.current_device())

    def add(self, x: Tensor) -> Tensor:
        """Sum over all processes."""
        if self.size > 1:
            x = x.clone()
            dist.all_reduce(x)
        return x

    def share(self, x: Tensor) -> Tensor:
        """The first process's tensor, everywhere."""
        if self.size > 1:
            x = x.clone()
            dist.broadcast(x, 0)
        return x

    def any(self, said: bool) -> bool:
        """Whether any process says so; the same answer for all, who may then act together."""
        if self.size == 1:  # no tensor: its way to a GPU and back waits for all that is queued there
            return bool(said)
        return bool(self.add(torch.tensor(int(said), device=self.device)))

    def gather(self, said: Any) -> list[Any]:
        """What every process says, by rank: small plain values."""
        if self.size == 1:
            return [said]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, said)
        return found

    def average_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Mean gradient over all processes; one message for all of them. A missing gradient becomes zero, of one process
        alone, too: another one's rows may have had one, and moments and decay move what has a gradient.
        """
        known = [p for p in parameters if p.requires_grad]
        for p in known:
            if p.grad is None:
                p.grad = torch.zeros_like(p)
        if self.size == 1:
            return
        flat = torch.cat([p.grad.flatten() for p in known if p.grad is not None])
        dist.all_reduce(flat)
        flat /= self.size
        for p, part in zip(known, flat.split([p.numel() for p in known]), strict=True):
            p.grad = part.view_as(p)

    def leave(self) -> None:
        """Wait for all, then end the group."""
        if self.size > 1:
            dist.barrier()
            dist.destroy_process_group()
