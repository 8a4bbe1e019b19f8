"""A pipeline as the benchmark asks it: asks become requests of one engine, many at a time."""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch

from nextflow_ar.evaluation.world.asking import Ask, Reply
from nextflow_ar.generation.documents import Part, part
from nextflow_ar.generation.engine import ContextError, ImageRequest, Request, TextRequest, WriteRequest
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.dialogue import turns
from nextflow_ar.sequence.layout import IGNORED, build, reference_of
from nextflow_ar.types import Codes, Document, ImageReady, Text, TextDelta

GREEDY = SamplingSettings(temperature=0.0)
Said = str | Codes | np.ndarray
"""Words, or a picture: its codes, or its pixels where it is more than they say."""


class PipelineAnswers:
    """Asks to a pipeline. ``settings``: of pictures; words are greedy, thoughts as the pipeline thinks. Every item has a
    seed of its own, which follows from ``seed`` and its name, so answers are independent of each other.
    """

    def __init__(self, pipeline: NextFlowPipeline, settings: SamplingSettings, seed: int) -> None:
        self.pipeline, self.settings, self.seed = pipeline, settings, seed

    def __call__(self, asks: Sequence[Ask]) -> list[Reply]:
        """Answers in order; none where an ask is beyond the model's context. Raises RequestError where a size is."""
        out: list[list[Said]] = [[] for _ in asks]
        groups: dict[object, list[int]] = defaultdict(list)
        for number, ask in enumerate(asks):
            groups[("picture", self._thinks(ask)) if ask.want == "picture" else "other"].append(number)
        for kind, numbers in groups.items():
            mine = [asks[k] for k in numbers]
            if isinstance(kind, tuple):
                found = self._pictures(mine, kind[1])
            else:
                found = self._run([self._request(ask) for ask in mine])
            for k, reply in zip(numbers, found, strict=True):
                out[k] = reply
        return self._decoded(out)

    def _thinks(self, ask: Ask) -> bool:
        """As the pipeline itself does by default."""
        if ask.think is not None:
            return ask.think
        if ask.next_frame:
            return bool(self.pipeline.told_thoughts)
        edited = any(not isinstance(one, str) for _, one in ask.parts)
        return self.pipeline.thinks_edits if edited else self.pipeline.thinks

    def _seed(self, ask: Ask) -> int:
        return (self.seed + zlib.crc32(repr(ask.key).encode())) % 2**63

    def _parts(self, ask: Ask) -> list[Part]:
        said = ((role, one if isinstance(one, str) else self.pipeline.encode(one)) for role, one in ask.parts)
        return [part(role, one) for role, one in said]

    def _asked(self, ask: Ask) -> ImageRequest:
        """A picture, as the pipeline itself asks for one, an edit too."""
        schedule = self.pipeline.schedule_for((ask.size[1], ask.size[0]))
        request = self.pipeline.request(self._parts(ask), schedule, self._seed(ask), self.settings)
        shown = [one for _, one in ask.parts if not isinstance(one, str)]
        if shown and reference_of(request.document, schedule) is not None:
            return self.pipeline.sparing(request, shown[-1])
        return request

    def _pictures(self, asks: Sequence[Ask], think: bool) -> list[list[Said]]:
        pipeline = self.pipeline
        requests = [self._asked(ask) for ask in asks]
        said: list[list[Said]] = [[] for _ in requests]
        if think:
            fitting = [k for k, request in enumerate(requests) if self._fits(request)]
            thought = pipeline.think([requests[k] for k in fitting])
            for k, request in zip(fitting, thought, strict=True):
                last = request.document.segments[-1]
                requests[k] = request
                said[k] = [last.text] if isinstance(last, Text) and last.text.strip() else []
        drawn = zip(said, requests, self._run(requests), strict=True)
        return [[*words, *(self._whole(request, one) for one in found)] for words, request, found in drawn]

    def _whole(self, request: ImageRequest, one: Said) -> Said:
        """A changed picture with what is left of the original; anything else as it is."""
        if request.original is None or not isinstance(one, Codes):
            return one
        return np.asarray(self.pipeline.finished(request, one))

    def _request(self, ask: Ask) -> TextRequest | WriteRequest:
        pipeline, manner = self.pipeline, self.pipeline.manner
        document = manner.document(self._parts(ask))
        if ask.want == "text":
            return TextRequest(document, ask.words, self._seed(ask), GREEDY, manner.ends)
        return WriteRequest(
            document,
            0 if ask.want == "pictures" else ask.words,
            ask.pictures,
            pipeline.schedule_for((ask.size[1], ask.size[0])),
            self._seed(ask),
            GREEDY,
            self.settings,
            manner.ends,
            manner.unconditional,
            last_image_ends=True,
            thoughts=pipeline.told_thoughts if ask.pictures else 0,
            thought_settings=pipeline.thought_settings,
        )

    def _fits(self, request: Request) -> bool:
        try:
            self.pipeline.engine.job(0, request)
        except ContextError:
            return False
        return True

    def _run(self, requests: Sequence[Request]) -> list[list[Said]]:
        """Texts and codes of every request, in the order in which they came; nothing for one beyond the model's context."""
        out: list[list[Said]] = [[] for _ in requests]
        fitting = [k for k, request in enumerate(requests) if self._fits(request)]
        for event in self.pipeline.engine.run([requests[k] for k in fitting]):
            if not isinstance(event, ImageReady | TextDelta):
                continue
            row = out[fitting[event.row]]
            if isinstance(event, ImageReady):
                row.append(event.codes)
            elif row and isinstance(row[-1], str):
                row[-1] += event.text
            else:
                row.append(event.text)
        return [[one for one in row if not isinstance(one, str) or one.strip()] for row in out]

    def _decoded(self, replies: Sequence[Sequence[Said]]) -> list[Reply]:
        """The replies with pictures for codes, decoded many at a time."""
        groups: dict[object, list[Codes]] = defaultdict(list)
        for reply in replies:
            for one in reply:
                if isinstance(one, Codes):
                    groups[one.schedule].append(one)
        pictures: dict[int, np.ndarray] = {}
        tokenizer, device = self.pipeline.image_tokenizer, self.pipeline.engine.device
        with torch.inference_mode():
            for several in groups.values():
                indices = torch.stack([one.target for one in several]).to(device)
                decoded = tokenizer.decode_bytes(indices, several[0].schedule).cpu().numpy()
                pictures |= {id(codes): picture for codes, picture in zip(several, decoded, strict=True)}
        return [
            tuple(
                one.strip() if isinstance(one, str) else pictures[id(one)] if isinstance(one, Codes) else one
                for one in reply
            )
            for reply in replies
        ]

    @torch.inference_mode()
    def through(self, pictures: Sequence[np.ndarray]) -> list[np.ndarray]:
        """Pictures (H, W, 3) uint8 through the image tokenizer and back, at their own sizes."""
        tokenizer, device = self.pipeline.image_tokenizer, self.pipeline.engine.device
        groups: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for number, picture in enumerate(pictures):
            groups[picture.shape].append(number)
        out: dict[int, np.ndarray] = {}
        for shape, numbers in groups.items():
            pixels = torch.from_numpy(np.stack([pictures[k] for k in numbers])).to(device)
            codes = tokenizer.encode_bytes(pixels).target
            decoded = tokenizer.decode_bytes(codes, tokenizer.schedule_for(shape[0], shape[1]))
            out |= dict(zip(numbers, decoded.cpu().numpy(), strict=True))
        return [out[k] for k in range(len(pictures))]

    @torch.inference_mode()
    def read(self, exchanges: Sequence[Sequence[tuple[str, str]]]) -> list[tuple[float, int]]:
        """(nats, tokens) of the assistant's words (with the marks that end its turns) in every exchange."""
        bundle = self.pipeline.bundle
        samples = []
        for exchange in exchanges:
            parts = [(role, Text(text, role == "assistant")) for role, text in exchange]
            segments = turns(parts) if self.pipeline.manner.dialogue else tuple(one for _, one in parts)
            samples.append(build(Document(segments), bundle.vocab, bundle.layout))
        batch = collate(samples).to(self.pipeline.engine.device)
        scores = bundle.model.logits(bundle.model.hidden(batch)).float().log_softmax(-1)
        told = batch.targets != IGNORED
        picked = scores.gather(-1, batch.targets.clamp_min(0)[..., None])[..., 0]
        nats = -(picked * told).sum(1)
        return list(zip(nats.tolist(), told.sum(1).tolist(), strict=True))
