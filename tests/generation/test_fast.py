"""The static path draws what the engine draws, and its attention without a mask is attention with one."""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
from torch.nn import functional as F

from nextflow_ar.generation.engine import ContextError, Engine, ImageRequest
from nextflow_ar.generation.fast import StaticCache, StaticDrawer, compile_layers
from nextflow_ar.generation.forcing import Forced
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.attention import PrefixMask, attend
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Codes, Document, Done, Image, ImageReady, ScaleReady, Text
from tests.conftest import TINY_MODEL, tiny_bundle

SCHEDULE = ScaleSchedule.from_final((64, 64), 5)
SETTINGS = SamplingSettings(guidance=(3.0, 1.5), temperature=0.9, top_k=12, top_p=0.95)


def requests(bundle: Bundle, settings: SamplingSettings, prompts: tuple[str, ...]) -> list[ImageRequest]:
    return [ImageRequest(Document((Text(p),)), SCHEDULE, 7 + i, settings) for i, p in enumerate(prompts)]


def drawn(events) -> dict[int, list[int]]:
    return {e.row: e.codes.target.tolist() for e in events if isinstance(e, ImageReady)}


@pytest.mark.parametrize("attention", ["split", "masked"])
@pytest.mark.parametrize("settings", [SETTINGS, SamplingSettings(temperature=1.0)])
@pytest.mark.parametrize("kv_heads", [3, 1])
def test_static_shapes_draw_the_engines_pictures(
    attention: str, settings: SamplingSettings, kv_heads: int
) -> None:
    bundle = tiny_bundle(replace(TINY_MODEL, kv_heads=kv_heads))
    drawer = StaticDrawer(
        bundle, SCHEDULE, 3, guided=settings.guided, prefix=64, attention=attention, graphs=False
    )
    for prompts in (
        ("two dogs", "a red circle on a blue background", "a"),
        ("a cat", "dogs"),
    ):  # memory is used again
        asked = requests(bundle, settings, prompts)
        assert drawn(drawer.images(asked)) == drawn(Engine(bundle).images(asked))


def test_events_come_scale_by_scale(bundle: Bundle) -> None:
    drawer, named = StaticDrawer(bundle, SCHEDULE, 1, guided=True, prefix=32), []

    @contextmanager
    def watch(name: str):
        named.append(name)
        yield

    events = list(drawer.images(requests(bundle, SETTINGS, ("two dogs",)), watch=watch))
    sizes = [len(e.codes) for e in events if isinstance(e, ScaleReady)]
    assert sizes == list(SCHEDULE.offsets[1:]) and isinstance(events[-1], Done)
    scales = [name for name in named if name != "sampling"]
    assert scales == ["prefill", *(f"scale {k}" for k in range(2, 6))] and named.count("sampling") == 5
    device = drawn(drawer.images(requests(bundle, SETTINGS, ("two dogs",)), noise="device"))
    assert device == drawn(events)  # on a CPU the two kinds of noise are one


def test_pictures_in_the_prompt_and_kept_codes(bundle: Bundle) -> None:
    codes = Codes.plain(SCHEDULE, torch.arange(SCHEDULE.num_tokens) % 24)
    document = Document((Image(codes), Text("two dogs")))
    keep = torch.zeros(SCHEDULE.num_tokens, dtype=torch.bool)
    keep[::3] = True
    request = ImageRequest(document, SCHEDULE, 3, SETTINGS, forced=Forced(codes, keep, None, None))
    drawer = StaticDrawer(bundle, SCHEDULE, 2, guided=True, prefix=128, graphs=False)
    found = drawn(drawer.images([request]))
    assert found == drawn(Engine(bundle).images([request]))
    assert [found[0][i] for i in range(0, SCHEDULE.num_tokens, 3)] == codes.target[::3].tolist()


def test_what_does_not_fit_is_said(bundle: Bundle) -> None:
    drawer = StaticDrawer(bundle, SCHEDULE, 1, guided=False, prefix=8, graphs=False)
    plain = SamplingSettings()
    with pytest.raises(ContextError, match="this drawer holds 8"):
        list(drawer.images(requests(bundle, plain, ("a red circle on a blue background, " * 3,))))
    with pytest.raises(ValueError, match="takes 1 to 1 requests, got 2"):
        list(drawer.images(requests(bundle, plain, ("a", "b"))))
    with pytest.raises(ValueError, match="guided=True"):
        list(drawer.images(requests(bundle, SETTINGS, ("a",))))
    other = replace(requests(bundle, plain, ("a",))[0], schedule=ScaleSchedule.square(3))
    with pytest.raises(ValueError, match="of the drawer's schedule"):
        list(drawer.images([other]))
    small = tiny_bundle(replace(TINY_MODEL, max_positions=40))
    narrow = StaticDrawer(small, SCHEDULE, 1, guided=False, prefix=16, graphs=False)
    with pytest.raises(ContextError, match="the model's context holds 40"):
        list(narrow.images(requests(small, plain, ("a",))))


def test_it_does_not_copy_pictures() -> None:
    bundle = tiny_bundle(replace(TINY_MODEL, copies=True))
    codes = Codes.plain(SCHEDULE, torch.arange(SCHEDULE.num_tokens) % 24)
    request = ImageRequest(Document((Image(codes), Text("two dogs"))), SCHEDULE, 3, SETTINGS)
    drawer = StaticDrawer(bundle, SCHEDULE, 2, guided=True, prefix=128, graphs=False)
    with pytest.raises(ValueError, match="copies no picture"):
        list(drawer.images([request]))
    asked = requests(bundle, SETTINGS, ("two dogs",))
    assert drawn(drawer.images(asked)) == drawn(Engine(bundle).images(asked))


@pytest.mark.parametrize("groups", [4, 2, 1])
def test_attention_behind_prefixes(groups: int) -> None:
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(3, 4, 9, 8, generator=generator)
    key, value = (torch.randn(3, groups, 30, 8, generator=generator) for _ in range(2))
    seen = torch.arange(12) >= torch.tensor([0, 5, 11])[:, None]
    whole = torch.cat([seen, torch.ones(3, 18, dtype=torch.bool)], 1)[:, None, None]
    found, _ = attend(torch.nn.Module(), query, key, value, PrefixMask(seen[:, None, None]), scaling=0.3)
    wide = [x.repeat_interleave(4 // groups, 1) for x in (key, value)]
    wanted = F.scaled_dot_product_attention(query, *wide, attn_mask=whole, scale=0.3).transpose(1, 2)
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)


def test_a_static_cache_never_moves() -> None:
    cache = StaticCache(TINY_MODEL, 2, 16, torch.device("cpu"), torch.float32)
    places = [x.data_ptr() for x in cache.keys]
    cache.at(3, 5, 8)
    new = torch.ones(2, 3, 2, 16)
    keys, _ = cache.update(new, new * 2, 1)
    assert keys.shape == (2, 3, 8, 16) and keys[:, :, 3:5].eq(1).all() and keys.sum() == new.sum()
    assert cache.values[1][:, :, 3:5].eq(2).all() and not cache.keys[0].any()
    assert [x.data_ptr() for x in cache.keys] == places and cache.get_seq_length() == 3


def test_layers_can_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    compiled = []
    monkeypatch.setattr(
        torch.nn.Module, "compile", lambda self, **how: compiled.append((type(self).__name__, how))
    )
    compile_layers(tiny_bundle().model)
    assert len(compiled) == 3 * TINY_MODEL.layers and all(how == {"dynamic": True} for _, how in compiled)
