"""The tokenizer as a whole: shapes, saving, schedules, previews, and that both branches matter."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_ar.scales import FINAL_GRIDS, ScaleSchedule
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer, canvas_schedule
from nextflow_ar.tokenizer.pixels import to_bytes, to_unit
from nextflow_ar.types import Codes
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
    before = tokenizer.quantize(x).target
    for name in ("encoder", "semantic_head"):
        changed = tiny_image_tokenizer()
        for parameter in getattr(changed, name).parameters():
            parameter.mul_(1.5)
        assert not torch.equal(changed.quantize(x).target, before), name
    features = tokenizer.embed(x)
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


@pytest.mark.parametrize("scales", [7, 8, 12])
def test_whatever_can_be_extracted_has_a_schedule(scales: int) -> None:
    config = replace(TINY_TOKENIZER, num_scales=scales)
    for level in range(1, 19):
        for height, width in FINAL_GRIDS:
            laid = ScaleSchedule.nearest(height, width, level)
            found = canvas_schedule(config, *laid.image_size(8))
            assert found.final == laid.final and found.canonical
            assert found == laid or {len(found), len(laid)} <= {
                2,
                3,
                4,
                7,
                8,
            }  # two levels have a few tiny ones
            assert len(found) == scales or level != scales
    assert canvas_schedule(config, 48, 88).final == (6, 11)  # 2:1
    for height, width in ((48, 87), (40, 176), (0, 8)):
        with pytest.raises(ValueError, match=f"no scale schedule covers {width}x{height} pixels"):
            canvas_schedule(config, height, width)


def test_pictures_are_turned_upright(tmp_path: Path) -> None:
    tokenizer, whole = tiny_image_tokenizer(), photo(40, 64)
    side = whole.transpose(Image.Transpose.ROTATE_90)
    side.getexif()[0x0112] = 6
    side.save(tmp_path / "phone.png", exif=side.getexif())
    codes, wanted = tokenizer.encode(Image.open(tmp_path / "phone.png")), tokenizer.encode(whole)
    assert isinstance(codes, Codes) and isinstance(wanted, Codes)
    assert codes.schedule == wanted.schedule and torch.equal(codes.target, wanted.target)
    assert tokenizer.decode(codes).size == (64, 40)  # type: ignore[union-attr]


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


def photo(height: int, width: int, seed: int = 0) -> Image.Image:
    """Smooth, so that scaling and back loses little."""
    small = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def test_the_library_takes_pictures_of_any_and_of_mixed_sizes() -> None:
    tokenizer = tiny_image_tokenizer()
    several = [
        photo(40, 40),
        photo(33, 61, 1),
        np.asarray(photo(64, 20, 2)),
        torch.from_numpy(np.array(photo(9, 9))),
    ]
    found = tokenizer.encode(several)
    assert isinstance(found, list)
    for picture, codes in zip(several, found, strict=True):
        alone = tokenizer.encode(picture)
        assert isinstance(alone, Codes) and torch.equal(alone.target, codes.target)
        height, width = (
            (picture.height, picture.width) if isinstance(picture, Image.Image) else picture.shape[:2]
        )
        h, w = codes.schedule.image_size(8)
        assert h >= height and w >= width  # the smallest canvas that holds it whole
        out = tokenizer.decode(codes)
        assert isinstance(out, Image.Image) and out.size == (width, height)  # fitting is undone
    pictures_again = tokenizer.decode(found)
    assert isinstance(pictures_again, list)
    assert [p.size for p in pictures_again] == [(40, 40), (61, 33), (20, 64), (9, 9)]
    large = tokenizer.encode(photo(700, 1000), num_scales=6)
    assert isinstance(large, Codes) and len(large.schedule) == 6
    assert tokenizer.decode(large, upto_scale=2).size == (1000, 700)  # type: ignore[union-attr]
    with pytest.raises(ValueError, match="aspect ratios from 1:4 to 4:1"):
        tokenizer.encode(photo(10, 100))
    with pytest.raises(ValueError, match=r"a picture is \(H, W, 3\) uint8, got \(4, 4\) float64"):
        tokenizer.encode(np.zeros((4, 4)))


def test_crop_fills_the_canvas_and_tells_what_it_saw() -> None:
    tokenizer = tiny_image_tokenizer()
    codes = tokenizer.encode(photo(60, 90), schedule=SQUARE, fit="crop")
    assert isinstance(codes, Codes) and codes.frame is not None
    assert codes.frame.size == (60, 60) and codes.frame.box == (0, 0, 40, 40)
    assert tokenizer.decode(codes).size == (60, 60)  # type: ignore[union-attr]


def test_every_aspect_ratio_encodes_and_decodes() -> None:
    tokenizer = tiny_image_tokenizer()
    for final in FINAL_GRIDS:
        schedule = ScaleSchedule.from_final(final, 7)
        height, width = schedule.image_size(8)
        codes = tokenizer.encode(photo(height, width), schedule=schedule)
        assert isinstance(codes, Codes) and codes.target.shape == (schedule.num_tokens,)
        assert tokenizer.decode(codes).size == (width, height)  # type: ignore[union-attr]


def test_features_of_codes() -> None:
    tokenizer = tiny_image_tokenizer()
    codes = tokenizer.encode([photo(40, 40), photo(40, 40, 1)])
    found = tokenizer.features(codes)
    assert found.semantic.shape == (2, 4, 5, 5) and found.pixel.shape == (2, 6, 5, 5)
    assert found.decoded is not None and found.decoded.shape == (2, 32, 5, 5)
    indices = torch.stack([c.target for c in codes])  # type: ignore[union-attr]
    summed = tokenizer.quantizer.accumulate(indices, SQUARE)
    torch.testing.assert_close(torch.cat([found.semantic, found.pixel], 1), summed)
    with pytest.raises(ValueError, match="one and the same schedule"):
        tokenizer.features([codes[0], tokenizer.encode(photo(20, 40))])  # type: ignore[index,list-item]


def test_a_tokenizer_of_the_pixel_branch_alone() -> None:
    config = replace(
        TINY_TOKENIZER, semantic=None, quantizer=replace(TINY_TOKENIZER.quantizer, semantic_dim=0)
    )
    tokenizer = ImageTokenizer(config).eval().requires_grad_(False)
    tokenizer.quantizer.codebook.normal_()
    codes = tokenizer.encode(photo(40, 40))
    assert tokenizer.decode(codes).size == (40, 40)  # type: ignore[union-attr,arg-type]
    assert tokenizer.features(codes).decoded is None  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no semantic branch"):
        tokenizer.semantics(torch.zeros(1, 6, 5, 5))
    with pytest.raises(ValueError, match="if and only if there is no semantic branch"):
        ImageTokenizer(replace(TINY_TOKENIZER, semantic=None))
    with pytest.raises(ValueError, match="groups of about 16"):
        ImageTokenizer(replace(TINY_TOKENIZER, decoder_channels=(8, 16, 56)))


def test_names_that_need_no_download_and_unknown_ones(tmp_path: Path) -> None:
    bundled = ImageTokenizer.from_pretrained("nano")
    assert bundled.config.num_scales == 8
    with pytest.raises(
        StorageError, match="no such checkpoint folder; nano, nano-tokenizer, a folder or a Hub id"
    ):
        ImageTokenizer.from_pretrained("nanno")


def test_push_to_hub_uploads_a_whole_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[tuple[str, object]] = []

    class Hub:
        def __init__(self, token: str | None = None) -> None:
            calls.append(("token", token))

        def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
            calls.append(("create", (repo_id, private, exist_ok)))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            again = ImageTokenizer.from_pretrained(folder_path)  # what is uploaded can be loaded
            calls.append(("upload", (repo_id, again.config, (folder_path / "README.md").read_text())))
            if repo_id.endswith("no"):
                raise OSError("403\nforbidden")
            return "https://hub/" + repo_id

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    tokenizer = tiny_image_tokenizer()
    address = tokenizer.push_to_hub("me/it", private=True, token="t", card="# it")
    assert address == "https://hub/me/it"
    assert calls == [
        ("token", "t"), ("create", ("me/it", True, True)), ("upload", ("me/it", tokenizer.config, "# it")),
    ]  # fmt: skip
    with pytest.raises(StorageError, match="me/no: the upload failed \\(403 forbidden\\)"):
        tokenizer.push_to_hub("me/no", card="# it")


def test_what_was_decoded_encodes_to_nearly_the_same_picture() -> None:
    tokenizer = ImageTokenizer.from_pretrained("nano")
    blue, red, white, green = (45, 95, 210), (220, 40, 40), (245, 245, 245), (50, 160, 70)
    errors = np.zeros(2)
    for ground, square in ((blue, red), (white, green)):
        picture = np.full((64, 64, 3), ground, np.uint8)
        picture[16:48, 16:48] = square
        first = tokenizer.decode(tokenizer.encode(picture))
        again = tokenizer.decode(tokenizer.encode(first))  # type: ignore[arg-type]
        errors += [((np.asarray(x, float) - picture) ** 2).mean() for x in (first, again)]
    assert 10 * np.log10(255**2 / (errors[0] / 2)) > 26
    # Less than 3.5 dB are lost by a second pass: the encoder for the wide world loses 3.1 of these squares.
    assert errors[1] < 10**0.35 * errors[0]
