"""Sharded training on two processes (gloo) against one: loss curves, optimisers, checkpoints, export.

The two processes are started once and go through every scenario; the tests look at what they left.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import socket
from dataclasses import replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.model.checkpoint import load_bundle, save_bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.precision import best_dtype
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.storage import StorageError
from nextflow_ar.training import distributed_checkpoint, sharded
from nextflow_ar.training.distributed_checkpoint import Checkpoints, export_bundle, export_weights
from nextflow_ar.training.optim import OptimizerConfig, StackedMuon
from nextflow_ar.training.parallel import World
from nextflow_ar.training.sharded import ShardingConfig
from nextflow_ar.training.sharded_optim import ShardedMuon, ShardedOptimizer
from nextflow_ar.types import Codes, Document, Text
from tests.conftest import TINY_MODEL, tiny_bundle, tiny_model

SQUARE, WIDE = ScaleSchedule.square(4), ScaleSchedule.from_final((40, 100), 3)
OPTIMIZER = OptimizerConfig(
    lr=3e-3, muon_lr=0.0, weight_decay=0.1, beta1=0.9, beta2=0.95, warmup=2, schedule="constant", decay=0.0,
    final=0.1, clip=1.0,
)  # fmt: skip
SHARDING = ShardingConfig(
    1, "float32", "float32", reshard=True, recompute=False, compile=False, reduce_each=False
)
STEPS, SAVED = 6, 3
CODEBOOK = torch.linspace(-0.3, 0.7, 24 * 10).view(24, 10)
NEW = 290
"""First of the rows that the alignment trains."""


def documents(source: int, numbers: range) -> list[Document]:
    """Rows of one source by number: source 0 draws, source 1 is text, then pictures that are read."""

    def codes(number: int, schedule: ScaleSchedule) -> Codes:
        generator = torch.Generator().manual_seed(number)
        return Codes.plain(schedule, torch.randint(0, 24, (schedule.num_tokens,), generator=generator))

    def one(i: int) -> Document:
        if source == 0:
            return Document.text_to_image("two dogs" if i % 4 < 2 else "a red circle", codes(i, SQUARE))
        if i % 2 == 0:  # so the first process sees no picture at all
            return Document((Text("a picture"), Text("of three frogs, green background", True)))
        return Document.image_to_text(codes(i, WIDE), "a cat and two dogs")

    return [one(i) for i in numbers]


class Run:
    """A training as the model stage does it, on all processes of ``world``."""

    def __init__(
        self,
        world: World,
        folder: Path,
        sharding: ShardingConfig = SHARDING,
        align: bool = False,
        **rates: float,
    ) -> None:
        self.world, self.sharding, self.align, self.step = world, sharding, align, 0
        self.vocab = tiny_bundle().vocab
        self.model = tiny_model().train().requires_grad_(not align)
        rows: dict[str, Tensor] = {}
        if align:  # the connector, and the new rows of both tables
            self.model.scale_inputs.connector.requires_grad_(True)
            self.model.scale_inputs.code_embed.requires_grad_(True)
            self.model.head.requires_grad_(True)
            self.model.backbone.embed_tokens.requires_grad_(True)
            new = torch.arange(NEW, 300)
            rows = {
                "head.weight": torch.cat([new, torch.arange(300, 324)]),
                "backbone.embed_tokens.weight": new,
            }
        if world.size > 1:
            sharded.shard(self.model, sharded.device_mesh(world, sharding), sharding)
        self.parameters = sharded.trained(self.model)
        self.optimizer = ShardedOptimizer(self.parameters.items(), replace(OPTIMIZER, **rates), rows)
        self.averages = sharded.start_averages(self.parameters)
        self.checkpoints = Checkpoints(folder, world)

    def batch(self, source: int) -> Batch:
        numbers = range(4 * self.step, 4 * self.step + 4)[self.world.rank :: self.world.size]
        options = LayoutOptions(12.0, alpha=0.9, text_weight=2.0)
        return collate([build(d, self.vocab, options) for d in documents(source, numbers)])

    def advance(self) -> list[float]:
        """One step; loss and norm, over all processes."""
        batches = [self.batch(0), self.batch(1)]
        weight = self.world.add(torch.stack([b.weights.sum() for b in batches]).sum())
        loss = torch.zeros(())
        for number, batch in enumerate(batches):
            sharded.sum_gradients(self.model, number == len(batches) - 1, self.sharding)
            total = self.model.losses(batch).total / weight
            (total * self.world.size).backward()  # the processes' gradients are averaged
            loss += total.detach()
        # the alignment's first steps train the connector alone
        resting = [n for n in self.parameters if "connector" not in n] if self.align and self.step < 2 else ()
        norm = self.optimizer.step(OPTIMIZER.factor(self.step, STEPS), resting)
        sharded.move_averages(self.averages, self.parameters, 0.9)
        self.step += 1
        return [float(self.world.add(loss)), norm]

    def tensors(self) -> dict[str, Tensor]:
        found = {f"model.{k}": v for k, v in self.model.state_dict().items()}
        found |= {f"averages.{k}": v for k, v in self.averages.items()}
        return found | {f"optimizer.{k}": v for k, v in self.optimizer.tensors().items()}

    def save(self, **options: Any) -> None:
        self.checkpoints.save(self.step, self.tensors(), {"step": self.step}, **options)

    def load(self) -> None:
        self.step = self.checkpoints.load(self.tensors())["step"]

    def curve(self, until: int = STEPS) -> list[list[float]]:
        return [self.advance() for _ in range(self.step, until)]

    def whole(self) -> dict[str, Tensor]:
        return {k: v.clone() for k, v in sharded.whole(self.tensors().items())}


def muon_run(world: World, shapes: list[tuple[int, int]]) -> list[Tensor]:
    """Weights after three steps of Muon with gradients that follow from the step alone."""
    generator = torch.Generator().manual_seed(0)
    module = torch.nn.ParameterList([torch.randn(shape, generator=generator) for shape in shapes])
    if world.size > 1:
        from torch.distributed.fsdp import fully_shard

        fully_shard(module, mesh=sharded.device_mesh(world, SHARDING))
    parameters = dict(module.named_parameters())
    optimizer: Any = ShardedMuon(parameters, 0.1)
    for _ in range(3):
        for p in parameters.values():
            grad = torch.randn(p.shape, generator=generator)
            p.grad = p.detach().clone()
            sharded.local(p.grad).copy_(grad[sharded.local_rows(p)])
        optimizer.step(0.02)
    return [tensor.detach() for _, tensor in sharded.whole(parameters.items())]


SHAPES = [(8, 12), (12, 8), (7, 5), (1, 6), (5, 5)]


def _scenarios(world: World, out: Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    run = Run(world, out / "two")
    found["curve"] = run.curve(SAVED)
    run.save(background=True)
    found["curve"] += run.curve()  # moves the weights while they are being written
    run.save()
    found["whole"] = run.whole()
    if world.rank == 0:
        bundle = tiny_bundle()
        for name, part_bytes in (("bundle", 1 << 30), ("parts", 40_000)):
            export_bundle(
                run.checkpoints.place(STEPS), out / name, TINY_MODEL, bundle.image_tokenizer,
                bundle.vocab.tokenizer, bundle.generation, "# tiny\n", part_bytes,
            )  # fmt: skip
    again = Run(world, out / "one")
    again.load()
    found["resumed"] = [again.step, again.curve()]

    checked = replace(SHARDING, recompute=True, reduce_each=True, reshard=False)
    align = Run(world, out / "align", checked, align=True)
    found["align"], found["aligned"] = align.curve(4), align.whole()
    found["muon"] = muon_run(world, SHAPES)
    found["muon_curve"] = Run(world, out / "muon", muon_lr=3e-3).curve()
    half = Run(world, out / "half", replace(SHARDING, replicas=2, params="bfloat16", recompute=True))
    found["half"] = half.curve()
    half.save()
    found["halved"] = half.whole()

    def freeze(model: NextFlowModel) -> None:
        model.backbone.requires_grad_(False)

    mesh = sharded.device_mesh(world, SHARDING)
    built = sharded.build(TINY_MODEL, mesh, SHARDING, freeze)
    found["trains"] = sorted(sharded.trained(built))
    sharded.initialise(built, torch.Generator().manual_seed(5), CODEBOOK)
    found["initialised"] = {k: v.clone() for k, v in sharded.whole(built.state_dict().items())}
    sharded.load_weights(built, out / "tiny")
    found["loaded"] = dict(sharded.whole(built.state_dict().items()))
    found["held"] = sum(sharded.local(p).numel() for p in built.parameters())
    with torch.no_grad():
        found["loaded_loss"] = float(built.losses(run.batch(0)).total)
    return found


def _fails(world: World, run: Run) -> str:
    """A disk that is full for the second process only."""
    write = distributed_checkpoint._WholeFolderWriter.write_data

    def full(self: Any, plan: Any, planner: Any) -> Any:
        if world.rank == 1:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(self, plan, planner)

    distributed_checkpoint._WholeFolderWriter.write_data = full  # type: ignore[method-assign]
    try:
        run.save()
    except StorageError as error:
        return str(error)
    finally:
        distributed_checkpoint._WholeFolderWriter.write_data = write  # type: ignore[method-assign]
    return "no error"


class Disk:
    """A disk that is full for the second process, or for a process that is alone, while ``full``."""

    def __init__(self, world: World, patch: pytest.MonkeyPatch) -> None:
        self.full = True
        write = distributed_checkpoint._WholeFolderWriter.write_data

        def written(writer: Any, plan: Any, planner: Any) -> Any:
            if self.full and world.rank == world.size - 1:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return write(writer, plan, planner)

        patch.setattr(distributed_checkpoint._WholeFolderWriter, "write_data", written)


class Lines(logging.Handler):
    """What is logged."""

    def __init__(self) -> None:
        super().__init__()
        self.told: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.told.append(record.getMessage())


def _fails_unseen(world: World, folder: Path) -> dict[str, Any]:
    """Saves in the background that fail: once where there is room again at the next one, once where there is none."""
    run, lines, found = Run(world, folder), Lines(), {}
    logging.getLogger("nextflow_ar").addHandler(lines)
    with pytest.MonkeyPatch.context() as patch:
        disk = Disk(world, patch)
        run.advance()
        run.save(background=True)
        disk.full = not _ended(run)
        if world.rank == 0:
            run.checkpoints.look()
            run.checkpoints.look()
        found["looked"] = list(lines.told)
        run.advance()
        run.save(background=True)
        found["room"] = [run.checkpoints._saving is None, run.checkpoints.steps(), list(lines.told)]
        run.advance()
        disk.full = True
        run.save(background=True)
        try:
            run.save(background=True)
        except StorageError as error:
            found["none"] = str(error)
        disk.full = False
        run.save(background=True)  # the last failure was raised, so it is nobody's news
        run.checkpoints.wait()
        found["after"] = [run.checkpoints.steps(), len(lines.told)]
    logging.getLogger("nextflow_ar").removeHandler(lines)
    return found


def _ended(run: Run) -> bool:
    assert run.checkpoints._saving is not None
    return run.checkpoints._saving.exception(60) is not None


def _killed(world: World, run: Run) -> None:
    """Both processes die by SIGKILL when everything but the last step of a save is done."""
    distributed_checkpoint._WholeFolderWriter.finish = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    if world.rank == 1:
        distributed_checkpoint._WholeFolderWriter.write_data = (  # type: ignore[method-assign]
            lambda *_: os.kill(os.getpid(), signal.SIGKILL)
        )
    run.save()


def _process(rank: int, port: int, out: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": "2"}
    torch.set_num_threads(1)
    world, folder = World.join(), Path(out)
    found = _scenarios(world, folder)
    run = Run(world, folder / "killed")
    run.advance()
    run.save()
    found["kept"] = run.whole()
    run.advance()
    found["full"] = _fails(world, run)
    found["unseen"] = _fails_unseen(world, folder / "unseen2")
    found["any"] = [world.any(said) for said in (False, rank == 1, True)]
    world.add(torch.zeros(()))  # the first process has cleared up
    found["left"] = sorted(path.name for path in (folder / "killed").iterdir())
    torch.save(found, folder / f"found{rank}.pt")
    _killed(world, run)


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """The same trainings on this process alone; the plain one leaves a checkpoint half-way."""
    out = tmp_path_factory.mktemp("sharded")
    run = Run(World(), out / "one")
    curve = run.curve(SAVED)
    run.save()
    bundle = tiny_bundle()
    save_bundle(out / "tiny", bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, {}, "# tiny\n")
    align = Run(World(), out / "align1", align=True)
    return {
        "out": out, "curve": curve + run.curve(), "whole": run.whole(), "align": align.curve(4),
        "aligned": align.whole(), "muon_curve": Run(World(), out / "muon1", muon_lr=3e-3).curve(),
    }  # fmt: skip


@pytest.fixture(scope="module")
def two(one: dict[str, Any]) -> list[dict[str, Any]]:
    """What each of the two processes found. They end by their own SIGKILL."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    with pytest.raises(torch.multiprocessing.ProcessExitedException, match="SIGKILL"):
        torch.multiprocessing.spawn(_process, (port, str(one["out"])), nprocs=2)
    return [torch.load(one["out"] / f"found{rank}.pt") for rank in range(2)]


def close(found: Any, expected: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), atol=tolerance, rtol=tolerance)


def test_two_processes_follow_the_curve_of_one(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    assert one["curve"][-1][0] < 0.9 * one["curve"][0][0]  # it learns
    for found in two:
        close(found["curve"], one["curve"])
        for name, tensor in one["whole"].items():
            if "k_proj.bias" not in name:  # attention is blind to it: its gradient is rounding alone
                torch.testing.assert_close(found["whole"][name], tensor, atol=1e-4, rtol=1e-4, msg=name)


def test_a_partly_frozen_stage_follows_too(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    start = tiny_model().state_dict()
    for found in two:
        close(found["align"], one["align"])
        trained = {k.removeprefix("averages.") for k in found["aligned"] if k.startswith("averages.")}
        assert len(trained) == 4 + 3
        for name, before in start.items():
            after = found["aligned"][f"model.{name}"]
            if name in ("head.weight", "backbone.embed_tokens.weight"):
                assert torch.equal(after[:NEW], before[:NEW]) and not torch.equal(after[NEW:], before[NEW:])
            else:
                assert torch.equal(after, before) == (name not in trained), name


def test_muon_on_shards_is_muon(two: list[dict[str, Any]]) -> None:
    generator = torch.Generator().manual_seed(0)
    parameters = [torch.nn.Parameter(torch.randn(shape, generator=generator)) for shape in SHAPES]
    half = best_dtype(torch.device("cpu")) == torch.bfloat16  # torch's own iterates in bf16 alone
    kind, closeness = (torch.optim.Muon, 1e-6) if half else (StackedMuon, 1e-5)
    optimizer = kind(parameters, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for _ in range(3):
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    for found in (two[0]["muon"], two[1]["muon"], muon_run(World(), SHAPES)):
        for ours, theirs in zip(found, parameters, strict=True):
            torch.testing.assert_close(ours, theirs.detach(), atol=closeness, rtol=closeness)


def test_muon_trains_alike(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    close(two[0]["muon_curve"], one["muon_curve"], 5e-3)  # its products are bf16, which a last bit may tip
    assert two[0]["muon_curve"] == two[1]["muon_curve"]


def test_replicas_in_half_precision_stay_near(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    close(two[0]["half"], one["curve"], 0.05)
    assert two[0]["half"] != one["curve"]
    run = Run(World(), one["out"] / "half")
    run.load()
    for name, tensor in run.whole().items():
        for found in two:
            assert torch.equal(tensor, found["halved"][name]), name


def test_a_run_goes_on_with_another_number_of_processes(
    one: dict[str, Any], two: list[dict[str, Any]], tmp_path: Path
) -> None:
    for found in two:  # one, then two
        assert found["resumed"][0] == SAVED
        close(found["resumed"][1], one["curve"][SAVED:])
    folder = one["out"] / "two"
    run = Run(World(), folder)  # two, then one: the checkpoint that was written while training went on
    assert run.checkpoints.steps() == [SAVED, STEPS]
    assert run.checkpoints.load(run.tensors(), SAVED) == {"step": SAVED}
    run.step = SAVED
    close(run.curve(), one["curve"][SAVED:])
    run.load()
    assert run.step == STEPS
    for name, tensor in run.whole().items():
        assert torch.equal(tensor, two[0]["whole"][name]), name


def test_a_checkpoint_survives_a_full_disk_and_a_kill(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    folder = one["out"] / "killed"
    for found in two:
        assert (
            found["full"] == f"{folder}: the checkpoint cannot be written: process 1: No space left on device"
        )
        assert found["left"] == ["step_00000001"] and found["any"] == [False, True, True]
    run = Run(World(), folder)
    left = {
        path.name for path in folder.iterdir()
    }  # one that sees the other die first clears up what they had begun
    assert left - {".step_00000002.part"} == {"step_00000001"}
    (folder / ".step_00000002.part").mkdir(exist_ok=True)
    run.load()
    assert run.step == 1
    for name, tensor in run.whole().items():
        assert torch.equal(tensor, two[0]["kept"][name]), name
    run.advance()
    run.save()
    assert sorted(path.name for path in folder.iterdir()) == ["step_00000001", "step_00000002"]


def test_a_save_that_failed_in_the_background_is_told_and_the_next_one_written(
    one: dict[str, Any], two: list[dict[str, Any]]
) -> None:
    alone = _fails_unseen(World(), one["out"] / "unseen1")
    for name, number, told in (("unseen1", 0, alone), *(("unseen2", 1, found["unseen"]) for found in two)):
        folder = one["out"] / name
        line = (
            f"{folder}: a checkpoint could not be written: process {number}: No space left on device; "
            "the next one is tried all the same"
        )
        lines = [line] if told in (alone, two[0]["unseen"]) else []
        assert told["room"] == [True, [2], lines]  # once, and written while all waited
        assert (
            told["none"]
            == f"{folder}: the checkpoint cannot be written: process {number}: No space left on device"
        )
        assert told["after"] == [[2, 3], 2 * len(lines)]
        assert told["looked"] == lines  # before the next save


def test_the_export_is_the_averages(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    whole = two[0]["whole"]
    parts = sorted(path.name for path in (one["out"] / "parts").glob("*.safetensors"))
    assert len(parts) > 2 and parts[0] == f"model-00001-of-{len(parts):05d}.safetensors"
    for name in ("bundle", "parts"):
        model = load_bundle(one["out"] / name).model
        for key, tensor in model.state_dict().items():
            average = whole.get(f"averages.{key}", whole[f"model.{key}"])
            assert torch.equal(tensor, average.bfloat16().float()), key
    (one["out"] / "parts" / parts[1]).write_bytes(b"nothing")
    with pytest.raises(StorageError, match=f"{parts[1]} is damaged"):
        load_bundle(one["out"] / "parts")


def test_a_model_is_built_without_ever_being_whole(one: dict[str, Any], two: list[dict[str, Any]]) -> None:
    model = NextFlowModel(TINY_MODEL)
    model.initialise(torch.Generator().manual_seed(5))
    model.scale_inputs.start_from(CODEBOOK)
    stored = load_bundle(one["out"] / "tiny").model
    for found in two:
        for name, tensor in model.state_dict().items():
            assert torch.equal(found["initialised"][name], tensor), name
        for name, tensor in stored.state_dict().items():
            assert torch.equal(found["loaded"][name], tensor), name
        assert found["trains"] == sorted(
            name for name in sharded.trained(model) if not name.startswith("backbone.")
        )
    sizes = [found["held"] for found in two]
    whole = sum(p.numel() for p in model.parameters())
    assert sum(sizes) == whole and max(sizes) < 0.51 * whole
    run = Run(World(), one["out"] / "unused")
    run.model.load_state_dict(stored.state_dict())
    run.step = STEPS
    with torch.no_grad():
        expected = float(run.model.losses(run.batch(0)).total)
    assert sum(found["loaded_loss"] for found in two) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize(
    "device",
    [
        "cpu",
        pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")),
    ],
)
def test_a_save_in_the_background_keeps_what_its_step_had(
    device: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    moved_on, write = Event(), distributed_checkpoint.save_state

    def late(*args: Any, **options: Any) -> Any:
        assert moved_on.wait(60)
        return write(*args, **options)

    monkeypatch.setattr(distributed_checkpoint, "save_state", late)
    checkpoints, facts, tensors = (
        Checkpoints(tmp_path, World()),
        {"open": [[1, 2], [3]]},
        {"x": torch.ones(3, device=device)},
    )
    checkpoints.save(1, tensors, facts, background=True)
    facts["open"][0].append(9)
    tensors["x"].zero_()
    moved_on.set()
    checkpoints.wait()
    assert checkpoints.load(tensors) == {"open": [[1, 2], [3]]}
    assert tensors["x"].tolist() == [1.0, 1.0, 1.0]


def test_compiled_shards_on_gpus_attend_sparsely(monkeypatch: pytest.MonkeyPatch) -> None:
    """A dense mask of a row of 49,152 places would be 2.4 GB; uncompiled, FlexAttention would be no better."""
    monkeypatch.setattr(sharded, "fully_shard", lambda *args, **kwargs: None)
    monkeypatch.setattr(sharded, "register_fsdp_forward_method", lambda *args: None)
    for device, compiled, flex, expected in (
        ("cuda", True, True, True), ("cuda", True, False, False), ("cuda", False, True, False), ("cpu", True, True, False),
    ):  # fmt: skip
        model = NextFlowModel(TINY_MODEL)
        config = ShardingConfig(1, "float32", "float32", True, False, compiled, False)
        sharded.shard(model, cast(Any, SimpleNamespace(device_type=device)), config, flex=flex)
        assert model.sparse is expected, (device, compiled, flex)


def test_a_flipped_bit_never_gives_other_numbers(tmp_path: Path) -> None:
    tensors = {"x": torch.arange(500.0), "y": torch.ones(30, dtype=torch.long)}
    checkpoints = Checkpoints(tmp_path, World())
    checkpoints.save(1, tensors, {"open": [[1, 2], [3]], "step": 1})
    chance, found, lines = np.random.default_rng(0), {}, []
    for file in sorted((tmp_path / "step_00000001").iterdir()):
        whole = file.read_bytes()
        for bit in chance.choice(8 * len(whole), 60, replace=False).tolist():
            changed = bytearray(whole)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            again = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
            try:
                facts = checkpoints.load(again)
            except StorageError as error:
                lines.append(str(error))
                found[file.name] = found.get(file.name, 0) + 1
            else:  # in what fills up a zip file, or is told twice
                assert facts == {"open": [[1, 2], [3]], "step": 1}
                assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
        file.write_bytes(whole)
    assert checkpoints.load(tensors)["step"] == 1
    assert not any("\n" in line for line in lines)
    assert found.pop("__0_0.distcp") >= 40
    assert found == {".metadata": 60, "facts.json": 60, "digests.json": 60}


def test_what_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    run = Run(World(), tmp_path)
    with pytest.raises(StorageError, match="no checkpoint"):
        run.load()
    run.save()
    whole = dict(run.tensors())
    with pytest.raises(StorageError, match=r"cannot be read: .*strange"):
        run.checkpoints.load({"strange": torch.zeros(2)})
    with pytest.raises(StorageError, match=r"cannot be read: .*head\.weight"):
        run.checkpoints.load({**whole, "model.head.weight": torch.zeros(3, 3)})
    with pytest.raises(StorageError, match="cannot be read"):
        export_weights(tmp_path / "nothing", tmp_path)
    (data,) = (tmp_path / "step_00000000").glob("*.distcp")
    data.write_bytes(data.read_bytes()[:100])
    with pytest.raises(StorageError, match="cannot be read"):
        run.load()
    with pytest.raises(ConfigError, match="replicas: 1 processes cannot be divided into 2 groups"):
        sharded.device_mesh(World(), replace(SHARDING, replicas=2))
    with pytest.raises(ValueError, match=r"head\.weight does not train"):
        ShardedOptimizer([], OPTIMIZER, {"head.weight": torch.tensor([1])})
    facts = json.loads((tmp_path / "step_00000000" / "facts.json").read_text())
    assert facts == {"step": 0}
