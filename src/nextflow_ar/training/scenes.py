"""The playground as a source of batches: scenes are drawn, encoded and laid out at every step."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from nextflow_ar.config import ConfigError
from nextflow_ar.data.playground.mixture import SceneMixture
from nextflow_ar.data.tasks import WORD_CLASSES, caption_corpus, document, plan_document
from nextflow_ar.precision import mixed_precision
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, collate
from nextflow_ar.sequence.layout import TEXT_SCALE, LayoutOptions, build
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.tokenizer.pixels import to_unit
from nextflow_ar.tokenizer.quantizer import SelfCorrection
from nextflow_ar.training.recipe import Source
from nextflow_ar.types import Codes, Document


class SceneBatches:
    """Batches of one playground source. A batch follows from the step and from what the generator holds."""

    def __init__(self, source: Source, tokenizer: ImageTokenizer) -> None:
        self.source, self.tokenizer = source, tokenizer
        self.mixture = SceneMixture(source.data)
        self.schedule = ScaleSchedule.square(tokenizer.config.num_scales)
        if source.scales is not None and not 1 <= source.scales <= len(self.schedule):
            raise ConfigError(
                f"a source's scales are from 1 to the image tokenizer's {len(self.schedule)}, got {source.scales}"
            )

    @torch.no_grad()
    def batch(
        self,
        step: int,
        vocab: Vocabulary,
        layout: LayoutOptions,
        classes: list[Tensor],
        correction: SelfCorrection | None,
        generator: torch.Generator,
    ) -> Batch:
        """Scenes, codes, documents, sequences of one step. ``classes``: as :func:`word_classes` makes them."""
        source = self.source
        numbers = range(step * source.rows, (step + 1) * source.rows)
        if source.task == "plan":
            documents = [plan_document(self.mixture, i) for i in numbers]
        else:
            documents = self._drawn(numbers, correction, generator)
        samples = [build(d, vocab, layout) for d in documents]
        longest = max(len(sample) for sample in samples)
        # A rare long text must not end a run; steps of 32 keep the number of compiled shapes small.
        batch = collate(samples, source.length if longest <= source.length else -(-longest // 32) * 32)
        return swap_words(batch, source.swap, classes, generator)

    def _drawn(
        self, numbers: range, correction: SelfCorrection | None, generator: torch.Generator
    ) -> list[Document]:
        scenes, pictures = self.mixture.pictures(numbers.start, len(numbers))
        device = self.tokenizer.device
        pixels = to_unit(torch.from_numpy(pictures).to(device)).contiguous(memory_format=torch.channels_last)
        seen = generator
        if device.type != "cpu":
            seed = int(torch.randint(2**62, (), generator=generator))
            seen = torch.Generator(device).manual_seed(seed)
        with mixed_precision(device):
            codes = self.tokenizer.quantizer.quantize(
                self.tokenizer.embed(pixels), self.schedule, correction=correction, generator=seen
            )
        target, fed = codes.target.cpu(), codes.input.cpu()
        pairs = [Codes(self.schedule, target[i], fed[i]) for i in range(len(scenes))]
        return [
            document(self.source.task, scene, pair, self.mixture, i, self.source.scales)
            for i, scene, pair in zip(numbers, scenes, pairs, strict=True)
        ]

    def peek(self, count: int) -> Iterator[Document]:
        """Documents of the first scenes, their codes left blank."""
        blank = Codes.plain(self.schedule, torch.zeros(self.schedule.num_tokens, dtype=torch.long))
        for i in range(count):
            if self.source.task == "plan":
                yield plan_document(self.mixture, i)
            else:
                yield document(
                    self.source.task, self.mixture.scene(i), blank, self.mixture, i, self.source.scales
                )

    def texts(self, count: int) -> list[str]:
        """Prompts, captions and plans of ``count`` scenes, to train a text tokenizer on."""
        return caption_corpus(self.mixture, count)


def word_classes(vocab: Vocabulary, words: Sequence[Sequence[str]] = WORD_CLASSES) -> list[Tensor]:
    """Ids of the words of every class that are one token within a sentence; classes of one are left out."""
    classes = [[ids[0] for w in several if len(ids := vocab.encode(" " + w)) == 1] for several in words]
    return [torch.tensor(ids) for ids in classes if len(ids) > 1]


def swap_words(batch: Batch, share: float, classes: list[Tensor], generator: torch.Generator) -> Batch:
    """The batch with ``share`` of each class's words in its responses fed as another word of the class.

    A response word is one that the place before it learns to predict. Targets, weights and images stay.
    """
    if share <= 0:
        return batch
    told = torch.zeros_like(batch.tokens, dtype=torch.bool)
    told[:, 1:] = (batch.targets[:, :-1] == batch.tokens[:, 1:]) & (batch.scales[:, 1:] == TEXT_SCALE)
    tokens = batch.tokens.clone()
    for ids in classes:
        chosen = told & torch.isin(batch.tokens, ids)
        chosen &= torch.rand(tokens.shape, generator=generator) < share
        tokens[chosen] = ids[torch.randint(len(ids), (int(chosen.sum()),), generator=generator)]
    return replace(batch, tokens=tokens)
