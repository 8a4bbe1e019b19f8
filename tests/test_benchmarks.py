"""Benchmarks, small: equal sizes, as many tokens as they say, the paper's own formula, packing of real steps."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType

import pytest

from nextflow_ar.model.checkpoint import find_checkpoint, load_architecture
from nextflow_ar.model.costs import ImageShape, TextShape, count
from nextflow_ar.model.flops import sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.training.model_stage import ModelTrainer
from tests.training.test_episode_sources import folder as folder  # a fixture
from tests.training.test_episode_sources import source, trainer

FOLDER = Path(__file__).parent.parent / "benchmarks"
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason="needs the checkout")


@pytest.fixture
def benchmark(monkeypatch: pytest.MonkeyPatch):
    def load(name: str) -> ModuleType:
        monkeypatch.syspath_prepend(str(FOLDER))
        sys.modules.pop(name, None)
        return importlib.import_module(name)

    return load


def test_training_steps_of_both_shapes(benchmark, tmp_path: Path) -> None:
    told = tmp_path / "training.json"
    arguments = ["--tiny", "--ways", "eager", "--repeats", "1", "--json", str(told)]
    rows = benchmark("gpu_training").main(arguments)
    assert [(row["shape"], row["way"]) for row in rows] == [("small", "eager"), ("7b", "eager")]
    assert all(row["seconds"] > 0 and 256 < row["places"] <= 512 for row in rows)
    assert json.loads(told.read_text())["results"] == rows


def test_where_a_step_of_a_recipe_goes(benchmark, folder: Path, tmp_path: Path) -> None:
    trainer(tmp_path / "one", folder, [source()])  # leaves its recipe in its folder
    recipe = ["--recipe", str(tmp_path / "one" / "recipe.yaml"), "--steps", "1"]
    found = benchmark("gpu_step").main(recipe)
    assert 100 < found["places"] <= 2700
    parts = ("pictures to codes", "forward and loss", "backward", "update")
    assert all(found[part] > 0 for part in parts) and found["of it, the encoder"] < found["pictures to codes"]
    assert sum(found[part] for part in parts) < found["whole"] and found["the data, waited for"] == 0
    assert ModelTrainer._update.__name__ == "_update"  # what was timed is as it was


def test_loops_of_equal_size_side_by_side(benchmark, tmp_path: Path) -> None:
    told = tmp_path / "out" / "ratios.json"
    arguments = ["--sizes", "64", "--layers", "1", "--repeats", "1", "--json", str(told)]
    rows, counts = benchmark("ratios").main(arguments)
    assert [(r.loop, r.final_tokens, r.steps) for r in rows] == [
        ("ours", 64, 7), ("raster", 64, 64), ("janus", 64, 64), ("emu3", 64, 72)
    ]  # fmt: skip
    assert all(r.cpu > 0 and abs(r.stack / rows[0].stack - 1) < 0.01 for r in rows)
    assert 1.0 < counts[0].layers_counted / counts[0].layers_formula < 1.2  # what small steps are padded by
    saved = json.loads(told.read_text())
    assert (
        len(saved["rows"]) == 4
        and saved["flops"][0]["counted"] == counts[0].counted > counts[0].layers_counted
    )


def test_the_others_draw_as_many_tokens_as_they_say(benchmark) -> None:
    ratios = benchmark("ratios")
    engine, schedule = ratios.our_engine(8, 6)
    config, whole = engine.model.config, ratios.size_of(engine.model)
    parameters, _, picture = ratios.janus(config, 64)
    assert picture(4).shape == (1, 4) and abs(parameters / whole - 1) < 0.1
    parameters, _, picture = ratios.emu3(config, 64)
    drawn = picture(16)[0].tolist()  # two rows of eight, each with its mark
    assert [i for i, token in enumerate(drawn) if token == 5] == [8, 17] and len(drawn) == 18
    assert (
        all(token >= config.text_vocab for token in drawn if token != 5)
        and abs(parameters / whole - 1) < 0.05
    )
    codes = ratios.raster(engine, schedule, "two dogs", 5)
    assert codes.shape == (5,) and codes.max() < config.codes


def test_the_papers_formula_is_ours_in_its_own_units(benchmark) -> None:
    ratios = benchmark("ratios")
    counts = ratios.paper_counts(count([TextShape(100), ImageShape(ScaleSchedule.square(18), True)]))
    for hidden in (256, 3584):
        assert ratios.paper_flops(hidden, counts) == 122_208 * hidden**2 + 256_215_912 * hidden


def test_packing_of_real_steps_uses_every_document_once_at_most(benchmark) -> None:
    packing = benchmark("packing_run")
    _, tokenizer = load_architecture(find_checkpoint("nano"))
    vocab = Vocabulary(tokenizer, packing.MODEL.text_vocab, packing.MODEL.codes)
    found = packing.samples(40, 0, vocab)
    longest, costliest = max(map(len, found)), max(sample_flops(s, packing.MODEL) for s in found)
    for mode in packing.MODES:
        width, steps = packing.steps_of(mode, found, 2, 4)
        used = [n for shares in steps for rows in shares for row in rows for n in row]
        assert steps and len(used) == len(set(used)) and all(len(shares) == 2 for shares in steps)
        for rows in (rows for shares in steps for rows in shares):
            lengths = [sum(len(found[n]) for n in row) for row in rows]
            assert max(lengths) <= width(max(lengths)) < max(lengths) * 1.03 + 64 or mode == "fixed length"
            if mode == "padding":
                assert len(rows) == 4 and all(len(row) == 1 for row in rows)
            elif mode == "fixed length":
                assert max(lengths) <= width(max(lengths)) == longest
            else:
                assert all(
                    sum(sample_flops(found[n], packing.MODEL) for n in row) <= costliest for row in rows
                )


def test_the_gpu_benchmark_runs_small_on_a_cpu(benchmark, tmp_path: Path) -> None:
    gpu, told = benchmark("gpu_7b"), tmp_path / "gpu.json"
    arguments = [
        "--tiny",
        "--device",
        "cpu",
        "--batch",
        "2",
        "--guidance",
        "on",
        "--ways",
        "graphs",
        "--repeats",
        "1",
    ]
    (result,) = gpu.main([*arguments, "--attention", "split", "--json", str(told)])
    names = ["prefill", *(f"scale {k}" for k in range(2, 7)), "sampling", "image decode", "rest"]
    assert sorted(result.phases) == sorted(names) and all(s >= 0 for s in result.phases.values())
    assert result.seconds > 0 and result.tflops > 0
    assert json.loads(told.read_text())["results"][0]["phases"] == result.phases
    with pytest.raises(SystemExit, match="the 7B shape needs a GPU"):
        gpu.main(["--device", "cpu"])


def test_copies_of_an_edit(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    found = benchmark("copies").main(["--edits", "1"])
    told = capsys.readouterr().out
    assert "17 edits" in told and "plain: copies by scale" in told and "kept: copies by scale" in told
    right = {name: sum(found[name, "right"]) / len(found[name, "right"]) for name in ("a copy", "another")}
    assert right["a copy"] > 0.8 > right["another"]  # the bundled model knows where to copy
