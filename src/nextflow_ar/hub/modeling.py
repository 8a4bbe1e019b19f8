"""A whole checkpoint as a transformers model: logits by teacher forcing, and text or pictures from ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar

import torch
from jaxtyping import Int
from PIL import Image as PILImage
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from nextflow_ar.config import to_dict
from nextflow_ar.generation.engine import ImageRequest, TextRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline, best_dtype, fold_seed, resolve_model
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.hub.configuration import NextFlowConfig
from nextflow_ar.hub.processing import as_pixels
from nextflow_ar.hub.tokens import asks, blind, changes, document_of
from nextflow_ar.model.checkpoint import Bundle, load_bundle
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import IGNORED, build
from nextflow_ar.storage import StorageError, first_line
from nextflow_ar.types import Codes, Document, Image, TextDelta

_LOADED_OTHERWISE = {
    "load_in_8bit",
    "load_in_4bit",
    "quantization_config",
    "subfolder",
    "gguf_file",
    "variant",
}
"""Of from_pretrained's options those that ask for other weights or numbers than the folder's own."""
_SAMPLED_OTHERWISE = {
    "max_length", "num_return_sequences", "num_beams", "penalty_alpha", "repetition_penalty", "min_new_tokens",
    "stopping_criteria", "logits_processor", "bad_words_ids",
}  # fmt: skip
"""Of generate's options those that ask for other tokens, which the engine does not know."""
_NEUTRAL = {"min_new_tokens": 0, "penalty_alpha": 0.0}
_OF_THE_HUB = ("revision", "token", "cache_dir", "local_files_only", "force_download")


def folder_of(name: str | Path, **options: Any) -> Path:
    """The folder of a model: here, bundled, or downloaded with the Hub options among ``options``. Raises StorageError or
    RequestError.
    """
    asked = {k: options[k] for k in _OF_THE_HUB if options.get(k)}
    if asked and not Path(name).exists() and str(name).count("/") == 1:
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(str(name), **asked))
        except Exception as error:
            raise StorageError(f"{name}: the Hub did not give it ({first_line(error)})") from None
    return resolve_model(name)


def _device(asked: Any) -> torch.device:
    """Raises ValueError for what is not one device."""
    alone = isinstance(asked, dict) and len(asked) == 1  # as accelerate names one for all
    named: Any = next(iter(asked.values())) if alone else asked
    try:
        return torch.device("cpu" if named in (None, "auto") else named)
    except (RuntimeError, TypeError):
        raise ValueError(f"device_map is one device (cpu, cuda:0), got {asked!r}") from None


def _dtype(asked: Any) -> torch.dtype | None:
    """None: what is fastest. Raises ValueError for what is no dtype of numbers."""
    found = getattr(torch, asked, None) if isinstance(asked, str) and asked != "auto" else asked
    if found in (None, "auto") and asked in (None, "auto"):
        return None
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"dtype is one such as float32 or bfloat16, got {asked!r}")
    return found


class NextFlowForConditionalGeneration(PreTrainedModel):
    """Transformer and image tokenizer of one checkpoint; :attr:`pipeline` is the same as a ``NextFlowPipeline``."""

    config_class = NextFlowConfig
    base_model_prefix = "model"
    output_modalities: ClassVar[tuple[str, ...]] = ("text", "image")

    def __init__(self, config: NextFlowConfig, bundle: Bundle | None = None, **_: Any) -> None:
        if bundle is None:
            raise ValueError(
                "a NextFlow model is more than its configuration: use from_pretrained, or nextflow-ar init"
            )
        super().__init__(config)
        self.model, self.image_tokenizer = bundle.model, bundle.image_tokenizer
        self._bundle = bundle
        self._pipeline = NextFlowPipeline(bundle)

    @classmethod
    def from_pretrained(  # pyright: ignore
        cls,
        name: str | Path = "nano",
        *_: Any,
        config: NextFlowConfig | None = None,
        dtype: torch.dtype | str | None = None,
        torch_dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        **kwargs: Any,
    ) -> NextFlowForConditionalGeneration:
        """Load a checkpoint folder, a Hub id or a bundled model, every file verified.

        ``dtype``: of the transformer (None or "auto": the fastest that the device has); ``torch_dtype``: its former name.
        ``device_map``: one device. Raises StorageError or RequestError, one line; ValueError for an option that this model
        does not know and that would change what is loaded, and for a ``config`` of another architecture.
        """
        unknown = sorted(key for key in _LOADED_OTHERWISE & set(kwargs) if kwargs[key])
        if unknown:
            raise ValueError(
                f"a NextFlow model is not loaded with {', '.join(unknown)}; dtype and device_map are known"
            )
        folder = folder_of(name, **kwargs)
        device, chosen = _device(device_map), _dtype(torch_dtype if dtype is None else dtype)
        bundle = load_bundle(folder, device, best_dtype(device) if chosen is None else chosen)
        if config is not None and config.architecture != bundle.model.config:
            given, own = to_dict(config.architecture), to_dict(bundle.model.config)
            changed = sorted(key for key in own if given[key] != own[key])
            raise ValueError(
                f"config is of another architecture than {name}: it differs in {', '.join(changed)}"
            )
        config = config or NextFlowConfig.from_pretrained(folder)
        config.name_or_path = str(name)
        return cls(config, bundle).eval()

    @property
    def input_modalities(self) -> tuple[str, ...]:  # pyright: ignore
        """Text and pictures. transformers' any-to-any pipeline wants torchvision for models that name pictures here, which
        this one does not need; so pictures are named only where torchvision is installed.
        """
        from transformers.utils.import_utils import is_torchvision_available

        return ("text", "image") if is_torchvision_available() else ("text",)

    @property
    def pipeline(self) -> NextFlowPipeline:
        """The checkpoint as a pipeline, on the device where the model is now."""
        if self._pipeline.engine.device != self.model.head.weight.device:
            self._pipeline = NextFlowPipeline(self._bundle)
        return self._pipeline

    def can_generate(self) -> bool:  # pyright: ignore
        """Yes."""
        return True

    def documents(
        self,
        input_ids: Int[Tensor, "b l"],
        pixel_values: Sequence[Tensor] | None = None,
        attention_mask: Int[Tensor, "b l"] | None = None,
    ) -> list[Document]:
        """Rows of token ids and their pictures as documents. Raises ValueError where they do not match."""
        pictures = () if pixel_values is None else pixel_values
        codes: list[Codes] = [self.pipeline.encode(as_pixels(p).numpy()) for p in pictures]
        rest, found, seen = iter(codes), [], self.pipeline.manner.seen
        for number, row in enumerate(input_ids):
            kept = row if attention_mask is None else row[attention_mask[number].bool()]
            found.append(document_of(kept.tolist(), rest, self._bundle.vocab, seen=seen))
        if next(rest, None) is not None:
            raise ValueError("there are more pictures than <boi><eoi> in the token ids")
        return found

    def forward(
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | None = None,
        pixel_values: Sequence[Tensor] | None = None,
        labels: Int[Tensor, "b l"] | None = None,
        **_: Any,
    ) -> CausalLMOutput:
        """Scores (B, L, V) over text and codes behind every token; the places inside pictures are left out. Padding has
        zeros. ``labels``: text ids to predict, -100 where none; shifted here, as transformers does.
        """
        documents = self.documents(input_ids, pixel_values, attention_mask)
        vocab, layout = self._bundle.vocab, self._bundle.layout
        samples = [build(document, vocab, layout, close_last=True) for document in documents]
        scores = self.model.logits(self.model.hidden(collate(samples).to(input_ids.device)))
        out = scores.new_zeros(*input_ids.shape, scores.shape[-1])
        for number, sample in enumerate(samples):
            places = (sample.tokens >= 0).nonzero()[:, 0]
            kept = torch.arange(input_ids.shape[1])
            if attention_mask is not None:
                kept = attention_mask[number].cpu().nonzero()[:, 0]
            if len(places) != len(kept):
                raise ValueError("these token ids are not how the text tokenizer writes their text")
            out[number, kept] = scores[number, places]
        loss = None
        if labels is not None:
            loss = cross_entropy(
                out[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), ignore_index=IGNORED
            )
        return CausalLMOutput(loss=loss, logits=out)

    @torch.inference_mode()
    def generate(  # pyright: ignore
        self,
        input_ids: Int[Tensor, "b l"],
        attention_mask: Int[Tensor, "b l"] | None = None,
        pixel_values: Sequence[Tensor] | None = None,
        *,
        generation_mode: str = "text",
        max_new_tokens: int = 256,
        do_sample: bool = False,
        temperature: float | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        guidance_scale: float | None = None,
        size: tuple[int, int] | None = None,
        think: bool | None = None,
        seed: int = 0,
        **others: Any,
    ) -> Tensor | list[PILImage.Image]:
        """Mode "text": the token ids with the answer behind them, padded on the right; greedy unless ``do_sample``;
        ``guidance_scale`` holds against a word how likely it is without the pictures. Mode "image": a picture for each row.
        Where a row shows pictures, it is drawn in the size of the last; if the turn that is answered shows that one, it is
        changed as ``NextFlowPipeline.edit`` does. What is not said is as the checkpoint has it.

        Raises ValueError for transformers' options that would give other tokens and that this model does not know, and for
        guidance of words where a row has no picture or no words.
        """
        unknown = sorted(
            k for k in _SAMPLED_OTHERWISE & set(others) if others[k] not in (None, _NEUTRAL.get(k, 1), [], ())
        )
        if unknown:
            raise ValueError(
                f"generate knows no {', '.join(unknown)} here: max_new_tokens, do_sample, temperature, top_k, top_p, "
                "guidance_scale and seed are known"
            )
        if generation_mode not in ("text", "image"):
            raise ValueError(f"generation_mode is text or image, got {generation_mode!r}")
        documents = self.documents(input_ids, pixel_values, attention_mask)
        seeds = [fold_seed(seed, row) for row in range(len(documents))]
        given = {"temperature": temperature, "top_k": top_k, "top_p": top_p}
        if generation_mode == "image":
            settings = self.pipeline.defaults.changed(**given, guidance=guidance_scale)
            pictures = () if pixel_values is None else pixel_values
            return self._drawn(documents, pictures, seeds, settings, size, think)
        settings = SamplingSettings().changed(**given) if do_sample else SamplingSettings(temperature=0.0)
        return self._written(input_ids, documents, seeds, settings, guidance_scale, max_new_tokens)

    def _drawn(
        self,
        documents: Sequence[Document],
        pixel_values: Sequence[Tensor],
        seeds: Sequence[int],
        settings: SamplingSettings,
        size: tuple[int, int] | None,
        think: bool | None,
    ) -> list[PILImage.Image]:
        """A picture behind each document."""
        pipeline, rest = self.pipeline, iter(pixel_values)
        requests, planned = [], []
        for row, (document, seed) in enumerate(zip(documents, seeds, strict=True)):
            shown = [(one.codes, next(rest)) for one in document.segments if isinstance(one, Image)]
            codes, pixels = shown[-1] if shown else (None, None)
            schedule = pipeline.schedule_for(size) if codes is None or size is not None else codes.schedule
            request = ImageRequest(document, schedule, seed, settings, pipeline.manner.unconditional)
            edited = changes(document)
            if edited and codes is not None and codes.schedule == schedule:
                request = pipeline.sparing(request, as_pixels(pixels).numpy())
            requests.append(request)
            by_itself = pipeline.thinks_edits if edited else pipeline.thinks
            if by_itself if think is None else think:
                planned.append(row)
        thought = pipeline.think([requests[row] for row in planned])
        for row, request in zip(planned, thought, strict=True):
            requests[row] = request
        return pipeline.draw(requests)

    def _written(
        self,
        input_ids: Int[Tensor, "b l"],
        documents: Sequence[Document],
        seeds: Sequence[int],
        settings: SamplingSettings,
        guidance: float | None,
        tokens: int,
    ) -> Int[Tensor, "b m"]:
        """The token ids with up to so many of the answers behind them."""
        pipeline, vocab = self.pipeline, self._bundle.vocab
        usual = float(self._bundle.generation.get("answer_guidance", 1.0))
        requests = []
        for document, seed in zip(documents, seeds, strict=True):
            without = blind(document)
            if without is None and guidance not in (None, 1):
                raise ValueError(
                    "guidance_scale of a text is against its words without the picture: a row has no picture or no words"
                )
            strength = guidance if guidance is not None else usual if asks(document) else 1.0
            chosen, ends = settings.changed(guidance=strength), pipeline.manner.ends
            requests.append(TextRequest(document, tokens, seed, chosen, ends, unconditional=without))
        texts = [""] * len(requests)
        for event in pipeline.engine.texts(requests):
            if isinstance(event, TextDelta):
                texts[event.row] += event.text
        rows = [vocab.encode(text) for text in texts]
        longest = max(len(row) for row in rows)
        new = torch.tensor([row + [vocab.end] * (longest - len(row)) for row in rows], dtype=torch.long)
        return torch.cat([input_ids, new.to(input_ids.device)], dim=1)

    def save_pretrained(self, save_directory: str | Path, **_: Any) -> None:  # pyright: ignore
        """Write a checkpoint folder, as ``NextFlowPipeline.save_pretrained`` does."""
        self.pipeline.save_pretrained(save_directory)

    def push_to_hub(  # pyright: ignore
        self, repo_id: str, *, private: bool = False, token: str | None = None, **_: Any
    ) -> str:
        """Upload it, as ``NextFlowPipeline.push_to_hub`` does."""
        return self.pipeline.push_to_hub(repo_id, private=private, token=token)
