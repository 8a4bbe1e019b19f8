"""Muon over matrices of one shape at once is torch's own, its state too."""

from __future__ import annotations

import logging
from dataclasses import replace
from itertools import pairwise

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


@pytest.mark.parametrize("muon_lr", [1e-2, 0.0])
def test_adapters_with_a_rate_of_their_own(muon_lr: float) -> None:
    config = OptimizerConfig(
        lr=1e-3, muon_lr=muon_lr, weight_decay=0.0, beta1=0.9, beta2=0.98, warmup=1, schedule="constant", decay=0.0,
        final=1.0, clip=1e9, adapter_lr=8e-3,
    )  # fmt: skip
    rates = {"q.lora_A.weight": 8e-3, "q.lora_B.weight": 8e-3, "head.weight": 1e-3, "norm.weight": 1e-3}
    named = {name: nn.Parameter(torch.ones(4, 4)) for name in rates} | {
        "norm.weight": nn.Parameter(torch.ones(4))
    }
    optimizer = StageOptimizer(named.items(), config)
    assert len(optimizer.optimizers) == 1  # nothing is left for Muon
    for factor in (1.0, 0.5):
        before = {name: p.detach().clone() for name, p in named.items()}
        for p in named.values():
            p.grad = torch.ones_like(p)
        optimizer.step(factor)
        for name, p in named.items():  # AdamW's step under a steady gradient is its rate
            torch.testing.assert_close(
                before[name] - p, torch.full_like(p, factor * rates[name]), rtol=1e-3, atol=0
            )
    with pytest.raises(ConfigError, match="nothing here has any"):
        StageOptimizer([("head.weight", named["head.weight"])], config)
    again = StageOptimizer(named.items(), replace(config, adapter_lr=4e-3))
    again.load_state_dict(optimizer.state_dict())
    assert again.state_dict()["optimizers"][0]["state"].keys() == set(range(4))
    with pytest.raises(ConfigError, match="adapter_lr not from or to null"):
        StageOptimizer(named.items(), replace(config, adapter_lr=None)).load_state_dict(
            optimizer.state_dict()
        )


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


def test_a_warmup_that_the_run_never_leaves_is_told(caplog: pytest.LogCaptureFixture) -> None:
    config = OptimizerConfig(1e-3, 1e-2, 0.1, 0.9, 0.95, 1000, "cosine", 0.0, 0.1, 1.0)
    with caplog.at_level(logging.WARNING):
        config.warn(1001)
        assert not caplog.records
        config.warn(500)
    (record,) = caplog.records
    assert record.getMessage() == (
        "optimizer: a warmup of 1000 steps in a run of 500: the rate never falls, and ends at 50 % of its peak"
    )


def test_a_constant_rate_falls_from_the_end_of_the_warmup_at_the_earliest() -> None:
    config = OptimizerConfig(1e-3, 1e-2, 0.1, 0.9, 0.95, 60, "constant", 0.9, 0.1, 1.0)
    factors = [config.factor(step, 100) for step in range(101)]
    assert factors[59] == factors[60] == 1 and factors[100] == pytest.approx(0.1)
    assert max(a - b for a, b in pairwise(factors)) < 0.03


class Quantised(nn.Module):
    """A model with a codebook that learns by gradient among its other matrices."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder, self.quantizer, self.decoder = nn.Linear(4, 4), nn.Module(), nn.Linear(4, 4)
        self.quantizer.codebook = nn.Parameter(torch.ones(5, 4))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(x) + self.quantizer.codebook.sum(0))  # type: ignore[union-attr]


def _quantised(muon_lr: float) -> tuple[Quantised, StageOptimizer]:
    config = OptimizerConfig(1e-3, muon_lr, 0.1, 0.9, 0.95, 1, "constant", 0.0, 1.0, 1.0)
    model = Quantised()
    return model, StageOptimizer(model.named_parameters(), config)


@pytest.mark.parametrize("muon_lr", [1e-2, 0.0])
def test_a_codebook_is_no_hidden_matrix_and_does_not_decay(muon_lr: float) -> None:
    model, optimizer = _quantised(muon_lr)
    adamw = optimizer.optimizers[0]
    assert len(optimizer.optimizers) == (2 if muon_lr else 1)
    (decay,) = [
        group["weight_decay"]
        for group in adamw.param_groups
        if any(p is model.quantizer.codebook for p in group["params"])
    ]
    assert decay == 0
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(1.0)
    again = _quantised(muon_lr)[1]
    again.load_state_dict(optimizer.state_dict())
    assert {len(state) for each in again.optimizers for state in each.state.values()} <= {1, 3}


@pytest.mark.parametrize("muon_lr", [1e-2, 0.0])
def test_moments_of_a_version_that_dealt_codebooks_out_otherwise_are_read(muon_lr: float) -> None:
    matrices = ["encoder.weight", "quantizer.codebook", "decoder.weight"]
    biases = ["encoder.bias", "decoder.bias"]
    model, optimizer = _quantised(muon_lr)
    parameters = dict(model.named_parameters())
    marks = {name: float(i + 1) for i, name in enumerate(parameters)}

    def state(kind: str, names: list[str], sizes: list[int]) -> dict[str, object]:
        alike = optimizer.optimizers[0].state_dict()["param_groups"][0]
        held = {i: {kind: torch.full_like(parameters[n], marks[n])} for i, n in enumerate(names)}
        if kind == "exp_avg":
            for i, n in enumerate(names):
                held[i] |= {"step": torch.tensor(1.0), "exp_avg_sq": torch.ones_like(parameters[n])}
        ends = [sum(sizes[: i + 1]) for i in range(len(sizes))]
        groups = [alike | {"params": list(range(e - n, e))} for e, n in zip(ends, sizes, strict=True)]
        return {"state": held, "param_groups": groups}

    if muon_lr:
        old = [state("exp_avg", biases, [0, 2]), state("momentum_buffer", matrices, [3])]
    else:
        old = [state("exp_avg", matrices + biases, [3, 2])]
    optimizer.load_state_dict({"optimizers": old})
    shown = {id(p): name for name, p in parameters.items()}
    shown |= {id(matrix): shown[id(p)] for p, matrix in optimizer._matrices}
    found = {
        shown[id(p)]: float(
            next(iter(x for k, x in held.items() if k in ("exp_avg", "momentum_buffer"))).mean()
        )
        for each in optimizer.optimizers
        for p, held in each.state.items()
    }
    if muon_lr:
        del marks["quantizer.codebook"]  # what Muon had of it is not AdamW's
    assert found == marks
    model(torch.ones(2, 4)).sum().backward()
    optimizer.step(1.0)
    assert all(p.isfinite().all() for p in parameters.values())
