"""The stream of packed rows: nothing lost, exact resume, mixture, shares of processes, what is done to documents."""

from __future__ import annotations

import json
import math
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nextflow_ar.config import ConfigError, from_dict
from nextflow_ar.data import code_shards, extraction, shard_order
from nextflow_ar.data import loader as loader_module
from nextflow_ar.data.code_shards import CodeShard, CodeShards, as_document
from nextflow_ar.data.loader import PackedRow, Packing, ShardFolder, ShardLoader, ShardSource
from nextflow_ar.data.packing import Packer
from nextflow_ar.data.token_counts import TokenCounter
from nextflow_ar.data.transforms import draws, drop_condition, invert, plan, reads, task_of
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.flops import sample_flops
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import pack
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, Sample, build
from nextflow_ar.sequence.vocab import Vocabulary, train_text_tokenizer
from nextflow_ar.storage import StorageError
from nextflow_ar.types import Document, Image, Mark, Text
from tests.conftest import TINY_MODEL, tiny_image_tokenizer
from tests.shards import captions, make_shards, mixed

LAYOUT = LayoutOptions(12.0, alpha=0.9)
LENGTH = Packing("length", 220, open_rows=3)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    place, tokenizer = tmp_path_factory.mktemp("loader"), tiny_image_tokenizer()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(code_shards, "_TOGETHER", 2)  # of the three rows of a shard
        return (
            make_shards(place / "a", mixed(16), tokenizer),
            make_shards(place / "b", captions(5), tokenizer, per_shard=2),
        )


def loader(bundle: Bundle, source: ShardSource, *, prefetch: bool = False) -> ShardLoader:
    return ShardLoader(source, bundle.image_tokenizer, bundle.vocab, LAYOUT, TINY_MODEL, prefetch=prefetch)


def source_of(*folders: Path, packing: Packing = LENGTH, rows: int = 2, **options: Any) -> ShardSource:
    mixture = tuple(ShardFolder(f, w, **options) for f, w in zip(folders, (1.0, 3.0), strict=False))
    return ShardSource("shards", rows, mixture, packing, seed=5)


def columns(rows: list[PackedRow]) -> list[tuple[list[int], list[int], list[int], tuple[str, ...]]]:
    return [
        (
            r.sample.tokens.tolist(),
            r.sample.targets.tolist(),
            [c for span in r.sample.images for c in span.codes.input.tolist()],
            r.tasks,
        )
        for r in rows
    ]


def texts(bundle: Bundle, row: PackedRow) -> list[str]:
    sample = row.sample
    return [
        bundle.vocab.decode([t for t in sample.tokens[sample.documents == d].tolist() if t >= 0])
        for d in range(len(row.tasks))
    ]


@pytest.mark.parametrize("mode", ["pad", "length", "compute"])
def test_every_pass_holds_every_document_once_in_another_order(
    bundle: Bundle, folders: tuple[Path, Path], mode: str
) -> None:
    budget = {"pad": 200, "length": 220, "compute": 0.00004}[mode]
    stream = loader(bundle, source_of(folders[1], packing=Packing(mode, budget, open_rows=1), rows=1))  # type: ignore[arg-type]
    told: list[str] = []
    while len(told) < 25:
        (row,) = stream.rows()
        assert len(row.tasks) == int(row.sample.documents.max()) + 1
        if mode == "pad":
            assert len(row.tasks) == 1
        if mode == "compute":
            assert sample_flops(row.sample, TINY_MODEL) <= budget * 1e12
        else:
            assert len(row.sample) <= budget
        told += texts(bundle, row)
    places = Counter(told)
    assert len(places) == 5 and max(places.values()) - min(places.values()) <= 2
    if mode == "pad":  # one document after the other: the order itself
        passes = [told[i * 5 : i * 5 + 5] for i in range(5)]
        assert all(len(set(p)) == 5 for p in passes) and len({tuple(p) for p in passes}) > 1


@pytest.mark.parametrize("mode", ["pad", "length", "compute"])
@pytest.mark.parametrize("stop", [1, 7])
def test_a_restart_anywhere_gives_the_same_rows(
    bundle: Bundle, folders: tuple[Path, Path], mode: str, stop: int
) -> None:
    packing = Packing(mode, 0.00005 if mode == "compute" else 220, open_rows=3)  # type: ignore[arg-type]
    options = {"invert": 0.4, "condition_dropout": 0.3, "dialogue": True}
    source = source_of(*folders, packing=packing, **options)
    whole = loader(bundle, source)
    expected = [columns(whole.rows()) for _ in range(12)]
    first = loader(bundle, source)
    for _ in range(stop):
        first.rows()
    state = json.loads(json.dumps(first.state()))
    first.rows()  # what happens after the state was taken does not matter
    second = loader(bundle, source)
    second.restore(state)
    assert [columns(second.rows()) for _ in range(12 - stop)] == expected[stop:]
    assert second.state() == whole.state()
    other = loader(bundle, replace(source, seed=6))
    assert [columns(other.rows()) for _ in range(12)] != expected


def test_a_folder_that_lacks_shards_says_which(
    bundle: Bundle, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    holes = Path(shutil.copytree(folders[0], tmp_path / "holes"))
    assert loader(bundle, source_of(*folders)).incomplete() == []
    for number in (1, 3):
        (holes / f"{number:06d}.parquet").unlink()
    (told,) = loader(bundle, source_of(folders[1], holes)).incomplete()
    assert told == f"{holes} lacks 2 shards (000001, 000003): extract again writes them"


def test_folders_that_show_pictures_in_two_ways_are_told(
    bundle: Bundle, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    padded = Path(shutil.copytree(folders[0], tmp_path / "padded"))
    manifest = json.loads((padded / "manifest.json").read_text())
    manifest["config"]["fit"] = "pad"
    (padded / "manifest.json").write_text(json.dumps(manifest))
    assert loader(bundle, source_of(*folders)).fits == {"crop"}
    assert loader(bundle, source_of(padded)).fits == {"pad"}
    assert loader(bundle, source_of(padded)).incomplete() == []
    (told,) = loader(bundle, source_of(folders[1], padded)).incomplete()
    assert told == f"{padded} has padded pictures, other folders cropped ones: extract all with one --fit"


@pytest.mark.parametrize("prefetch", [False, True])
def test_canvases_of_what_was_taught_are_counted(
    bundle: Bundle, folders: tuple[Path, Path], prefetch: bool
) -> None:
    """Alike in all processes, through a stop, and of no more than was given out."""
    source = source_of(*folders, rows=4)
    whole = loader(bundle, source)
    first, second = (loader(bundle, source, prefetch=prefetch) for _ in range(2))
    assert whole.canvases == {}
    seen: Counter[str] = Counter()
    for step in range(9):
        for row in whole.rows():
            sizes = [image.codes.schedule.image_size(8) for image in row.sample.images]
            seen.update(f"{width}x{height}" for height, width in sizes)
        first.rows(0, 2)
        second.rows(1, 2)
        assert first.canvases == second.canvases == whole.canvases
        if step == 4:
            kept = json.loads(json.dumps(first.state()))
            first.close()
            first = loader(bundle, source, prefetch=prefetch)
            first.restore(kept)
    assert set(whole.canvases) == {"32x32", "48x24"}
    waiting = sum(whole.canvases.values()) - seen.total()  # in rows that are open
    assert 0 <= waiting < 20 and all(0 <= whole.canvases[name] - seen[name] <= waiting for name in seen)
    before = whole.state()
    del before["canvases"]  # as checkpoints of before were
    first.restore(before)
    assert first.canvases == {} and columns(first.rows(0, 1)) == columns(whole.rows())
    for one in (first, second):
        one.close()


def test_shards_of_before_are_read_as_they_are_and_named(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer, old = bundle.image_tokenizer, ScaleSchedule.from_final((44, 84), 4)
    assert old.image_size(8) == (24, 40) and not old.canonical
    with monkeypatch.context() as before:
        before.setattr(extraction, "canvas_schedule", lambda *_: old)
        before.setattr(extraction, "final_of", lambda *_: (44, 84))
        before.setattr(ScaleSchedule, "image_size", lambda *_: (24, 40))
        make_shards(tmp_path / "old", captions(4), tokenizer)
    new = make_shards(tmp_path / "new", captions(4), tokenizer)
    stream = loader(bundle, source_of(tmp_path / "old" / "shards", new))
    shown = [image.codes.schedule for _ in range(6) for row in stream.rows() for image in row.sample.images]
    assert old in shown and ScaleSchedule.square(4) in shown
    (told,) = [line for line in caplog.messages if "schedules that inference has not" in line]
    assert told.startswith(f"{tmp_path / 'old' / 'shards'}: ") and "one of 40x24" in told


def test_pictures_of_more_scales_than_the_model_has_are_refused(
    bundle: Bundle, folders: tuple[Path, Path]
) -> None:
    deep = CodeShards(folders[0], bundle.image_tokenizer).config.num_scales
    model = replace(TINY_MODEL, max_scales=deep - 1)
    with pytest.raises(StorageError, match=f"have {deep} scales, the model has embeddings for {deep - 1}: "):
        ShardLoader(source_of(folders[0]), bundle.image_tokenizer, bundle.vocab, LAYOUT, model)


def test_processes_share_the_rows_of_one_stream(bundle: Bundle, folders: tuple[Path, Path]) -> None:
    source = source_of(*folders, rows=6)
    alone, parts = loader(bundle, source), [loader(bundle, source) for _ in range(3)]
    for _ in range(4):
        whole = columns(alone.rows())
        shares = [columns(part.rows(rank, 3)) for rank, part in enumerate(parts)]
        assert [shares[i % 3][i // 3] for i in range(6)] == whole
    assert all(part.state() == alone.state() for part in parts)  # so another number of them may go on


def slowly(bundle: Bundle, source: ShardSource, layout: LayoutOptions) -> Iterator[PackedRow]:
    """The stream as it was first written: everything is laid out, and packed by what the samples themselves cost."""
    packing, compute = source.packing, source.packing.mode == "compute"
    budget = packing.budget * (1e12 if compute else 1)
    packer = Packer(budget, longest=packing.longest, open_rows=packing.open_rows)
    edges = np.cumsum(np.array([f.weight for f in source.folders]) / sum(f.weight for f in source.folders))

    def order(number: int) -> Iterator[list[dict[str, Any]]]:
        shards = CodeShards(source.folders[number].folder, bundle.image_tokenizer)
        for epoch in count():
            files = np.random.default_rng([1, source.seed, number, epoch]).permutation(len(shards.files))
            for group in range(-(-len(files) // 4)):
                chosen = files[group * 4 : group * 4 + 4].tolist()
                records = [r for i in chosen for r in shards.shard(i).table().to_pylist()]
                rng = np.random.default_rng([2, source.seed, number, epoch, group])
                yield from (records[i]["parts"] for i in rng.permutation(len(records)))

    orders, waiting = [order(i) for i in range(len(source.folders))], dict[int, tuple[Sample, str]]()
    numbers = count()
    for number in numbers:
        draw = np.random.default_rng([3, source.seed, number]).random()
        chosen = min(int(np.searchsorted(edges, draw, side="right")), len(orders) - 1)
        settings = source.folders[chosen]
        for parts in orders[chosen]:
            turned, without, planned = np.random.default_rng([4, source.seed, number]).random(3)
            if turned < settings.invert:
                parts = invert(parts, settings.question)
            elif planned < settings.planned:
                parts = plan(parts)
            if without < settings.condition_dropout:
                parts = drop_condition(parts)
            document = as_document(parts, dialogue=settings.dialogue)
            sample = build(document, bundle.vocab, layout)
            cost = sample_flops(sample, TINY_MODEL) if compute else len(sample)
            if cost <= budget and (packing.longest is None or len(sample) <= packing.longest):
                break
            number = next(numbers)
        waiting[number] = sample, task_of(document)
        row = [number] if packing.mode == "pad" else packer.add(number, cost, len(sample))
        if row is not None:
            found = [waiting.pop(n) for n in row]
            yield PackedRow(pack([s for s, _ in found]), tuple(task for _, task in found))


def same(a: PackedRow, b: PackedRow) -> bool:
    names = ("tokens", "targets", "weights", "positions", "blocks", "scales", "lengths", "documents")
    spans = [[(s.boi, s.scales, s.closed, s.codes.schedule) for s in row.sample.images] for row in (a, b)]
    codes = [[c for s in row.sample.images for c in s.codes.input.tolist()] for row in (a, b)]
    columns = all(torch.equal(getattr(a.sample, name), getattr(b.sample, name)) for name in names)
    return columns and a.tasks == b.tasks and spans[0] == spans[1] and codes[0] == codes[1]


PACKINGS = {
    "pad": Packing("pad", 200), "length": Packing("length", 220, open_rows=3),
    "compute": Packing("compute", 0.00005, longest=240, open_rows=4),
}  # fmt: skip


@pytest.mark.parametrize("mode", list(PACKINGS))
@pytest.mark.parametrize("context", ["scales", "closing"])
@pytest.mark.parametrize("dialogue", [False, True])
def test_rows_are_those_of_a_stream_that_lays_everything_out(
    bundle: Bundle, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch, mode: str, context: str,
    dialogue: bool,
) -> None:  # fmt: skip
    """For any number of processes, started anew in mid-shard by another number of them; texts counted in several goes."""
    monkeypatch.setattr(shard_order, "_SLAB", 3)
    changes = {"invert": 0.3, "planned": 0.5, "condition_dropout": 0.3, "question": "what is <boi> it?"}
    source = source_of(*folders, packing=PACKINGS[mode], rows=6, dialogue=dialogue, **changes)
    layout = LayoutOptions(12.0, alpha=0.9, context_images=context)  # type: ignore[arg-type]

    def made() -> ShardLoader:
        return ShardLoader(source, bundle.image_tokenizer, bundle.vocab, layout, TINY_MODEL)

    reference = slowly(bundle, source, layout)
    state, kinds = made().state(), Counter[str]()
    for step, processes in enumerate([1, 2, 3, 6, 2, 1, 3]):
        loaders = [made() for _ in range(processes)] if step % 3 != 1 else loaders[:1] * processes
        if step % 3 != 1:
            for one in loaders:
                one.restore(json.loads(json.dumps(state)))
            shares = [one.rows(rank, processes) for rank, one in enumerate(loaders)]
            assert all(one.state() == loaders[0].state() for one in loaders)
        else:  # goes on without having been started anew: as one process
            processes, shares = 1, [loaders[0].rows()]
        for i in range(6):
            expected = next(reference)
            kinds.update(expected.tasks)
            assert same(shares[i % processes][i // processes], expected), (step, i)
        state = loaders[0].state()
    assert {"draw", "edit", "read", "write"} <= set(kinds) and state["folders"][1]["epoch"] > 1


def test_what_is_another_process_s_is_never_laid_out(
    bundle: Bundle, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    laid: list[Document] = []

    def noted(document: Document, *others: Any) -> Sample:
        laid.append(document)
        return build(document, *others)

    monkeypatch.setattr(loader_module, "build", noted)
    stream = loader(bundle, source_of(*folders, rows=12))
    kept = [row for _ in range(3) for row in stream.rows(5, 12)]
    assert len(kept) == 3 and len(laid) == sum(len(row.tasks) for row in kept)


def test_codes_of_another_process_s_rows_are_not_read(
    bundle: Bundle, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[tuple[Path, int]] = []

    def noted(shard: CodeShard, number: int) -> Any:
        read.append((shard.path, number))
        return group(shard, number)

    group = CodeShard.group
    monkeypatch.setattr(CodeShard, "group", noted)
    a_pass = source_of(folders[0], rows=16, packing=PACKINGS["pad"])
    stream = loader(bundle, a_pass)
    (row,) = stream.rows(3, 16)
    assert row.tasks and len(read) == 1
    alone = loader(bundle, a_pass)
    read.clear()
    alone.rows()
    assert len(read) == len(set(read)) == 5 * 2 + 1  # two groups of three rows each, one of the last one's


@pytest.mark.parametrize("told", [False, True])
def test_texts_are_counted_once_for_all_passes(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, *, told: bool
) -> None:
    counter = TokenCounter(bundle.vocab.tokenizer) if told else None
    folder = make_shards(tmp_path, captions(5), bundle.image_tokenizer, per_shard=2, counter=counter)
    counted: list[str] = []

    def noted(self: TokenCounter, texts: list[str]) -> list[int]:
        counted.extend(texts)
        return counting(self, texts)

    counting = TokenCounter.__call__
    monkeypatch.setattr(TokenCounter, "__call__", noted)
    source = source_of(folder, packing=PACKINGS["pad"])
    stream = loader(bundle, source)
    rows = [columns(stream.rows()) for _ in range(12)]
    assert stream.state()["folders"][0]["epoch"] > 3
    at_extraction = 5 if told else 0
    assert len(counted) == len(set(counted)) == 5 - at_extraction
    letters = Vocabulary(train_text_tokenizer(["zz"], 262), TINY_MODEL.text_vocab, TINY_MODEL.codes)
    other = Bundle(bundle.model, bundle.image_tokenizer, letters, {})
    assert [columns(loader(other, source).rows())] != rows[:1]
    assert len(counted) > 5 - at_extraction  # what the shards tell is another tokenizer's


def test_weights_are_shares_of_the_documents(bundle: Bundle, folders: tuple[Path, Path]) -> None:
    stream = loader(bundle, source_of(*folders))
    chosen = Counter(stream._stream._draw()[1].folder for _ in range(1000))
    assert 0.70 < chosen[1] / 1000 < 0.80  # weights 1 and 3


def lengths(bundle: Bundle, folder: Path) -> list[Sample]:
    documents = CodeShards(folder, bundle.image_tokenizer).documents()
    return [build(document, bundle.vocab, LAYOUT) for _, document in documents]


def test_what_fits_no_row_is_left_out_and_counted(
    bundle: Bundle, folders: tuple[Path, Path], caplog: pytest.LogCaptureFixture
) -> None:
    stream = loader(bundle, source_of(folders[0], packing=Packing("length", 60, open_rows=2)))
    rows = [row for _ in range(10) for row in stream.rows()]
    assert stream.skipped > 0 and all(len(row.sample) <= 60 for row in rows)
    assert {task for row in rows for task in row.tasks} >= {"draw", "write"}
    assert len([r for r in caplog.records if "fits no row and is left out" in r.message]) == 1
    short = Packing("pad", 60)
    both = loader(
        bundle, source_of(*folders, packing=short, rows=1)
    )  # of the one some are too long, of the other none
    drawn, orders = both._stream.drawn, both._stream.orders
    for _ in range(200):
        both.rows()
    assert both._stream.drawn - drawn == 200 + orders[0].skipped > 205 and orders[1].skipped == 0
    assert 0.15 < orders[0].accepted / 200 < 0.35  # its share is of what is kept: weights 1 and 3
    plain = max(len(d) for d in lengths(bundle, folders[1]))  # fits as it is, and not with a plan before it
    few = loader(bundle, source_of(folders[1], packing=Packing("pad", plain), rows=1, planned=0.5))
    assert all(len(few.rows()) == 1 for _ in range(40)) and 10 < few.skipped < 100
    nothing = loader(bundle, source_of(folders[1], packing=Packing("length", 8)))
    with pytest.raises(StorageError, match=r"no document of it fits a row \(5 are too long\)"):
        nothing.rows()


def test_a_budget_of_compute_that_was_meant_as_tokens_is_refused(
    bundle: Bundle, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader_module, "_PLACES", 2000)
    stream = loader(bundle, source_of(folders[0], packing=Packing("compute", 4096)))
    with pytest.raises(
        StorageError, match="a row of 4096 TFLOPs holds more than 2,000 places of this model: give"
    ):
        stream.rows()
    limited = loader(
        bundle, source_of(folders[0], packing=Packing("compute", 4096, longest=300, open_rows=2))
    )
    assert max(len(row.sample) for row in limited.rows()) <= 300


@pytest.mark.parametrize(
    ("kind", "values", "why"),
    [
        (Packing, {"mode": "compute", "budget": 1.0, "longest": 0}, "longest is at least 1, got 0"),
        (Packing, {"mode": "compute", "budget": math.inf}, "a finite number is expected, got inf"),
        (
            ShardSource,
            {"kind": "shards", "rows": 1, "seed": -1, "folders": [{"folder": "x"}],
             "packing": {"mode": "pad", "budget": 9}},
            "seed is at least 0, got -1",
        ),
    ],
)  # fmt: skip
def test_senseless_settings_are_named(kind: type, values: dict[str, Any], why: str) -> None:
    with pytest.raises(ConfigError, match=why):
        from_dict(kind, values)


def test_other_shards_and_damaged_ones_are_refused(
    bundle: Bundle, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(folders[0], copy)
    stream = loader(bundle, source_of(copy))
    state = stream.state()
    (copy / "000005.parquet").unlink()
    with pytest.raises(StorageError, match="are not those that the checkpoint was made with"):
        loader(bundle, source_of(copy)).restore(state)
    with pytest.raises(StorageError, match="another number of shard folders"):
        loader(bundle, source_of(copy, folders[1])).restore(state)
    for path in copy.glob("*.parquet"):
        path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(StorageError, match="the shard cannot be read") as caught:
        loader(bundle, source_of(copy)).rows()
    assert "\n" not in str(caught.value)
    other = Bundle(bundle.model, tiny_image_tokenizer(seed=1), bundle.vocab, {})
    with pytest.raises(StorageError, match="made by another image tokenizer"):
        loader(other, source_of(folders[0]))


def picture(role: str, supervised: bool) -> dict[str, Any]:
    return {
        "role": role, "supervised": supervised, "text": None, "final": [64, 64], "scales": 2, "target": [1, 2, 3, 4, 5],
        "input": [1, 2, 3, 4, 6],
    }  # fmt: skip


def text(words: str, role: str = "user", supervised: bool = False) -> dict[str, Any]:
    return {"role": role, "supervised": supervised, "text": words, "final": None}


def told(parts: list[dict[str, Any]]) -> list[tuple[str, str, bool]]:
    return [(p["text"] or "picture", p["role"], p["supervised"]) for p in parts]


def test_inverting_and_dropping_by_hand() -> None:
    drawing = [text("be brief", "system"), text("a dog"), picture("assistant", True)]
    assert told(invert(drawing)) == [
        ("be brief", "system", False), ("picture", "user", False), ("a dog", "assistant", True),
    ]  # fmt: skip
    assert told(invert(drawing, "what is it?")) == [
        ("be brief", "system", False), ("picture", "user", False), ("what is it?", "user", False),
        ("a dog", "assistant", True),
    ]  # fmt: skip
    assert told(drawing)[1] == ("a dog", "user", False)  # the record itself is as it was
    edit = [picture("user", False), text("bluer"), picture("assistant", True)]
    planned = [text("a dog"), text("a dog above", "assistant", True), picture("assistant", True)]
    reading = [picture("user", False), text("a dog", "assistant", True)]
    for others in (edit, planned, reading, [picture("assistant", True)], [text("a", "assistant", True)]):
        assert invert(others) == others and plan(others) == others
    assert told(plan(drawing)) == [
        ("be brief", "system", False), ("a dog", "user", False), ("a dog", "assistant", True),
        ("picture", "assistant", True),
    ]  # fmt: skip
    assert told(drop_condition(plan(drawing))) == [("picture", "assistant", True)]
    for parts in (drawing, edit, planned):
        assert told(drop_condition(parts)) == [("picture", "assistant", True)]
    assert drop_condition(reading) == reading
    (drawn,) = as_document(drop_condition(edit)).segments
    assert isinstance(drawn, Image) and drawn.codes.input.tolist() == [1, 2, 3, 4, 6]


def test_what_documents_teach() -> None:
    def kinds(*parts: dict[str, Any]) -> tuple[str, bool, bool]:
        document = as_document(list(parts))
        return task_of(document), draws(document), reads(document)

    drawn, seen = picture("assistant", True), picture("user", False)
    answer = text("a dog", "assistant", True)
    assert kinds(text("a dog"), drawn) == ("draw", True, False)
    assert kinds(seen, text("bluer"), drawn) == ("edit", True, False)
    assert kinds(seen, answer) == ("read", False, True)
    assert kinds(text("hi"), answer) == ("write", False, False)
    assert kinds(drawn, answer) == ("draw", True, True)
    assert kinds(answer, drawn, answer, drawn) == ("story", True, True)
    assert not draws(Document((Text("a"), Mark("<|im_end|>", True))))


def test_options_of_a_source_show_in_its_rows(bundle: Bundle, folders: tuple[Path, Path]) -> None:
    def tasks(**options: Any) -> Counter[str]:
        stream = loader(bundle, source_of(folders[1], packing=Packing("pad", 400), rows=40, **options))
        return Counter(row.tasks[0] for row in stream.rows())

    assert tasks() == {"draw": 40} and tasks(invert=1.0) == {"read": 40}
    some = tasks(invert=0.5)
    assert 10 <= some["read"] <= 30 and some["read"] + some["draw"] == 40
    stream = loader(
        bundle, source_of(folders[1], packing=Packing("pad", 400), rows=40, condition_dropout=0.5)
    )
    firsts = [int(row.sample.tokens[0]) == bundle.vocab.boi for row in stream.rows()]
    assert 10 <= sum(firsts) <= 30
    stream = loader(bundle, source_of(folders[1], packing=Packing("pad", 400), rows=1, dialogue=True))
    sample = stream.rows()[0].sample
    assert sample.tokens[0] == bundle.vocab.special("<|im_start|>")
    learned = [int(t) for t in sample.targets if t != IGNORED]
    assert learned[0] == bundle.vocab.boi and learned[-1] == bundle.vocab.special("<|im_end|>")
    assert all(t >= 300 for t in learned[1:-1])  # the response alone: its codes
    with pytest.raises(ValueError, match="invert is a probability from 0 to 1, got 2"):
        ShardFolder(folders[0], invert=2)


def test_widths_of_batches() -> None:
    assert Packing("length", 220).width(150) == 220
    assert Packing("compute", 1.0).width(150) == 192
    assert Packing("pad", 1000).width(150) == 192 and Packing("pad", 160).width(150) == 160
    with pytest.raises(ValueError, match="widths is from 1 to 64, got 0"):
        Packing("compute", 1.0, widths=0)
    with pytest.raises(ValueError, match="longest goes with the mode compute"):
        Packing("length", 100, longest=50)


@pytest.mark.parametrize("n", [7, 24])
@pytest.mark.parametrize("longest", [None, 98304, 32768, 20000, 300])
def test_rows_of_equal_compute_have_few_widths(longest: int | None, n: int) -> None:
    packing, most = Packing("compute", 1.0, longest=longest, widths=n), longest or 50000
    widths = [packing.width(length) for length in range(1, most + 1)]
    assert widths == sorted(widths) and all(w % 64 == 0 for w in widths)
    assert all(long <= w <= long * 2 ** (1 / n) + 64 for long, w in enumerate(widths, 1))
    assert all(packing.width(w) == w for w in set(widths))
    if longest:
        assert widths[-1] == -(-longest // 64) * 64
    for least in range(100, most // 2, 997):  # of rows whose lengths differ by not quite a factor of two
        assert len(set(widths[least - 1 : int(1.9 * least)])) <= n + 1
    assert len({w for w in widths if w >= most / 4}) <= 2 * n + 1
    assert len(set(widths)) <= 10 * n


def test_peeking_moves_nothing(bundle: Bundle, folders: tuple[Path, Path]) -> None:
    stream, other = (loader(bundle, source_of(*folders)) for _ in range(2))
    stream.rows()
    other.rows()
    seen = list(stream.peek(30))
    assert len(seen) == 30 and any(map(draws, seen)) and any(map(reads, seen))
    assert stream.state() == other.state()
    assert columns(stream.rows()) == columns(other.rows())
    assert torch.equal(stream.rows()[0].sample.weights, other.rows()[0].sample.weights)


def test_a_thread_ahead_changes_neither_rows_nor_state(bundle: Bundle, folders: tuple[Path, Path]) -> None:
    """Killed after any step, the next one's rows made already: what a checkpoint held goes on, with a thread or without."""
    source = source_of(*folders, rows=4, packing=PACKINGS["compute"], invert=0.4, dialogue=True)
    whole, ahead = loader(bundle, source), loader(bundle, source, prefetch=True)

    def peeked(one: ShardLoader) -> list[list[type]]:
        return [[type(s) for s in told.segments] for told in one.peek(5)]

    for step in range(8):
        assert columns(ahead.rows(1, 2)) == columns(whole.rows(1, 2))
        if ahead._thread is not None:
            ahead._wait()
            assert ahead._stream.state() != whole.state()  # is a step further
        assert ahead.state() == whole.state() and ahead.skipped == whole.skipped
        assert peeked(ahead) == peeked(whole)
        if step % 2:
            kept = json.loads(json.dumps(ahead.state()))
            ahead.close()
            ahead = loader(bundle, source, prefetch=step != 3)
            ahead.restore(kept)
    assert columns(ahead.rows(0, 1)) == columns(whole.rows(0, 1))
    assert columns(ahead.rows(2, 4)) == columns(whole.rows(2, 4))  # another share than the one made ahead
    assert ahead.state() == whole.state()
    ahead.close()


def test_rows_are_made_while_a_step_is_computed(
    bundle: Bundle, folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    threads: list[str] = []

    def noted(*given: Any) -> Sample:
        threads.append(threading.current_thread().name)
        return build(*given)

    monkeypatch.setattr(loader_module, "build", noted)
    alone = loader(bundle, source_of(*folders))
    alone.rows()
    alone.rows()
    two_steps = len(threads)
    assert not any(name.startswith("shards") for name in threads)
    threads.clear()
    ahead = loader(bundle, source_of(*folders), prefetch=True)
    ahead.rows()
    ahead._wait()
    assert len(threads) == two_steps and all(name.startswith("shards") for name in threads)
    ahead.close()
    assert not any(thread.name.startswith("shards") for thread in threading.enumerate())


def test_an_error_of_the_thread_is_raised_at_the_step_it_belongs_to(
    bundle: Bundle, folders: tuple[Path, Path], tmp_path: Path
) -> None:
    shutil.copytree(folders[0], tmp_path / "copy")
    source = source_of(tmp_path / "copy", rows=1, packing=PACKINGS["pad"])
    alone, ahead = loader(bundle, source), loader(bundle, source, prefetch=True)
    assert columns(alone.rows()) == columns(ahead.rows())
    ahead._wait()
    ((_, first),) = ahead._stream.orders[0]._read.items()
    begun = {shard.file.path for shard in first.shards}
    for path in {*(tmp_path / "copy").glob("*.parquet")} - begun:
        path.write_bytes(path.read_bytes()[:-40])
    steps, told = 1, ""
    while not told:
        try:
            expected = columns(alone.rows())
        except StorageError as error:
            told = str(error)
        else:
            assert columns(ahead.rows()) == expected
            steps += 1
    assert 8 <= steps <= 12 and "the shard cannot be read" in told and ahead.state() == alone.state()
    for _ in range(2):  # it does not go on behind what it could not make
        with pytest.raises(StorageError) as caught:
            ahead.rows()
        assert str(caught.value) == told and "\n" not in told
    assert ahead.state() == alone.state()
    ahead.close()
