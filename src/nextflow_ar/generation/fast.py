"""Drawing with static shapes: memory laid out once, and every scale one fixed computation, on a GPU one CUDA graph each.

The engine (engine.py) takes requests of any kind as they come. This draws many pictures of one schedule: rows stand at the
same columns of a preallocated cache, prefixes end together (shorter ones begin later and are masked), and what changes
from call to call, codes, clocks and the prefixes' first columns, lies in buffers. Nothing is copied from the host and
nothing is allocated between the scales' first and last kernel, so each scale can be recorded and replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from nextflow_ar.config import ModelConfig
from nextflow_ar.generation.cache import spanned
from nextflow_ar.generation.forcing import Forcing
from nextflow_ar.generation.requests import ContextError, ImageRequest
from nextflow_ar.generation.sampling import draw, guide
from nextflow_ar.model.attention import PrefixMask
from nextflow_ar.model.backbone import Cache
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import image_prefix, next_clock, reference_of, scale_block
from nextflow_ar.types import Codes, Done, Event, ImageReady, ScaleReady

Watch = Callable[[str], AbstractContextManager[object]]
"""Called with the name of a phase ("prefill", "scale 7", "sampling"); what it returns is entered around that phase."""


class StaticCache:
    """Keys and values of ``rows`` sequences that all stand at the same column, as attention layers call it."""

    def __init__(
        self, config: ModelConfig, rows: int, columns: int, device: torch.device, dtype: torch.dtype
    ) -> None:
        shape = (rows, config.kv_heads, columns, config.hidden // config.heads)
        self.keys, self.values = (
            [torch.zeros(shape, device=device, dtype=dtype) for _ in range(config.layers)] for _ in range(2)
        )
        self.start = self.end = self.seen = 0

    def at(self, start: int, end: int, seen: int) -> None:
        """Let the next step write columns ``start`` to ``end`` and see the first ``seen``."""
        self.start, self.end, self.seen = start, end, seen

    def update(
        self, keys: Float[Tensor, "r h n d"], values: Float[Tensor, "r h n d"], layer: int, *_: Any, **__: Any
    ) -> tuple[Float[Tensor, "r h k d"], Float[Tensor, "r h k d"]]:
        """Write a layer's new keys and values; returns what the step sees of that layer."""
        for store, given in ((self.keys[layer], keys), (self.values[layer], values)):
            store[:, :, self.start : self.end] = given
        return self.keys[layer][:, :, : self.seen], self.values[layer][:, :, : self.seen]

    def get_seq_length(self, *_: Any) -> int:
        """Columns before the new ones: part of transformers' cache interface."""
        return self.start


class StaticDrawer:
    """Draws up to ``pictures`` pictures of ``schedule`` at a time.

    ``guided``: room for the unconditional rows. ``prefix``: most places of a prompt with its ``<boi>``. ``attention``:
    "split" runs the fused kernel without a mask and joins the prefix to it, "masked" gives it a mask over all (None: split,
    but in fp32 on a GPU, which has no such kernel, masked). ``graphs``: record every scale as a CUDA graph when it is first
    drawn (None: where there is CUDA).
    Pictures are the engine's: the same codes up to rounding. Not for several threads: its memory is its own.
    """

    def __init__(
        self,
        bundle: Bundle,
        schedule: ScaleSchedule,
        pictures: int,
        *,
        guided: bool,
        prefix: int = 128,
        attention: Literal["split", "masked"] | None = None,
        graphs: bool | None = None,
    ) -> None:
        self.bundle, self.schedule, self.pictures = bundle, schedule, pictures
        self.tracks, self.prefix = 2 if guided else 1, prefix
        self.model, self.layout = bundle.model, bundle.layout
        weight = bundle.model.head.weight
        self.device = device = weight.device
        self.graphs = device.type == "cuda" if graphs is None else graphs
        rows, columns = pictures * self.tracks, spanned(prefix + schedule.num_tokens - 1)
        dtype = bundle.model.backbone.norm.weight.dtype
        whole = device.type == "cuda" and dtype == torch.float32
        self.attention = attention or ("masked" if whole else "split")
        self.cache = StaticCache(bundle.model.config, rows, columns, device, dtype)
        self.codes = torch.zeros(pictures, schedule.num_tokens, dtype=torch.long, device=device)
        self.clocks = torch.zeros(rows, 1, device=device)
        self.first = torch.zeros(rows, 1, dtype=torch.long, device=device)
        blocks = [scale_block(schedule, k, 0, 0, self.layout) for k in range(len(schedule))]
        self.blocks = [
            replace(b, scales=b.scales.to(device), lengths=b.lengths.to(device)) for b in blocks
        ]  # [0] is not used
        self.places = [b.positions.to(device) for b in blocks]
        self.recorded: dict[int, tuple[torch.cuda.CUDAGraph, Tensor]] = {}

    @torch.inference_mode()
    def images(
        self,
        requests: Sequence[ImageRequest],
        *,
        noise: Literal["host", "device"] = "host",
        watch: Watch | None = None,
    ) -> Iterator[Event]:
        """Draw all requests; events are :meth:`Engine.images`'. Raises ContextError for a prompt that does not fit, and
        ValueError for more requests than places, another schedule, or guidance where there is no room for it.

        ``noise``: "host" draws a seed's noise on the CPU, as the engine does; "device" draws it on the model's device,
        much faster for large grids, another picture for the same seed.
        """
        self._check(requests)
        watch = watch or _unwatched
        place = self.device if noise == "device" else torch.device("cpu")
        generators = [torch.Generator(place).manual_seed(r.seed) for r in requests]
        quantizer = self.bundle.image_tokenizer.quantizer
        forcings = [None if r.forced is None else Forcing(r.forced, quantizer) for r in requests]
        count = len(self.schedule)
        for k in range(count):
            with watch("prefill" if k == 0 else f"scale {k + 1}"):
                scores = self._begin(requests) if k == 0 else self._replayed(k)
            with watch("sampling"):
                for row, request in enumerate(requests):
                    chosen = self._chosen(scores, row, request, k, generators[row])
                    forcing = forcings[row]
                    if forcing is not None:
                        chosen = forcing.choose(k, chosen.cpu())
                    self.codes[row, self.schedule.offsets[k] : self.schedule.offsets[k + 1]] = chosen
            so_far = self.codes[: len(requests), : self.schedule.offsets[k + 1]].cpu()
            for row in range(len(requests)):
                yield ScaleReady(row, k, count, so_far[row])
        for row in range(len(requests)):
            yield ImageReady(row, Codes.plain(self.schedule, self.codes[row].cpu()))
            yield Done(row, "stop")

    def _check(self, requests: Sequence[ImageRequest]) -> None:
        if not 0 < len(requests) <= self.pictures:
            raise ValueError(f"this drawer takes 1 to {self.pictures} requests, got {len(requests)}")
        for request in requests:
            if request.schedule != self.schedule:
                raise ValueError("all requests are of the drawer's schedule")
            before = request.document, request.unconditional
            if self.layout.copies and any(reference_of(d, self.schedule) is not None for d in before):
                raise ValueError(
                    "this drawer copies no picture: a document with pictures of its size is the engine's"
                )
            if request.settings.guided and self.tracks == 1:
                raise ValueError("guidance needs a drawer made with guided=True")

    def _begin(self, requests: Sequence[ImageRequest]) -> Float[Tensor, "r n v"]:
        """Feed the prefixes of all rows, conditional ones first; returns the scores of the first grid."""
        filled = [*requests, *([requests[0]] * (self.pictures - len(requests)))]
        documents = [r.document for r in filled]
        if self.tracks == 2:
            documents += [r.unconditional for r in filled]
        samples = [image_prefix(d, self.schedule, self.bundle.vocab, self.layout) for d in documents]
        longest, limit = max(map(len, samples)), self.model.config.max_positions
        if longest > self.prefix:
            raise ContextError(f"the prompt takes {longest} places, this drawer holds {self.prefix}")
        if longest + self.schedule.num_tokens - 1 > limit:
            need = longest + self.schedule.num_tokens - 1
            raise ContextError(f"the request takes {need} tokens, the model's context holds {limit}")
        batch = collate(samples, self.prefix, align="right").to(self.device)
        self.first.copy_(torch.tensor([[self.prefix - len(s)] for s in samples]))
        self.clocks.copy_(torch.tensor([[float(next_clock(s)[0])] for s in samples]))
        self.cache.at(0, self.prefix, self.prefix)
        mask = block_mask(batch.blocks, batch.documents)
        hidden = self.model.step(self.model.embed(batch), batch.positions, mask, cast(Cache, self.cache))
        return self._scores(hidden[:, -1:])

    def _step(self, k: int) -> Float[Tensor, "r n v"]:
        """Feed scale ``k - 1`` (0-based) of the codes; returns the scores of scale ``k``. Everything that it reads but
        ``k`` lies in buffers.
        """
        size, offset = self.schedule.sizes[k], self.prefix - 1 + self.schedule.offsets[k]
        x = self.model.embed_scale(self.codes, self.schedule, k - 1, self.blocks[k])
        row, column, scale = (axis.expand(self.clocks.shape[0], -1) for axis in self.places[k])
        positions = torch.stack([row, column, scale + self.clocks - 1])
        end = offset + size
        split = self.attention == "split"
        seen = end if split else spanned(end)
        columns = torch.arange(self.prefix if split else seen, device=self.device)
        mask: Any = ((columns >= self.first) & (columns < end))[:, None, None]
        mask = PrefixMask(mask) if split else mask.expand(-1, 1, size, -1)
        self.cache.at(offset, end, seen)
        hidden = self.model.step(x.repeat(self.tracks, 1, 1), positions, mask, cast(Cache, self.cache))
        return self._scores(hidden)

    def _scores(self, hidden: Tensor) -> Tensor:
        first = self.bundle.vocab.text_size
        return F.linear(hidden, self.model.head.weight[first : first + self.bundle.vocab.codes])

    def _chosen(
        self, scores: Tensor, row: int, request: ImageRequest, k: int, generator: torch.Generator
    ) -> Tensor:
        guidance, temperature, top_k, top_p = request.settings.at(k, len(self.schedule))
        own = scores[row].float()
        if request.settings.guided:
            own = guide(own, scores[self.pictures + row].float(), guidance)
        return draw(own, temperature, top_k, top_p, generator)

    def _replayed(self, k: int) -> Tensor:
        """:meth:`_step`, recorded at its first call where graphs are on."""
        if not self.graphs:
            return self._step(k)
        if k not in self.recorded:
            self.recorded[k] = self._record(k)
        graph, scores = self.recorded[k]
        graph.replay()
        return scores

    def _record(self, k: int) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        """Run a scale twice beside the main stream, so that libraries and caches are warm, then record it."""
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            for _ in range(2):
                self._step(k)
        torch.cuda.current_stream(self.device).wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        pool = next(iter(self.recorded.values()))[0].pool() if self.recorded else None
        with torch.cuda.graph(graph, pool=pool):
            scores = self._step(k)
        return graph, scores


def compile_layers(model: NextFlowModel) -> None:
    """Compile the parts of every layer that are alike in all of them, norms and feed-forward, once for all shapes.

    The whole stack would be compiled anew for each scale, and attention for each layer, which its cache tells apart.
    """
    for layer in model.backbone.layers:
        for part in (layer.input_layernorm, layer.post_attention_layernorm, layer.mlp):
            cast(nn.Module, part).compile(dynamic=True)


def _unwatched(_: str) -> AbstractContextManager[object]:
    return nullcontext()
