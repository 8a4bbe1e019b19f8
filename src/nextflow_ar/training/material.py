"""What a step of the transformer is computed from, and the text tokenizer of a run that starts from nothing."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from nextflow_ar.data.episodes import EpisodeSource, episode_texts
from nextflow_ar.data.loader import ShardSource
from nextflow_ar.sequence.batch import Batch
from nextflow_ar.sequence.vocab import train_text_tokenizer
from nextflow_ar.storage import write_folder
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.episode_sources import Draft
from nextflow_ar.training.recipe import ModelRecipe

CORPUS = 4000
"""Documents of every source whose texts a text tokenizer is trained on."""


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
