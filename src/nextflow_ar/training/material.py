"""What a step of the transformer is computed from, what its sources teach a model about itself, and the text tokenizer of a
run that starts from nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nextflow_ar.config import ImageTokenizerConfig
from nextflow_ar.data.episodes import EpisodeSource, canvas_size, episode_texts
from nextflow_ar.data.loader import ShardLoader, ShardSource
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.vocab import train_text_tokenizer
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer, canvas_schedule
from nextflow_ar.training.episode_sources import Draft
from nextflow_ar.training.recipe import ModelRecipe

CORPUS = 4000
"""Documents of every source whose texts a text tokenizer is trained on."""
_RARE = 1 / 200
"""Of the pictures from shards: a canvas of fewer is a stray that is better read at another one."""


@dataclass(frozen=True, eq=False)
class Part:
    """A batch that is computed at once. ``tasks``: of the documents of every row; ``weight``: sum of the loss weights;
    ``seen``: tokens; ``flops``: of training on it; ``replays``: what a distilled model knows already.
    """

    batch: Batch
    tasks: tuple[tuple[str, ...], ...]
    weight: float
    seen: int
    flops: int
    replays: bool = True


def as_parts(found: list[tuple[Draft, Batch]]) -> list[Part]:
    """Drafts with their batches, ready to be computed."""
    return [Part(batch, draft.tasks, draft.weight, draft.seen, draft.flops) for draft, batch in found]


def taught_defaults(
    recipe: ModelRecipe,
    generation: Mapping[str, Any],
    loaders: Collection[ShardLoader],
    tokenizer: ImageTokenizerConfig,
) -> dict[str, Any]:
    """``generation``, the sampling defaults of a run, with what it has been taught so far about how pictures are shown: the
    ``canvases`` of its sources beside those that it has, and the ``fit`` of its shards where all have one. What the
    recipe's own ``generation`` says of either stands. The same in all processes.
    """
    found = dict(generation)
    if "canvases" not in recipe.generation:
        known = found.get("canvases", [])
        default = default_canvas(found, tokenizer).image_size(tokenizer.downsample)
        new = _taught_canvases(recipe, loaders, default) - set(known)
        if new:
            found["canvases"] = [*known, *sorted(new, key=lambda name: (*_area(name), name))]
    ways = {fit for loader in loaders for fit in loader.fits}
    if len(ways) == 1 and "fit" not in recipe.generation and ways != {found.get("fit", "crop")}:
        (found["fit"],) = ways
    return found


def default_canvas(generation: Mapping[str, Any], tokenizer: ImageTokenizerConfig) -> ScaleSchedule:
    """Schedule of what a model with these sampling defaults draws where nobody says a size."""
    if not generation.get("size"):
        return ScaleSchedule.square(tokenizer.num_scales)
    return canvas_schedule(tokenizer, *canvas_size(generation["size"]))


def _taught_canvases(
    recipe: ModelRecipe, loaders: Collection[ShardLoader], default: tuple[int, int]
) -> set[str]:
    """WIDTHxHEIGHT of what is not rare among a run's pictures so far, without ``default`` (height, width)."""
    episodes = [s for s in recipe.sources if isinstance(s, EpisodeSource) and s.scales != 0]
    sizes = {canvas_size(name) for s in episodes for name, weight in s.canvases.items() if weight > 0}
    seen: Counter[str] = Counter()
    for loader in loaders:
        seen.update(loader.canvases)
    sizes |= {canvas_size(name) for name, count in seen.items() if count >= _RARE * seen.total()}
    sizes.discard(default)
    return {f"{width}x{height}" for height, width in sizes}


def _area(name: str) -> tuple[int, int]:
    height, width = canvas_size(name)
    return height * width, width


def shard_texts(source: ShardSource, tokenizer: ImageTokenizer, count: int) -> list[str]:
    """Texts of the first rows of every extraction of a source, to train a text tokenizer on."""
    from nextflow_ar.data.code_shards import CodeShards

    return [t for f in source.folders for t in CodeShards(f.folder, tokenizer).texts(count)]


def own_tokenizer(
    recipe: ModelRecipe, texts: list[str], image_tokenizer: ImageTokenizer, folder: Path
) -> None:
    """Train a text tokenizer on ``texts`` and what a recipe's other sources say, into ``folder``."""
    corpus = list(texts)
    for source in recipe.sources:
        if isinstance(source, ShardSource):
            corpus += shard_texts(source, image_tokenizer, CORPUS)
        elif isinstance(source, EpisodeSource):
            corpus += episode_texts(source, CORPUS)
    tokenizer = train_text_tokenizer(corpus, recipe.text_entries)

    def fill(target: Path) -> None:
        tokenizer.save_pretrained(target)

    write_folder(folder, fill)
