"""edit, inpaint, variations, story, video and chat as commands: files, JSON, seeds, one line for every mistake."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from nextflow_ar.app import chat_command
from nextflow_ar.app.cli import run
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import save_bundle
from nextflow_ar.types import ImageReady, TextDelta
from tests.conftest import TINY_MODEL, tiny_bundle


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny checkpoint in dialogue form, and a picture and a mask beside it."""
    folder = tmp_path_factory.mktemp("commands")
    made = tiny_bundle(replace(TINY_MODEL, max_positions=2048))
    generation = {"guidance": 2.0, "temperature": 8.0, "dialogue": True, "caption": "what is it?"}
    save_bundle(
        folder / "model", made.model, made.image_tokenizer, made.vocab.tokenizer, generation, "# tiny\n"
    )
    pixels = np.random.default_rng(0).integers(0, 255, (5, 5, 3), np.uint8)
    Image.fromarray(pixels).resize((40, 40)).save(folder / "a.png")
    mask = Image.new("L", (40, 40))
    mask.paste(255, (8, 8, 24, 24))
    mask.save(folder / "mask.png")
    return folder / "model"


def told(capsys: pytest.CaptureFixture[str], model: Path, *arguments: object) -> str:
    """What a command prints that succeeds."""
    status = run([*map(str, arguments), "-m", str(model)])
    out, err = capsys.readouterr()
    assert status == 0 and err == "", err
    return out


def pixels(path: Path | str) -> np.ndarray:
    return np.asarray(Image.open(path).convert("RGB"))


def test_edit(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = model.parent / "a.png", tmp_path / "e.png"
    found = told(capsys, model, "edit", given, "make it green", "-o", out, "--n", 2, "--seed", 3)
    assert found == f"{tmp_path / 'e-1.png'}\n{tmp_path / 'e-2.png'}\n"
    pipeline = NextFlowPipeline.from_pretrained(model)
    same = pipeline.edit(Image.open(given), "make it green", n=2, seed=3)
    assert np.array_equal(same[1], pixels(tmp_path / "e-2.png"))
    pairs = ("--before", given, "--after", tmp_path / "e-1.png")
    answer = json.loads(
        told(capsys, model, "edit", given, "now this", "-o", out, *pairs, "--think", "--json", "--top-k", 3)
    )
    assert answer["pictures"] == [str(out)] and len(answer["thoughts"]) == 1 and answer["thoughts"][0]


def test_inpaint(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = model.parent / "a.png", tmp_path / "i.png"
    assert (
        told(capsys, model, "inpaint", given, model.parent / "mask.png", "two dogs", "-o", out) == f"{out}\n"
    )
    own = np.asarray(NextFlowPipeline.from_pretrained(model).reconstruct(Image.open(given)))
    mask = pixels(model.parent / "mask.png")[..., 0] > 0
    assert np.array_equal(pixels(out)[~mask], own[~mask]) and (pixels(out)[mask] != own[mask]).any()
    answer = json.loads(
        told(capsys, model, "inpaint", given, model.parent / "mask.png", "-o", out, "--json", "-n", 2)
    )
    assert answer["prompt"] == "" and len(answer["pictures"]) == 2


def test_variations(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given, out = model.parent / "a.png", tmp_path / "v.png"
    found = told(capsys, model, "variations", given, "--from-scale", 5, "-n", 3, "-o", out).split()
    assert found == [str(tmp_path / f"v-{i}.png") for i in (1, 2, 3)]
    again = NextFlowPipeline.from_pretrained(model).variations(Image.open(given), from_scale=5, n=3)
    assert all(np.array_equal(pixels(name), one) for name, one in zip(found, again, strict=True))


def test_describe_asks_the_checkpoints_own_question(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = model.parent / "a.png"
    unasked = told(capsys, model, "describe", given, "--max-tokens", 8)
    assert unasked == told(capsys, model, "describe", given, "-q", "what is it?", "--max-tokens", 8)


def test_generate_in_dialogue_with_thoughts_and_sizes(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "g.png"
    answer = json.loads(
        told(capsys, model, "generate", "two dogs", "-o", out, "--think", "--json", "--size", "24x24")
    )
    assert answer["pictures"][0]["thought"] and Image.open(out).size == (24, 24)
    plain = json.loads(told(capsys, model, "generate", "two dogs", "-o", out, "--no-think", "--json"))
    assert "thought" not in plain["pictures"][0] and Image.open(out).size == (40, 40)


def test_story(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = NextFlowPipeline.from_pretrained(model).reconstruct(Image.open(model.parent / "a.png"))
    given: dict[str, object] = {}

    def written(_: object, prompt: str, **options: object) -> list[object]:
        given.update(options, prompt=prompt)
        return ["a <cat> sits.", drawn, "it goes.", drawn]

    monkeypatch.setattr(NextFlowPipeline, "story", written)  # a random model seldom begins a picture
    out = tmp_path / "new" / "s"
    found = told(capsys, model, "story", "a cat & a dog", "-o", out, "--images", 2, "--seed", 5)
    assert found.splitlines() == [
        "a <cat> sits.",
        str(out / "1.png"),
        "it goes.",
        str(out / "2.png"),
        str(out / "index.html"),
    ]
    assert given["max_pictures"] == 2 and given["seed"] == 5 and given["prompt"] == "a cat & a dog"
    assert (out / "story.txt").read_text() == "a <cat> sits.\n[1.png]\nit goes.\n[2.png]\n"
    page = (out / "index.html").read_text()
    assert "<h1>a cat &amp; a dog</h1>" in page and '<p>a &lt;cat&gt; sits.</p><img src="1.png"' in page
    assert np.array_equal(pixels(out / "2.png"), drawn)
    answer = json.loads(told(capsys, model, "story", "a cat", "-o", out, "--json"))
    assert [next(iter(one)) for one in answer["parts"]] == ["text", "picture"] * 2
    monkeypatch.undo()
    assert told(capsys, model, "story", "a cat", "-o", tmp_path / "t", "--images", 1).endswith("index.html\n")


def test_video(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    given = model.parent / "a.png"
    for name in ("v.gif", "v.webp", "v.png"):
        out = tmp_path / name
        assert told(capsys, model, "video", "two dogs", "-o", out, "--frames", 3, "--rate", 4) == f"{out}\n"
        with Image.open(out) as film:
            assert film.n_frames == 3 and film.size == (40, 40)
            film.seek(1)
            film.load()
            assert film.info["duration"] == 250
    frames = NextFlowPipeline.from_pretrained(model).video("two dogs", frames=3)
    with Image.open(tmp_path / "v.webp") as film:
        film.seek(2)
        assert np.array_equal(np.asarray(film.convert("RGB")), frames[2])  # without loss
    out = tmp_path / "on.webp"
    answer = json.loads(
        told(capsys, model, "video", "--first", given, "--first", given, "-o", out, "--frames", 4, "--json")
    )
    assert answer["frames"] == 4
    with Image.open(out) as film:
        own = NextFlowPipeline.from_pretrained(model).reconstruct(Image.open(given))
        assert film.n_frames >= 3 and np.array_equal(np.asarray(film.convert("RGB")), own)


def test_chat_through_a_pipe(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = [
        "hello",
        "",
        "/image none.png",
        "/foo",
        f"/image {model.parent / 'a.png'}",
        "what is it?",
        "/quit",
        "no",
    ]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
    status = run(["chat", "-o", str(tmp_path / "c"), "-m", str(model), "--max-tokens", "6"])
    out, err = capsys.readouterr()
    assert status == 0 and ">" not in out.split("\n")[0][:1]
    assert err == "none.png: no such file\nunknown command /foo: /image PATH, /new, /help or /quit\n"


def test_a_talk_keeps_what_was_said_and_drawn(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline = NextFlowPipeline.from_pretrained(model)
    codes = pipeline.encode(Image.open(model.parent / "a.png"))
    asked: list[list[dict[str, object]]] = []

    def answered(messages: list[dict[str, object]], **options: object) -> list[object]:
        asked.append([*messages])
        hear = options["on_event"]
        assert callable(hear)
        if messages[-1]["content"] == ["stop"]:
            hear(TextDelta(0, "wai"))
            raise KeyboardInterrupt
        for event in (
            TextDelta(0, "two "),
            TextDelta(0, "dogs"),
            ImageReady(0, codes, pipeline.decode(codes)),
        ):
            hear(event)
        return []

    monkeypatch.setattr(pipeline, "chat", answered)
    shown: list[str] = []

    def tell(text: str, nl: bool = True, err: bool = False) -> None:
        shown.append(("! " if err else "") + text + ("\n" if nl else ""))

    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "041.png").write_bytes(b"")  # of an earlier conversation
    talk = chat_command.Talk(pipeline, tmp_path / "c", pipeline.defaults, None, 9, 2, 0, tell)
    assert talk.hear(f"/image {model.parent / 'a.png'}") and talk.hear("what is it?")
    assert "".join(shown) == f"two dogs\n{tmp_path / 'c' / '042.png'}\n"
    assert np.array_equal(pixels(tmp_path / "c" / "042.png"), pipeline.decode(codes))
    assert talk.hear("stop") and "forgotten" in shown[-1] and len(talk.messages) == 2
    assert talk.hear("and now?")
    first, second = asked[0], asked[2]
    assert [type(one).__name__ for one in first[0]["content"]] == ["Codes", "str"]  # type: ignore[union-attr]
    assert second[1] == {"role": "assistant", "content": ["two dogs", codes]} and len(second) == 3
    assert talk.hear("/new") and not talk.messages and not talk.hear("/quit")
    assert talk.hear("/help") and "/image PATH" in shown[-1]
    assert talk.hear("/image") and shown[-1] == "! /image takes the path of a picture\n"


@pytest.mark.parametrize(
    ("arguments", "status", "line"),
    [
        (["edit", "A", " ", "-o", "x.png"], 2, "the instruction is empty"),
        (["edit", "none.png", "green", "-o", "x.png"], 1, "none.png: no such file"),
        (["edit", "A", "green", "-o", "x.txt"], 2, "use .png, .jpg or .webp"),
        (["edit", "A", "green", "-o", "x.png", "--before", "A"], 2, "come in pairs"),
        (["edit", "A", "green", "-o", "x.png", "--guidance", "1,2,3"], 2, "guidance takes one value, two"),
        (["inpaint", "A", "S", "dogs", "-o", "x.png"], 2, "the mask is 8x8 pixels, the picture 40x40"),
        (["inpaint", "A", "B", "dogs", "-o", "x.png"], 2, "the mask marks nothing"),
        (["variations", "A", "-k", "6", "-o", "x.png"], 2, "from-scale is 1 to 5 for this picture, got 6"),
        (["variations", "A", "-k", "0", "-o", "x.png"], 2, "Invalid value for '--from-scale'"),
        (["story", " ", "-o", "s"], 2, "say what to tell"),
        (["story", "dogs", "-o", "A"], 2, "is a file; name a folder"),
        (["story", "dogs", "-o", "s", "--images", "60"], 2, "the model's context holds 2048"),
        (["video", "dogs", "-o", "v.mp4"], 2, "use .gif, .webp or .png"),
        (["video", "-o", "v.gif"], 2, "say what moves"),
        (["video", "-o", "v.gif", "--first", "A", "--frames", "1"], 2, "leaves nothing to draw"),
        (["video", "-o", "v.gif", "--first", "A", "--size", "40x40"], 2, "--size is for videos from words"),
        (["video", "dogs", "-o", "v.gif", "--size", "50x41"], 2, "no scale schedule covers 50x41"),
        (["chat", "-o", "A"], 2, "is a file; name a folder"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(
    arguments: list[str], status: int, line: str, model: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    Image.new("RGB", (40, 40)).save(tmp_path / "black.png")
    before = set(tmp_path.iterdir())
    names = {"A": str(model.parent / "a.png"), "S": "small.png", "B": "black.png"}
    assert run([*(names.get(a, a) for a in arguments), "-m", str(model)]) == status
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("nextflow-ar: ") and err.count("\n") == 1 and line in err, err
    assert set(tmp_path.iterdir()) == before


def test_python_m(model: Path, tmp_path: Path) -> None:
    arguments = [
        "edit",
        str(model.parent / "a.png"),
        "green",
        "-o",
        str(tmp_path / "e.png"),
        "-m",
        str(model),
    ]
    done = subprocess.run([sys.executable, "-m", "nextflow_ar", *arguments], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{tmp_path / 'e.png'}\n", "")
    wrong = subprocess.run([sys.executable, "-m", "nextflow_ar", "edit"], capture_output=True, text=True)
    assert wrong.returncode == 2 and wrong.stderr.startswith("nextflow-ar: Missing argument")
