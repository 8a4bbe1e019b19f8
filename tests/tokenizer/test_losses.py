"""Perceptual and adversarial losses by hand."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

from nextflow_ar.tokenizer.losses import (
    PatchDiscriminator,
    adaptive_weight,
    feature_distance,
    hinge_discriminator,
    hinge_generator,
    lpips_distance,
    semantic_distance,
    structure_distance,
)
from nextflow_ar.tokenizer.metrics import ssim
from nextflow_ar.tokenizer.pixels import to_unit


def test_hinge_losses_by_hand() -> None:
    real, fake = torch.tensor([0.5, 2.0]), torch.tensor([-3.0, 0.0])
    assert float(hinge_discriminator(real, fake)) == pytest.approx(0.5 * (0.25 + 0.5))
    assert float(hinge_generator(fake)) == pytest.approx(1.5)


def test_the_structure_distance_is_one_minus_ssim() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randint(0, 256, (2, 20, 27, 3), dtype=torch.uint8, generator=generator)
    b = (a.int() + torch.randint(-30, 30, a.shape, generator=generator)).clamp(0, 255).to(torch.uint8)
    found = structure_distance(to_unit(a), to_unit(b))
    assert float(found) == pytest.approx(1 - float(ssim(a, b).mean()), abs=1e-5)
    x = to_unit(b).requires_grad_()
    structure_distance(x, to_unit(a)).backward()
    better = x.detach() - 0.02 * x.grad / x.grad.abs().max()
    assert x.grad is not None and float(structure_distance(better, to_unit(a))) < float(found)


def test_the_adaptive_weight_balances_gradients() -> None:
    weight = nn.Parameter(torch.tensor([1.0, 2.0]))
    strong, faint = (weight * torch.tensor([3.0, 4.0])).sum(), (weight * torch.tensor([0.06, 0.08])).sum()
    assert float(adaptive_weight(strong, faint, weight)) == pytest.approx(5 / 0.1001, rel=1e-4)
    assert float(adaptive_weight(strong, (weight * 0).sum(), weight)) == 1e4


def test_a_discriminator_learns_to_tell_two_kinds_of_pictures() -> None:
    torch.manual_seed(0)
    critic = PatchDiscriminator(channels=8, layers=2)
    optimizer = torch.optim.Adam(critic.parameters(), lr=3e-3)
    assert critic(torch.zeros(2, 3, 40, 56)).shape[0:2] == (2, 1)
    losses = []
    for _ in range(25):
        real = torch.rand(4, 3, 32, 32) * 2 - 1
        fake = torch.rand(4, 3, 32, 1).expand(4, 3, 32, 32) * 2 - 1  # striped
        loss = hinge_discriminator(critic(real), critic(fake))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss))
    assert losses[-1] < 0.3 < losses[0]


def test_perceptual_and_semantic_distances() -> None:
    distance = feature_distance(lambda x: x[:, :2] * 3)
    a = torch.randn(2, 3, 4, 4, requires_grad=True)
    assert float(distance(a, a.detach())) == pytest.approx(0, abs=1e-6)
    other = distance(a, -a.detach())
    assert float(other) == pytest.approx(2, abs=1e-5)
    distance(a, torch.randn(2, 3, 4, 4)).backward()
    assert a.grad is not None and bool(a.grad[:, :2].any()) and not bool(a.grad[:, 2].any())
    read, goal = torch.tensor([[[[3.0]], [[4.0]]]]), torch.tensor([[[[4.0]], [[3.0]]]])
    assert float(semantic_distance(read, goal, "cosine")) == pytest.approx(1 - 24 / 25)
    assert float(semantic_distance(read, goal, "l2")) == pytest.approx(1)


def test_lpips_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lpips", None)
    with pytest.raises(ImportError, match="pip install lpips"):
        lpips_distance()
