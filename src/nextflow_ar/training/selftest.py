"""What is checked before the first step: that tokenizer, layout and model agree, and that the data teaches both ways.

A training whose teacher-forced logits differ from those of step-by-step generation learns something that nobody can
sample from; one that reads codes of another codebook learns noise. Both look like a slow start.
"""

from __future__ import annotations

import logging
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError, ImageTokenizerConfig
from nextflow_ar.data.loader import ShardFolder, ShardSource
from nextflow_ar.data.textures import dead_leaves
from nextflow_ar.data.transforms import contents, draws, reads
from nextflow_ar.model.backbone import new_cache
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import IGNORED, LayoutOptions, Sample, build, image_prefix, scale_block
from nextflow_ar.sequence.vocab import BOI, END_OF_TEXT, EOI, TURN_START, Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.material import default_canvas
from nextflow_ar.training.recipe import AnySource
from nextflow_ar.types import Codes, Document, Image, Mark, Text

if TYPE_CHECKING:
    from nextflow_ar.data.loader import ShardLoader

_LOG = logging.getLogger(__name__)
LOOK = 64
"""Documents of every source that are looked at."""
_MOST_SCALES = 8
"""Scales of the picture that is tried; more would show nothing new."""
_PROMPT, _ANSWER = "two dogs on a red square", "a cat"
_PLANS = {
    "think": ("it draws", "set the folder's planned, or "),
    "think_edits": ("it changes a picture", "set "),
    "think_told": ("each of several pictures", "set "),
}
"""Keys of generation.json that have the model plan in words: before what, and what else to do where nothing teaches it."""
_PROMPT_ALONE = "{prompt}"


class Room(NamedTuple):
    """How long documents are in tokens, and how long they may be (``most``); ``pictures``: of the image tokenizer."""

    vocab: Vocabulary
    layout: LayoutOptions
    most: int
    pictures: ImageTokenizerConfig


class SelfTestError(ConfigError):
    """Parts that do not go together: one line that names both sides."""


def check_agreement(
    model: NextFlowModel, tokenizer: ImageTokenizer, vocab: Vocabulary, start: Path | None = None
) -> None:
    """Vocabulary, codebook and schedule are the same on both sides. Raises SelfTestError.

    ``start``: the folder of the model that the training goes on from, which has to have learnt this tokenizer's codes.
    """
    config, image = model.config, tokenizer.config
    sides = (
        ("codes", "the image tokenizer has", image.quantizer.codebook_size, config.codes),
        ("numbers per code vector", "the image tokenizer has", image.quantizer.dim, config.code_dim),
        ("text entries", "the vocabulary has", vocab.text_size, config.text_vocab),
        ("codes", "the vocabulary has", vocab.codes, config.codes),
        ("entries in the head", "the vocabulary has", vocab.text_size + vocab.codes, len(model.head.weight)),
    )
    for what, who, theirs, ours in sides:
        if theirs != ours:
            raise SelfTestError(f"self-test: {who} {theirs} {what}, the model {ours}")
    if image.num_scales > config.max_scales:
        raise SelfTestError(
            f"self-test: the image tokenizer draws {image.num_scales} scales, the model has embeddings for "
            f"{config.max_scales}"
        )
    own = None if start is None else start / "image_tokenizer"
    if own is not None and ImageTokenizer.from_pretrained(own).fingerprint() != tokenizer.fingerprint():
        raise SelfTestError(
            f"self-test: {start} was trained with the codes of another image tokenizer than the recipe's: name its own "
            f"({own}), or set codes: carried or codes: anew to learn the new ones"
        )
    marks = {token: vocab.special(token) for token in (BOI, EOI, END_OF_TEXT)}
    if len(set(marks.values())) < len(marks) or not all(0 <= i < vocab.text_size for i in marks.values()):
        raise SelfTestError(f"self-test: the special tokens' ids are wrong: {marks}")


@torch.no_grad()
def check_generation(
    model: NextFlowModel,
    tokenizer: ImageTokenizer,
    vocab: Vocabulary,
    layout: LayoutOptions,
    *,
    tolerance: float = 1e-3,
) -> float:
    """Encode a picture, lay it out between two texts, and compare a whole forward pass with one step after the other.

    The layout's targets are the codes again and decode to a picture; every place that predicts has the same hidden state
    and logits both ways, up to ``tolerance`` of their size. Runs in the model's own precision, so give it fp32. Returns
    the largest difference found. Raises SelfTestError.
    """
    schedule = ScaleSchedule.square(min(tokenizer.config.num_scales, _MOST_SCALES))
    height, width = schedule.image_size(tokenizer.config.downsample)
    picture = torch.tensor(dead_leaves((0,), height, width), device=tokenizer.device)[None]
    pixels = picture.permute(0, 3, 1, 2).float() / 127.5 - 1
    codes = Codes.plain(schedule, tokenizer.quantize(pixels, schedule).target[0].cpu())
    document = Document((Text(_PROMPT), Image(codes, supervised=True), Text(_ANSWER, supervised=True)))
    sample = build(document, vocab, layout)
    if len(sample) > model.config.max_positions:
        raise SelfTestError(
            f"self-test: a picture of {len(schedule)} scales between two short texts takes {len(sample)} tokens, the "
            f"model's context holds {model.config.max_positions}: raise max_positions"
        )
    _check_round_trip(sample, codes, tokenizer, vocab, height, width)
    training = model.training
    model.eval()
    try:
        whole = _whole(model, sample)
        steps = _stepwise(model, sample, codes, vocab, layout)
    finally:
        model.train(training)
    worst = 0.0
    for where, a, b in (
        ("hidden states", whole, steps),
        ("logits", model.logits(whole), model.logits(steps)),
    ):
        size = float(a.abs().max())
        worst = max(worst, float((a - b).abs().max()) / max(size, 1e-6))
        if not worst <= tolerance:
            raise SelfTestError(
                f"self-test: {where} of a whole pass and of one step after the other differ by {worst:.1e} of their "
                f"size (accepted: {tolerance:.0e}): what is trained could not be sampled from"
            )
    return worst


def _check_round_trip(
    sample: Sample, codes: Codes, tokenizer: ImageTokenizer, vocab: Vocabulary, height: int, width: int
) -> None:
    """From the columns back to text, codes and a picture."""
    told = sample.targets[sample.targets != IGNORED].tolist()
    drawn = torch.tensor([t - vocab.text_size for t in told if t >= vocab.text_size])
    if not torch.equal(drawn, codes.target):
        raise SelfTestError("self-test: the targets of a laid-out picture are not its codes")
    answer = vocab.decode([t for t in told if t < vocab.text_size])
    if answer != _ANSWER:
        raise SelfTestError(f"self-test: {_ANSWER!r} comes back from the layout as {answer!r}")
    picture = tokenizer.decode(Codes.plain(codes.schedule, drawn))
    assert not isinstance(picture, list)
    if picture.size != (width, height):
        raise SelfTestError(
            f"self-test: codes of a {width}x{height} picture decode to {picture.size[0]}x{picture.size[1]}"
        )


def _whole(model: NextFlowModel, sample: Sample) -> Tensor:
    """(L, D) hidden states of all places at once."""
    batch = collate([sample]).to(model.head.weight.device)
    mask = block_mask(batch.blocks, batch.documents)
    return model.backbone.run(model.embed(batch), batch.positions, mask)[0]


def _stepwise(
    model: NextFlowModel, sample: Sample, codes: Codes, vocab: Vocabulary, layout: LayoutOptions
) -> Tensor:
    """The same, prompt first, then scale by scale, then word by word, over a KV cache, as the engine does it."""
    device, schedule, cache = model.head.weight.device, codes.schedule, new_cache()
    prefix = image_prefix(Document((Text(_PROMPT),)), schedule, vocab, layout)
    batch = collate([prefix]).to(device)
    mask = block_mask(batch.blocks, batch.documents)
    found = [model.step(model.embed(batch), batch.positions, mask, cache)]
    clock, block = int(prefix.positions[2].max()), int(prefix.blocks.max())
    fed = codes.input[None].to(device)
    for k in range(len(schedule)):
        columns = scale_block(schedule, k + 1, clock, block, layout)
        x = model.embed_scale(fed[:, : schedule.offsets[k + 1]], schedule, k, columns)
        found.append(model.step(x, columns.positions[:, None].to(device), None, cache))
    done = sum(part.shape[1] for part in found)
    for place in range(done, len(sample)):
        x = model.embed_text(sample.tokens[None, place : place + 1].to(device))
        at = sample.positions[:, None, place : place + 1].to(device)
        found.append(model.step(x, at, None, cache))
    return torch.cat(found, dim=1)[0]


def check_material(
    documents: Iterable[Iterable[Document]],
    sources: Iterable[AnySource],
    loaders: Iterable[ShardLoader],
    generation: Mapping[str, Any],
    room: Room,
) -> list[str]:
    """:func:`check_data`, :func:`check_lengths`, :func:`check_size` and :func:`check_guidance` of ``documents``, those of
    every one of the ``sources``, :func:`check_turns` and :func:`check_manner` of the first of every loader, and a warning
    for every folder of shards that lacks some.
    """
    of_each, sources, shards = [list(some) for some in documents], list(sources), list(loaders)
    seen = [one for some in of_each for one in some]
    lacking = [line for one in shards for line in one.incomplete()]
    for line in lacking:
        _LOG.warning("self-test: %s", line)
    told = check_data(seen, dialogue=bool(generation.get("dialogue")))
    told += check_lengths(seen, sources, room) + check_size(seen, generation, room.pictures)
    if any(map(draws, seen)):
        plain = ((s, of) for s, of in zip(sources, of_each, strict=True) if not isinstance(s, ShardSource))
        told += check_guidance(
            [*plain, *(pair for one in shards for pair in one.peek_folders(LOOK))], generation
        )
    of_shards = [d for one in shards for d in one.peek(LOOK)]
    if not generation.get("dialogue"):
        told += check_turns(of_shards)
    return lacking + told + check_manner(of_shards, generation)


def check_lengths(documents: Iterable[Document], sources: Iterable[AnySource], room: Room) -> list[str]:
    """A warning (logged too) where documents are longer than what the model will ever be given; those that no row of the
    ``sources`` holds are left out anyway.
    """
    held = max(map(_holds, sources), default=math.inf)
    lengths = [n for one in documents if (n := len(build(one, room.vocab, room.layout))) <= held]
    if max(lengths, default=0) <= room.most:
        return []
    line = (
        f"{sum(one > room.most for one in lengths)} of the first {len(lengths)} documents are longer than the model's "
        f"context, {room.most} tokens (the longest {max(lengths)}), so it will never be asked so: raise max_positions"
    )
    _LOG.warning("self-test: %s", line)
    return [line]


def check_size(
    documents: Iterable[Document], generation: Mapping[str, Any], pictures: ImageTokenizerConfig
) -> list[str]:
    """A warning (logged too) where what the model draws when nobody says a size is the size of no drawing among
    ``documents``.
    """
    drawn = Counter(
        s.codes.schedule for d in documents for s in d.segments if isinstance(s, Image) and s.supervised
    )
    default = default_canvas(generation, pictures)
    if not drawn or default in drawn:
        return []
    names = [_named(schedule, pictures) for schedule, _ in drawn.most_common(3)]
    line = (
        f"the model draws {_named(default, pictures)} where no size is asked, none of the first {drawn.total()} drawings "
        f"has it (mostly {', '.join(names)}): set generation: {{size: {names[0]}}}"
    )
    _LOG.warning("self-test: %s", line)
    return [line]


def _named(schedule: ScaleSchedule, pictures: ImageTokenizerConfig) -> str:
    height, width = schedule.image_size(pictures.downsample)
    return f"{width}x{height}"


def _holds(source: AnySource) -> float:
    """Tokens of the longest document that a row of a source takes, as far as its settings tell."""
    packing = getattr(source, "packing", None)
    if packing is None:
        return math.inf
    return (packing.longest or math.inf) if packing.mode == "compute" else packing.budget


def check_data(documents: Iterable[Document], *, dialogue: bool = False) -> list[str]:
    """Warnings, one line each (logged too), where nothing among ``documents`` teaches drawing, or reading, and where some
    have no chat marks although the model is one of ``dialogue``, or have them although it is not.
    """
    seen = list(documents)
    told = []
    if not any(draws(document) for document in seen):
        told.append(f"nothing in the first {len(seen)} documents teaches drawing")
    if not any(reads(document) for document in seen):
        told.append(f"nothing in the first {len(seen)} documents teaches reading pictures")
    plain = sum(Mark(TURN_START) not in document.segments for document in seen)
    if dialogue and plain:
        told.append(
            f"{plain} of the first {len(seen)} documents have no chat marks, which this model is asked with: dialogue: true"
        )
    if not dialogue and plain < len(seen):
        told.append(
            f"{len(seen) - plain} of the first {len(seen)} documents have chat marks, which this model is not asked with: "
            "set generation: {dialogue: true}"
        )
    for line in told:
        _LOG.warning("self-test: %s", line)
    return told


def check_manner(documents: Iterable[Document], generation: Mapping[str, Any]) -> list[str]:
    """Warnings, one line each (logged too), where a model would be asked in another way than ``documents``, those of
    shards, teach it: with a plan in words before what it draws, or a question about a picture, that none of them has, or
    for films in words that are none of theirs.
    """
    planned: dict[str, list[bool]] = {key: [] for key in _PLANS}
    asked: list[bool] = []
    films: list[str] = []
    for segments in map(contents, documents):
        pictures = [i for i, s in enumerate(segments) if isinstance(s, Image)]
        drawn = [i for i in pictures if segments[i].supervised]
        if drawn:
            key = _form(segments, len(pictures) - len(drawn), len(drawn))
            if key and drawn[0]:  # without its condition it has no plan either
                planned[key].append(any(s.supervised for s in segments[: drawn[0]]))
            said = [s for s in segments if isinstance(s, Text)]
            alone = len(drawn) == len(pictures) == len(segments) - len(said) > 1
            if alone and said and segments[: len(said)] == said and not any(s.supervised for s in said):
                films.append(" ".join(s.text.strip() for s in said))
        elif pictures and segments[pictures[0] + 1 :]:
            asked.append(pictures[0] > 0 or not segments[pictures[0] + 1].supervised)
    told = [
        f"the model plans in words before {what}, no document of the shards does: {advice}generation: {{{key}: false}}"
        for key, (what, advice) in _PLANS.items()
        if generation.get(key) and planned[key] and not any(planned[key])
    ]
    if generation.get("caption") and asked and not any(asked):
        told.append(
            f"the model is asked {generation['caption']!r} about a picture, no document of the shards asks anything: set "
            "the folder's question"
        )
    phrase = str(generation.get("video", _PROMPT_ALONE))
    form = re.escape(phrase)
    for place in (_PROMPT_ALONE, "{frames}"):
        form = form.replace(re.escape(place), ".*")
    if films and not any(re.fullmatch(form, film, re.DOTALL) for film in films):
        told.append(
            f"the model is asked for a film as {phrase!r}, none of the shards is: set "
            f"generation: {{video: {_PROMPT_ALONE!r}}}, or what their captions have"
        )
    for line in told:
        _LOG.warning("self-test: %s", line)
    return told


def check_turns(documents: Iterable[Document]) -> list[str]:
    """A warning (logged too) where some of shards' ``documents`` are conversations without chat marks.

    These have a text that is given right behind one that is learnt. (Episodes have such exercises in plain text, too.)
    """
    seen = list(documents)
    turns = sum(
        any(
            isinstance(a, Text) and a.supervised and isinstance(b, Text) and not b.supervised
            for a, b in pairwise(document.segments)
        )
        for document in seen
        if not any(isinstance(s, Mark) for s in document.segments)
    )
    if not turns:
        return []
    line = (
        f"{turns} of the first {len(seen)} documents of the shards go on asking behind an answer, without a mark between "
        "the turns: set the folder's dialogue: true"
    )
    _LOG.warning("self-test: %s", line)
    return [line]


def _form(segments: list[Text | Image], shown: int, drawn: int) -> str:
    """The key that says whether a drawing of this kind is planned; "" where that cannot be told: behind several given
    pictures, or one without a word, there may be the next frame of a film as well as an edit.
    """
    if drawn > 1:
        return "think_told"
    if not shown:
        return "think"
    asked = any(isinstance(s, Text) and not s.supervised for s in segments)
    return "think_edits" if shown == 1 and asked else ""


def check_guidance(
    material: Iterable[tuple[AnySource | ShardFolder, Iterable[Document]]], generation: Mapping[str, Any]
) -> list[str]:
    """A warning (logged too) where pictures will be drawn with guidance, and no source that draws ever leaves their
    condition out: guidance contrasts with pictures that are drawn of nothing. ``material``: sources, of shards
    folders, and what they give.
    """
    strength = generation.get("guidance", 1.0)
    if all(one == 1 for one in (strength if isinstance(strength, list | tuple) else [strength])):
        return []
    for source, documents in material:
        drawn = [said for one in documents if draws(one) and (said := contents(one))]
        dropped = getattr(source, "condition_dropout", 0.0) > 0
        if any(isinstance(first, Image) and first.supervised for first, *_ in drawn) or (drawn and dropped):
            return []
    line = (
        f"pictures are drawn with guidance {strength}, no source that draws leaves a condition out: set condition_dropout, "
        "or generation: {guidance: 1.0}"
    )
    _LOG.warning("self-test: %s", line)
    return [line]


def self_test(
    model: NextFlowModel, tokenizer: ImageTokenizer, vocab: Vocabulary, layout: LayoutOptions
) -> None:
    """All that can be said about a model before it is trained. Raises SelfTestError, one line."""
    check_agreement(model, tokenizer, vocab)
    check_generation(model, tokenizer, vocab, layout)
