"""Rows of the tables that train beside adapters: those of new words alone."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch

from nextflow_ar.app.cli import run
from nextflow_ar.config import ConfigError, from_dict
from nextflow_ar.model.checkpoint import load_bundle
from nextflow_ar.storage import StorageError
from nextflow_ar.training import new_words
from nextflow_ar.training.model_stage import ModelRecipe
from nextflow_ar.training.new_words import more_often
from nextflow_ar.types import Text
from tests.training.test_from_shards import Make, make, place, recipe, same  # noqa: F401

TABLES = ("backbone.embed_tokens.weight", "head.weight")
LORA: dict[str, Any] = {
    "trains": "lora", "lora": {"rank": 2, "modules_to_save": ["embed_tokens", "head"], "rows": "new"},
}  # fmt: skip


@pytest.fixture
def sources(place: Path, tmp_path: Path) -> list[dict[str, Any]]:  # noqa: F811
    """Shards and a replayed conversation."""
    episodes = {
        "kind": "episodes", "tasks": {"chat": 1}, "rows": 2, "seed": 9, "canvases": {"64x64": 1.0},
        "packing": {"mode": "length", "budget": 300, "open_rows": 2},
    }  # fmt: skip
    return [*recipe(place, tmp_path)["sources"], episodes]


def test_a_word_is_new_where_its_share_is_much_larger() -> None:
    known = Counter({1: 60, 2: 30, 3: 10})
    assert more_often(Counter({1: 50, 2: 40, 3: 5, 9: 5}), known) == [9]
    assert more_often(Counter({1: 2, 3: 3, 2: 5}), known) == [3]  # three tenths, a tenth
    assert more_often(Counter({2: 60, 3: 29, 1: 11}), known) == []
    assert more_often(Counter({2: 1, 1: 1}), Counter()) == [1, 2]


def test_without_tables_nothing_is_counted(
    make: Make,  # noqa: F811
    sources: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def never(*_: object) -> None:
        raise AssertionError("the shards' texts were read")

    monkeypatch.setattr(new_words.CodeShards, "texts", never)
    trainer = make(
        "a", trains="lora", lora={"rank": 2, "modules_to_save": [], "rows": "new"}, sources=sources
    )
    assert trainer.trainable.rows == {}


def test_rows_of_other_words_stay_bit_for_bit(
    make: Make,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
    sources: list[dict[str, Any]],
) -> None:
    trainer = make("a", **LORA, steps=4, sources=sources, ema=0.5)
    vocab, rows = trainer.vocab, trainer.trainable.rows
    words = rows[TABLES[0]]
    codes = torch.arange(vocab.text_size, vocab.text_size + vocab.codes)
    assert torch.equal(rows[TABLES[1]], torch.cat([words, codes]))
    said = {
        token
        for document in trainer.loaders[0].peek(40)
        for segment in document.segments
        if isinstance(segment, Text)
        for token in vocab.encode(segment.text)
    }
    assert 0 < len(words) < len(said) and set(words.tolist()) <= said
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    final = trainer.fit()
    start = dict(load_bundle(place / "base").model.named_parameters())
    adapter = tmp_path / "a" / "adapter"
    assert run(["export", str(place / "base"), "--adapter", str(adapter), "-o", str(tmp_path / "m")]) == 0
    for name in TABLES:
        now = dict(trainer.model.named_parameters())[name]
        moved = (now != before[name]).any(1).nonzero().flatten()
        assert torch.equal(moved, rows[name])
        stays = torch.ones(len(now), dtype=torch.bool)
        stays[rows[name]] = False
        for folder in (final, tmp_path / "m"):
            told = dict(load_bundle(folder).model.named_parameters())[name]
            assert torch.equal(told[stays], start[name][stays])
            assert not torch.equal(told[rows[name]], start[name][rows[name]])


def test_a_run_that_goes_on_trains_the_same_rows(
    make: Make,  # noqa: F811
    sources: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    changes = LORA | {"sources": sources}
    whole, first = make("a", **changes), make("b", **changes)
    told = [whole.advance() for _ in range(5)]
    for _ in range(3):
        first.advance()
    first.save()
    second = make("b", **changes)
    assert [second.advance() for _ in range(2)] == told[3:]
    same(whole, second)
    for name, rows in whole.trainable.rows.items():
        assert torch.equal(second.trainable.rows[name], rows)
    second.save()
    monkeypatch.setattr(new_words, "TIMES", 0)  # another version, say
    with pytest.raises(StorageError, match="made with another choice of new words than"):
        make("b", **changes)


def test_one_table_alone(make: Make, sources: list[dict[str, Any]]) -> None:  # noqa: F811
    lora = LORA["lora"] | {"modules_to_save": ["embed_tokens"]}
    assert list(make("a", trains="lora", lora=lora, sources=sources).trainable.rows) == [TABLES[0]]
    assert make("b", trains="lora", lora=lora | {"rows": "all"}, sources=sources).trainable.rows == {}


def test_without_new_words_it_says_so(
    make: Make,  # noqa: F811
    place: Path,  # noqa: F811
    tmp_path: Path,
    sources: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert make("a", trains="lora", lora={"rows": "new"}, sources=sources).trainable.rows == {}  # no table
    built = from_dict(ModelRecipe, recipe(place, tmp_path, **LORA, sources=sources[1:]))
    with pytest.raises(
        ConfigError,
        match=r"lora\.rows: new are those of words in shards, and no source has any: set rows: all",
    ):
        built.check(1)
    monkeypatch.setattr(new_words, "TIMES", 1e9)
    alone = make("b", **LORA)  # nothing is replayed: all of their words are new
    monkeypatch.setattr(new_words, "more_often", lambda new, known: [])
    assert len(alone.trainable.rows[TABLES[0]]) > 3
    with pytest.raises(ConfigError, match=r"have no words but those of what is replayed: set rows: all"):
        make("c", **LORA, sources=sources)
