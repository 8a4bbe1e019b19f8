"""Which rows of the tables a fine-tune needs: those of words that are new to what it starts from.

AdamW moves a row by its rate however small the gradient is, so of a table that trains whole every row drifts, most of all
in the head, where a token is pushed away wherever it is not said: of `nano`'s text rows by a quarter of their length.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.data.code_shards import CodeShards
from nextflow_ar.data.loader import ShardSource
from nextflow_ar.data.transforms import contents
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training.recipe import ModelRecipe
from nextflow_ar.types import Document, Text

_LOG = logging.getLogger(__name__)
LOOK = 512
"""Documents of every replayed source that are looked at."""
TIMES = 3
"""How much larger a share of new texts than of replayed ones makes a token a new word's. (The emoji's: colours and
"background", which are no news, up to 1.5, pieces of names mostly from 4 on.)
"""
_MOST = 100_000
"""Documents of every folder of shards, at most: its first ones. Folders count by what they hold, whatever their weight."""


class _Replayed(Protocol):
    def peek(self, number: int, /) -> Iterable[Document]: ...


def new_rows(
    recipe: ModelRecipe,
    image_tokenizer: ImageTokenizer,
    vocab: Vocabulary,
    replayed: Iterable[_Replayed],
) -> dict[str, Tensor]:
    """Name of every table of ``lora.modules_to_save`` -> the rows of it that train, where ``lora.rows`` is "new": tokens
    that are :data:`TIMES` as large a share of the texts in the recipe's shards as of ``replayed`` ones, and all codes in
    the head. Empty otherwise, and where no table trains. The same at every start of a run.

    Raises ConfigError where the shards have no such token, StorageError where they cannot be read.
    """
    if recipe.lora is None or recipe.lora.rows != "new" or not recipe.lora.modules_to_save:
        return {}
    folders = {
        f.folder for source in recipe.sources if isinstance(source, ShardSource) for f in source.folders
    }
    new: Counter[int] = Counter()
    for folder in sorted(folders):
        for text, times in Counter(CodeShards(folder, image_tokenizer).texts(_MOST)).items():
            for token in vocab.encode(text):
                new[token] += times
    known = Counter(
        token
        for source in replayed
        for document in source.peek(LOOK)
        for segment in contents(document)
        if isinstance(segment, Text)
        for token in vocab.encode(segment.text)
    )
    words = more_often(new, known)
    if not words:
        raise ConfigError(
            "lora.rows: new: the shards' texts have no words but those of what is replayed: set rows: all"
        )
    _LOG.info(
        "%d of %d text rows train, of words that what is replayed hardly has", len(words), vocab.text_size
    )
    text, codes = torch.tensor(words), torch.arange(vocab.text_size, vocab.text_size + vocab.codes)
    tables = {"embed_tokens": ("backbone.embed_tokens.weight", text)}
    tables["head"] = ("head.weight", torch.cat([text, codes]))
    return dict(tables[name] for name in recipe.lora.modules_to_save)


def more_often(new: Counter[int], known: Counter[int]) -> list[int]:
    """Keys that are at least :data:`TIMES` as large a share of ``new`` as of ``known``, in order."""
    return sorted(k for k, n in new.items() if n * known.total() >= TIMES * known[k] * new.total())
