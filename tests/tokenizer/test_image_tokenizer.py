"""The tokenizer as a whole: shapes, saving, schedules, previews, and that both branches matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_bytes, to_unit
from tests.conftest import TINY_TOKENIZER, tiny_image_tokenizer

SQUARE = ScaleSchedule.square(5)


def pictures(count: int, height: int = 40, width: int = 40) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    return torch.randint(0, 256, (count, height, width, 3), generator=generator, dtype=torch.uint8)


def test_pictures_to_codes_and_back() -> None:
    tokenizer = tiny_image_tokenizer()
    found = tokenizer.encode_bytes(pictures(3))
    assert found.target.shape == (3, 55) and found.target.dtype == torch.int64
    whole = tokenizer.decode_bytes(found.target, SQUARE)
    assert whole.shape == (3, 40, 40, 3) and whole.dtype == torch.uint8
    preview = tokenizer.decode_bytes(found.target, SQUARE, upto_scale=2)
    later = found.target.clone()
    later[:, 5:] = 0
    assert torch.equal(preview, tokenizer.decode_bytes(later, SQUARE, upto_scale=2))
    assert not torch.equal(preview, whole)


def test_uint8_survives_the_change_of_range() -> None:
    every = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(1, 16, 16, 3)
    assert torch.equal(to_bytes(to_unit(every)), every)
    assert to_unit(every).min() == -1 and to_unit(every).max() == 1


def test_both_branches_decide_the_codes() -> None:
    tokenizer = tiny_image_tokenizer()
    x = to_unit(pictures(8))
    before = tokenizer.encode(x).target
    for name in ("encoder", "semantic_head"):
        changed = tiny_image_tokenizer()
        for parameter in getattr(changed, name).parameters():
            parameter.mul_(1.5)
        assert not torch.equal(changed.encode(x).target, before), name
    features = tokenizer.features(x)
    assert features.shape == (8, 10, 5, 5)
    assert tokenizer.semantics(features).shape == (8, 32, 5, 5)


def test_a_decoder_may_read_pixels_only() -> None:
    tokenizer = ImageTokenizer(replace(TINY_TOKENIZER, decoder_sees_semantic=False)).eval()
    features = torch.randn(1, 10, 5, 5)
    other = features.clone()
    other[:, :4] = 0
    assert torch.equal(tokenizer.render(features), tokenizer.render(other))


def test_other_aspect_ratios_and_sizes() -> None:
    tokenizer = tiny_image_tokenizer()
    wide = ScaleSchedule.from_final((40, 100), 5)
    height, width = wide.image_size(8)
    assert tokenizer.schedule_for(height, width) == wide
    assert tokenizer.encode_bytes(pictures(1, height, width)).target.shape == (1, wide.num_tokens)
    assert tokenizer.schedule_for(24, 24) == ScaleSchedule.square(3)
    with pytest.raises(ValueError, match="no scale schedule covers 50x40 pixels at downsampling 8"):
        tokenizer.schedule_for(40, 50)


def test_saved_and_loaded_is_the_same_up_to_bf16(tmp_path: Path) -> None:
    tokenizer = tiny_image_tokenizer()
    tokenizer.save_pretrained(tmp_path / "t")
    again = ImageTokenizer.from_pretrained(tmp_path / "t")
    assert again.config == tokenizer.config
    assert torch.equal(again.quantizer.codebook, tokenizer.quantizer.codebook)
    for (name, a), b in zip(again.state_dict().items(), tokenizer.state_dict().values(), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-8, atol=0, msg=name)
    again.save_pretrained(tmp_path / "u")  # bf16 is exact from here on
    third = ImageTokenizer.from_pretrained(tmp_path / "u")
    assert torch.equal(third.encode_bytes(pictures(2)).target, again.encode_bytes(pictures(2)).target)


def test_damaged_folders_say_what_is_wrong(tmp_path: Path) -> None:
    folder = tmp_path / "t"
    tiny_image_tokenizer().save_pretrained(folder)
    weights = folder / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[-5] ^= 1
    weights.write_bytes(bytes(data))
    with pytest.raises(StorageError, match=r"model.safetensors is damaged"):
        ImageTokenizer.from_pretrained(folder)
    weights.unlink()
    with pytest.raises(StorageError, match=r"lacks the file model.safetensors"):
        ImageTokenizer.from_pretrained(folder)
    with pytest.raises(StorageError, match="no such checkpoint folder"):
        ImageTokenizer.from_pretrained(tmp_path / "none")
