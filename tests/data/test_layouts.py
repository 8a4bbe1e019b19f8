"""Layouts of public data sets as rows: dialogues, edits, interleaved pages, COCO; and what is wrong with one, and where."""

from __future__ import annotations

import base64
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from nextflow_ar.app.cli import run
from nextflow_ar.data.rows import Row, RowError, TextPart, parse_row
from nextflow_ar.data.sources import SourceError, open_source
from nextflow_ar.tokenizer.pictures import PictureError

GOLDEN = Path(__file__).parents[1] / "golden" / "bundle"


def png(size: tuple[int, int] = (20, 20)) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", size, "red").save(buffer, "PNG")
    return buffer.getvalue()


def told(row: Row) -> list[tuple[str, str, bool]]:
    return [
        (
            p.text if isinstance(p, TextPart) else f"<{p.picture.name.rpartition(': ')[2]}>",
            p.role,
            p.supervised,
        )
        for p in row.parts
    ]


def given(text: str, role: str = "user") -> tuple[str, str, bool]:
    return text, role, False


def learned(text: str) -> tuple[str, str, bool]:
    return text, "assistant", True


def turn(text: Any, role: str = "human") -> dict[str, Any]:
    return {"from": role, "value": text}


EDIT = [given("<a.png>"), given("make it red"), learned("<b.png>")]
LAYOUTS: list[tuple[dict[str, Any], list[tuple[str, str, bool]]]] = [
    (
        {"id": "1", "image": "a.png", "conversations": [
            {"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A dog."},
            {"from": "human", "value": "Sure?"}, {"from": "gpt", "value": "Yes."}]},
        [given("<a.png>"), given("What is it?"), learned("A dog."), given("Sure?"), learned("Yes.")],
    ),
    (
        {"images": ["a.png", "b.png"], "messages": [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": "first <image> then <image>?"}, {"role": "assistant", "content": "both"}]},
        [given("be brief", "system"), given("first"), given("<a.png>"), given("then"), given("<b.png>"), given("?"),
         learned("both")],
    ),
    (
        {"images": ["a.png"], "messages": [
            {"role": "user", "content": [{"type": "image", "text": None}, {"type": "text", "text": "draw it larger"}]},
            {"role": "assistant", "content": [{"type": "image", "path": "b.png"}]}]},
        [given("<a.png>"), given("draw it larger"), learned("<b.png>")],
    ),
    ({"omni_edit_id": "1", "src_img": "a.png", "edited_img": "b.png", "edited_prompt_list": ["make it red", "red!"]}, EDIT),
    ({"original_image": "a.png", "edit_prompt": "make it red", "edited_image": "b.png", "edited_prompt": "a red dog",
      "original_prompt": "a dog"}, EDIT),
    ({"source_img": "a.png", "instruction": "make it red", "target_img": "b.png", "mask_img": "m.png"}, EDIT),
    ({"input_image": "a.png", "edit": "make it red", "output_image": "b.png"}, EDIT),
    (
        {"images": [None, "a.png", None, "b.png"], "texts": ["one", None, "two", None], "metadata": "x"},
        [learned("one"), learned("<a.png>"), learned("two"), learned("<b.png>")],
    ),
    (
        {"text_list": ["one", "two"], "image_info": [
            {"image_name": "b.png", "matched_text_index": 1}, {"image_name": "a.png", "matched_text_index": 0}]},
        [learned("<a.png>"), learned("one"), learned("<b.png>"), learned("two")],
    ),
    (  # texts that follow each other are one, which ends once
        {"text_list": ["one.", " ", "two.", "three"], "image_info": [{"image_name": "a.png", "matched_text_index": 3}]},
        [learned("one. two."), learned("<a.png>"), learned("three")],
    ),
    ({"images": [None, None, "a.png"], "texts": ["one", "two", None]}, [learned("one\ntwo"), learned("<a.png>")]),
    (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "what"}, {"type": "text", "text": "now?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": "this"}, {"type": "text", "text": "that"}]}]},
        [given("what\nnow?"), learned("this\nthat")],
    ),
    (
        {"images": [None, "a.png"], "texts": ["one", None], "prompt": "tell"},
        [given("tell"), learned("one"), learned("<a.png>")],
    ),
    (
        {"system": "be brief", "conversations": [
            {"from": "system", "value": ""}, {"from": "human", "value": "hi"}, {"from": "gpt", "value": "a"}]},
        [("be brief", "system", False), given("hi"), learned("a")],
    ),
    (  # pictures that a turn names itself
        {"messages": [{"role": "user", "content": "what is this?", "images": ["a.png"]}, {"role": "bot", "content": "a"}]},
        [given("<a.png>"), given("what is this?"), learned("a")],
    ),
    (
        {"image": "c.png", "conversations": [
            {"from": "human", "value": "<image> and <image>:", "image": None, "images": ["a.png", "b.png"]},
            {"from": "gpt", "value": "x"}, {"from": "human", "value": "now <image>", "images": []},
            {"from": "gpt", "value": "here", "image": "d.png"}]},
        [given("<a.png>"), given("and"), given("<b.png>"), given(":"), learned("x"), given("now"), given("<c.png>"),
         learned("<d.png>"), learned("here")],
    ),
    (  # turns that say again what the row says
        {"image": "a.png", "conversations": [turn("<image>\nwhat?") | {"image": "a.png"}, turn("a", "gpt")]},
        [given("<a.png>"), given("what?"), learned("a")],
    ),
    (
        {"images": ["a.png", "b.png"], "image": "a.png", "conversations": [
            turn("<image><image> which?") | {"image": ""}, turn("a", "gpt") | {"image": {"bytes": None}, "images": [{}]}]},
        [given("<a.png>"), given("<b.png>"), given("which?"), learned("a")],
    ),
    (  # parts that name their pictures, as transformers and OpenAI have it
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "url": "a.png", "text": None}, {"type": "image", "image_url": {"url": "b.png"}},
                {"type": "image_url", "image_url": {"url": "c.png", "detail": "low"}}, {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a"}]},
        [given("<a.png>"), given("<b.png>"), given("<c.png>"), given("what?"), learned("a")],
    ),
    (  # what transformers and OpenAI have besides, and one picture under two keys
        {"messages": [
            {"role": "user", "content": [
                {"type": "image", "image": "a.png", "min_pixels": 50176, "text": "alt", "cache_control": {"type": "x"}},
                {"type": "image", "image": {"bytes": None, "path": "b.png"}, "path": "b.png", "vendor": "x"},
                {"type": "image_url", "image_url": {"url": "c.png"}, "url": "c.png", "path": "", "detail": "low"},
                {"type": "text", "text": "what?"}]},
            {"role": "assistant", "content": "a"}]},
        [given("<a.png>"), given("<b.png>"), given("<c.png>"), given("what?"), learned("a")],
    ),
    (  # an index that begins anew in every turn
        {"images": ["a.png", "b.png", "c.png"], "messages": [
            turn([{"type": "image", "index": 0, "max_pixels": 1, "text": "alt"}]), turn("a", "gpt"),
            turn([{"type": "image", "index": 0}, {"type": "image", "index": 1}]), turn("b", "gpt")]},
        [given("<a.png>"), learned("a"), given("<b.png>"), given("<c.png>"), learned("b")],
    ),
    (
        {"images": [], "image": "a.png", "messages": [
            {"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "index": None, "text": "what?"}]},
            {"role": "assistant", "content": "a"}]},
        [given("<a.png>"), given("what?"), learned("a")],
    ),
    (
        {"messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": "bad", "weight": 0},
                      {"role": "user", "content": "y"}, {"role": "assistant", "content": "good", "weight": 1}]},
        [given("x"), given("bad", "assistant"), given("y"), learned("good")],
    ),
    (  # a weight that is none, as pandas has it, and one that only says more or less
        {"messages": [turn("x") | {"weight": math.nan}, turn("a", "gpt") | {"weight": math.nan}, turn("y"),
                      turn("b", "gpt") | {"weight": 0.5}]},
        [given("x"), learned("a"), given("y"), learned("b")],
    ),
    ({"image": "a.png", "text": "a dog"}, [given("a dog"), learned("<a.png>")]),
    ({"image": "a.png", "text": "a dog", "caption": None}, [given("a dog"), learned("<a.png>")]),
    ({"image": "a.png", "prompt": "what?", "response": "a dog"}, [given("<a.png>"), given("what?"), learned("a dog")]),
]  # fmt: skip


@pytest.mark.parametrize(("values", "wanted"), LAYOUTS)
def test_layouts_are_rows(values: dict[str, Any], wanted: list[tuple[str, str, bool]]) -> None:
    assert told(parse_row(values, "x:1", Path("/data"))) == wanted


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"conversations": []}, "at least one turn"),
        ({"conversations": [turn("hi"), turn("  ", "gpt")]}, "turn 1: the response is empty"),
        ({"messages": [turn(""), turn("a", "gpt")]}, "turn 0: it is empty"),
        ({"messages": [turn([{"type": "text"}]), turn("a", "gpt")]}, "turn 0: it is empty"),
        ({"conversations": [turn("hi"), turn(None, "gpt")]}, "turn 1: the response is empty"),
        ({"conversations": [turn("hi", "robot")]}, "turn 0: from \\(or role\\) is one of system, user"),
        ({"conversations": [turn(3)]}, "turn 0: value \\(or content\\) is text, got int"),
        ({"conversations": [turn([{"type": "audio"}])]}, "a part's type is text, image or image_url, got 'audio'"),
        ({"conversations": ["hi"]}, "turn 0 is a mapping, got str"),
        ({"image": "a.png", "conversations": [turn("hi"), turn("a", "gpt")]}, "1 images and 0 <image> marks"),
        ({"conversations": [turn("<image>"), turn("a", "gpt")]}, "0 images and 1 <image> marks"),
        (
            {"conversations": [turn("<image>") | {"images": ["a.png", "b.png"]}, turn("a", "gpt")]},
            "turn 0: 2 images and 1 <image> marks",
        ),
        ({"images": ["a.png"], "image": "b.png", "messages": [turn("<image> what?"), turn("a", "gpt")]},
         "images and image both name pictures"),
        ({"image": "a.png", "conversations": [turn("<image>") | {"image": "b.png"}, turn("a", "gpt")]},
         "1 images and 0 <image> marks"),
        ({"messages": [turn("<image>?") | {"images": ["a.png"], "image": "b.png"}]}, "turn 0: images and image both name"),
        ({"messages": [turn([{"type": "image", "source": {"data": "x"}}])]}, "turn 0: nothing reads 'source' of a part"),
        ({"messages": [turn([{"type": "image", "url": "a.png", "path": "b.png"}])]}, "one of path and url"),
        ({"messages": [turn([{"type": "image", "min_pixels": 4, "data": "x"}])]}, "turn 0: nothing reads 'data' of a part"),
        ({"messages": [turn([{"type": "image_url", "image_url": {}}])]}, "turn 0: image_url is empty"),
        ({"messages": [turn([{"type": "image", "image_url": {"url": None}}])]}, "turn 0: image_url is empty"),
        ({"images": ["a.png", "b.png"], "messages": [turn([{"type": "image", "index": 1}, {"type": "image", "index": 0}])]},
         "turn 0: its image has index 1, and is number 0 of the row"),
        ({"conversations": [turn("hi"), turn("a", "gpt") | {"weight": -1}]}, "turn 1: weight is 0 .* or 1, got -1"),
        ({"conversations": [turn("hi"), turn("a", "gpt") | {"weight": "0"}]}, "turn 1: weight is 0 .* or 1, got '0'"),
        ({"conversations": [turn("hi"), turn("a", "gpt") | {"weight": 0}]}, "nothing in it is supervised"),
        ({"images": ["a.png", None], "texts": ["a"]}, "2 images and 1 texts: the lists are to be equally long"),
        ({"images": ["a.png", None], "texts": ["a", "b"]}, "place 0 of images and texts holds both"),
        ({"images": [None, "a.png"], "texts": [None, None]}, "place 0 of images and texts holds nothing"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 1}]}, "matched_text_index is a place in text_list"),
        ({"text_list": ["a"], "image_info": [{"matched_text_index": 0}]}, "has neither image_name nor image_base64"),
        (
            {"text_list": ["a"], "image_info": [{"matched_text_index": 0, "image_base64": "?"}]},
            "image_base64 is not base64",
        ),
        ({"text_list": "a", "image_info": []}, "text_list and image_info are lists"),
        ({"src_img": "a.png", "edited_img": "b.png", "edited_prompt_list": []}, "instruction is empty"),
        ({"image": "https://x.org/a.png", "caption": "a"}, "image is a web address: download the pictures first"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_layout(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=f"x:1: .*{message}"):
        parse_row(values, "x:1")


def test_keys_of_a_layout_that_nothing_reads_are_told() -> None:
    turns = [turn("hi"), turn("a", "gpt")]
    for values, ignored in (
        ({"id": 1, "conversations": turns}, {"id"}),
        ({"messages": [turns[0] | {"name": "x", "weight": 1}, turns[1] | {"loss": False}]},
         {"messages.name", "messages.loss"}),
        ({"messages": [turn([{"type": "image", "image": "a.png", "index": 3, "url": None, "max_pixels": 9, "text": ""},
                             {"type": "text", "text": "b", "image": "", "cache_control": {"type": "x"}}]), turns[1]]},
         {"messages.value.max_pixels", "messages.value.cache_control"}),
        ({"messages": [turns[0], turns[1] | {"weight": 0.5}]}, {"messages.weight"}),
        ({"messages": [turns[0], turns[1] | {"weight": math.nan}]}, set()),
        ({"src_img": "a.png", "edited_img": "b.png", "edit": "red", "promt": "x", "url": None}, {"promt"}),
        ({"images": ["a.png", None], "texts": [None, "a"], "metadata": "x"}, {"metadata"}),
        ({"image": "a.png", "text": "a dog", "id": 3}, {"id"}),
    ):  # fmt: skip
        assert parse_row(values, "x").ignored == ignored


def test_pictures_in_base64() -> None:
    info = {"image_base64": base64.b64encode(png((9, 8))).decode(), "matched_text_index": 0}
    (ref,) = parse_row({"text_list": ["a"], "image_info": [info]}, "x:1").pictures
    assert ref.size() == (8, 9)


@pytest.mark.parametrize("head", ["", "data:image/png;base64,"])
def test_pictures_written_into_the_row(head: str) -> None:
    told_of = head + base64.b64encode(png((9, 8))).decode()
    part = {"type": "image_url", "image_url": {"url": told_of}}
    for values in (
        {"image": told_of, "caption": "a"},
        {"messages": [turn([part, {"type": "text", "text": "what?"}]), turn("a", "gpt")]},
        {"segments": [{"image": told_of, "role": "assistant"}]},
    ):
        (ref,) = parse_row(values, "x:1", Path("/data")).pictures
        assert ref.size() == (8, 9) and len(ref.name) < 40
    for cut in (told_of, told_of[:-3]):
        with pytest.raises(RowError, match="reads 'img', which is a picture"):
            parse_row({"img": cut, "text": "a dog"}, "x:1")
    with pytest.raises(
        RowError, match=r"x:1: image: a picture in base64 is cut short or damaged, got '.{,200}$"
    ):
        parse_row({"image": told_of[:-1], "caption": "a"}, "x:1")


def test_words_that_begin_like_a_picture_are_words() -> None:
    for beside in ("Qk" + "a" * 70, "/9j/" + "a" * 70, "Qk" + " " * 200_000 + "?"):
        row = parse_row({"text": "hello", "profile_id": beside}, "x:1")
        assert told(row) == [learned("hello")] and row.ignored == {"profile_id"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"image": "x" * 9000, "caption": "a"}, "image is neither a picture in base64 nor the name of a file: 'xxx"),
        ({"image": "data:image/png," + "x" * 9000, "caption": "a"}, "data:image/...;base64,..., got 'data:image/png,xxx"),
        ({"segments": [{"x" * 9000: "a"}]}, "unknown key 'xxx"),
        ({"messages": [turn("hi", "x" * 9000)]}, "is one of system, user, .* got 'xxx"),
    ],
)  # fmt: skip
def test_messages_stay_short(values: dict[str, Any], message: str) -> None:
    with pytest.raises(RowError, match=message) as found:
        parse_row(values, "x:1")
    assert len(str(found.value)) < 400
    (ref,) = parse_row({"image": "a/" * 2000 + "b.png", "caption": "a"}, "x:1").pictures
    for reading in (ref.open, ref.size):
        with pytest.raises(PictureError, match=r"^x:1: a/a/.*/b\.png \(4005 characters\): no such file$"):
            reading()


def test_a_json_list_and_its_pictures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(png())
    dialogue = [turn("<image> what?"), turn("a dog", "gpt")]
    rows = [
        {"image": "images/a.png", "conversations": dialogue},
        {"image": "images/none.png", "conversations": dialogue},
        7,
        {"conversations": [turn("hi"), turn("", "gpt")]},
    ]
    path = tmp_path / "llava.json"
    path.write_text(json.dumps(rows))
    source = open_source(tmp_path)
    assert source.count() == 4
    found = list(source.rows(2))
    assert "llava.json: row 2: a row is a mapping" in str(found[0]) and "row 3: turn 1" in str(found[1])
    assert run(["data", "check", str(path), "-m", str(GOLDEN), "--dialogue"]) == 1
    out = capsys.readouterr().out
    assert "4 rows, 3 problems" in out and "none.png: no such file" in out and "1 reading" in out
    path.write_text("{}")
    with pytest.raises(SourceError, match="a JSON file is a list of rows, or COCO's mapping"):
        list(open_source(path).rows())
    path.write_text("[")
    with pytest.raises(SourceError, match="not valid JSON"):
        open_source(path).count()


@pytest.mark.parametrize("folder", ["val2017", "images", "annotations", "images/val2017"])
def test_coco_finds_its_pictures(tmp_path: Path, folder: str, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("annotations", folder):
        (tmp_path / name).mkdir(parents=True, exist_ok=True)
    for number in (1, 2, 3):
        (tmp_path / folder / f"{number:04d}.png").write_bytes(png())
    document = {
        "images": [{"id": i, "file_name": f"{i:04d}.png"} for i in (1, 2, 3, 4)],
        "annotations": [
            {"image_id": 2, "caption": "two"}, {"image_id": 1, "caption": "one"}, {"image_id": 2, "caption": "zwei"},
            {"image_id": 4, "caption": "gone"},
        ],
    }  # fmt: skip
    path = tmp_path / "annotations" / "captions_val2017.json"
    path.write_text(json.dumps(document))
    assert run(["data", "check", str(path), "-m", str(GOLDEN), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert report["kinds"] == {"drawing": 2} and len(report["problems"]) == 2
    assert (
        "row 2: caption is empty" in report["problems"][0]
        and "0004.png: no such file" in report["problems"][1]
    )
    texts = [
        r.parts[0].text
        for r in open_source(path).rows()
        if isinstance(r, Row) and isinstance(r.parts[0], TextPart)
    ]
    assert texts == ["one", "two", "gone"]
    path.write_text(json.dumps({"images": [], "annotations": [{"bbox": []}]}))
    with pytest.raises(SourceError, match="its annotations have no captions"):
        open_source(path).count()


def test_parquet_of_an_edit_set(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    pq = pytest.importorskip("pyarrow.parquet")
    row = {"src_img": {"bytes": png(), "path": None}, "edited_img": {"bytes": png((9, 8)), "path": None},
           "edited_prompt_list": ["make it red", "red"], "height": 20}  # fmt: skip
    page = {"images": [{"bytes": png(), "path": None}, None], "texts": [None, "one"]}
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "a.parquet")
    pq.write_table(pa.Table.from_pylist([page]), tmp_path / "b.parquet")
    edit, told_page = (r for r in open_source(tmp_path).rows())
    assert isinstance(edit, Row) and [p.size() for p in edit.pictures] == [(20, 20), (8, 9)]
    assert isinstance(told_page, Row) and [p.supervised for p in told_page.parts] == [True, True]


def test_rows_from_anywhere_in_a_long_file(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n".join(json.dumps({"text": f"row {i}"}) for i in range(2500)))
    source = open_source(tmp_path)
    assert source.count() == 2500
    for start in (0, 1, 999, 1000, 2345, 2499):
        row = next(iter(source.rows(start)))
        assert (
            isinstance(row, Row)
            and told(row) == [learned(f"row {start}")]
            and row.where == f"{path}:{2 * start + 1}"
        )
    assert list(source.rows(2500)) == []
