"""The optimiser of every stage: Muon for the hidden matrices, AdamW for all else, behind one face."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from nextflow_ar.config import ConfigError, within
from nextflow_ar.precision import best_dtype

_LOG = logging.getLogger(__name__)
_CODEBOOK = "codebook"
"""In the name of one that learns by gradient: points in space, which neither an orthogonal update nor decay suits."""
_NOT_HIDDEN = ("embed", "head", "lm_head", "copy_gate")


@dataclass(frozen=True)
class OptimizerConfig:
    """``lr``: of AdamW (embeddings, heads, norms, biases). ``muon_lr``: of the hidden matrices and of adapters, in AdamW's
    units (the update is scaled to AdamW's root mean square); 0 gives those to AdamW as well. ``adapter_lr``: of adapters,
    by AdamW whatever ``muon_lr`` is, where tables beside them want another rate (null: as hidden matrices).

    ``schedule``: "cosine" over the whole run, or "constant" with a linear fall over the last ``decay`` share of the steps
    (from the end of the warmup on, where that is later); both end at ``final`` times the peak.
    """

    __pydantic_config__ = ConfigDict(extra="forbid")
    lr: float
    muon_lr: float
    weight_decay: float
    beta1: float
    beta2: float
    warmup: int
    schedule: Literal["cosine", "constant"]
    decay: float
    final: float
    clip: float
    adapter_lr: float | None = None

    def __post_init__(self) -> None:
        within(
            "at least 0", lr=self.lr, muon_lr=self.muon_lr, weight_decay=self.weight_decay, warmup=self.warmup
        )
        within("above 0", adapter_lr=self.adapter_lr)
        within("at least 0 and below 1", beta1=self.beta1, beta2=self.beta2)
        within("from 0 to 1", decay=self.decay, final=self.final)
        within("above 0", clip=self.clip)

    def factor(self, step: int, steps: int) -> float:
        """Share of the peak rate at ``step`` of ``steps``."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        start = self.warmup
        if self.schedule == "constant":
            start = max(start, int(steps * (1 - self.decay)))
        progress = min(1.0, max(0.0, (step - start) / max(1, steps - start)))
        fall = 0.5 * (1 + math.cos(math.pi * progress)) if self.schedule == "cosine" else 1.0 - progress
        return self.final + (1 - self.final) * fall

    def warn(self, steps: int) -> None:
        """Log it where a run of so many steps ends within its warmup: right for a trial, not for a run."""
        if steps <= self.warmup:
            told = "optimizer: a warmup of %d steps in a run of %d: the rate never falls, and ends at %d %% of its peak"
            _LOG.warning(told, self.warmup, steps, round(100 * self.factor(steps - 1, steps)))


class StackedMuon(torch.optim.Muon):
    """torch's Muon with all matrices of one shape orthogonalised at once: a small model on a GPU waits for the number of
    operations, not for their size. Where a device is slow at bf16, in fp32. State and results are Muon's, up to rounding.
    """

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient."""
        if closure is not None:
            raise ValueError("a closure is not taken")
        for group in self.param_groups:
            alike: dict[torch.Size, list[Tensor]] = {}
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike.setdefault(parameter.shape, []).append(parameter)
            for shape, several in alike.items():
                self._update(group, shape, several)

    def _update(self, group: dict[str, Any], shape: torch.Size, several: list[Tensor]) -> None:
        gradients = [p.grad for p in several if p.grad is not None]
        for parameter, gradient in zip(several, gradients, strict=True):
            if "momentum_buffer" not in self.state[parameter]:
                self.state[parameter]["momentum_buffer"] = torch.zeros_like(gradient)
        moments = [self.state[p]["momentum_buffer"] for p in several]
        torch._foreach_lerp_(moments, gradients, 1 - group["momentum"])  # pyright: ignore[reportPrivateImportUsage]
        ahead = torch._foreach_lerp(gradients, moments, group["momentum"]) if group["nesterov"] else moments  # pyright: ignore[reportPrivateImportUsage]
        x = torch.stack(list(ahead))
        x = x.to(best_dtype(x.device))
        if shape[0] > shape[1]:
            x = x.mT
        x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(group["eps"])
        a, b, c = group["ns_coefficients"]
        for _ in range(group["ns_steps"]):  # Newton-Schulz
            gram = x @ x.mT
            x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
        if shape[0] > shape[1]:
            x = x.mT
        rate = group["lr"]
        adjusted = rate * 0.2 * max(shape) ** 0.5  # adjust_lr_fn match_rms_adamw
        torch._foreach_mul_(several, 1 - rate * group["weight_decay"])  # pyright: ignore[reportPrivateImportUsage]
        torch._foreach_add_(several, list(x.float().unbind()), alpha=-adjusted)  # pyright: ignore[reportPrivateImportUsage]


class StageOptimizer:
    """Muon and AdamW over one model's trainable parameters; :meth:`step` takes the schedule's factor (1 = peak).

    ``rows``: name of a table -> the rows of it that train. They are trained as a table of their own and written back, so
    that neither gradient, weight decay nor moments ever touch the other rows, which stay bit for bit.
    """

    def __init__(
        self,
        named: Iterable[tuple[str, nn.Parameter]],
        config: OptimizerConfig,
        rows: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self._rows: list[tuple[nn.Parameter, Tensor, nn.Parameter]] = []
        self._named: dict[str, nn.Parameter] = {}
        for name, parameter in named:
            if not parameter.requires_grad:
                continue
            if rows is not None and name in rows:
                index = rows[name].to(parameter.device)
                whole, parameter = parameter, nn.Parameter(parameter.detach()[index].clone())
                self._rows.append((whole, index, parameter))
            self._named[name] = parameter
        dealt = ([self._named[name] for name in names] for names in self._dealt())
        decayed, plain, hidden, adapters = dealt
        self.parameters = hidden + decayed + plain + adapters
        groups = [
            {"params": decayed, "weight_decay": config.weight_decay},
            {"params": plain, "weight_decay": 0.0},
        ]
        if config.adapter_lr is not None and not adapters:
            raise ConfigError("optimizer.adapter_lr is for adapters (trains: lora), and nothing here has any")
        if adapters:
            groups.append({"params": adapters, "weight_decay": config.weight_decay})
        self.optimizers: list[torch.optim.Optimizer] = [
            torch.optim.AdamW(groups, lr=config.lr, betas=(config.beta1, config.beta2), foreach=True)
        ]
        self.peaks = [[config.lr, config.lr, config.adapter_lr or config.lr]]
        # Muon takes matrices: a convolution's kernel is shown to it as (out, in * h * w), sharing memory.
        self._matrices = [(p, nn.Parameter(p.detach().view(p.shape[0], -1))) for p in hidden]
        if hidden:
            matrices = [matrix for _, matrix in self._matrices]
            device = hidden[0].device
            theirs = device.type == "cpu" and best_dtype(device) == torch.bfloat16
            kind = torch.optim.Muon if theirs else StackedMuon
            self.optimizers.append(
                kind(
                    matrices,
                    lr=config.muon_lr,
                    weight_decay=config.weight_decay,
                    adjust_lr_fn="match_rms_adamw",
                )
            )
            self.peaks.append([config.muon_lr])

    @property
    def names(self) -> list[str]:
        """Names of all that trains."""
        return list(self._named)

    def _dealt(self, *, apart: bool = True) -> tuple[list[str], list[str], list[str], list[str]]:
        """Names of AdamW's parameters with decay, of those without, of Muon's, and of adapters with a rate of their own.
        ``apart``: a codebook is of the second kind; earlier versions took it for any other matrix.
        """
        decayed: list[str] = []
        plain: list[str] = []
        hidden: list[str] = []
        adapters: list[str] = []
        for name, parameter in self._named.items():
            if self.config.adapter_lr is not None and "lora_" in name:
                adapters.append(name)
            elif parameter.ndim < 2 or (apart and _CODEBOOK in name):
                plain.append(name)
            elif self.config.muon_lr == 0 or any(word in name for word in _NOT_HIDDEN):
                decayed.append(name)
            else:
                hidden.append(name)
        return decayed, plain, hidden, adapters

    def step(self, factor: float, idle: Container[str] = ()) -> Tensor:
        """Clip, update with every rate times ``factor``, clear gradients; returns the gradient norm before clipping, a
        scalar that nothing here waits for.

        Parameters named in ``idle`` are left alone, moments and decay included.
        """
        for whole, index, part in self._rows:
            with torch.no_grad():
                part.copy_(whole[index])  # the table may have been loaded since
            part.grad = None if whole.grad is None else whole.grad[index]
            whole.grad = None
        for name, parameter in self._named.items():
            if name in idle:
                parameter.grad = None
        norm = nn.utils.clip_grad_norm_(self.parameters, self.config.clip)
        for parameter, matrix in self._matrices:
            matrix.grad = None if parameter.grad is None else parameter.grad.reshape(matrix.shape)
            parameter.grad = None
        for optimizer, peaks in zip(self.optimizers, self.peaks, strict=True):
            for group, peak in zip(optimizer.param_groups, peaks, strict=False):
                group["lr"] = peak * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for whole, index, part in self._rows:
                whole[index] = part
        return norm

    def state_dict(self) -> dict[str, Any]:
        """State of both."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore both; rates, decay and betas stay those of the configuration. Raises ConfigError where the state is that
        of other parameters.
        """
        ours = [[dict(group) for group in optimizer.param_groups] for optimizer in self.optimizers]
        try:
            for optimizer, values in zip(self.optimizers, self._as_dealt(state["optimizers"]), strict=True):
                optimizer.load_state_dict(values)
        except ValueError:
            raise ConfigError(
                "the optimiser's state is of other parameters: muon_lr may change in a run, but not from or to 0, "
                "adapter_lr not from or to null"
            ) from None
        for optimizer, groups in zip(self.optimizers, ours, strict=True):
            for group, before in zip(optimizer.param_groups, groups, strict=True):
                group |= {k: before[k] for k in ("lr", "weight_decay", "betas") if k in before}

    def _as_dealt(self, states: list[dict[str, Any]]) -> list[dict[str, Any]]:
        """The states, those of an earlier version as this one deals its parameters out (see :meth:`_dealt`): moments that
        Muon had of a codebook are not AdamW's, which begins anew.
        """
        before, now = self._dealt(apart=False), self._dealt()
        sizes = [len(group["params"]) for state in states for group in state["param_groups"]]
        expected = [len(names) for names in before[: 3 if before[2] else 2]]
        if before == now or sizes != expected:
            return states
        found = []
        orders = zip((before[0] + before[1], before[2]), (now[0] + now[1], now[2]), strict=True)
        for optimizer, state, (old, new) in zip(self.optimizers, states, orders, strict=False):
            known = {name: state["state"][i] for i, name in enumerate(old) if i in state["state"]}
            kept = {i: known[name] for i, name in enumerate(new) if name in known}
            found.append({"state": kept, "param_groups": optimizer.state_dict()["param_groups"]})
        return found
