"""The wide benchmark asks a real pipeline (with random weights): every kind of ask gets the kind of answer it wants."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from nextflow_ar.app.cli import app
from nextflow_ar.app.world_command import world_settings
from nextflow_ar.config import ConfigError
from nextflow_ar.evaluation.world.asking import pictures_of, texts_of
from nextflow_ar.evaluation.world.lines import LINES, item
from nextflow_ar.evaluation.world.pipeline_model import PipelineAnswers
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.sequence.vocab import TURN_END
from tests.conftest import TINY_MODEL, tiny_bundle


@pytest.fixture(scope="module")
def answers() -> PipelineAnswers:
    bundle = tiny_bundle(replace(TINY_MODEL, max_positions=4096))
    bundle.generation = {"guidance": 1.0, "dialogue": True, "canvases": ["64x64", "72x56"]}
    pipeline = NextFlowPipeline(bundle)
    return PipelineAnswers(pipeline, pipeline.defaults, 3)


def asked(name: str, number: int = 0):
    return item(LINES[name], "train", number, (64, 64), "world").ask()


def test_every_kind_of_ask(answers: PipelineAnswers) -> None:
    names = ("draw_scene", "edit", "think", "in_context", "caption_short", "video_draw", "turn_worded")
    asks = [replace(asked(name), words=6) for name in names]
    replies = answers(asks)
    drawn = [len(pictures_of(reply)) for reply in replies]
    assert drawn[:6] == [1, 1, 1, 1, 0, asks[5].pictures] and asks[5].pictures == 3 and drawn[6] <= 1
    assert texts_of(replies[0]) == () and len(texts_of(replies[2])) <= 1
    assert all(p.shape == (64, 64, 3) and p.dtype == np.uint8 for r in replies for p in pictures_of(r))
    again = answers(asks[::-1])[::-1]  # whoever stands beside an ask does not matter
    for before, after in zip(replies, again, strict=True):
        assert texts_of(before) == texts_of(after)
        assert all(np.array_equal(a, b) for a, b in zip(pictures_of(before), pictures_of(after), strict=True))


def test_what_does_not_fit_the_context_is_not_answered() -> None:
    bundle = tiny_bundle(replace(TINY_MODEL, max_positions=700))
    bundle.generation = {"guidance": 1.0, "canvases": ["64x64"]}
    short = PipelineAnswers(NextFlowPipeline(bundle), NextFlowPipeline(bundle).defaults, 0)
    replies = short([asked("story_script"), asked("draw_scene"), asked("video_draw")])
    assert replies[0] == () and replies[2] == () and len(pictures_of(replies[1])) == 1


def test_pictures_through_the_tokenizer_keep_their_sizes(answers: PipelineAnswers) -> None:
    pictures = [
        np.zeros((64, 64, 3), np.uint8),
        np.full((56, 72, 3), 200, np.uint8),
        np.ones((64, 64, 3), np.uint8),
    ]
    found = answers.through(pictures)
    assert [one.shape for one in found] == [one.shape for one in pictures]
    tokenizer = answers.pipeline.image_tokenizer
    alone = tokenizer.encode_bytes(torch.from_numpy(pictures[1])[None]).target
    wanted = tokenizer.decode_bytes(alone, tokenizer.schedule_for(56, 72))[0].numpy()
    assert np.array_equal(found[1], wanted)


def test_language_is_measured_on_the_assistants_words(answers: PipelineAnswers) -> None:
    exchange = [("user", "two dogs"), ("assistant", "a cat")]
    (nats, tokens), (other, _) = answers.read(
        [exchange, [("user", "a cat and a frog"), ("assistant", "two dogs")]]
    )
    vocab = answers.pipeline.bundle.vocab
    assert vocab.special(TURN_END) >= 0
    assert tokens == len(vocab.encode("a cat")) + 1  # and the mark that ends the turn
    alone = answers.read([exchange])[0]
    assert (
        alone[0] == pytest.approx(nats, rel=1e-4) and other > 0 and nats > tokens
    )  # random weights know nothing


def test_the_command_lists_its_lines_and_refuses_others(tmp_path: Path) -> None:
    assert world_settings(None, 8, ["edit"], ["96x96"]).canvases == {"96x96": 1.0}
    assert world_settings(None, 8, [], []).ceiling == 8
    with pytest.raises(ConfigError, match="unknown line 'edits'"):
        world_settings(None, None, ["edits"], [])
    with pytest.raises(ConfigError, match="a canvas has sides of at least 16 pixels, got 64x5"):
        world_settings(None, None, [], ["64x5"])
    assert world_settings(None, None, [], ["16x16"]).canvases == {"16x16": 1.0}
    bad = tmp_path / "bench.yaml"
    bad.write_text("item: 5\n")
    with pytest.raises(ConfigError, match=r"bench\.yaml.*item"):
        world_settings(bad, None, [], [])
    assert json.loads(json.dumps(world_settings(None, 5, [], []).items)) == 5
    told = CliRunner().invoke(app, ["evaluate", "--help"])
    assert told.exit_code == 0 and "--line" in told.output
