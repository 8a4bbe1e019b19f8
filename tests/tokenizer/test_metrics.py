"""Metrics against hand-worked values and, where it is installed, torchmetrics."""

from __future__ import annotations

import pytest
import torch

from nextflow_ar.tokenizer.metrics import frechet_distance, psnr, ssim


def pair(seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    a = torch.randint(0, 256, (2, 24, 40, 3), generator=generator)
    b = (a + torch.randint(-30, 31, a.shape, generator=generator)).clamp(0, 255)
    return a.to(torch.uint8), b.to(torch.uint8)


def test_psnr_by_hand() -> None:
    a = torch.zeros(2, 4, 4, 3, dtype=torch.uint8)
    b = a.clone()
    b[0] += 16  # mean squared error 256
    assert psnr(a, b).tolist() == pytest.approx([24.0483, 78.1308], abs=1e-3)


def test_ssim_equals_torchmetrics() -> None:
    image = pytest.importorskip("torchmetrics.functional.image")
    a, b = pair()
    _, every = image.structural_similarity_index_measure(
        b.movedim(-1, 1).double(), a.movedim(-1, 1).double(), data_range=255.0, return_full_image=True
    )
    # torchmetrics mirrors the border; the original, and ours, take windows inside the picture only
    wanted = every[:, :, 5:-5, 5:-5].mean((1, 2, 3))
    assert ssim(a, b).tolist() == pytest.approx(wanted.tolist(), abs=1e-5)


def test_ssim_of_the_same_and_of_opposites() -> None:
    a, _ = pair()
    assert ssim(a, a).tolist() == pytest.approx([1, 1])
    assert float(ssim(a, 255 - a).max()) < 0
    with pytest.raises(ValueError, match="at least 11 pixels, got 8x16"):
        ssim(torch.zeros(1, 16, 8, 3, dtype=torch.uint8), torch.zeros(1, 16, 8, 3, dtype=torch.uint8))


def test_the_frechet_distance_of_two_gaussians() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(60_000, 3, generator=generator, dtype=torch.float64)
    assert frechet_distance(x, x) == pytest.approx(0, abs=1e-6)
    # independent axes: sum of (m1 - m2)^2 + (s1 - s2)^2
    y = torch.randn(60_000, 3, generator=generator, dtype=torch.float64) * torch.tensor([2.0, 1.0, 0.5])
    y = y + torch.tensor([1.0, 0.0, -2.0])
    assert frechet_distance(x, y) == pytest.approx(5 + 1 + 0.25, rel=0.03)
