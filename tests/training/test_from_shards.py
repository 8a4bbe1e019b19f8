"""Training from shards: exact resume, what trains and what stays bit for bit, the self-test, adapters, metrics."""

from __future__ import annotations

import errno
import hashlib
import io
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode, addmm_flop

from nextflow_ar.app.cli import run
from nextflow_ar.config import ConfigError, from_dict, to_dict
from nextflow_ar.data.loader import Packing, ShardFolder, ShardSource
from nextflow_ar.data.transforms import draws
from nextflow_ar.model.checkpoint import load_bundle, load_generation, save_bundle
from nextflow_ar.model.costs import Counts
from nextflow_ar.model.flops import batch_flops, batch_pairs, passed_flops, sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate, pack
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.sequence.layout import IGNORED, build, scale_block
from nextflow_ar.sequence.vocab import TURN_END, TURN_START, train_text_tokenizer
from nextflow_ar.storage import StorageError, pack_weights, read_weights
from nextflow_ar.training import runs
from nextflow_ar.training.adapters import weights_print
from nextflow_ar.training.meters import Speedometer, measured_peak, peak_of
from nextflow_ar.training.model_stage import ModelRecipe, ModelTrainer
from nextflow_ar.training.parallel import World
from nextflow_ar.training.plan import useful_flops
from nextflow_ar.training.plan_stage import read_stage
from nextflow_ar.training.selftest import (
    Room,
    SelfTestError,
    check_data,
    check_generation,
    check_guidance,
    check_lengths,
    check_manner,
    check_size,
    check_turns,
    self_test,
)
from nextflow_ar.types import Codes, Document, Image, Mark, Text
from tests.conftest import TINY_MODEL, tiny_bundle, tiny_image_tokenizer, tiny_model
from tests.shards import captions, make_shards, mixed

OPTIMIZER = {
    "lr": 5e-3, "muon_lr": 1e-2, "weight_decay": 0.1, "beta1": 0.9, "beta2": 0.98, "warmup": 2,
    "schedule": "cosine", "decay": 0.0, "final": 0.1, "clip": 1.0,
}  # fmt: skip
Make = Callable[..., ModelTrainer]
EXACT = {"precision": "float32"}
"""Two models that say the same do so to a few bits only in bf16, which CPUs that have it train in."""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint folder ``base`` with its tokenizer, and extractions ``a`` and ``b`` by that tokenizer."""
    folder, bundle = tmp_path_factory.mktemp("shards"), tiny_bundle()
    save_bundle(
        folder / "base", bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, bundle.generation, "# base\n"
    )  # fmt: skip
    make_shards(folder / "a", mixed(12), tiny_image_tokenizer())
    make_shards(folder / "b", captions(6), tiny_image_tokenizer())
    return folder


def recipe(place: Path, out: Path, **changes: Any) -> dict[str, Any]:
    shards = {
        "kind": "shards", "rows": 2, "seed": 3, "packing": {"mode": "length", "budget": 220, "open_rows": 3},
        "folders": [
            {"folder": str(place / "a" / "shards")},
            {"folder": str(place / "b" / "shards"), "weight": 2.0, "invert": 0.5, "condition_dropout": 0.2},
        ],
    }  # fmt: skip
    values = {
        "kind": "model", "out": str(out), "seed": 1, "image_tokenizer": str(place / "base"), "text_entries": 300,
        "start": str(place / "base"), "steps": 30, "alpha": 0.9, "text_weight": 2.0, "ema": 0.0, "compile": False,
        "sheet_seconds": 1e9, "save_seconds": 1e9, "optimizer": OPTIMIZER, "sources": [shards], "model": None,
        "correction": {"share": 0.0, "top_k": 4, "temperature": 1.0, "start": 0, "ramp": 1},
    }  # fmt: skip
    return values | changes


def maker(place: Path, tmp_path: Path) -> Make:
    """Makes a trainer of :func:`recipe` in a run of this name."""

    def made(name: str = "run", **changes: Any) -> ModelTrainer:
        built = from_dict(ModelRecipe, recipe(place, tmp_path / name, **changes))
        return ModelTrainer(built, to_dict(built))

    return made


@pytest.fixture
def make(place: Path, tmp_path: Path) -> Make:
    return maker(place, tmp_path)


def same(one: ModelTrainer, two: ModelTrainer) -> None:
    for (name, a), b in zip(one.model.state_dict().items(), two.model.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize("prefetch", [False, True])
def test_resuming_in_mid_shard_equals_never_stopping(make: Make, prefetch: bool) -> None:
    whole = make("a")
    told = [whole.advance() for _ in range(7)]
    first = make("b", prefetch=prefetch)
    assert (first.loaders[0]._thread is not None) == prefetch
    for _ in range(3):
        first.advance()
    first.save()  # with prefetch the next step's rows are made, or being made
    first.advance()  # lost: killed after the save
    second = make("b", prefetch=prefetch)
    assert second.step == 3 and [second.advance() for _ in range(4)] == told[3:]
    same(whole, second)
    assert (second.documents, second.tokens) == (whole.documents, whole.tokens) and whole.documents > 14
    assert {"draw_loss", "draw_right", "read_loss", "write_right", "scale_4_right", "text"} <= set().union(
        *told
    )


def test_what_is_replayed_is_said_as_the_start_said_it(make: Make) -> None:
    plain, own = make("a", **EXACT).advance(), make("b", distillation={"share": 1.0}, **EXACT).advance()
    assert plain["norm"] == own["norm"] > 0.1  # shards are what is to be learnt
    every = {"share": 1.0, "shards": True}
    replayed = make("c", distillation=every, **EXACT)
    first = replayed.advance()
    assert first["norm"] < 1e-3 * plain["norm"] and first["loss"] == plain["loss"]  # it says what it said
    half = make("d", distillation={"share": 0.5, "shards": True}, **EXACT).advance()
    assert half["norm"] == pytest.approx(plain["norm"] / 2, rel=1e-2)
    moved = make("e", distillation=every, **EXACT)
    with torch.no_grad():
        moved.model.head.weight.add_(0.02 * torch.randn(moved.model.head.weight.shape))
    assert moved.advance()["norm"] > 10 * first["norm"]  # and is drawn back where it has moved


def test_another_checkpoint_may_teach(make: Make, place: Path, tmp_path: Path) -> None:
    bundle = load_bundle(place / "base")
    bundle.model.head.weight.add_(0.02 * torch.randn(bundle.model.head.weight.shape))
    save_bundle(
        tmp_path / "other", bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, {}, "# other\n"
    )
    every = {"share": 1.0, "shards": True, "teacher": str(tmp_path / "other")}
    told = make("a", distillation=every, **EXACT).advance()["norm"]
    there = make("b", distillation=every, **EXACT)
    there.model.load_state_dict(load_bundle(tmp_path / "other").model.state_dict())
    assert there.advance()["norm"] < 1e-2 * told  # it says what the other one says
    few = make("e", distillation=every, **EXACT, trains="lora", lora={"rank": 2}).advance()
    assert few["norm"] > 0  # adapters are no part of what teaches
    own = make(
        "f", distillation={"share": 1.0, "shards": True}, **EXACT, trains="lora", lora={"rank": 2}
    ).advance()
    assert own["norm"] < 1e-2 * few["norm"]
    with pytest.raises(ConfigError, match=r"distillation.teacher: .*nano is of another architecture"):
        make("c", distillation=every | {"teacher": "nano"})
    with pytest.raises(StorageError, match="no such checkpoint folder"):
        make("d", distillation=every | {"teacher": str(tmp_path / "nowhere")})


def test_a_resumed_run_has_the_teacher_that_it_began_with(make: Make) -> None:
    taught = {"distillation": {"share": 0.7, "shards": True}}
    whole = make("a", **taught)
    told = [whole.advance() for _ in range(5)]
    first = make("b", **taught)
    for _ in range(3):
        first.advance()
    first.save()
    second = make("b", **taught)
    assert [second.advance() for _ in range(2)] == told[3:]
    same(whole, second)


def test_a_step_in_parts_is_the_same_step(make: Make) -> None:
    source = recipe(Path("x"), Path("y"))["sources"][0]
    whole = make("a")
    folders = to_dict(whole.recipe)["sources"][0]["folders"]
    sources = [{**source, "rows": 4, "folders": folders}]
    whole, parts, again = (
        make("b", sources=sources),
        make("c", sources=sources, accumulate=2),
        make("d", sources=sources, checkpointing=True),
    )
    told: list[float] = []
    for trainer in (whole, parts, again):
        trainer._update = lambda: 0.0  # type: ignore[method-assign]  # keeps the gradients
        told.append(trainer.advance()["loss"])
    assert told[1:] == pytest.approx([told[0]] * 2, rel=1e-3)
    for name, a in whole.model.named_parameters():
        assert a.grad is not None
        for other in (parts, again):
            b = dict(other.model.named_parameters())[name].grad
            assert b is not None
            assert float((a.grad - b).norm()) <= 0.05 * float(a.grad.norm()) + 1e-6, name
    assert (
        again.model.backbone.is_gradient_checkpointing and not whole.model.backbone.is_gradient_checkpointing
    )


def test_two_processes_do_what_one_does(make: Make) -> None:
    class Second(World):
        def add(self, x: torch.Tensor) -> torch.Tensor:
            return torch.tensor([sum(weights), 0.0, 0.0])  # tokens and documents are not looked at

        def any(self, said: bool) -> bool:
            return said

        def gather(self, said: Any) -> list[Any]:
            return [said]

    alone = make("a")
    alone._update = lambda: 0.0  # type: ignore[method-assign]
    batch = make("peek").batch(0)
    weights = [float(w.sum()) for w in batch.weights]
    alone.advance()
    halves = [make("b"), make("c")]
    for rank, half in enumerate(halves):
        half.world = Second(rank, 2)
        half._update = lambda: 0.0  # type: ignore[method-assign]
        half.advance()
    for (name, a), b, c in zip(
        alone.model.named_parameters(), *(h.model.parameters() for h in halves), strict=True
    ):
        assert a.grad is not None and b.grad is not None and c.grad is not None
        mean = (b.grad + c.grad) / 2
        assert float((a.grad - mean).norm()) <= 0.05 * float(a.grad.norm()) + 1e-6, name


def test_rows_of_a_batch_as_a_batch(make: Make) -> None:
    trainer = make()
    batch = trainer.batch(0)
    embedded = trainer.model.embed(batch)
    for i in range(2):
        part = batch.part(i, 2)
        assert part.shape == (1, 220)
        torch.testing.assert_close(trainer.model.embed(part), embedded[i : i + 1])
    assert batch_flops(batch, TINY_MODEL) == sum(batch_flops(batch.part(i, 2), TINY_MODEL) for i in range(2))


def test_flops_of_a_batch_are_those_of_its_samples(make: Make) -> None:
    loader = make().loaders[0]
    samples = [row.sample for _ in range(3) for row in loader.rows()]
    batch = collate(samples)
    assert batch_flops(batch, TINY_MODEL) == sum(sample_flops(s, TINY_MODEL) for s in samples)
    assert batch_pairs(collate([pack(samples[:1])])) == batch_pairs(collate(samples[:1], 400))


TABLES = {"modules_to_save": ["embed_tokens", "head"]}


def counted(compute: Callable[[], Tensor]) -> int:
    """FLOPs by torch's counter, backward, too, where something trains; the loss's own gradients are added in place."""

    def added(*shapes: Any, **_: Any) -> int:
        return addmm_flop(*shapes[:3])

    with (
        FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: added}) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        found = compute()
        if found.requires_grad:
            found.backward()
    return counter.get_total_flops()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"trains": "alignment"},
        {"trains": "lora", "lora": {"rank": 16}},
        {"trains": "lora", "lora": {"rank": 16} | TABLES},
    ],
)
def test_flops_of_what_stays_and_of_adapters_are_those_of_torchs_counter(
    make: Make, place: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    """Of shards and of episodes, forward and backward; and ``plan`` counts them so."""
    episodes = {
        "kind": "episodes", "tasks": {"chat": 1}, "rows": 2, "seed": 9, "canvases": {"64x64": 1.0},
        "packing": {"mode": "length", "budget": 300, "open_rows": 2},
    }  # fmt: skip
    values = recipe(
        place, tmp_path / "run", **changes, sources=[*recipe(place, tmp_path)["sources"], episodes]
    )
    trainer = make(**changes, sources=values["sources"])
    stage = read_stage(values, "here")
    for number in range(2):
        (part,) = trainer.material(number)
        real, pairs = int((part.batch.documents >= 0).sum()), batch_pairs(part.batch)
        predicted = int((part.batch.targets != IGNORED).sum())
        assert part.flops == passed_flops(real, pairs, predicted, TINY_MODEL, trainer.passes)
        assert part.flops == useful_flops(stage, Counts(real, pairs, predicted))
    document = next(one for some in trainer.documents_ahead() for one in some if draws(one))
    sample = build(document, trainer.vocab, trainer.layout)
    batch, length = collate([sample]), len(sample)
    inputs = counted(lambda: trainer.model.embed(batch).sum())  # no part of what is told
    found = counted(lambda: trainer.model.losses(batch).total) - inputs
    predicted = int((sample.targets != IGNORED).sum())
    wanted = passed_flops(
        length, length**2, predicted, TINY_MODEL, trainer.passes
    )  # the mask is multiplied, too
    if changes.get("lora") == {"rank": 16}:  # nothing before q, k and v of the first layer trains
        wanted -= 3 * 2 * length * TINY_MODEL.hidden * (TINY_MODEL.hidden + 16)
    assert found == pytest.approx(wanted, rel=0.003)


def moved(trainer: ModelTrainer, before: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Per parameter, which rows changed."""
    return {
        name: (p != before[name]).flatten(1).any(1) if p.ndim > 1 else p != before[name]
        for name, p in trainer.model.named_parameters()
    }


def copied(trainer: ModelTrainer) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


def test_alignment_leaves_all_else_bit_for_bit(make: Make) -> None:
    trainer = make(trains="alignment")
    before, vocab = copied(trainer), trainer.vocab
    for _ in range(4):
        trainer.advance()
    marks = {vocab.boi, vocab.eoi}
    for name, rows in moved(trainer, before).items():
        on = set(rows.nonzero()[:, 0].tolist())
        if name == "backbone.embed_tokens.weight":
            assert on == marks, name
        elif (
            name == "head.weight"
        ):  # every code takes part in the softmax, and weight decay reaches all of them
            assert on == marks | set(range(300, 324)), name
        elif name.startswith("backbone."):
            assert not on, name
        else:
            assert on, name
    restored = make(trains="alignment")
    assert restored.step == 0
    trainer.save()
    restored = make(trains="alignment")
    assert restored.advance() == trainer.advance()
    same(restored, trainer)


def test_alignment_in_two_steps_trains_the_connector_first(make: Make) -> None:
    trainer = make(trains="alignment_two_steps", connector_steps=2, steps=4)
    before = copied(trainer)
    for _ in range(2):
        trainer.advance()
    on = {name for name, rows in moved(trainer, before).items() if bool(rows.any())}
    assert on and all(n.startswith("scale_inputs.") and "code_embed" not in n for n in on)
    between = copied(trainer)
    for _ in range(2):
        trainer.advance()
    on = {name for name, rows in moved(trainer, between).items() if bool(rows.any())}
    assert on == {"scale_inputs.code_embed.weight", "backbone.embed_tokens.weight", "head.weight"}


def test_what_it_starts_from_is_named_and_its_sampling_defaults_stay(make: Make, place: Path) -> None:
    trainer = make()
    assert trainer.generation["guidance"] == 2.0 and trainer.generation["think"] is False  # base's, then ours
    assert trainer.bundle().generation == trainer.generation
    nano = from_dict(ModelRecipe, recipe(place, place / "unused", start="nano"))
    assert nano.base is not None and load_generation(nano.base)["think"] is True
    missing = from_dict(ModelRecipe, recipe(place, place / "unused", start="./nowhere"))
    with pytest.raises(StorageError, match=r"nowhere: no such checkpoint folder; nano or a Hub id will do"):
        _ = missing.base


LORA = {"trains": "lora", "lora": {"rank": 4, "alpha": 8.0}}


def test_a_merged_adapter_says_what_the_adapted_model_said(
    make: Make, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    trainer = make(**LORA, steps=4)
    before = copied(trainer)
    trainer.fit()
    on = {name for name, rows in moved(trainer, before).items() if bool(rows.any())}
    assert on == {name for name in before if "lora_" in name} and len(on) == 2 * 2 * 7
    batch = trainer.batch(0)
    with torch.no_grad():
        adapted = trainer.model.logits(trainer.model.hidden(batch))
        merged_here = trainer.bundle().model
        merged = merged_here.logits(merged_here.hidden(batch))
        base = load_bundle(place / "base").model
        plain = base.logits(base.hidden(batch))
    torch.testing.assert_close(merged, adapted, atol=2e-3, rtol=1e-3)
    assert float((adapted - plain).abs().max()) > 0.1  # the adapter says something
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "merged"
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(out)]) == 0
    for folder in (out, tmp_path / "run" / "final"):
        for name, p in load_bundle(folder).model.named_parameters():
            torch.testing.assert_close(p, dict(merged_here.named_parameters())[name], atol=1e-3, rtol=2**-7)
    capsys.readouterr()
    assert run(["export", str(out), "--adapter", str(adapter), "-o", str(tmp_path / "no")]) == 1
    told = capsys.readouterr().err
    assert "it was trained on other weights than those of" in told and told.count("\n") == 1
    peft = pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(load_bundle(place / "base").model, str(adapter))
    with torch.no_grad():  # the folder is in peft's own form
        hidden = theirs.base_model.model.hidden(batch)
    torch.testing.assert_close(trainer.model.head(hidden), adapted, atol=0.1, rtol=0.05)


@pytest.mark.parametrize("muon", [0.0, 0.02])
def test_tables_that_train_beside_adapters_are_saved_and_merged_with_them(
    make: Make, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], muon: float
) -> None:
    lora = {"trains": "lora", "lora": LORA["lora"] | TABLES}
    rates = recipe(place, tmp_path)["optimizer"] | {"muon_lr": muon}
    trainer = make(**lora, steps=4, optimizer=rates)
    before, tables = copied(trainer), {"backbone.embed_tokens.weight", "head.weight"}
    final = trainer.fit()
    on = {name for name, rows in moved(trainer, before).items() if bool(rows.any())}
    assert on == tables | {name for name in before if "lora_" in name} and len(on) == 2 * 2 * 7 + 2
    state = torch.load(trainer.run.path / "checkpoint.pt", weights_only=True)
    assert set(state["model"]) == on
    adapter, out = tmp_path / "run" / "adapter", tmp_path / "merged"
    told = json.loads((adapter / "adapter_config.json").read_text())
    assert told["modules_to_save"] == ["embed_tokens", "head"]
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(out)]) == 0
    merged, base = load_bundle(out).model, load_bundle(place / "base").model
    wanted, start = dict(load_bundle(final).model.named_parameters()), dict(base.named_parameters())
    for name, p in merged.named_parameters():
        torch.testing.assert_close(p, wanted[name], atol=1e-3, rtol=2**-7)
        assert torch.equal(p, start[name]) == (not name.endswith("_proj.weight") and name not in tables)
    batch, peft = trainer.batch(0), pytest.importorskip("peft")
    theirs = peft.PeftModel.from_pretrained(base, str(adapter)).base_model.model
    with torch.no_grad():  # the folder is in peft's own form
        ours = merged.logits(merged.hidden(batch))
        torch.testing.assert_close(theirs.head(theirs.hidden(batch)), ours, atol=0.1, rtol=0.05)
    weights = read_weights(adapter, "adapter_model.safetensors")
    weights["base_model.model.head.weight"] = weights["base_model.model.head.weight"][:-1].clone()
    (adapter / "adapter_model.safetensors").write_bytes(pack_weights(weights))
    (adapter / "checksums.json").unlink()
    capsys.readouterr()
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(tmp_path / "no")]) == 1
    assert "the adapter is of another model: head has another shape here" in capsys.readouterr().err


def in_parts(base: Path, folder: Path) -> Path:
    """A copy of a checkpoint folder whose weights are in three files and an index, as large ones are written."""
    shutil.copytree(base, folder)
    weights = read_weights(base, "model.safetensors")
    (folder / "model.safetensors").unlink()
    (folder / "checksums.json").unlink()
    listed = {}
    for number in range(3):
        file = f"model-{number + 1:05d}-of-00003.safetensors"
        some = sorted(weights)[number::3]
        (folder / file).write_bytes(pack_weights({name: weights[name] for name in some}))
        listed |= dict.fromkeys(some, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": listed}))
    return folder


def test_adapters_on_a_start_whose_weights_are_in_parts(
    make: Make, place: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    start = in_parts(place / "base", tmp_path / "parts")
    parts = sorted(start.glob("model-*.safetensors"))
    assert len(parts) == 3
    wanted = hashlib.sha256(b"".join(part.read_bytes() for part in parts)).hexdigest()
    final = make(**LORA, steps=2, start=str(start)).fit()
    adapter = tmp_path / "run" / "adapter"
    assert json.loads((adapter / "base.json").read_text())["weights"] == wanted
    single = (place / "base" / "model.safetensors").read_bytes()  # as adapters from before name it
    assert weights_print(place / "base") == hashlib.sha256(single).hexdigest() != wanted
    out = tmp_path / "merged"
    assert run(["export", str(start), "--adapter", str(adapter), "-o", str(out)]) == 0
    trained = dict(load_bundle(final).model.named_parameters())
    for name, p in load_bundle(out).model.named_parameters():
        torch.testing.assert_close(p, trained[name], atol=1e-3, rtol=2**-7)
    data = bytearray(parts[1].read_bytes())
    data[-1] ^= 4  # another number in one of the parts: other weights
    parts[1].write_bytes(data)
    capsys.readouterr()
    assert run(["export", str(start), "--adapter", str(adapter), "-o", str(tmp_path / "no")]) == 1
    assert "it was trained on other weights than those of" in capsys.readouterr().err


def test_a_merged_adapter_is_the_model_that_it_was_trained_as(
    make: Make, place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Sampling defaults and configuration with it; of another pixel decoder a line tells."""
    tokenizer = load_bundle(place / "base").image_tokenizer
    with torch.no_grad():
        tokenizer.decoder.last_weight.mul_(2)
    tokenizer.save_pretrained(tmp_path / "other")
    model = to_dict(replace(TINY_MODEL, rope_range=20.0))
    with pytest.raises(ConfigError, match="no copies, and adapters do not train them: set copies: false"):
        make(**LORA, model=model | {"copies": True})
    changed = {"model": model, "image_tokenizer": str(tmp_path / "other"), "generation": {"guidance": 1.5}}
    final = make(**LORA, steps=2, **changed).fit()
    out, adapter = tmp_path / "merged", tmp_path / "run" / "adapter"
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(out)]) == 0
    assert (
        f"another pixel decoder than {place / 'base'} has: --image-tokenizer {tmp_path / 'other'}"
        in caplog.text
    )
    mine, theirs = load_bundle(out), load_bundle(final)
    assert mine.model.config == theirs.model.config and mine.model.config.rope_range == 20.0
    assert mine.generation == theirs.generation and mine.generation["guidance"] == 1.5
    told = json.loads((adapter / "base.json").read_text())
    (adapter / "base.json").write_text(json.dumps({"weights": told["weights"]}))  # as of before
    (adapter / "checksums.json").unlink()
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(tmp_path / "old")]) == 0
    assert load_bundle(tmp_path / "old").model.config.rope_range == TINY_MODEL.rope_range
    (adapter / "base.json").write_text(json.dumps(told | {"codes": "others"}))
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(tmp_path / "no")]) == 1


def swapped(place: Path, folder: Path, change: str) -> None:
    """Another checkpoint where one was."""
    bundle = load_bundle(place / "base")
    text, images = bundle.vocab.tokenizer, bundle.image_tokenizer
    if change == "weights":
        bundle.model.head.weight.add_(0.5)
    if change == "words":
        text = train_text_tokenizer(["other words than those, in another order"] * 3, 300)
    if change == "codes":
        images = tiny_image_tokenizer(seed=5)
    save_bundle(folder, bundle.model, images, text, {}, "# other\n")


@pytest.mark.parametrize(
    ("change", "recipe_of", "what"),
    [
        ("weights", {**LORA}, "start"),
        ("weights", {"distillation": {"share": 1.0}}, "start"),
        ("weights", {"distillation": {"share": 1.0, "teacher": "TEACHER"}}, "distillation.teacher"),
        ("words", {}, "text tokenizer"),
        ("weights", {}, None),  # its checkpoint holds all weights
    ],
)
def test_a_run_goes_on_with_what_it_was_begun_with(
    make: Make, place: Path, tmp_path: Path, change: str, recipe_of: dict[str, Any], what: str | None
) -> None:
    folder = Path(shutil.copytree(place / "base", tmp_path / "named"))
    changes = json.loads(json.dumps(recipe_of).replace("TEACHER", str(folder)))
    if what != "distillation.teacher":
        changes |= {"start": str(folder)}
    first = make(**changes)
    first.advance()
    first.save()
    assert make(**changes).step == 1
    swapped(place, folder, change)
    if what is None:
        assert make(**changes).step == 1
        return
    with pytest.raises((StorageError, ConfigError)) as caught:
        make(**changes)
    if change == "weights":
        assert f"its checkpoint was made with another {what} than the recipe's folder holds by now" in str(
            caught.value
        )


def test_a_teacher_has_the_architecture_of_its_pupil(make: Make) -> None:
    model = to_dict(replace(TINY_MODEL, rope_range=20.0))
    with pytest.raises(
        ConfigError, match=r"cannot teach a model of another architecture \(model: rope_range\)"
    ):
        make(distillation={"share": 1.0}, model=model)


def test_a_damaged_checkpoint_is_one_line(make: Make, tmp_path: Path) -> None:
    first = make()
    first.advance()
    first.save()
    path = tmp_path / "run" / "checkpoint.pt"
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 4
    for content, why in ((b"", "zip"), (bytes(flipped), "is damaged"), (whole[:-100], "zip")):
        path.write_bytes(content)
        with pytest.raises(
            StorageError, match=f"checkpoint.pt: the checkpoint cannot be read: .*{why}"
        ) as caught:
            make()
        assert "\n" not in str(caught.value)
    torch.save([1], path)
    with pytest.raises(StorageError, match="it is no training's"):
        make()
    path.write_bytes(whole)
    resolved = tmp_path / "run" / "recipe.yaml"
    resolved.write_text("")
    with pytest.raises(ConfigError, match="expected a mapping"):
        make()


def test_a_write_that_fails_is_told_as_it_was() -> None:
    class Full(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() > 1000:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    with pytest.raises(OSError, match="No space left on device"):
        runs._save({"a": torch.zeros(5000)}, Full())
    file = io.BytesIO()
    runs._save({"a": torch.arange(5000)}, file)
    file.seek(0)
    assert torch.equal(torch.load(file)["a"], torch.arange(5000))


@pytest.mark.parametrize("tables", [{}, TABLES, {"modules_to_save": ["head"]}])
def test_adapters_resume_and_hold_little(make: Make, tables: dict[str, Any]) -> None:
    lora = {"trains": "lora", "lora": LORA["lora"] | tables, "ema": 0.9}
    whole, first = make("a", **lora), make("b", **lora)
    for _ in range(4):
        whole.advance()
    for _ in range(2):
        first.advance()
    first.save()
    state = torch.load(first.run.path / "checkpoint.pt", weights_only=True)
    held = {name for name in state["model"] if "lora_" not in name}
    assert held == {
        n for n in ("backbone.embed_tokens.weight", "head.weight") if n.split(".")[-2] in str(tables)
    }
    second = make("b", **lora)
    for _ in range(2):
        second.advance()
    same(whole, second)
    averaged = dict(second.bundle().model.named_parameters())
    for name, p in whole.bundle().model.named_parameters():
        assert torch.equal(p, averaged[name])
    for name in held:
        assert torch.equal(averaged[name], second.averages[name])
        assert not torch.equal(averaged[name], dict(second.model.named_parameters())[name])
    with pytest.raises(ConfigError, match="'head' is no layer that takes adapters; accepted: down_proj"):
        make("c", trains="lora", lora={"targets": ["head"]})
    with pytest.raises(ConfigError, match=r"modules_to_save.*'embed_tokens' or 'head'"):
        make("c", trains="lora", lora={"modules_to_save": ["lm_head"]})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trains": "lora"}, "trains: lora goes with the key lora"),
        ({"optimizer": OPTIMIZER | {"adapter_lr": 1e-3}}, "optimizer.adapter_lr goes with trains: lora"),
        ({"trains": "alignment", "start": None}, "need a checkpoint folder to start from"),
        ({"trains": "alignment_two_steps"}, "connector_steps, above 0 and below steps"),
        (
            {"distillation": {}, "start": None, "model": to_dict(TINY_MODEL)},
            "distillation is for a run with a start",
        ),
        (
            {"start": None, "text_entries": 1025, "model": to_dict(replace(TINY_MODEL, text_vocab=1024))},
            "text_entries 1025 do not fit into the model's text_vocab 1024",
        ),
        ({"distillation": {"share": 1.5}}, "share is above 0 and at most 1, got 1.5"),
        ({"accumulate": 3}, "2 rows do not divide into 3 parts of 1 processes"),
        ({"model": to_dict(replace(TINY_MODEL, layers=3))}, r"not the recipe's \(differs in layers\)"),
        ({"trains": "nothing"}, "'trains': input should be 'everything', 'alignment'"),
    ],
)
def test_recipes_that_cannot_be_meant(make: Make, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        make(**changes)
    assert "\n" not in str(caught.value)


def test_an_architecture_unlike_the_start_s_is_told(make: Make, caplog: pytest.LogCaptureFixture) -> None:
    make(model=to_dict(TINY_MODEL))
    assert "not trained with" not in caplog.text
    make(model=to_dict(replace(TINY_MODEL, rope_theta=200.0, scale_input="accumulated")))
    (line,) = [r.getMessage() for r in caplog.records if "not trained with" in r.getMessage()]
    assert "rope_theta 200.0 (was 100.0)" in line and "scale_input accumulated" in line


def test_a_recipe_from_before_these_keys_goes_on(make: Make) -> None:
    trainer = make()
    trainer.advance()
    trainer.save()
    path = trainer.run.path / "recipe.yaml"
    lines = path.read_text().splitlines()
    new = ("trains", "connector_steps", "lora", "accumulate", "checkpointing", "peak", "tensorboard")
    path.write_text("\n".join(line for line in lines if not line.startswith(new)))
    assert make().step == 1
    with pytest.raises(StorageError, match=r"another recipe \(differs in trains\)"):
        make(trains="alignment")


def test_the_self_test_passes_and_finds_each_mismatch(
    place: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    bundle = tiny_bundle()
    parts = (bundle.image_tokenizer, bundle.vocab, bundle.layout)
    assert check_generation(bundle.model, *parts) < 1e-4
    baseline = {"closing_input": "accumulated", "scale_input": "accumulated", "positions": "learned_1d"}
    model = tiny_model(replace(TINY_MODEL, **baseline))
    assert check_generation(model, *parts) < 1e-4
    for change, message in (
        ({"codes": 25}, "the image tokenizer has 24 codes, the model 25"),
        ({"code_dim": 9}, "the image tokenizer has 10 numbers per code vector, the model 9"),
        ({"text_vocab": 310}, "the vocabulary has 300 text entries, the model 310"),
        ({"max_scales": 4}, "draws 5 scales, the model has embeddings for 4"),
    ):
        with pytest.raises(SelfTestError, match=message):
            self_test(tiny_model(replace(TINY_MODEL, **change)), *parts)

    def shifted(schedule: Any, k: int, clock: int, block: int, options: Any) -> Any:
        return scale_block(schedule, k, clock + 1, block, options)

    monkeypatch.setattr("nextflow_ar.training.selftest.scale_block", shifted)
    with pytest.raises(
        SelfTestError, match="hidden states of a whole pass and of one step after the other differ"
    ):
        check_generation(bundle.model, *parts)
    monkeypatch.undo()
    with caplog.at_level(logging.WARNING):
        assert check_data([]) == [
            "nothing in the first 0 documents teaches drawing",
            "nothing in the first 0 documents teaches reading pictures",
        ]
    assert len(caplog.records) == 2
    spoken = Document((Mark(TURN_START), Text("user\nhello"), Mark(TURN_END)))
    bare = Document((Text("hello"),))
    assert check_data([spoken, spoken], dialogue=True) == check_data([bare, bare])
    (*_, told) = check_data([spoken, bare], dialogue=True)
    assert told.startswith("1 of the first 2 documents have no chat marks")


@pytest.mark.parametrize("dialogue", [False, True])
def test_ways_of_asking_that_shards_do_not_teach_are_told(dialogue: bool) -> None:
    codes = Codes.plain(ScaleSchedule.square(2), torch.zeros(5, dtype=torch.long))

    def document(*parts: tuple[str, Text | Image]) -> Document:
        return Document(turns(parts) if dialogue else tuple(segment for _, segment in parts))

    prompt, drawn, shown = ("user", Text("a dog")), ("assistant", Image(codes, True)), ("user", Image(codes))
    said, asked = ("assistant", Text("a dog", True)), ("user", Text("what is it?"))
    plain, planned = (
        document(prompt, drawn),
        document(prompt, ("assistant", Text("plan: a dog", True)), drawn),
    )
    told, answered = document(shown, said), document(shown, asked, said)
    manner = {"think": True, "caption": "what is it?"}
    (about_plans,) = check_manner([plain, answered, document(drawn)], manner)
    assert "generation: {think: false}" in about_plans
    (about_questions,) = check_manner([plain, planned, told], manner)
    assert "'what is it?'" in about_questions and "question" in about_questions
    assert len(check_manner([plain, told], manner)) == 2
    assert check_manner([planned, answered, told], manner) == check_manner([plain, told], {}) == []
    changed = document(shown, asked, drawn)
    assert (
        check_manner([told, changed], manner) == check_manner([told], manner) != []
    )  # an edit asks nothing about it
    assert check_manner([plain, changed], {"think_edits": True}) == [
        "the model plans in words before it changes a picture, no document of the shards does: set generation: "
        "{think_edits: false}"
    ]
    thought = document(shown, asked, ("assistant", Text("plan: a cat", True)), drawn)
    assert check_manner([changed, thought], {"think_edits": True}) == []
    story = document(prompt, said, drawn, said, drawn)
    (about_plans,) = check_manner([plain, story], {"think": True, "think_told": True})
    assert "before it draws" in about_plans  # the sentences of a story are no plan of a single picture


def test_what_is_ahead_is_known_by_folder(make: Make) -> None:
    loader = make().loaders[0]
    (a, of_a), (b, of_b) = loader.peek_folders(40)
    assert (a.folder.parent.name, b.folder.parent.name) == ("a", "b") and b.condition_dropout == 0.2
    assert len(of_a) + len(of_b) == 40 and len(of_b) > len(of_a) > 3  # of twice the weight
    one, two = iter(of_a), iter(of_b)
    following = [next(one), next(two)]
    for document in map(str, loader.peek(40)):  # the same documents, each folder's in order
        which = [str(each) == document for each in following].index(True)
        following[which] = next((one, two)[which], None)
    assert following == [None, None]


def test_films_and_guidance_that_nothing_teaches_are_told() -> None:
    codes = Codes.plain(ScaleSchedule.square(2), torch.zeros(5, dtype=torch.long))
    frame, drop = Image(codes, True), {"video": "a video in which {prompt}, {frames} frames"}
    bare = Document((Text("a red car moves left"), frame, frame))
    asked = Document((Text("a video in which a red car moves left, two frames"), frame, frame))
    (line,) = check_manner([bare, bare], drop)
    assert "a video in which" in line and "generation: {video: '{prompt}'}" in line
    assert check_manner([bare, asked], drop) == check_manner([bare], {}) == check_manner([asked], {}) == []
    chat = Document((Text("a red car"), frame, Text("now a blue one"), frame))
    given = Image(codes)
    edited = Document((given, Text("make it red"), frame, frame))
    assert check_manner([chat, edited], drop) == []  # no films
    following = [Document((given, given, Text("the next frame"), frame)), Document((given, frame))]
    assert check_manner(following, {"think_edits": True}) == []  # frames of films, or edits: nobody knows
    (line,) = check_manner([bare], {"think_told": True})
    assert "each of several pictures" in line

    def source(dropped: float, *documents: Document) -> tuple[ShardFolder, tuple[Document, ...]]:
        return ShardFolder(Path("a"), condition_dropout=dropped), documents

    (line,) = check_guidance([source(0.0, bare)], {"guidance": [1.0, 2.0]})
    assert "guidance [1.0, 2.0]" in line and "condition_dropout" in line
    assert check_guidance([source(0.1, bare)], {"guidance": 2.0}) == []
    assert check_guidance([source(0.0, bare), source(0.0, Document((frame,)))], {"guidance": 2.0}) == []
    assert check_guidance([source(0.0, bare)], {"guidance": [1.0, 1.0]}) == []
    assert check_guidance([source(0.0, bare)], {}) == []
    told = Document((given, Text("a red car", supervised=True)))  # what only reads drops nothing
    assert check_guidance([source(0.0, bare), source(0.1, told)], {"guidance": [1.0, 2.0]}) == [line]


def test_a_context_too_short_is_told_before_any_step(make: Make) -> None:
    with pytest.raises(
        SelfTestError, match=r"a picture of . scales between two short texts takes \d+ tokens, the"
    ):
        make(start=None, model=to_dict(replace(TINY_MODEL, max_positions=16))).self_test()
    trainer = make()
    documents = [Document((Text("hello"),)), Document((Text("hello " * 50),))]
    room = Room(trainer.vocab, trainer.layout, 40, trainer.image_tokenizer.config)
    (line,) = check_lengths(documents, [], room)
    assert line.startswith(
        "1 of the first 2 documents are longer than the model's context, 40 tokens (the longest "
    )
    assert check_lengths(documents[:1], [], room) == check_lengths([], [], room) == []
    short = ShardSource("shards", 1, (ShardFolder(Path("a")),), Packing("length", 40))
    assert check_lengths(documents, [short], room) == []  # no row of it holds the longer one


def test_a_size_that_no_picture_has_is_told_before_any_step(
    make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        make().self_test()
    (line,) = [record.getMessage() for record in caplog.records]
    assert re.fullmatch(
        r"self-test: the model draws 40x40 where no size is asked, none of the first \d+ drawings has it "
        r"\(mostly 32x32, 48x24\): set generation: \{size: 32x32\}",
        line,
    )
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        make("set", generation={"size": "48x24"}).self_test()
    assert not caplog.records
    trainer = make("look")
    written = [Document((Text("hello", supervised=True),))]  # draws nothing
    assert check_size(written, {}, trainer.image_tokenizer.config) == []


def test_turns_without_marks_are_told(place: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    turns = [
        Text("what is 2?"),
        Text("a number", supervised=True),
        Text("and 3?"),
        Text("so, too", supervised=True),
    ]
    marked = Document((Mark(TURN_START), *turns, Mark(TURN_END)))
    line = (
        "1 of the first 3 documents of the shards go on asking behind an answer, without a mark between the turns: set the "
        "folder's dialogue: true"
    )
    assert check_turns([Document(tuple(turns)), Document(tuple(turns[:2])), marked]) == [line]
    assert check_turns([Document(tuple(turns[:2])), marked]) == check_turns([]) == []
    chats = [
        {"messages": [{"role": role, "content": f"{role} {i}"} for role in ("user", "assistant") * 2]}
        for i in range(6)
    ]
    folder = make_shards(tmp_path / "chats", chats, tiny_image_tokenizer())
    (shards,) = recipe(place, tmp_path)["sources"]
    made = maker(place, tmp_path)
    for name, dialogue in (("plain", False), ("spoken", True)):
        caplog.clear()
        source = shards | {"folders": [{"folder": str(folder), "dialogue": dialogue}]}
        with caplog.at_level(logging.WARNING):
            made(name, sources=[source], generation={"dialogue": dialogue}).self_test()
        assert any("go on asking behind an answer" in r.getMessage() for r in caplog.records) is not dialogue


def test_what_a_step_never_used_moves_on_one_process_as_on_several(make: Make, place: Path) -> None:
    """Rows of text alone leave the connector without a gradient: its moments and decay move it still."""
    trainer = make(**EXACT, optimizer=OPTIMIZER | {"muon_lr": 0.0, "weight_decay": 0.5, "warmup": 0})
    name = next(n for n, p in trainer.parameters.items() if n.startswith("scale_inputs") and p.dim() == 2)
    trainer.advance()
    before = trainer.parameters[name].detach().clone()
    (part,) = trainer._parts()
    text = replace(part, batch=one_text(trainer))
    trainer._parts = lambda: [text]  # type: ignore[method-assign]
    trainer.advance()
    assert not torch.equal(trainer.parameters[name], before)
    grads = trainer.parameters[name].grad
    assert grads is None or not grads.any()


def one_text(trainer: ModelTrainer) -> Batch:
    """A batch of a document without a picture."""
    return collate([build(Document((Text("hello", supervised=True),)), trainer.vocab, trainer.layout)])


def test_the_peak_is_measured_in_what_is_computed_in(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.dtype] = []
    monkeypatch.setattr(torch, "mm", lambda a, b: asked.append(a.dtype))
    for products, dtype in (("float32", torch.float32), ("bfloat16", torch.bfloat16)):
        asked.clear()
        assert peak_of("measured", torch.device("cpu"), products) and set(asked) == {dtype}
    assert peak_of(3.0, torch.device("cpu")) == 3.0 and peak_of(None, torch.device("cpu")) is None


def test_defaults_of_sampling_can_be_set(make: Make) -> None:
    trainer = make(steps=1, generation={"think": False, "top_p": 0.5})
    assert trainer.generation["think"] is False and trainer.bundle().generation["top_p"] == 0.5


def test_a_mismatch_stops_the_run_before_any_step(
    make: Make, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    trainer = make(generation={"size": "32x32"})
    with caplog.at_level(logging.WARNING):
        trainer.self_test()
    assert not caplog.records  # this mixture teaches both
    monkeypatch.setattr(trainer.model, "embed_scale", lambda codes, s, k, b: torch.zeros(1, len(b), 48))
    before = copied(trainer)
    with pytest.raises(SelfTestError, match="what is trained could not be sampled from"):
        trainer.fit()
    assert trainer.step == 0 and not any(bool(r.any()) for r in moved(trainer, before).values())
    assert not (trainer.run.path / "checkpoint.pt").exists()


def test_metrics_say_how_fast_it_goes(make: Make) -> None:
    trainer = make(steps=2, peak=0.001, tensorboard=True)
    trainer.fit()
    (line,) = [json.loads(s) for s in (trainer.run.path / "metrics.jsonl").read_text().splitlines()]
    assert line["documents"] == trainer.documents and line["tokens"] == trainer.tokens > 300
    assert line["skipped"] == 0 and line["tokens_per_s"] > 0 and line["documents_per_s"] > 0
    assert line["utilisation"] == pytest.approx(line["tflops_per_s"] / 0.001, rel=0.05, abs=1e-3)
    assert list((trainer.run.path / "tensorboard").glob("events*"))
    speed = Speedometer(peak=2.0, processes=4)
    speed.add(0.5, int(1e12), 100, 10)
    speed.add(0.5, int(1e12), 100, 10)
    assert speed.read() == {
        "documents_per_s": 80, "tokens_per_s": 800, "tflops_per_s": pytest.approx(2.0), "utilisation": pytest.approx(1),
    }  # fmt: skip
    assert speed.read()["tokens_per_s"] == 0
    assert measured_peak(torch.device("cpu"), 0.01) > 1e-4


def test_shards_in_dialogue_make_a_model_of_dialogue(
    place: Path, make: Make, caplog: pytest.LogCaptureFixture
) -> None:
    """A model is asked as it was taught: with chat marks where all sources have them; the self-test tells of others."""
    values = recipe(place, Path("unused"))["sources"][0]
    marked = [folder | {"dialogue": True} for folder in values["folders"]]
    training = make("said", sources=[values | {"folders": marked}], start=None, model=to_dict(TINY_MODEL))
    assert training.generation["dialogue"] is True
    half = [marked[0], values["folders"][1]]
    mixed_run = make("half", sources=[values | {"folders": half}], start=None, model=to_dict(TINY_MODEL))
    assert "dialogue" not in mixed_run.generation
    told = check_data(chain(*mixed_run.documents_ahead()))
    assert any("have chat marks, which this model is not asked with" in line for line in told)
    assert not any("chat marks" in line for line in check_data(chain(*make("plain").documents_ahead())))
    hidden = sorted(Path(marked[0]["folder"]).glob("*.parquet"))[0]
    whole = hidden.read_bytes()
    hidden.unlink()
    try:
        training = make("holes")
    finally:
        hidden.write_bytes(whole)
    caplog.clear()
    training.self_test()
    assert sum("lacks 1 shards (000000)" in record.message for record in caplog.records) == 1


def test_without_an_average_the_weights_are_kept_once(make: Make) -> None:
    """ema: 0 keeps no second copy; what is saved, resumed and exported are the weights themselves."""
    training = make("run", ema=0.0, steps=2)
    assert training.averages == {}
    final = training.fit()
    again = make("run", ema=0.0, steps=2)
    same(again, training)
    for name, parameter in load_bundle(final).model.named_parameters():
        expected = training.parameters[name].detach().bfloat16().float()
        assert torch.equal(parameter, expected), name
    assert set(make("averaged", ema=0.9).averages) == set(training.parameters)
