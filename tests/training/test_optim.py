"""Muon over matrices of one shape at once is torch's own, its state too."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import nn

from nextflow_ar.config import ConfigError
from nextflow_ar.training.optim import OptimizerConfig, StackedMuon, StageOptimizer

SHAPES = ((24, 16), (16, 24), (24, 16), (20, 20), (24, 16))


def _trained(
    kind: type[torch.optim.Muon], steps: int, nesterov: bool
) -> tuple[list[nn.Parameter], torch.optim.Muon]:
    random = torch.Generator().manual_seed(2)
    weights = [nn.Parameter(torch.randn(*shape, generator=random)) for shape in SHAPES]
    optimizer = kind(weights, lr=0.02, weight_decay=0.1, nesterov=nesterov, adjust_lr_fn="match_rms_adamw")
    for step in range(steps):
        for number, weight in enumerate(weights):
            gradient = torch.randn(weight.shape, generator=random)
            weight.grad = None if (step, number) == (1, 2) else gradient  # one that is left alone for a step
        optimizer.step()
    return weights, optimizer


@pytest.mark.parametrize("nesterov", [True, False])
def test_as_torchs_own(nesterov: bool) -> None:
    ours, state = _trained(StackedMuon, 4, nesterov)
    theirs, other = _trained(torch.optim.Muon, 4, nesterov)
    for a, b in zip(ours, theirs, strict=True):
        # products in batches may round otherwise in bf16
        assert float((a - b).detach().abs().max()) < 0.02 * 0.2 * 24**0.5 * 0.05
    mine, yours = state.state_dict()["state"], other.state_dict()["state"]
    assert set(mine) == set(yours) == set(range(len(SHAPES)))
    for number in mine:
        torch.testing.assert_close(mine[number]["momentum_buffer"], yours[number]["momentum_buffer"])
    state.load_state_dict(other.state_dict())


def test_a_closure_is_refused() -> None:
    _, optimizer = _trained(StackedMuon, 1, True)
    with pytest.raises(ValueError, match="closure"):
        optimizer.step(lambda: 0.0)


@pytest.mark.parametrize("muon_lr", [1e-2, 0.0])
def test_what_muon_takes(muon_lr: float) -> None:
    config = OptimizerConfig(
        lr=1e-3, muon_lr=muon_lr, weight_decay=0.1, beta1=0.9, beta2=0.98, warmup=1, schedule="constant", decay=0.0,
        final=1.0, clip=1.0,
    )  # fmt: skip
    matrices = ("layers.0.q_proj.weight", "layers.0.q_proj.lora_A.weight", "layers.0.q_proj.lora_B.weight")
    named = {
        name: nn.Parameter(torch.ones(4, 6)) for name in (*matrices, "head.weight", "embed_tokens.weight")
    }
    named["norm.weight"] = nn.Parameter(torch.ones(6))
    optimizer = StageOptimizer(named.items(), config)
    adam = {id(p) for group in optimizer.optimizers[0].param_groups for p in group["params"]}
    assert {name for name, p in named.items() if id(p) not in adam} == (set(matrices) if muon_lr else set())
    assert len(optimizer.optimizers) == (2 if muon_lr else 1)


def test_a_resumed_run_keeps_its_own_rates() -> None:
    """A state brings moments, not the configuration of the run that wrote it; Muon's parameters have to be the same."""
    model, again = nn.Linear(4, 4), nn.Linear(4, 4)
    config = OptimizerConfig(1e-3, 1e-2, 0.1, 0.9, 0.95, 1, "constant", 0.0, 1.0, 1.0)
    first = StageOptimizer(model.named_parameters(), config)
    model(torch.ones(2, 4)).sum().backward()
    first.step(1.0)
    changed = replace(config, weight_decay=0.5, beta1=0.8, muon_lr=2e-2)
    second = StageOptimizer(again.named_parameters(), changed)
    second.load_state_dict(first.state_dict())
    adamw, muon = second.optimizers
    assert {group["betas"] for group in adamw.param_groups} == {(0.8, 0.95)}
    assert [group["weight_decay"] for group in adamw.param_groups] == [0.5, 0.0]
    assert muon.param_groups[0]["weight_decay"] == 0.5
    moments = [next(iter(o.state.values())) for o in (first.optimizers[1], muon)]
    assert torch.equal(moments[0]["momentum_buffer"], moments[1]["momentum_buffer"])
    without = StageOptimizer(again.named_parameters(), replace(config, muon_lr=0.0))
    with pytest.raises(ConfigError, match="muon_lr may change in a run, but not from or to 0"):
        without.load_state_dict(first.state_dict())
