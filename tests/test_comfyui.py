"""The ComfyUI nodes, called as ComfyUI calls them: by class attributes, keyword arguments, tensors in and out."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle

FILE = Path(__file__).parent.parent / "examples" / "comfyui" / "nextflow_ar_nodes.py"
pytestmark = pytest.mark.skipif(not FILE.is_file(), reason="needs the checkout")


@pytest.fixture(scope="module")
def nodes() -> ModuleType:
    """Loaded as ComfyUI loads a file of custom_nodes."""
    spec = importlib.util.spec_from_file_location("nextflow_ar_nodes", FILE)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def model(bundle: Bundle) -> NextFlowPipeline:
    return NextFlowPipeline(bundle)


def call(nodes: ModuleType, kind_of_node: str, /, **inputs: Any) -> Any:
    """A node run with its declared defaults filled in, as ComfyUI does."""
    node = nodes.NODE_CLASS_MAPPINGS[f"NextFlowAR{kind_of_node}"]
    declared = node.INPUT_TYPES()
    for key, kind in {**declared["required"], **declared.get("optional", {})}.items():
        if key not in inputs and kind[0] != "IMAGE":
            choices = kind[0] if isinstance(kind[0], list) else [None]
            inputs[key] = (kind[1] if len(kind) > 1 else {}).get("default", choices[0])
    found = getattr(node(), node.FUNCTION)(**inputs)
    return found["result"] if isinstance(found, dict) else found


def images(count: int = 2, height: int = 40, width: int = 40) -> torch.Tensor:
    return torch.rand(count, height, width, 3, generator=torch.Generator().manual_seed(0))


def test_every_node_is_declared_whole(nodes: ModuleType) -> None:
    assert set(nodes.NODE_CLASS_MAPPINGS) == set(nodes.NODE_DISPLAY_NAME_MAPPINGS)
    names = ("Load", "Generate", "Edit", "Inpaint", "Vary", "Describe")
    assert list(nodes.NODE_CLASS_MAPPINGS) == [f"NextFlowAR{n}" for n in names]
    for node in nodes.NODE_CLASS_MAPPINGS.values():
        assert node.CATEGORY == "NextFlow-AR" and callable(getattr(node, node.FUNCTION))
        assert len(node.RETURN_TYPES) == len(node.RETURN_NAMES) == 1
        for group in node.INPUT_TYPES().values():
            for kind in group.values():
                assert isinstance(kind[0], list) or kind[0].isupper()


def test_load(nodes: ModuleType, tmp_path: Path, model: NextFlowPipeline) -> None:
    model.save_pretrained(tmp_path / "m")
    loaded = call(nodes, "Load", name=f" {tmp_path / 'm'} ", device="cpu", dtype="float32")[0]
    assert isinstance(loaded, NextFlowPipeline) and loaded.engine.model.head.weight.dtype == torch.float32


def test_generate_is_the_pipelines(nodes: ModuleType, model: NextFlowPipeline) -> None:
    drawn = call(nodes, "Generate", model=model, prompt="two dogs", seed=5, count=2)[0]
    assert drawn.shape == (2, 40, 40, 3) and drawn.dtype == torch.float32
    wanted = model.generate("two dogs", seed=5, n=2)
    assert np.array_equal((drawn * 255).round().byte().numpy(), np.stack([np.asarray(p) for p in wanted]))
    hot = call(
        nodes,
        "Generate",
        model=model,
        prompt="two dogs",
        seed=5,
        count=1,
        temperature=0.0,
        width=24,
        height=24,
    )[0]
    assert hot.shape == (1, 24, 24, 3)
    again = call(
        nodes,
        "Generate",
        model=model,
        prompt="two dogs",
        seed=6,
        count=1,
        temperature=0.0,
        width=24,
        height=24,
    )[0]
    assert torch.equal(hot, again)  # greedy: no seed matters


def test_edit_each_or_all_together(nodes: ModuleType, model: NextFlowPipeline) -> None:
    each = call(nodes, "Edit", model=model, images=images(), instruction="a cat", seed=1)[0]
    assert each.shape == (2, 40, 40, 3)
    first = model.edit(nodes.to_pictures(images())[0], "a cat", seed=1)[0]
    assert torch.equal(each[:1], nodes.to_tensor([first]))


def test_inpaint_keeps_what_is_not_masked(nodes: ModuleType, model: NextFlowPipeline) -> None:
    mask = torch.zeros(20, 20)  # another size than the picture's: scaled to it
    mask[:10] = 1.0
    redrawn = call(nodes, "Inpaint", model=model, images=images(), mask=mask, prompt="two dogs", seed=1)[0]
    kept = nodes.to_tensor([model.reconstruct(p) for p in nodes.to_pictures(images())])
    assert torch.equal(redrawn[:, 20:], kept[:, 20:])
    assert not torch.equal(redrawn[:, :20], kept[:, :20])


def test_vary_and_describe(nodes: ModuleType, model: NextFlowPipeline) -> None:
    varied = call(
        nodes, "Vary", model=model, images=images(1), from_scale=3, seed=1, count=2, temperature=4.0
    )[0]
    assert varied.shape == (2, 40, 40, 3) and not torch.equal(varied[0], varied[1])
    text = call(nodes, "Describe", model=model, images=images(), max_tokens=6)[0]
    assert text == "\n".join(model.describe(nodes.to_pictures(images()), max_tokens=6))


def test_pictures_survive_the_way_there_and_back(nodes: ModuleType) -> None:
    pixels = (
        torch.arange(256).float()[None, :, None, None].expand(1, 256, 2, 4) / 255
    )  # with an alpha channel
    picture = nodes.to_pictures(pixels)[0]
    assert picture.size == (2, 256) and picture.mode == "RGB"
    assert torch.equal(nodes.to_tensor([picture]), pixels[..., :3])
