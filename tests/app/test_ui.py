"""The page's work without a browser: what each tab shows step by step, against the pipeline's own results."""

from __future__ import annotations

import base64
import io
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.app import ui_command
from nextflow_ar.app.cli import run
from nextflow_ar.app.ui import build_page, launch_options, mount_page
from nextflow_ar.app.ui.chat import bubble, chat_steps, without_last
from nextflow_ar.app.ui.describe import described
from nextflow_ar.app.ui.draw import draw_steps
from nextflow_ar.app.ui.edit import BY_WORDS, VARY, _options, edit_steps, original, painted
from nextflow_ar.app.ui.history import MOST_KEPT, History, Kept
from nextflow_ar.app.ui.settings import THINKING, as_size, chosen, next_seed, size_input, sizes
from nextflow_ar.app.ui.showing import Figure, Telling, data_uri, enlarged, file_name, planned, stage, status
from nextflow_ar.app.ui.telling import film_steps, frames_that_fit, story_steps
from nextflow_ar.app.ui.work import Stopped, Work, line_for
from nextflow_ar.generation.pipeline import NextFlowPipeline, RequestError, fold_seed
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.types import Done, Planned, ScaleReady, TextDelta

HOT = (2.0, 8.0, 0, 0.95)
SETTINGS = SamplingSettings(guidance=2.0, temperature=8.0, top_p=0.95)
NO = next(label for label, value in THINKING.items() if value is False)


@pytest.fixture
def history(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> History:
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    return History()


def addresses(page: Any) -> list[str]:
    return re.findall(r'src="(data:image/[^"]+)"', page)


def pixels(address: str) -> np.ndarray:
    return np.asarray(PILImage.open(io.BytesIO(base64.b64decode(address.partition(",")[2]))).convert("RGB"))


def big(page: Any) -> list[np.ndarray]:
    return [pixels(a) for a in re.findall(r'class="nf-big" src="([^"]+)"', page)]


def text_of(shown: Any) -> str:
    return re.sub(r"<[^>]+>", "", shown)


def test_drawing_sharpens_and_ends_as_the_pipelines_pictures(
    pipeline: NextFlowPipeline, history: History
) -> None:
    shown = list(draw_steps(pipeline, history, [], "two dogs", 2, "40x40", 7, False, NO, True, *HOT))
    assert shown[0][2] == 7 and "Drawing" in text_of(shown[0][1])
    grown = [str(step[0]).count('<button type="button" class="nf-step"') for step in shown]
    assert grown == sorted(grown) and grown[0] == 0 and grown[-1] == 2 * 5
    last = shown[-1]
    wanted = pipeline.generate("two dogs", n=2, seed=7, settings=SETTINGS, think=False)
    assert all(np.array_equal(a, b) for a, b in zip(big(last[0]), wanted, strict=True))
    assert len(addresses(last[0])) == 2 * (1 + 5)
    assert 'alt="Picture 2: two dogs"' in last[0] and last[0].count("download=") == 2
    assert re.fullmatch(r"Done: 2 pictures in \d+\.\d s, seed 7\.", text_of(last[1]))
    kept: list[Kept] = last[3]  # type: ignore[assignment]
    assert [k.seed for k in kept] == [7, fold_seed(7, 1)]
    assert all(np.array_equal(k.open(), w) for k, w in zip(kept, wanted, strict=True))
    assert PILImage.open(kept[0].path).info["Comment"] == "drawn, seed 7"


def test_without_steps_only_the_picture_is_shown(pipeline: NextFlowPipeline, history: History) -> None:
    last = list(draw_steps(pipeline, history, [], "two dogs", 1, "24x24", 7, False, NO, False, *HOT))[-1]
    assert len(addresses(last[0])) == 1 and big(last[0])[0].shape == (24, 24, 3)


def test_a_plan_is_shown(pipeline: NextFlowPipeline, history: History) -> None:
    last = list(draw_steps(pipeline, history, [], "a cat", 1, "40x40", 1, False, "Yes", True, *HOT))[-1]
    thought: list[str] = []
    pipeline.generate("a cat", seed=1, settings=SETTINGS, think=True,
                      on_event=lambda e: thought.append(e.text) if hasattr(e, "text") else None)  # fmt: skip
    plan = "".join(thought).strip()
    assert ("Plan: " in last[0]) == bool(plan)


def test_a_telling_has_its_plans_below_the_pictures() -> None:
    telling = Telling("a story", None)
    scale = ScaleReady(0, 0, 2, torch.zeros(1, dtype=torch.long))
    telling.take([TextDelta(0, "a dog."), Planned(0, "plan: a dog left"), scale])
    shown = telling.html()
    assert shown.count("a dog left") == 1 and "Plan: a dog left" in shown and "plan: " not in shown
    assert (
        planned(" ") == ""
        and planned("four minus one is three. plan: b") == "Plan: four minus one is three. plan: b"
    )


@pytest.mark.parametrize(
    ("prompt", "size", "sampling", "message"),
    [
        (" ", "40x40", HOT, "the prompt is empty"),
        ("a cat", "50x41", HOT, "no scale schedule covers 50x41"),
        ("a cat", "40x40", (2.0, -1.0, 0, 0.9), "temperature is a number from 0 to 100"),
        ("a cat " * 200, "40x40", HOT, "the model's context holds 256"),
    ],
)
def test_mistakes_are_one_line_on_the_page(
    pipeline: NextFlowPipeline,
    history: History,
    prompt: str,
    size: str,
    sampling: tuple[float, ...],
    message: str,
) -> None:
    last = list(draw_steps(pipeline, history, [], prompt, 1, size, 1, False, NO, True, *sampling))[-1]
    assert message in text_of(last[1]).replace("&#x27;", "'") and "nf-failed" in str(last[1])
    assert "\n" not in str(last[1])


def test_what_a_visitor_writes_is_never_markup(pipeline: NextFlowPipeline, history: History) -> None:
    evil = '<img src=x onerror="alert(1)">'
    last = list(draw_steps(pipeline, history, [], evil, 1, "24x24", 1, False, NO, True, *HOT))[-1]
    assert "<img src=x" not in last[0] and "&lt;img src=x" in last[0]
    assert "<img" not in bubble("user", evil)["content"]
    assert "<img" not in status(evil)
    assert file_name("../../a <b>/c", 3) == "nextflow-a-b-c-3.png"


def test_settings(pipeline: NextFlowPipeline, bundle: Bundle) -> None:
    assert chosen(pipeline, 2.0, 1.0, 0, 0.95) == pipeline.defaults
    assert chosen(pipeline, 3.0, 1.0, 5, 0.95) == SamplingSettings(guidance=3.0, top_k=5.0, top_p=0.95)
    sloped = NextFlowPipeline(
        Bundle(bundle.model, bundle.image_tokenizer, bundle.vocab, {"guidance": [4.0, 1.0]})
    )
    assert chosen(sloped, 4.0, 1.0, 0, 1.0).guidance == (4.0, 1.0)  # the slider was not moved
    assert chosen(sloped, 2.5, 1.0, 0, 1.0).guidance == 2.5
    offered = [size for _, size in sizes(pipeline)]
    assert offered == ["24x56", "32x48", "40x40", "48x32", "56x24", "32x32"]
    assert all(pipeline.schedule_for(as_size(size)) for size in offered)
    assert next_seed(5, False) == 5 and len({next_seed(5, True) for _ in range(20)}) > 15
    named = NextFlowPipeline(
        Bundle(bundle.model, bundle.image_tokenizer, bundle.vocab, {"canvases": ["32x16"]})
    )
    assert [size for _, size in sizes(named)] == ["40x40", "32x16", "32x32"]
    small = NextFlowPipeline(Bundle(bundle.model, bundle.image_tokenizer, bundle.vocab, {"size": "24x24"}))
    assert size_input(small).value == "24x24" and size_input(pipeline).value == "40x40"
    with gr.Blocks():
        options, _ = _options(small)
    (keep,) = [one for one in options if isinstance(one, gr.Slider) and "keep" in str(one.label)]
    assert keep.maximum == len(small.schedule_for()) - 1 < len(pipeline.schedule_for()) - 1


def picture(seed: int = 0, side: int = 40) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (side, side, 3), np.uint8))


def editor(paint: tuple[int, int, int, int] | None) -> dict[str, Any]:
    """What the editor sends: an enlarged picture off by a shade here and there, and a layer with strokes."""
    large = np.asarray(enlarged(picture()), np.int16)
    noise = (np.random.default_rng(1).random(large.shape) < 0.1).astype(np.int16)
    background = PILImage.fromarray((large + noise).clip(0, 255).astype(np.uint8))
    layer = np.zeros((*large.shape[:2], 4), np.uint8)
    if paint is not None:
        left, top, right, bottom = paint
        layer[top:bottom, left:right] = (255, 45, 135, 178)
    return {"background": background, "layers": [PILImage.fromarray(layer)], "composite": background}


def test_strokes_become_the_mask_of_the_small_picture() -> None:
    large = enlarged(picture())
    assert large.size == (480, 480) and np.array_equal(original(large), picture())
    photo = picture(3, 100)
    assert original(photo) is photo
    small, mask = painted(editor((12, 24, 121, 48)), None)
    assert np.abs(np.asarray(small, int) - np.asarray(picture(), int)).max() <= 1
    assert mask is not None and mask.shape == (40, 40)
    wanted = np.zeros((40, 40), bool)
    wanted[2:4, 1:11] = True  # one pixel of the eleventh cell is painted
    assert np.array_equal(mask, wanted)
    assert painted(editor(None), None)[1] is None
    _, by_hand = painted(editor(None), (0, 50, 25, 100))
    assert by_hand is not None and by_hand[20:, :10].all() and by_hand.sum() == 200
    with pytest.raises(RequestError, match="choose a picture first"):
        painted(None, None)


def edited(pipeline: NextFlowPipeline, history: History, value: Any, how: str, words: str) -> list[list[Any]]:
    steps = edit_steps(pipeline, history, [], value, words, how, 2, False, 0, 0, 1, 1, 1, 3, False, *HOT)
    return list(steps)


def test_editing_is_the_pipelines(pipeline: NextFlowPipeline, history: History) -> None:
    value = editor((0, 0, 240, 480))
    small, mask = painted(value, None)
    assert mask is not None
    calls = {
        "redrawn": (value, BY_WORDS, lambda: pipeline.inpaint(small, mask, "a cat", seed=3, settings=SETTINGS)),
        "edited": (editor(None), BY_WORDS, lambda: pipeline.edit(small, "a cat", seed=3, settings=SETTINGS)),
        "varied": (
            value, VARY, lambda: pipeline.variations(small, from_scale=3, prompt="a cat", seed=3, settings=SETTINGS),
        ),
    }  # fmt: skip
    for title, (given, how, call) in calls.items():
        last = edited(pipeline, history, given, how, "a cat")[-1]
        assert text_of(last[1]).startswith(f"Done: {title} in")
        assert np.array_equal(big(last[0])[0], call()[0])
        assert 'alt="Before"' in last[0] and '<input type="range"' in last[0]
        assert last[3][0].kind == title
    assert "nf-failed" in edited(pipeline, history, editor(None), BY_WORDS, "")[-1][1]
    assert "choose a picture first" in edited(pipeline, history, None, BY_WORDS, "a cat")[-1][1]


def talk(pipeline: NextFlowPipeline, history: History, turns: list[Any], said: Any) -> list[list[Any]]:
    return list(chat_steps(pipeline, history, [], turns, said, 12, 1, 4, False, *HOT))


def test_chat(pipeline: NextFlowPipeline, history: History, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(5).save(path)
    shown = talk(pipeline, history, [], {"text": "two dogs", "files": [str(path)]})
    turns = shown[-1][2]
    asked = [{"role": "user", "content": [picture(5), "two dogs"]}]
    wanted = pipeline.chat(asked, max_tokens=12, max_pictures=1, seed=4, settings=SETTINGS)
    got = turns[-1]["content"] if len(turns) == 2 else []
    assert [type(a) for a in got] == [type(a) for a in wanted]
    assert all(
        a == b if isinstance(a, str) else np.array_equal(a, b) for a, b in zip(got, wanted, strict=True)
    )
    assert np.array_equal(turns[0]["content"][0], picture(5)) and turns[0]["content"][1] == "two dogs"
    assert 'alt="Your picture"' in shown[0][0][0]["content"]
    again = talk(pipeline, history, turns, {"text": "a cat", "files": []})[-1][2]
    assert again[: len(turns)] == turns and len(again) > len(turns)
    _, left, told = without_last(again)
    assert left == turns and "back" in told
    assert "say something" in talk(pipeline, history, turns, {"text": " ", "files": []})[-1][3]
    path.write_bytes(b"no picture")
    broken = talk(pipeline, history, turns, {"text": "", "files": [str(path)]})[-1]
    assert "not a picture" in broken[3] and isinstance(broken[2], dict)  # the conversation stays as it was


def test_stories_and_films(pipeline: NextFlowPipeline, history: History, tmp_path: Path) -> None:
    small = {"size": (24, 24), "settings": SETTINGS}
    last = list(story_steps(pipeline, history, [], "a cat", 2, "24x24", 3, False, *HOT))[-1]
    told = pipeline.story("a cat", max_pictures=2, seed=3, **small)  # type: ignore[arg-type]
    drawn = [one for one in told if isinstance(one, PILImage.Image)]
    assert len(big(last[0])) == len(drawn)
    assert all(np.array_equal(a, b) for a, b in zip(big(last[0]), drawn, strict=True))
    assert f"Done: {len(drawn)} picture" in last[1]
    path = tmp_path / "first.png"
    picture(2, 24).save(path)
    film = list(film_steps(pipeline, history, [], "", str(path), 3, 4, "24x24", 3, False, *HOT))[-1]
    frames = pipeline.video("", first=pipeline.encode(picture(2, 24)), frames=3, seed=3, settings=SETTINGS)
    strip = [pixels(a) for a in re.findall(r'title="frame \d of 3"><img src="([^"]+)"', film[0])]
    assert len(strip) == 3 and all(np.array_equal(a, b) for a, b in zip(strip, frames, strict=True))
    gif = re.search(
        r'download="nextflow-what-comes-next-1.gif" href="data:image/gif;base64,([^"]+)"', film[0]
    )
    assert gif is not None
    file = PILImage.open(io.BytesIO(base64.b64decode(gif[1])))
    assert file.n_frames == 3 and file.info["duration"] == 250  # type: ignore[attr-defined]
    empty = list(film_steps(pipeline, history, [], "", None, 3, 4, "24x24", 3, False, *HOT))[-1]
    assert "the prompt is empty" in empty[1]
    assert 2 <= frames_that_fit(pipeline) <= 5


def test_describing(pipeline: NextFlowPipeline, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    picture(1).save(path)
    answer, said = described(pipeline, str(path), "two dogs?", 8)
    wanted = pipeline.describe(picture(1), question="two dogs?", max_tokens=8)[0]
    assert text_of(str(answer)) == __import__("html").escape(wanted) and bool(said) == (not wanted)
    assert "Choose a picture" in described(pipeline, None, "", 8)[1]
    path.write_bytes(b"x")
    assert "not a picture" in described(pipeline, str(path), "", 8)[1]


def test_history_is_bounded(history: History) -> None:
    kept: Any = []
    for n in range(MOST_KEPT + 3):
        kept = history.added(kept, [picture(n, 8)], f"p{n}", [n], "drawn")[0]
    assert len(kept) == MOST_KEPT and kept[0].seed == MOST_KEPT + 2
    assert kept[0].caption == f"p{MOST_KEPT + 2} (seed {MOST_KEPT + 2})"


def test_leaving_early_stops_the_work() -> None:
    made, ended = [], threading.Event()

    def call(follow: Any) -> int:
        try:
            for number in range(10_000):
                made.append(number)
                follow(Done(0, "stop"))
                time.sleep(0.001)
        except Stopped:
            ended.set()
            raise
        return 1

    def watch() -> Iterator[int]:
        with Work(call) as work:
            for events in work:
                yield len(events)

    steps = watch()
    assert next(steps) >= 1
    steps.close()  # as gradio does when Stop is pressed or the visitor goes
    assert ended.wait(5) and len(made) < 9_000


def test_work_hands_on_results_and_errors() -> None:
    with Work(lambda follow: [follow(Done(0, "stop")), 5][1]) as work:
        assert sum(len(events) for events in work) == 1
        assert work.result == 5

    def fail(_: Any) -> None:
        raise RequestError("no\nway")

    with pytest.raises(RequestError), Work(fail) as broken:
        list(broken)
    assert line_for(RequestError("no\nway")) == "no way"
    assert line_for(RequestError("/tmp/gradio/ab12/my.png: no picture; 16/9 or ME/NAME")) == (
        "my.png: no picture; 16/9 or ME/NAME"
    )
    assert line_for(KeyError("x")) == "KeyError: 'x'"


def test_large_pictures_are_shown_smaller_while_they_grow() -> None:
    large = PILImage.new("RGB", (1024, 512), "red")
    address = data_uri(large, 512)
    assert address.startswith("data:image/webp") and pixels(address).shape == (256, 512, 3)
    assert pixels(data_uri(large)).shape == (512, 1024, 3)
    waiting = stage([Figure("a")])
    assert "<progress" in waiting and "nf-wait" in waiting and "download" not in waiting


def test_every_setting_has_a_sentence_of_help(pipeline: NextFlowPipeline) -> None:
    page = build_page(pipeline)
    kinds = (gr.Slider, gr.Number, gr.Checkbox, gr.Radio, gr.Dropdown, gr.Textbox)
    found = [block for block in page.blocks.values() if isinstance(block, kinds)]
    assert len(found) > 40
    for block in found:
        assert block.label and block.info and block.info.endswith("."), block.label


def test_it_is_mounted_and_served(pipeline: NextFlowPipeline) -> None:
    fastapi = pytest.importorskip("fastapi")
    testing = pytest.importorskip("fastapi.testclient")
    app = mount_page(fastapi.FastAPI(), pipeline, "/ui", name="<tiny>")
    with testing.TestClient(app) as client:
        page = client.get("/ui/")
        assert page.status_code == 200 and "NextFlow-AR" in page.text
        assert "&lt;tiny&gt;" in page.text.replace("\\u0026", "&")
        assert "fonts.googleapis" not in page.text and "google" not in client.get("/ui/theme.css").text
    assert launch_options()["max_file_size"] == "20mb"


def test_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], bundle: Bundle
) -> None:
    monkeypatch.setattr(NextFlowPipeline, "from_pretrained", lambda *_, **__: NextFlowPipeline(bundle))
    told: dict[str, Any] = {}
    monkeypatch.setattr(gr.Blocks, "launch", lambda self, **options: told.update(options))
    assert run(["ui", "--port", "7999"]) == 0
    assert told["server_port"] == 7999 and told["server_name"] == "127.0.0.1" and told["css"]
    assert "open http://127.0.0.1:7999" in capsys.readouterr().err

    def busy(self: Any, **_: Any) -> None:
        raise OSError("Cannot find empty port\nin range")

    monkeypatch.setattr(gr.Blocks, "launch", busy)
    assert run(["ui"]) == 1
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("nextflow-ar: cannot listen on 127.0.0.1:7860: Cannot find empty port in range")
    monkeypatch.setattr(ui_command.importlib.util, "find_spec", lambda name: None)
    assert run(["ui"]) == 1
    assert capsys.readouterr().err == "nextflow-ar: the page needs gradio: pip install 'nextflow-ar[ui]'\n"


def test_scales_are_named_for_screen_readers(pipeline: NextFlowPipeline, history: History) -> None:
    events: list[Any] = []
    pipeline.generate("a cat", settings=SETTINGS, think=False, on_event=events.append)
    last = list(draw_steps(pipeline, history, [], "a cat", 1, "40x40", 0, False, NO, True, *HOT))[-1]
    scales = sum(isinstance(e, ScaleReady) for e in events)
    labels = re.findall(
        r'class="nf-step" aria-pressed="(true|false)" aria-label="after scale (\d) of 5"', last[0]
    )
    assert labels == [("true" if k == scales else "false", str(k)) for k in range(1, scales + 1)]
