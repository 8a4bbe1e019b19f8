"""A recipe on two processes (gloo) against one: loss curve, resume with another number of processes, export."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch.distributed.tensor import DTensor

from nextflow_ar.config import ConfigError, from_dict, to_dict
from nextflow_ar.model.checkpoint import Bundle, load_bundle, save_bundle
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.model_stage import ModelTrainer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.recipe import ModelRecipe
from nextflow_ar.training.runs import RunFolder
from nextflow_ar.training.sharded import local
from tests.conftest import TINY_MODEL, TINY_SEMANTIC, TINY_TOKENIZER, tiny_bundle, tiny_image_tokenizer
from tests.shards import captions, make_shards, mixed
from tests.training.test_from_shards import OPTIMIZER, recipe

SHARDING = {
    "replicas": 1, "params": "float32", "reduce": "float32", "reshard": True, "recompute": False, "compile": False,
    "reduce_each": False,
}  # fmt: skip
SAVED, FINISHED, STEPS = 2, 4, 6


def sharded_recipe(place: Path, **changes: Any) -> tuple[Path, Path]:
    """The folder of a sharded run from a tiny checkpoint over two extractions, and the file of its recipe."""
    bundle, tokenizer = tiny_bundle(), tiny_image_tokenizer()
    save_bundle(
        place / "base", bundle.model, tokenizer, bundle.vocab.tokenizer, bundle.generation, "# base\n"
    )
    make_shards(place / "a", mixed(12), tokenizer)
    make_shards(place / "b", captions(6), tokenizer)
    values = recipe(place, place / "run", ema=0.9, sharding=SHARDING, **changes)
    (place / "recipe.yaml").write_text(yaml.safe_dump(values))
    return place / "run", place / "recipe.yaml"


def trainer(place: Path, name: str, steps: int = STEPS, **changes: Any) -> ModelTrainer:
    """One source of shards, whose documents differ in kind, and one of the playground with self-correction."""
    values = recipe(place, place / name, steps=steps, sharding=SHARDING)
    values["image_tokenizer"] = str(place / "tokenizer")
    values["optimizer"] = OPTIMIZER | {"lr": 3e-3, "muon_lr": 0.0, "schedule": "constant"}
    values["ema"] = 0.9
    values["correction"] = {"share": 0.3, "top_k": 4, "temperature": 1.0, "start": 0, "ramp": 1}
    values |= {"start": None, "model": to_dict(replace(TINY_MODEL, max_positions=512, copies=True))} | changes
    shapes = {"levels": {"shapes": 1.0}, "split": "train", "seed": 5}
    values["sources"][0]["folders"] = [{"folder": str(place / "a" / "shards"), "invert": 0.3}]
    drawn = {"task": "think_to_image", "rows": 2, "length": 130, "scales": 4, "data": shapes}
    values["sources"] = [values["sources"][0], drawn]
    built = from_dict(ModelRecipe, values)
    return ModelTrainer(built, to_dict(built))


def curve(training: ModelTrainer, until: int) -> list[dict[str, float]]:
    return [training.advance() for _ in range(training.step, until)]


def close(found: list[dict[str, float]], expected: list[dict[str, float]]) -> None:
    assert len(found) == len(expected)
    for ours, theirs in zip(found, expected, strict=True):
        assert set(ours) == set(theirs)
        for name in ours:
            if name.endswith("_right"):  # a near tie may tip one of few tokens
                assert abs(ours[name] - theirs[name]) < 0.1, name
            else:
                assert ours[name] == pytest.approx(theirs[name], abs=1e-5, rel=1e-5), name


def no_room(*_: object) -> dict[str, torch.Tensor]:
    raise torch.OutOfMemoryError


def saved_together(world: World, folder: Path) -> list[Any]:
    """Whether a process is through while the first one writes the checkpoint; what each hears where that one cannot."""
    run = RunFolder(folder, {})
    state = {"step": 1, "model": {}, "optimizer": {}}

    def slowly() -> dict[str, Any]:
        time.sleep(2.0)
        return state

    def full() -> dict[str, Any]:
        raise StorageError("no space")

    run.save_together(world, slowly)
    there = (folder / "checkpoint.pt").is_file()
    try:
        run.save_together(world, full)
    except StorageError as error:
        return [there, str(error).replace(str(folder), "run")]
    return [there, "nothing"]


def _process(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    place = Path(folder)
    resumed = trainer(place, "one")
    found: dict[str, Any] = {"resumed": [resumed.step, curve(resumed, STEPS)]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ModelRecipe, "shapes", 40)
        training = trainer(place, "two", FINISHED)
    found["shapes"] = torch._dynamo.config.recompile_limit
    parameters = list(training.model.parameters())
    found["held"] = sum(local(p.detach()).numel() for p in parameters)
    found["spread"] = all(isinstance(p, DTensor) for p in parameters)
    found["curve"] = curve(training, SAVED)
    training.save(background=True)
    found["curve"] += curve(training, FINISHED - 1)
    assert training.shards is not None
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("nextflow_ar.training.sharded.room", no_room)
        found["no room"] = training.shards.gather(training.model, training.averages, training.device)

    def preview(bundle: Bundle, step: int) -> list[np.ndarray]:
        found["drawn with"] = step, bundle.model.state_dict()
        return [np.zeros((1, 8, 8, 3), np.uint8)]

    with (
        pytest.MonkeyPatch.context() as patch
    ):  # for what the second one gathers, which the first must not wait for
        patch.setattr("nextflow_ar.training.sharded_stage._try_room", no_room if rank else lambda *_: None)
        found["no room there"] = training.shards.gather(training.model, training.averages, training.device)
    found["together"] = saved_together(training.world, place / "whole")
    training.fit(preview)
    found["seen"] = [training.documents, training.tokens]
    torch.save(found, place / f"found{rank}.pt")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A tokenizer of eight scales and an extraction; one thread, so that all see the same codes."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stage")
    torch.manual_seed(3)
    semantic = replace(TINY_SEMANTIC, position_grid=8)
    tokenizer = ImageTokenizer(replace(TINY_TOKENIZER, num_scales=8, semantic=semantic)).eval()
    tokenizer.quantizer.codebook.normal_(0, 0.5)
    tokenizer.save_pretrained(folder / "tokenizer")
    make_shards(folder / "a", mixed(8), ImageTokenizer.from_pretrained(folder / "tokenizer"))
    yield folder
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def one(place: Path) -> dict[str, Any]:
    """One process; it leaves a checkpoint on its way."""
    training = trainer(place, "one")
    told = curve(training, SAVED)
    training.save()
    at = []
    for _ in range(SAVED, STEPS):
        told.append(training.advance())
        at.append([training.documents, training.tokens])
    return {"curve": told, "seen": at[FINISHED - SAVED - 1]}


@pytest.fixture(scope="module")
def two(place: Path, one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of two processes found."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    torch.multiprocessing.spawn(_process, (port, str(place)), nprocs=2)
    return [torch.load(place / f"found{rank}.pt") for rank in range(2)]


def test_two_processes_follow_one_step_by_step(
    place: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    assert one["curve"][-1]["loss"] < one["curve"][0]["loss"]
    for found in two:
        assert found["spread"] and found["seen"] == one["seen"]
        close(found["curve"], one["curve"][: FINISHED - 1])
    whole = sum(p.numel() for p in trainer(place, "unused").parameters.values())
    assert sum(found["held"] for found in two) == whole and two[0]["held"] < 0.51 * whole
    (line,) = [json.loads(x) for x in (place / "two" / "metrics.jsonl").read_text().splitlines()]
    assert line["step"] == FINISHED and [line["documents"], line["tokens"]] == one["seen"]
    close([{"loss": line["loss"], "text": line["text"]}], [
        {name: one["curve"][FINISHED - 1][name] for name in ("loss", "text")}
    ])  # fmt: skip


def test_a_run_goes_on_with_another_number_of_processes(
    place: Path, one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    for found in two:  # one, then two
        assert found["resumed"][0] == SAVED
        close(found["resumed"][1], one["curve"][SAVED:])
        assert found["shapes"] == 40  # which layers may be compiled for
    for parts in (1, 2):  # two, then one, which computes a step's rows at once or one by one
        alone = trainer(place, "two", accumulate=parts)
        assert alone.step == FINISHED
        close(curve(alone, STEPS), one["curve"][FINISHED:])


def test_the_export_of_two_processes_is_one_bundle(place: Path, two: list[dict[str, Any]]) -> None:
    model = load_bundle(place / "two" / "final").model
    averages = trainer(place, "two", FINISHED).averages
    assert set(averages) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, averages[name].bfloat16().float()), name


def test_a_sheet_is_drawn_with_the_whole_averaged_model(place: Path, two: list[dict[str, Any]]) -> None:
    assert "drawn with" not in two[1]
    assert [found[none] for found in two for none in ("no room", "no room there")] == [None] * 4
    step, weights = two[0]["drawn with"]
    expected = trainer(place, "two", FINISHED).bundle().model.state_dict()
    assert step == FINISHED and set(weights) == set(expected)
    for name, tensor in weights.items():
        assert torch.equal(tensor, expected[name].to(tensor.dtype)), name
    assert (place / "two" / f"sheet_{FINISHED:06d}.png").is_file()


def test_no_process_leaves_before_the_first_has_saved_for_all(two: list[dict[str, Any]]) -> None:
    """torchrun would kill it in the middle of that."""
    assert [found["together"] for found in two] == [[True, "no space"]] * 2


def test_a_sheet_without_room_ends_no_training(place: Path, caplog: pytest.LogCaptureFixture) -> None:
    def preview(bundle: Bundle, step: int) -> list[np.ndarray]:
        raise torch.OutOfMemoryError

    assert (trainer(place, "full", 1).fit(preview) / "model.safetensors").is_file()
    assert "no sample sheet at step 1: out of memory" in caplog.text and not list(
        (place / "full").glob("*.png")
    )


def test_a_checkpoint_that_does_not_fit_says_why(place: Path, one: dict[str, Any]) -> None:
    shutil.copytree(place / "one", place / "changed")
    with pytest.raises(
        StorageError, match=r"other tensors than the recipe trains .*: muon_lr stays 0, or above it"
    ):
        trainer(place, "changed", optimizer=OPTIMIZER)
    (facts,) = (place / "changed").glob("checkpoints/*/facts.json")
    (facts.parent / "digests.json").unlink()  # as of earlier versions, or it would be damaged
    told = json.loads(facts.read_text())
    facts.write_text(json.dumps(told | {"bound": told["bound"] | {"image_tokenizer": "another"}}))
    with pytest.raises(
        StorageError, match="its checkpoint was made with another image_tokenizer than the recipe's folder"
    ):
        trainer(place, "changed")
    facts.write_text("{}")
    with pytest.raises(StorageError, match=r"facts.json is no training's"):
        trainer(place, "changed")


def test_what_does_not_go_together_is_one_line(place: Path, one: dict[str, Any]) -> None:
    with pytest.raises(StorageError, match=r"holds a run of another recipe \(differs in alpha\)"):
        trainer(place, "one", alpha=0.5)
    written = yaml.safe_load((place / "one" / "recipe.yaml").read_text())
    whole = from_dict(ModelRecipe, written | {"sharding": None})
    with pytest.raises(StorageError, match="holds a run with the key sharding"):
        ModelTrainer(whole, to_dict(whole))
    for changes, told in (
        ({"trains": "lora", "lora": {}, "start": "x"}, "adapters are not trained in shards"),
        ({"together": True}, "together is for runs that are not sharded"),
        ({"sharding": None, "together": True, "accumulate": 2}, "together: true is for accumulate: 1"),
        ({"precision": "bfloat16"}, r"precision is for runs that are not sharded: set sharding\.params"),
        ({"checkpointing": True}, r"set sharding\.compile and sharding\.recompute"),
    ):
        with pytest.raises(ConfigError, match=told):
            from_dict(ModelRecipe, written | changes).check()
    with pytest.raises(ConfigError, match="2 rows do not divide"):
        from_dict(ModelRecipe, written).check(World(0, 3).size)
