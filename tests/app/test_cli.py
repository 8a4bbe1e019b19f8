"""The command as a subprocess and, for most mistakes, in this process: files, exit status, one line on stderr."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from nextflow_ar.app.cli import app, run
from nextflow_ar.app.stages import _known_defaults
from nextflow_ar.config import from_dict, load_yaml, to_dict
from nextflow_ar.model.checkpoint import load_bundle, save_bundle
from nextflow_ar.training.recipe import ModelRecipe
from nextflow_ar.training.teacher import TeacherRecipe
from nextflow_ar.training.tokenizer_stage import TokenizerRecipe

GOLDEN = Path(__file__).parent.parent / "golden" / "bundle"
ROOT = Path(__file__).parent.parent.parent


def command(*arguments: object, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    program = Path(sys.executable).parent / "nextflow-ar"
    return subprocess.run([str(program), *map(str, arguments)], capture_output=True, text=True, cwd=cwd)


def mistake(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str]:
    """Exit status and the line of an error."""
    status = run([str(a) for a in arguments])
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("nextflow-ar: ") and err.count("\n") == 1, err
    assert "Traceback" not in err
    return status, err[len("nextflow-ar: ") : -1]


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    options = (
        "--n",
        2,
        "--seed",
        3,
        "--guidance",
        "1,3",
        "--top-k",
        20,
        "--preview",
        folder / "p",
        "-m",
        GOLDEN,
        "--json",
    )
    done = command("generate", "two dogs", "-o", folder / "a.png", *options)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    told = json.loads(done.stdout)
    assert [Path(p["file"]).name for p in told["pictures"]] == ["a-1.png", "a-2.png"]
    assert told["pictures"][0]["seed"] == 3
    assert len(told["previews"]) == 10
    return folder


def test_generate_writes_pictures_and_previews(drawn: Path) -> None:
    last = Image.open(drawn / "p" / "a-1-scale-05.png")
    assert np.array_equal(last, Image.open(drawn / "a-1.png"))
    assert Image.open(drawn / "a-2.png").size == (40, 40)


def test_the_same_seed_gives_the_same_file_alone(drawn: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--seed", "3", "--guidance", "1,3", "--top-k", "20", "-m", str(GOLDEN)]
    assert run(["generate", "two dogs", "-o", str(drawn / "b.png"), *options]) == 0
    assert capsys.readouterr().out == f"{drawn / 'b.png'}\n"
    assert (drawn / "b.png").read_bytes() == (drawn / "a-1.png").read_bytes()


def test_describe(drawn: Path) -> None:
    done = command("describe", drawn / "a-1.png", "-m", GOLDEN, "--max-tokens", 5)
    assert done.returncode == 0 and done.stdout.endswith("\n") and done.stderr == ""
    told = command("describe", drawn / "a-1.png", "-m", GOLDEN, "--max-tokens", 5, "--json")
    said = json.loads(told.stdout)["text"].replace("\r", "\n")  # as text is read from a pipe
    assert said == done.stdout[:-1]


def test_reconstruct_files_and_folders(
    drawn: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert (
        run(
            [
                "reconstruct",
                str(drawn / "a-1.png"),
                str(drawn / "p"),
                "-o",
                str(out),
                "-m",
                str(GOLDEN),
                "--json",
            ]
        )
        == 0
    )
    rows = json.loads(capsys.readouterr().out)["pictures"]
    assert len(rows) == 11 and all(Path(row["out"]).is_file() and 3 < row["psnr"] < 60 for row in rows)
    assert Image.open(out / "side_by_side.png").size == (80, 11 * 40)
    before, after = (
        np.asarray(Image.open(p).convert("RGB"), float) for p in (drawn / "a-1.png", rows[0]["out"])
    )
    assert rows[0]["psnr"] == pytest.approx(10 * np.log10(255**2 / ((before - after) ** 2).mean()), abs=0.01)


@pytest.mark.parametrize("name", ["palette.png", "grey16.png", "cmyk.jpg", "alpha.png", "moving.gif"])
def test_unusual_pictures_are_accepted(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    base = Image.new("RGB", (50, 30), (200, 30, 40))
    made = {
        "palette.png": base.quantize(8),
        "grey16.png": Image.fromarray(np.full((30, 50), 40000, np.uint16)),
        "cmyk.jpg": base.convert("CMYK"),
        "alpha.png": base.convert("RGBA"),
        "moving.gif": base,
    }[name]
    options = {"save_all": True, "append_images": [base.rotate(90)]} if name == "moving.gif" else {}
    made.save(tmp_path / name, **options)
    assert run(["describe", str(tmp_path / name), "-m", str(GOLDEN), "--max-tokens", "3"]) == 0
    assert capsys.readouterr().err == ""


def test_bad_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "short.png").write_bytes(whole[: len(whole) // 2])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0))
    (tmp_path / "bomb.png").write_bytes(
        b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", b"") + chunk(b"IEND", b"")
    )
    for name, reason in (
        ("none.png", "no such file"),
        ("short.png", "truncated"),
        ("bomb.png", "64 megapixels"),
    ):
        status, line = mistake(capsys, "describe", tmp_path / name, "-m", GOLDEN)
        assert status == 1 and name in line and reason in line
        status, line = mistake(capsys, "reconstruct", tmp_path / name, "-o", tmp_path / "o", "-m", GOLDEN)
        assert status == 1 and reason in line


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["generate", " ", "-o", "a.png"], "the prompt is empty"),
        (["generate", "dog " * 400, "-o", "a.png"], "the model's context holds 256"),
        (["generate", "dogs", "-o", "a.png", "--size", "50x41"], "no scale schedule covers 50x41"),
        (["generate", "dogs", "-o", "a.png", "--size", "big"], "--size takes WIDTHxHEIGHT"),
        (["generate", "dogs", "-o", "a.png", "--guidance", "much"], "--guidance takes one value"),
        (["generate", "dogs", "-o", "a.png", "--guidance", "1,2,3"], "guidance takes one value, two"),
        (
            ["generate", "dogs", "-o", "a.png", "--top-p", "2"],
            "top-p is a number above 0 and at most 1, got 2",
        ),
        (["generate", "dogs", "-o", "a.png", "--n", "0"], "Invalid value for '--n'"),
        (["generate", "dogs", "-o", "a.xyz"], "use .png, .jpg or .webp"),
        (["generate", "dogs", "-o", "."], "cannot write '' pictures"),
        (["generate", "dogs"], "Missing option '-o'"),
        (["draw", "dogs"], "No such command 'draw'"),
        (["evaluate", "geneval", "-o", "x"], "unknown suite 'geneval': playground"),
    ],
)
def test_wrong_use(
    arguments: list[str],
    line: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    status, told = mistake(capsys, *arguments, *(["-m", str(GOLDEN)] if arguments[0] == "generate" else []))
    assert status == 2 and line in told
    assert list(tmp_path.iterdir()) == []


def test_bad_models(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, line = mistake(capsys, "generate", "dogs", "-o", tmp_path / "a.png", "-m", "nanoo")
    assert status == 2 and "unknown model 'nanoo': nano," in line
    copy = tmp_path / "model"
    shutil.copytree(GOLDEN, copy)
    weights = copy / "model.safetensors"
    data = bytearray(weights.read_bytes())
    data[999] ^= 1
    weights.write_bytes(bytes(data))
    status, line = mistake(capsys, "generate", "dogs", "-o", tmp_path / "a.png", "-m", copy)
    assert status == 1 and "model.safetensors is damaged" in line
    weights.unlink()
    status, line = mistake(capsys, "generate", "dogs", "-o", tmp_path / "a.png", "-m", copy)
    assert status == 1 and "lacks the file model.safetensors" in line


def test_export_changes_card_and_defaults(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "card.md").write_text("# mine\n")
    out = tmp_path / "new"
    options = ["--card", str(tmp_path / "card.md"), "--set", "guidance=[1, 4]", "--set", "think=true"]
    assert run(["export", str(GOLDEN), "-o", str(out), *options]) == 0
    assert (out / "README.md").read_text() == "# mine\n"
    assert json.loads((out / "generation.json").read_text()) == {
        "guidance": [1, 4],
        "top_p": 0.95,
        "think": True,
    }
    assert (out / "model.safetensors").read_bytes() == (GOLDEN / "model.safetensors").read_bytes()
    assert run(["generate", "a cat", "-o", str(tmp_path / "a.png"), "-m", str(out), "--no-think"]) == 0
    capsys.readouterr()
    for change, told in (
        ("guidence=3", "unknown sampling default 'guidence'; accepted: guidance,"),
        ("top_p=7", "top-p is"),
        ("canvases=[33x40]", "'33x40' is no size of this image tokenizer"),
        ("top_p=[0.9,0.8,0.7]", "top-p takes one value, two"),
    ):
        status, line = mistake(capsys, "export", GOLDEN, "-o", tmp_path / "bad", "--set", change)
        assert status == 2 and told in line
    assert not (tmp_path / "bad").exists()


def test_export_of_a_mean(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    bundle = load_bundle(GOLDEN)
    for value in bundle.model.state_dict().values():
        value.mul_(3.0)
    other = tmp_path / "other"
    save_bundle(other, bundle.model, bundle.image_tokenizer, bundle.vocab.tokenizer, {}, "# other\n")
    out = tmp_path / "mean"
    assert run(["export", str(GOLDEN), "-o", str(out), "--average", str(other)]) == 0
    old, new = (load_bundle(folder).model.state_dict() for folder in (GOLDEN, out))
    assert all(torch.allclose(new[k].float(), 2.0 * old[k].float(), rtol=0.01) for k in old)
    less = tmp_path / "less"
    assert run(["export", str(GOLDEN), "-o", str(less), "--average", str(other), "--share", "0.25"]) == 0
    new = load_bundle(less).model.state_dict()
    assert all(torch.allclose(new[k].float(), 1.5 * old[k].float(), rtol=0.01) for k in old)
    capsys.readouterr()
    for more in (("--share", "0.25"), ("--share", "1", "--average", other)):
        status, line = mistake(capsys, "export", GOLDEN, "-o", tmp_path / "bad", *more)
        assert status == 2 and "a share of the mean is above 0 and below 1 and needs --average" in line
    status, line = mistake(capsys, "export", GOLDEN, "-o", tmp_path / "bad", "--average", "nano")
    assert status == 2 and "nano has another architecture" in line and not (tmp_path / "bad").exists()


def test_bad_recipes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = ROOT / "recipes" / "nano_teacher.yaml"
    for change, line in (
        ("stepz=3", "unknown key 'stepz'; accepted: kind, out, seed, steps"),
        ("optimizer.lrr=3", "unknown key 'optimizer.lrr'; accepted: lr, muon_lr"),
        ("steps=many", "'steps': input should be a valid integer"),
        ("kind=nothing", "'kind' is one of teacher, tokenizer, model, judge"),
        ("data.levels={eazy: 1}", "unknown playground level 'eazy': one of shapes, easy"),
        ("steps", "--set takes KEY=VALUE"),
    ):
        status, told = mistake(capsys, "train", recipe, "--set", change, "--set", f"out={tmp_path / 'run'}")
        assert status == 2 and line in told, told
    model = ROOT / "recipes" / "emoji_full.yaml"
    for change, line in (
        ("sources.0.rovs=3", "unknown key 'sources.0.rovs'; accepted: kind, rows, folders, packing, seed"),
        (
            "sources.0.folders.0.wieght=3",
            "unknown key 'sources.0.folders.0.wieght'; accepted: folder, weight",
        ),
        ("sources.1.packing.mod=pad", "unknown key 'sources.1.packing.mod'; accepted: mode, budget"),
    ):
        status, told = mistake(capsys, "train", model, "--set", change)
        assert status == 2 and line in told, told
    merged = tmp_path / "merged.yaml"
    merged.write_text("a: &A {x: 5}\nb: {c: &B {<<: *A, x: 1}}\nd: {<<: *B, <<: *A, 1: y, '1': z}\n")
    assert load_yaml(merged) == {"a": {"x": 5}, "b": {"c": {"x": 1}}, "d": {"x": 5, 1: "y", "1": "z"}}
    twice = tmp_path / "twice.yaml"
    twice.write_text(model.read_text() + "\nsteps: 9\n")
    status, told = mistake(capsys, "train", twice)
    assert status == 2 and f"{twice}: not valid YAML: the key 'steps' stands twice (line " in told
    status, told = mistake(capsys, "train", model, "--set", "generation.thinc=true")
    assert status == 2 and "generation: unknown sampling default 'thinc'; accepted: guidance" in told
    for change, wrong in (
        ("top_k=-5", "top-k is a whole number of at least 0 (0: all), got -5"),
        ("temperature=hot", "temperature is a number, or a list of them, got 'hot'"),
        ("temperature=[1.0, hot]", "temperature is a number, or a list of them, got [1.0, 'hot']"),
        ("top_p=[]", "top_p is a number, or a list of them, got []"),
        ("guidance=true", "guidance is a number, or a list of them, got True"),
        ("answer_guidance=-1", "answer_guidance: guidance is a number from 0 to 100, got -1"),
        ("thought_temperature=[1.0]", "thought_temperature is a number, got [1.0]"),
        ("think=3", "think is true or false, got 3"),
        ("caption=7", "caption is a text, got 7"),
        ("size=[64x64]", "size is a size in pixels such as 96x64, got ['64x64']"),
        ("size=65x64", "size: '65x64' is no size of this image tokenizer"),
        ("fit=stretch", "fit is crop or pad, got 'stretch'"),
        ("canvases=[64]", "canvases is a list of sizes in pixels such as [64x64, 96x64], got [64]"),
        ("canvases=[64x64, 65x64]", "canvases: '65x64' is no size of this image tokenizer"),
        (
            "top_k=[1, 2, 3]",
            "top-k takes one value, two (first and last scale) or one for each of the 8 scales, got 3",
        ),
    ):
        status, told = mistake(
            capsys, "train", model, "--set", f"generation.{change}", "--set", "image_tokenizer=nano"
        )
        assert status == 2 and f"generation: {wrong}" in told, told
    status, told = mistake(capsys, "train", model, "--set", "steps=[1,")
    assert status == 2 and "--set steps=[1,: the value is not valid YAML" in told
    status, told = mistake(capsys, "train", model, "--set", "sources.0.kind=shard")
    assert status == 2 and "'sources.0.kind' is one of playground, shards, episodes, got 'shard'" in told
    status, told = mistake(capsys, "train", tmp_path / "none.yaml")
    assert status == 2 and "No such file" in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["nano_teacher", "nano_judge", "world_judge"])
def test_what_one_process_trains_is_not_for_torchrun(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Every process would train by itself, and write into the same folder."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    for trains in ("training.teacher.train_teacher", "app.stages._judge", "app.world_command.train_judge_of"):
        monkeypatch.setattr(f"nextflow_ar.{trains}", lambda *_: pytest.fail("it trains"))
    path, out = ROOT / "recipes" / f"{name}.yaml", tmp_path / "run"
    status, line = mistake(capsys, "train", path, "--set", f"out={out}")
    kind = load_yaml(path)["kind"]
    assert status == 2 and not out.exists()
    assert line == f"{path}: a {kind} is trained by one process, not by 2: start it without torchrun"


def test_every_recipe_passes_its_checks() -> None:
    kinds = {"model": ModelRecipe, "teacher": TeacherRecipe, "tokenizer": TokenizerRecipe}
    seen = set()
    for path in sorted((ROOT / "recipes").glob("*.yaml")):
        values = load_yaml(path)
        if values.get("kind") not in kinds:  # judges, the bench
            continue
        recipe = from_dict(kinds[values["kind"]], values, path.name)
        assert from_dict(type(recipe), to_dict(recipe), path.name) == recipe
        if not isinstance(recipe, TeacherRecipe):
            recipe.check()
        if isinstance(recipe, ModelRecipe):
            _known_defaults(recipe.generation, path.name)
        seen.add(values["kind"])
    assert seen == set(kinds)
    for path in (ROOT / "src").rglob("generation.json"):
        _known_defaults(json.loads(path.read_text()), path.name)


def test_unforeseen_errors_are_one_line_unless_debug(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object) -> None:
        raise KeyError("surprise")

    monkeypatch.setattr("nextflow_ar.app.cli._load", broken)
    status, line = mistake(capsys, "generate", "dogs", "-o", "a.png")
    assert status == 1 and line == "KeyError: 'surprise' (--debug shows where)"
    with pytest.raises(KeyError):
        run(["--debug", "generate", "dogs", "-o", "a.png"])


def test_help_and_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["--version"]) == 0
    assert capsys.readouterr().out.strip() == "0.1.0"
    assert run(["generate", "--help"]) == 0
    assert "--guidance" in capsys.readouterr().out
    commands = [[c.name or c.callback.__name__] for c in app.registered_commands if c.callback]
    for group in app.registered_groups:
        assert group.typer_instance is not None and group.name
        commands += [
            [group.name, c.name or c.callback.__name__]
            for c in group.typer_instance.registered_commands
            if c.callback
        ]
    assert ["extract"] in commands and ["data", "check"] in commands and len(commands) > 15
    for command in commands:
        assert run([*[name.replace("_", "-") for name in command], "--help"]) == 0, command
        assert "--help" in capsys.readouterr().out
