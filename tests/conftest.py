"""A tiny checkpoint with random weights: every real part, in milliseconds."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from nextflow_ar.config import ImageTokenizerConfig, ModelConfig, QuantizerConfig, SemanticConfig
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.sequence.vocab import Vocabulary, train_text_tokenizer
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.training import material
from nextflow_ar.training.scenes import SceneBatches

CORPUS = [
    "a red circle on a blue background",
    "two dogs and a cat",
    "a picture of three frogs, green background",
]

TINY_SEMANTIC = SemanticConfig(
    patch=8, hidden=32, layers=1, heads=1, intermediate=48, position_grid=4, decoder_layers=1
)
TINY_TOKENIZER = ImageTokenizerConfig(
    downsample=8,
    num_scales=5,
    encoder_channels=(8, 16, 16),
    encoder_blocks=1,
    decoder_channels=(8, 16, 16),
    decoder_blocks=1,
    decoder_sees_semantic=True,
    quantizer=QuantizerConfig(
        codebook_size=24, semantic_dim=4, pixel_dim=6, semantic_weight=1.0, normalize=False, refine=0.0
    ),
    semantic=TINY_SEMANTIC,
)
TINY_MODEL = ModelConfig(
    text_vocab=300,
    codes=24,
    code_dim=10,
    hidden=48,
    layers=2,
    heads=3,
    kv_heads=3,
    intermediate=64,
    max_positions=256,
    rms_eps=1e-6,
    rope="per_axis",
    rope_theta=100.0,
    rope_sections=(2, 3, 3),
    rope_range=12.0,
    max_scales=18,
    scale_input="residual",
    closing_input="residual",
    context_images="scales",
    positions="rope",
)


def tiny_image_tokenizer(seed: int = 0) -> ImageTokenizer:
    torch.manual_seed(seed)
    tokenizer = ImageTokenizer(TINY_TOKENIZER)
    tokenizer.quantizer.codebook.normal_(0, 0.5)
    with torch.no_grad():
        for parameter in tokenizer.parameters():
            if parameter.ndim > 1 and not parameter.any():
                parameter.normal_(0, 0.1)  # what starts at zero must show in tests as well
        for layer in (tokenizer.encoder.layers[-1], tokenizer.semantic_head.layers[-1]):
            layer.weight.mul_(4.0)
    return tokenizer.eval().requires_grad_(False)


def tiny_model(config: ModelConfig = TINY_MODEL, seed: int = 0) -> NextFlowModel:
    generator = torch.Generator().manual_seed(seed)
    model = NextFlowModel(config)
    model.initialise(generator)
    with torch.no_grad():
        model.head.weight.normal_(0, 0.3, generator=generator)
        for parameter in model.parameters():
            if parameter.ndim == 2 and not parameter.any():
                parameter.normal_(
                    0, 0.1, generator=generator
                )  # what starts at zero must show in tests as well
            if parameter.ndim == 2:
                parameter.mul_(3.0)  # far from zero, so that every part shows in the logits
    return model.eval().requires_grad_(False)


def tiny_bundle(config: ModelConfig = TINY_MODEL) -> Bundle:
    image_tokenizer = tiny_image_tokenizer()
    model = tiny_model(config)
    model.scale_inputs.start_from(image_tokenizer.quantizer.codebook)
    vocab = Vocabulary(train_text_tokenizer(CORPUS, 300), config.text_vocab, config.codes)
    return Bundle(model, image_tokenizer, vocab, {"guidance": 2.0, "top_p": 0.95})


@pytest.fixture(scope="session")
def bundle() -> Bundle:
    return tiny_bundle()


@pytest.fixture(scope="session", autouse=True)
def corpora() -> Iterator[None]:
    """What a source says to train a text tokenizer on takes seconds to write and follows from its settings alone: every
    source's is written once.
    """
    scenes, episodes = SceneBatches.texts, material.episode_texts
    known: dict[str, list[str]] = {}

    def texts(self: SceneBatches, count: int) -> list[str]:
        key = f"{self.source} {count}"
        if key not in known:
            known[key] = list(scenes(self, count))
        return list(known[key])

    def episode_texts(source: EpisodeSource, number: int) -> Iterator[str]:
        key = f"{source} {number}"
        if key not in known:
            known[key] = list(episodes(source, number))
        return iter(list(known[key]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SceneBatches, "texts", texts)
        patch.setattr(material, "episode_texts", episode_texts)
        yield
