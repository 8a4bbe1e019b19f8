"""The semantic branch on transformers' own SigLIP2 files, any size, and its losses."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    Siglip2Config,
    Siglip2Model,
    Siglip2TextConfig,
    Siglip2VisionConfig,
    Siglip2VisionModel,
)

from nextflow_ar.config import SemanticConfig
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.semantic import SemanticEncoder, contrastive_model, patches_of, sigmoid_loss

VISION = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "num_patches": 16,
    "patch_size": 8,
}  # fmt: skip
EXPECTED = SemanticConfig(
    patch=8, hidden=32, layers=2, heads=2, intermediate=48, position_grid=4, decoder_layers=3
)


def pictures(*sizes: tuple[int, int]) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return [torch.rand(3, h, w, generator=generator) * 2 - 1 for h, w in sizes]


def reference(tower: Siglip2VisionModel, x: torch.Tensor) -> torch.Tensor:
    """Hidden states by transformers, from patches cut out one by one."""
    h, w = x.shape[1] // 8, x.shape[2] // 8
    patches = [
        x[:, i * 8 : i * 8 + 8, j * 8 : j * 8 + 8].permute(1, 2, 0).flatten()
        for i in range(h)
        for j in range(w)
    ]
    out = tower(
        pixel_values=torch.stack(patches)[None],
        pixel_attention_mask=torch.ones(1, h * w, dtype=torch.int32),
        spatial_shapes=torch.tensor([[h, w]]),
    ).last_hidden_state[0]
    return out.T.reshape(-1, h, w)


@pytest.mark.parametrize("whole", [True, False], ids=["two towers", "vision tower"])
@torch.no_grad()
def test_a_checkpoint_that_transformers_saved_loads_and_agrees(whole: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    if whole:
        text = Siglip2TextConfig(
            hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2, vocab_size=50,
            projection_size=32, pad_token_id=0, bos_token_id=0, eos_token_id=0,
        )  # fmt: skip
        model = Siglip2Model(Siglip2Config(text_config=text.to_dict(), vision_config=VISION))
        tower = model.vision_model
    else:
        model = tower = Siglip2VisionModel(Siglip2VisionConfig(**VISION))
    model.eval().save_pretrained(tmp_path / "s")
    encoder, config = SemanticEncoder.from_pretrained(tmp_path / "s", decoder_layers=3)
    assert config == EXPECTED
    assert not any(p.requires_grad for p in encoder.parameters())
    for x in pictures((32, 32), (24, 64), (80, 16)):
        torch.testing.assert_close(encoder(x[None])[0], reference(tower, x), atol=1e-5, rtol=1e-5)
    again = SemanticEncoder(config)
    again.load_state_dict(encoder.state_dict())  # the student starts from the teacher


@torch.no_grad()
def test_mixed_sizes_in_one_padded_batch_equal_one_by_one() -> None:
    torch.manual_seed(1)
    encoder = SemanticEncoder(EXPECTED).eval()
    several = pictures((32, 32), (24, 64), (80, 16), (8, 8))
    for x, found in zip(several, encoder.many(several), strict=True):
        torch.testing.assert_close(found, encoder(x[None])[0], atol=1e-5, rtol=1e-5)


def test_what_is_no_siglip2_is_refused_in_one_line(tmp_path: Path) -> None:
    with pytest.raises(StorageError, match="no SigLIP2 to load"):
        SemanticEncoder.from_pretrained(tmp_path / "none", 1)
    clip = CLIPVisionConfig(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, image_size=16
    )
    CLIPVisionModel(clip).save_pretrained(tmp_path / "clip")
    with pytest.raises(StorageError, match="is no SigLIP2 NaFlex vision tower"):
        SemanticEncoder.from_pretrained(tmp_path / "clip", 1)
    Siglip2VisionModel(Siglip2VisionConfig(**VISION)).save_pretrained(tmp_path / "cut")
    weights = tmp_path / "cut" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:500])
    with pytest.raises(StorageError, match="no SigLIP2 to load"):
        SemanticEncoder.from_pretrained(tmp_path / "cut", 1)
    with pytest.raises(ValueError, match="must be multiples of the patch 8, got 20x16"):
        patches_of(torch.zeros(1, 3, 16, 20), 8)


def test_the_sigmoid_loss_by_hand() -> None:
    logits = torch.tensor([[2.0, -1.0], [0.0, 3.0]])
    log = torch.nn.functional.logsigmoid
    wanted = -(log(torch.tensor([2.0, 1.0, 0.0, 3.0])).sum()) / 2
    assert float(sigmoid_loss(logits)) == pytest.approx(float(wanted))


def test_a_new_contrastive_model_starts_as_siglip_does() -> None:
    model = contrastive_model(EXPECTED, entries=40, length=12, layers=1)
    assert float(model.logit_scale.exp()) == pytest.approx(10) and float(model.logit_bias) == -10
