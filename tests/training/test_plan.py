"""Plans by hand, and the recipes of the paper's 7B."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from nextflow_ar.app.cli import run
from nextflow_ar.config import ConfigError, from_dict, load_yaml, override
from nextflow_ar.model.costs import Counts, count
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.training.hardware import GPUS, Gpu
from nextflow_ar.training.plan import (
    communication,
    executed_flops,
    make_plan,
    memory,
    moments,
    muon_flops,
    times,
    useful_flops,
)
from nextflow_ar.training.plan_config import DocumentPlan
from nextflow_ar.training.plan_stage import Stage, documents_of, read_stage, trained
from nextflow_ar.training.recipe import ModelRecipe

RECIPES = Path(__file__).parent.parent.parent / "recipes"
MACHINE = Gpu("toy", 1e12, 1e11, 2.0**30, 1e9, 1e9, 1e8, 2, "made up")
TINY = {
    "kind": "model", "ema": 0.9, "trains": "everything",
    "optimizer": {"lr": 1.0, "muon_lr": 0.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.9, "warmup": 1,
                  "schedule": "constant", "decay": 0.1, "final": 0.1, "clip": 1.0},
    "model": {"text_vocab": 6, "codes": 4, "code_dim": 2, "hidden": 4, "layers": 3, "heads": 2, "kv_heads": 1,
              "intermediate": 8, "max_positions": 64, "rms_eps": 1e-6, "rope": "qwen", "rope_theta": 100.0,
              "rope_sections": [1, 0, 0], "rope_range": 4.0, "max_scales": 2, "scale_input": "residual",
              "closing_input": "residual", "context_images": "scales", "positions": "rope"},
    "sharding": {"replicas": 1, "params": "bfloat16", "reduce": "float32", "reshard": True, "recompute": False,
                 "compile": True, "reduce_each": True},
    "plan": {"scales": 2, "row": 8, "micro_steps": 2,
             "documents": {"text_to_image": {"samples": 100, "text": 3}}},
}  # fmt: skip


def tiny(*changes: str) -> Stage:
    return read_stage(override(TINY, list(changes)), "tiny")


def test_flops_by_hand() -> None:
    """A document: 3 words and an image of 1 + 4 cells: 8 places, 42 visible pairs, 6 predictions (<boi> too)."""
    stage = tiny()
    assert stage.row_counts == Counts(8, 42, 6) and stage.counts == Counts(800, 4200, 600)
    # a place and layer: q, o 4x4, k, v 4x2, three of 4x8: 16 + 16 + 16 + 96 = 144 multiply-adds; a pair 2 * 4 of them
    layers, head = 3 * 2 * (8 * 144 + 42 * 8), 2 * 6 * 4 * 10
    assert useful_flops(stage, stage.row_counts) == 3 * (layers + head)
    assert executed_flops(stage, stage.row_counts) == 3 * (layers + head)
    again = tiny("sharding.recompute=true")
    assert executed_flops(again, again.row_counts) == 4 * layers + 3 * head
    frozen = tiny("trains=alignment")
    attention = 3 * 2 * 42 * 8  # has no weights that could stay
    assert useful_flops(frozen, frozen.row_counts) == 2 * layers + attention + 3 * head


def test_memory_by_hand() -> None:
    stage = tiny()
    # a layer: q, k, v with biases 5 * 8, o 16, feed-forward 96, norms 8; and the last norm
    layer, outside = 160, 6 * 4 + 10 * 4 + (4 * 2 + 3 * 4 + 5 * 4 + 3 * 4 + 16)
    total = 3 * layer + 4 + outside
    assert trained(stage) == total and moments(stage) == 2 * total
    # trained rows of an alignment: <boi>, <eoi> in both tables and four codes in the head
    assert trained(tiny("trains=alignment")) == 68 + (2 + 2 + 4) * 4
    assert moments(tiny("optimizer.muon_lr=1.0")) == 2 * total - (3 * layer + 4)
    found = memory(stage, 4)
    assert found.weights == found.average == total
    # gradients of one layer and of all that is no layer, whole: 2 bytes, and 4 on their way to the sum
    assert found.gradients == total + (2 + 4) * (layer + outside) and found.optimizer == 2 * total
    assert found.gathered == 2 * (2 * layer + outside)
    # a place and layer keeps 12 * 4 + 2 * (2 * 4 + 4) + 8 * 8 = 136 bytes; 10 bytes of 4 at the edges
    assert found.activations == 8 * (3 * 136 + 40)
    assert memory(tiny("plan.checkpointing=true"), 4).activations == 8 * (3 * 8 + 136 + 40)
    assert found.logits == 2 * 6 * 10 + 4 * 40
    assert memory(tiny("plan.chunked_head=false"), 4).logits == 6 * 10 * 10
    assert found.total == pytest.approx(sum(vars(found).values()) / 0.94)
    alone = memory(stage, 1)
    assert alone.gathered == 0 and alone.gradients == alone.weights == 4 * total


def test_times_by_hand() -> None:
    stage, total = tiny(), 3 * 160 + 4 + 24 + 40 + 68
    found = times(stage, MACHINE, 4, 0.5)
    assert found.products == pytest.approx(2 * useful_flops(stage, stage.row_counts) / 0.5e12)
    assert found.elementwise == pytest.approx(2 * (5 * 136 * 8 * 3 + 48 * 6 * 10) / 1e9)
    assert found.optimizer == pytest.approx((8 * 2 * total + 36 * total + 12 * total) / 4 / 1e9)
    # two gathers in bf16 and one scatter in fp32 per micro step; two GPUs of a node share 2 * 1e8 bytes/s
    assert communication(stage, MACHINE, 4) == pytest.approx(2 * 8 * total * 0.75 / 2e8)
    assert communication(stage, MACHINE, 2) == pytest.approx(2 * 8 * total * 0.5 / 1e9)
    assert communication(stage, MACHINE, 1) == 0
    assert found.step == found.products + found.elementwise + found.optimizer  # longer than the traffic here
    slow = times(stage, replace(MACHINE, network=1e7), 4, 0.5)
    assert slow.step == slow.communication + slow.optimizer
    apart = times(stage, MACHINE, 4, 0.5, attention=1e11)
    pairs = 3 * 3 * 2 * 42 * 8
    assert apart.products - found.products == pytest.approx(2 * pairs * (1 / 1e11 - 1 / 0.5e12))
    # Muon: per matrix five times 4 r r c + 2 r r r
    four, two, wide = 4 * 16 * 4 + 2 * 64, 4 * 4 * 4 + 2 * 8, 4 * 16 * 8 + 2 * 64
    muon = tiny("optimizer.muon_lr=1.0")
    assert muon_flops(muon) == 3 * 5 * (2 * four + 2 * two + 3 * wide)
    layers = 3 * 160 + 4  # which Muon trains: one moment, and 34 bytes more of it
    moved = 8 * (2 * total - layers) + 36 * total + 34 * layers + 12 * total
    assert times(muon, MACHINE, 4, 0.5, muon=1e10).optimizer == pytest.approx(
        moved / 4 / 1e9 + muon_flops(muon) / 4 / 1e10
    )


def test_what_the_trainer_holds_follows_from_the_recipe() -> None:
    """Without shards, with gradients of parts summed once, in groups of shards, of adapters, without averages."""
    layer, outside = 160, 132
    total = 3 * layer + 4 + outside
    alone = tiny("sharding=null")
    whole = memory(alone, 4)
    assert (whole.weights, whole.optimizer, whole.average) == (4 * total, 8 * total, 4 * total)
    assert whole.gradients == 2 * 4 * total
    assert whole.gathered == 2 * (3 * layer + 4)  # bf16 copies of the layers, kept for the backward pass
    assert memory(tiny("sharding=null", "checkpointing=true"), 4).gathered == 0
    tables = (
        6 + 10
    ) * 4 + 68  # embeddings, head and inputs: of which some rows train, but all have gradients
    for aligned, kept in (
        (tiny("trains=alignment"), tables),
        (tiny("trains=alignment", "sharding=null"), 68 + 8 * 4),
    ):
        assert times(aligned, MACHINE, 1, 0.5).optimizer > 0
        assert (
            moments(aligned) == 2 * kept
            and memory(aligned, 1).gradients == memory(aligned, 1).average == 4 * tables
        )
    assert communication(alone, MACHINE, 2) == pytest.approx(2 * 4 * total * 0.5 / 1e9)
    once = tiny(
        "sharding.reduce_each=false"
    )  # two micro steps: until the last each process has all of its own
    assert memory(once, 4).gradients == memory(tiny(), 4).gradients + 4 * total
    assert communication(once, MACHINE, 4) == pytest.approx((2 * 4 + 4) * total * 0.75 / 2e8)
    kept = tiny("sharding.reshard=false")
    assert memory(kept, 4).gathered == 2 * (3 * layer + 4 + outside)
    lines = tiny("sharding.replicas=2")  # of two GPUs each, inside a node; their sums cross the nodes
    assert memory(lines, 4).weights == 4 * total / 2
    inside, across = (2 * 4 + 2 * 4) * total * 0.5 / 1e9, 2 * (2 * 4 * total / 2) * 0.5 / 2e8
    assert communication(lines, MACHINE, 4) == pytest.approx(inside + across)
    with pytest.raises(ConfigError, match="3 GPUs cannot be divided into 2 groups"):
        memory(lines, 3)
    assert memory(tiny("ema=0"), 4).average == 0
    few = tiny(
        "sharding=null", "trains=lora", "lora={rank: 2, alpha: 4, targets: [q_proj, v_proj, down_proj]}"
    )
    assert trained(few) == 3 * 2 * (8 + 6 + 12) == few.adapters and moments(few) == 2 * few.adapters
    assert memory(few, 1).gradients == 4 * few.adapters and memory(few, 1).average == 4 * few.adapters
    assert memory(few, 1).weights == 4 * (total + few.adapters)
    layers, head = 3 * 2 * (8 * 144 + 42 * 8), 2 * 6 * 4 * 10
    own, attention = 2 * 8 * few.adapters, 3 * 2 * 42 * 8
    # no gradient of what stays; attention's two factors have theirs, and so have the adapters
    assert useful_flops(few, few.row_counts) == 2 * layers + attention + 2 * head + 3 * own
    again = replace(few, checkpointing=True)
    assert executed_flops(again, few.row_counts) - useful_flops(again, few.row_counts) == layers + own
    assert memory(tiny("sharding=null"), 1).logits - memory(few, 1).logits == 4 * 4 * 10
    beside = tiny(
        "sharding=null", "trains=lora", "lora={rank: 2, alpha: 4, modules_to_save: [embed_tokens, head]}"
    )
    assert trained(beside) - beside.adapters == (6 + 10) * 4 and memory(beside, 1).gradients == 4 * trained(
        beside
    )
    own = 2 * 8 * beside.adapters
    assert useful_flops(beside, beside.row_counts) == 2 * layers + attention + 3 * head + 3 * own
    assert memory(tiny("sharding=null"), 1).logits == memory(beside, 1).logits
    lora = ("sharding=null", "trains=lora", "lora={rank: 2, alpha: 4}", "optimizer.muon_lr=1.0")
    assert moments(tiny(*lora)) == trained(tiny(*lora)) > 0  # Muon has one, AdamW two
    assert moments(tiny(*lora, "optimizer.adapter_lr=1.0")) == 2 * trained(tiny(*lora))
    with pytest.raises(ConfigError, match="'lm_head' is no layer that takes adapters; accepted: q_proj"):
        tiny("trains=lora", "lora={targets: [lm_head]}")


def test_accumulate_is_what_every_source_divides_by() -> None:
    one, two = TINY | {"sources": [{"rows": 16}]}, TINY | {"sources": [{"rows": 8}, {"rows": 8}]}
    odd = TINY | {"sources": [{"rows": 4}, {"rows": 12}]}
    for values, parts, micro, largest in ((one, 4, 4, None), (two, 2, 4, None), (odd, 1, 2, 3)):
        plain = {k: v for k, v in values["plan"].items() if k != "micro_steps"}
        stage = read_stage(values | {"plan": plain}, "tiny")
        on = stage.on(4)
        assert (on.accumulate, on.micro_steps) == (parts, micro)
        assert on.row_counts.tokens * on.micro_steps * 4 == stage.row_counts.tokens * 16  # a step is a step
        assert on.largest == (None if largest is None else stage.row_counts.times(largest))
        with pytest.raises(ConfigError, match="cannot be divided among 3 GPUs"):
            stage.on(3)


def test_a_recipe_without_a_plan_is_its_rows() -> None:
    """Rows of all GPUs together; every source is a micro step, and memory that of the largest."""
    sources = [
        {"rows": 8, "length": 10},
        {"kind": "shards", "rows": 4, "packing": {"mode": "length", "budget": 30, "open_rows": 4}},
    ]
    values = {k: v for k, v in TINY.items() if k != "plan"} | {
        "sources": sources,
        "steps": 5,
        "accumulate": 2,
    }
    stage = read_stage(values, "rows")
    assert stage.counts.tokens == 5 * 200 and stage.micro_steps == 4 and stage.shared == 2
    two = stage.on(2)
    assert two.row_counts.tokens * two.micro_steps * 2 == 200
    assert two.largest == Counts(30, 900, 30)  # four rows in two parts on two GPUs
    assert memory(two, 2).activations == 30 * (3 * 136 + 40)
    plan = make_plan(stage, MACHINE, 2, 0.5)
    assert plan.steps == 5 and plan.tokens == 1000
    assert plan.times.products * 2 == pytest.approx(make_plan(stage, MACHINE, 1, 0.5).times.products)
    with pytest.raises(ConfigError, match="rows cannot be divided among 4 GPUs"):
        make_plan(stage, MACHINE, 4, 0.5)
    sources[1]["packing"] = {"mode": "compute", "budget": 3}
    with pytest.raises(ConfigError, match="needs a group 'plan', or sources with rows and length"):
        read_stage(values, "rows")
    for steps in (0, -1):
        with pytest.raises(ConfigError, match=f"steps is at least 1, got {steps}"):
            read_stage(values | {"steps": steps}, "rows")


def test_sources_of_one_width_are_one_step_where_they_are_computed_together() -> None:
    packing = {"mode": "length", "budget": 30, "open_rows": 4}
    sources = [
        {"rows": 8, "length": 30},
        {"kind": "episodes", "rows": 4, "packing": packing},
        {"kind": "episodes", "rows": 2, "packing": packing},
        {"kind": "episodes", "rows": 2, "packing": packing | {"budget": 20}},
    ]
    values = {k: v for k, v in TINY.items() if k not in ("plan", "sharding")} | {
        "sources": sources,
        "steps": 5,
    }
    stage = read_stage(values, "rows")
    assert stage.micro_steps == 3 and stage.largest == Counts(240, 7200, 240)
    sources[0]["rows"] = 2
    stage = read_stage(values, "rows")
    assert stage.largest == Counts(180, 5400, 180)  # two sources of episodes
    for change in ({"together": False}, {"sharding": TINY["sharding"]}, {"accumulate": 2}):
        assert read_stage(values | change, "rows").largest != stage.largest
    apart = read_stage(values, "rows", cuda=False)
    assert apart.micro_steps == 4 and apart.largest == Counts(120, 3600, 120) and apart.apart is None
    assert read_stage(values | {"together": True}, "rows", cuda=False).largest == stage.largest
    helps = {knob.name: knob for knob in make_plan(stage, replace(MACHINE, memory=1e3), 1, 0.5).knobs}
    assert helps["together: false"].memory == memory(apart.on(1), 1).total
    assert helps["half the rows, accumulate twice"].memory < helps["together: false"].memory
    odd = make_plan(stage, replace(MACHINE, memory=1e3), 2, 0.5)  # one row of a source at a time
    assert "half the rows, accumulate twice" not in {knob.name for knob in odd.knobs}


def test_products_in_fp32_take_longer_and_keep_more(capsys: pytest.CaptureFixture[str]) -> None:
    for change in ("sharding.params=float32", "sharding=null"):
        half = tiny(change.replace("float32", "bfloat16"))
        full = tiny(change, "precision=float32") if "null" in change else tiny(change)
        assert times(full, MACHINE, 1, 0.5).products == pytest.approx(
            10 * times(half, MACHINE, 1, 0.5).products
        )
        # norms in and out, queries and the like, the feed-forward part: all 4 bytes; 12 of 4 at the edges
        assert memory(full, 1).activations == 8 * (3 * (2 * 8 * 4 + 4 * (2 * 4 + 4) + 4 * 4 * 8) + 48)
        assert memory(full, 1).logits - 4 * 40 == 2 * (memory(half, 1).logits - 4 * 40)
        plan = make_plan(full, MACHINE, 1, 0.5)
        assert (plan.gpu.flops, plan.gpu.products) == (1e11, "fp32")
    assert memory(tiny("sharding=null", "precision=float32"), 1).gathered == 0  # no copies in bf16
    recipe = str(RECIPES / "7b_pretrain_256.yaml")
    assert run(["plan", recipe, "--gpus", "64", "--set", "sharding.params=float32"]) == 0
    assert "64 x h100, 67 TFLOP/s fp32" in capsys.readouterr().out


def test_what_helps_where_it_does_not_fit() -> None:
    stage = tiny()
    small = replace(MACHINE, memory=5000.0)
    found = make_plan(stage, small, 4, 0.5)
    assert not found.fits and make_plan(stage, MACHINE, 4, 0.5).fits
    assert found.steps == pytest.approx(800 / (8 * 2 * 4))
    helps = {knob.name: knob for knob in found.knobs}
    now = memory(stage, 4).total
    again = helps["sharding.recompute: true (activations again)"]
    assert again.memory == memory(tiny("sharding.recompute=true"), 4).total
    assert helps["8 GPUs"].memory == memory(stage, 8).total
    assert helps["ema: 0 (no moving average)"].memory == memory(tiny("ema=0"), 4).total
    assert helps["half the rows, accumulate twice"].slower >= 1
    rows = {k: v for k, v in TINY["plan"].items() if k != "micro_steps"}  # type: ignore[attr-defined]
    dealt = read_stage(TINY | {"plan": rows, "sources": [{"rows": 16}]}, "rows")
    helps = {knob.name: knob for knob in make_plan(dealt, small, 4, 0.5).knobs}
    # a GPU has one row at a time already; on twice as many it has half as many of them
    assert "half the rows, accumulate twice" not in helps and "rows half as long, twice as many" in helps
    ratio = make_plan(dealt, small, 8, 0.5).times.step / make_plan(dealt, small, 4, 0.5).times.step
    assert helps["8 GPUs"].slower == pytest.approx(ratio) and ratio < 0.6
    assert "32 GPUs" not in {knob.name for knob in make_plan(dealt, small, 16, 0.5).knobs}
    assert all(knob.memory < now for knob in found.knobs)
    alone = make_plan(tiny("sharding=null"), small, 4, 0.5)
    assert "sharding (docs/parallel.md)" in {knob.name for knob in alone.knobs}
    once = make_plan(tiny("sharding.reduce_each=false"), small, 4, 0.5)
    assert "sharding.reduce_each: true" in {knob.name for knob in once.knobs}
    with pytest.raises(ConfigError, match="--efficiency above 0"):
        make_plan(stage, MACHINE, 1, 0.0)


@pytest.mark.parametrize(
    ("name", "lr", "scales", "samples", "tokens", "closeness"),
    [
        ("alignment", 1e-3, 12, {"text_to_image": 5, "image_to_text": 5}, 0.01e12, 0.15),
        ("pretrain_256", 1e-4, 12,
         {"text": 662, "text_to_image": 1891, "image_to_text": 520, "interleaved": 147}, 3.4e12, 0.07),
        ("pretrain_512", 1e-4, 16, {"text": 700, "text_to_image": 345, "edit": 20, "interleaved": 5}, 1.8e12, 0.05),
        ("pretrain_1024", 1e-4, 18, {"text": 47, "text_to_image": 10, "edit": 2, "interleaved": 0.5}, 0.2e12, 0.1),
        ("ct", 5e-5, 18, {"text": 47, "text_to_image": 9, "edit": 2}, 0.2e12, 0.25),
        ("sft", 1e-5, 18, {"text": 5, "text_to_image": 1, "edit": 0.1}, 0.02e12, 0.3),
    ],
)  # fmt: skip
def test_the_7b_recipes_are_the_paper_s_table(
    name: str, lr: float, scales: int, samples: dict[str, float], tokens: float, closeness: float
) -> None:
    path = RECIPES / f"7b_{name}.yaml"
    values = load_yaml(path)
    stage = read_stage(values, str(path))
    assert (stage.optimizer.lr, values["plan"]["scales"]) == (lr, scales)
    assert {k: d["samples"] / 1e6 for k, d in values["plan"]["documents"].items()} == pytest.approx(samples)
    (source,) = values["sources"]
    assert [folder["weight"] for folder in source["folders"]] == list(samples.values())
    assert stage.alignment == (name == "alignment") and values["correction"]["share"] == 0.6
    assert values["alpha"] == (0.9 if scales > 12 else 0.0)
    inverted = name in ("pretrain_512", "pretrain_1024", "ct", "sft")
    recipe = from_dict(ModelRecipe, values)
    recipe.check(1024)  # what its comment asks for can be started
    assert recipe.shapes >= 2 * source["packing"]["widths"] > 40  # compiled, all of them
    assert stage.sharding is not None and stage.checkpointing and not stage.averaged
    drawn = next(f for f in source["folders"] if f["folder"].endswith("text_to_image"))
    assert drawn.get("invert", 0.0) == values["plan"]["documents"]["text_to_image"].get("inverted", 0.0)
    assert drawn.get("invert", 0.0) == (0.1 if inverted else 0.0)
    plan = make_plan(stage, GPUS["h100"], 1024, 0.55)
    assert plan.fits and plan.tokens == pytest.approx(tokens, rel=closeness) == plan.paper_tokens
    assert values["steps"] == pytest.approx(plan.steps, rel=0.01)
    assert source["packing"]["budget"] == pytest.approx(_tflops(stage, stage.row_counts), rel=0.01)
    for kind, documents in values["plan"]["documents"].items():  # every kind of document fits a row
        for _, shapes in documents_of(kind, DocumentPlan(**documents), ScaleSchedule.square(scales)):
            one = count(shapes)
            assert _tflops(stage, one) < source["packing"]["budget"], kind
            assert one.tokens < source["packing"]["longest"], kind
    baseline = override(values, ["model.scale_input=accumulated", "model.positions=learned_1d", "alpha=0"])
    assert read_stage(baseline, "").model.positions == "learned_1d"


def _tflops(stage: Stage, counts: Counts) -> float:
    return useful_flops(replace(stage, trains="everything"), counts) / 1e12


def test_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(RECIPES / "7b_pretrain_512.yaml")
    assert run(["plan", recipe, "--gpus", "1024", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["parameters"] == 7_700_900_864 and told["fits"] and 2 < told["days"] < 4
    assert told["accumulate"] is None and 54_000 < told["steps"] < 55_000
    assert told["recipe_steps"] is None
    assert run(["plan", recipe, "--gpus", "1024", "--set", "steps=27337"]) == 0
    assert "the recipe says 27,337, 0.5 times what its documents take" in capsys.readouterr().out
    assert run(["plan", recipe, "--gpus", "512", "--set", "accumulate=2", "--json"]) == 0
    fewer = json.loads(
        capsys.readouterr().out
    )  # the same step in two parts, each with whole gradients until it ends
    assert fewer["accumulate"] is None and fewer["steps"] == pytest.approx(told["steps"])
    assert fewer["memory"]["gradients"] - told["memory"]["gradients"] > 4 * 7.7e9
    assert run(["plan", recipe, "--gpus", "8", "--set", "sharding.recompute=false"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "sharding.recompute: true" in out and "accumulate   has to be 128" in out
    assert run(["plan", recipe, "--gpus", "8", "--set", "sharding=null"]) == 0
    out = capsys.readouterr().out
    assert "does not fit" in out and "sharding (docs/parallel.md)" in out
    finish, pretrain = str(RECIPES / "nano_finish.yaml"), str(RECIPES / "nano_pretrain.yaml")
    nano = load_yaml(RECIPES / "nano_finish.yaml")
    assert run(["plan", str(RECIPES / "nano_finish.yaml"), "--json"]) == 0
    places = sum(source["rows"] * source["length"] for source in nano["sources"])
    assert json.loads(capsys.readouterr().out)["tokens"] == places * nano["steps"]
    for arguments, line in (
        ([recipe, "--gpus", "3"], "the recipe's rows cannot be divided among 3 GPUs"),
        ([recipe, "--gpu", "tpu"], "--gpu is one of a100, h100"),
        ([recipe, "--gpu", "this", "--gpus", "2"], "leave --gpus at 1"),
        ([str(RECIPES / "nano_pixel.yaml")], "plan is for recipes of kind model, got 'tokenizer'"),
        ([recipe, "--set", "plan.documents.songs.samples=1"], "missing key 'plan.documents.songs.text'"),
        ([recipe, "--set", "sources=[]", "--set", "plan.rows=1"], "unknown key 'plan.rows'"),
        ([recipe, "--set", "checkpointnig=true"], "unknown key 'checkpointnig'"),
        ([recipe, "--set", "plan.row=0"], "row is at least 1, got 0"),
        ([recipe, "--set", "plan.documents={}"], "plan.documents needs at least one kind"),
        ([recipe, "--set", "plan.scales=19"], "plan.scales is from 1 to 18, got 19"),
        ([recipe, "--set", "plan.documents.text.samples=-5"], "samples is above 0, got -5"),
        ([recipe, "--set", "plan.documents.text_to_image.inverted=2"], "inverted is a share from 0 to 1"),
        ([recipe, "--set", "accumulate=0"], "accumulate is at least 1, got 0"),
        ([recipe, "--set", "steps=-1"], "steps is at least 1, got -1"),
        ([finish, "--set", "steps=-1"], "steps is at least 1, got -1"),
        ([finish, "--set", "steps=0"], "steps is at least 1, got 0"),
        ([finish, "--set", "trains=lora"], "trains: lora goes with the key lora"),
        ([finish, "--set", "ema=1"], "ema is at least 0 and below 1, got 1"),
        (
            [pretrain, "--set", "text_entries=300000"],
            "text_entries 300000 do not fit into the model's text_vocab",
        ),
        ([pretrain, "--set", "trains=lora", "--set", "lora={}"], "need a checkpoint folder to start from"),
    ):
        assert run(["plan", *arguments]) == 2, arguments
        assert line in capsys.readouterr().err, arguments


TRANSFORMERS = [path for path in sorted(RECIPES.glob("*.yaml")) if load_yaml(path).get("kind") == "model"]


@pytest.mark.parametrize("path", TRANSFORMERS, ids=lambda path: path.stem)
def test_every_recipe_of_a_transformer_is_complete(path: Path) -> None:
    recipe = from_dict(ModelRecipe, load_yaml(path), str(path))
    assert recipe.steps > 0 and recipe.sources
