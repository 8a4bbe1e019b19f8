"""NextFlow: one decoder-only transformer over text and the scales of images (paper section 2)."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from nextflow_ar.config import ModelConfig
from nextflow_ar.model.attention import RowGroups, mask_of_rows, sparse_mask
from nextflow_ar.model.backbone import Backbone, Cache
from nextflow_ar.model.embeddings import ScaleInputs
from nextflow_ar.model.loss import Teacher, chunked_linear_cross_entropy
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import Batch, ImageGroup
from nextflow_ar.sequence.blocks import block_mask
from nextflow_ar.sequence.layout import IGNORED, TEXT_SCALE, Sample


@dataclass(frozen=True, eq=False)
class LossReport:
    """``total``: weighted sum over all places, differentiable. ``losses``: (N,) nats, ``scales``: (N,) scale of each
    place (TEXT_SCALE: text), ``right``: (N,) whether the best entry is the target; ``weight``: sum of the weights.
    """

    total: Tensor
    losses: Tensor
    scales: Tensor
    right: Tensor
    weight: Tensor


@dataclass(frozen=True, eq=False)
class Copies:
    """``codes``: (V,) that would copy, -1 for none; ``places``: (V,) of a batch whose rows are laid end to end, or None
    where nothing is copied.
    """

    codes: Tensor
    places: Tensor | None


def allow_shapes(shapes: int) -> None:
    """Let torch compile a function for so many shapes; behind its own eighth it would run all others uncompiled."""
    limit = torch._dynamo.config
    limit.recompile_limit = max(limit.recompile_limit, shapes)
    limit.accumulated_recompile_limit = max(limit.accumulated_recompile_limit, 2 * shapes)


class NextFlowModel(nn.Module):
    """Backbone, inputs of both modalities, and one head over text and codes."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.backbone = Backbone(config)
        self.scale_inputs = ScaleInputs(config)
        self.head = nn.Linear(config.hidden, config.vocab, bias=False)
        self.runner: Callable[..., Tensor] = self.backbone.run
        self.sparse = False

    @classmethod
    def empty(cls, config: ModelConfig) -> NextFlowModel:
        """A model whose weights have shapes but no memory (the meta device), to be given them by
        ``load_state_dict(weights, assign=True)``. What follows from the configuration alone is there, on the CPU.
        """
        with torch.device("meta"):
            model = cls(config)
        model.backbone.compute_frequencies(config)
        model.scale_inputs.code_scale = torch.ones(())
        return model

    @torch.no_grad()
    def initialise(self, generator: torch.Generator, prefix: str = "") -> None:
        """Start from nothing: normal weights of deviation 0.02 (by depth for output projections), zero head and copies.
        With ``prefix``, only parameters whose names begin so.
        """
        depth = (2 * self.config.layers) ** -0.5
        for name, parameter in self.named_parameters():
            if not name.startswith(prefix):
                continue
            if parameter.ndim < 2:
                parameter.fill_(1.0 if "norm" in name and name.endswith("weight") else 0.0)
            elif ".copy_" in name:
                parameter.zero_()
            else:
                spread = parameter.shape[1] ** -0.5 if ".connector" in name else 0.02
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    spread *= depth
                parameter.normal_(0.0, spread, generator=generator)
        if "head.weight".startswith(prefix):
            self.head.weight.zero_()

    @torch.no_grad()
    def codes_anew(self, codebook: Float[Tensor, "k c"]) -> None:
        """Forget what each code means: embeddings from another image tokenizer's ``codebook``, a zero head for codes."""
        self.scale_inputs.start_from(codebook)
        self.head.weight[self.config.text_vocab :] = 0.0

    def compile_backbone(self, *, flex: bool = True, shapes: int = 8) -> None:
        """Compile the transformer (training); embeddings and loss stay eager.

        On a GPU a layer is compiled once for all of them, which takes seconds instead of minutes, with FlexAttention unless
        ``flex`` says otherwise; on a CPU the stack as a whole. Every shape of a batch is compiled for, up to ``shapes`` of
        them; others are computed uncompiled.
        """
        allow_shapes(shapes)
        if self.head.weight.device.type == "cuda":
            for layer in self.backbone.layers:
                layer.compile(dynamic=False)  # pyright: ignore[reportCallIssue]
            self.sparse = flex
        else:
            self.runner = torch.compile(self.backbone.run, dynamic=False)

    def checkpoint_activations(self) -> None:
        """Compute the layers' activations again in the backward pass instead of keeping them (training)."""
        # transformers 5.24 renamed the method
        name = "activation_checkpointing_enable"
        enable = getattr(self.backbone, name, None) or self.backbone.gradient_checkpointing_enable
        enable({"use_reentrant": False})

    def embed_text(self, tokens: Int[Tensor, "b l"]) -> Float[Tensor, "b l d"]:
        """Embeddings of text places; zero where codes are fed (token -1)."""
        return self.backbone.embed_tokens(tokens.clamp_min(0)) * (tokens >= 0)[..., None]

    def embed(self, batch: Batch, copied: Copies | None = None) -> Float[Tensor, "b l d"]:
        """Inputs of a whole batch. ``copied``: what :meth:`copies` says, if it is known."""
        x = self.embed_text(batch.tokens)
        rows, length = batch.shape
        flat = x.reshape(rows * length, -1)
        if batch.images:  # all of them at once: a GPU waits for the number of operations
            each = [self.scale_inputs.vectors(g.codes, g.schedule, g.scales, g.closed) for g in batch.images]
            spans = zip(batch.images, each, strict=True)
            places = torch.cat([g.places(length, found.shape[1]).flatten() for g, found in spans])
            inputs = self.scale_inputs.connector(torch.cat([found.flatten(0, 1) for found in each]))
            if self.scale_inputs.place_embed is not None:
                inputs = inputs + torch.cat([self._places(group) for group in batch.images])
            flat = flat.index_add(0, places, inputs.to(flat.dtype))
        copied = self.copies(batch) if copied is None else copied
        if copied.places is not None:
            flat = flat.index_add(0, copied.places, self.scale_inputs.told(copied.codes).to(flat.dtype))
        x = flat.view(rows, length, -1)
        return x + self.scale_inputs.tags(batch.scales, batch.lengths).to(x.dtype)

    def copies(self, batch: Batch) -> Copies:
        """Which codes would copy, and at which places of the batch, laid end to end."""
        found, places = [], []
        for group in batch.images:
            if group.reference is None or group.scales <= 1:
                continue
            codes = group.copied
            if codes is None:
                asked = group.reference, group.codes, group.schedule, 1, group.scales
                codes = self.scale_inputs.copied(*asked, alone=not torch.is_grad_enabled())
            found.append(codes.flatten())
            places.append(group.places(batch.shape[1], codes.shape[1]).flatten())
        if not found:
            return Copies(batch.tokens.new_zeros(0), None)
        return Copies(torch.cat(found), torch.cat(places))

    def embed_scale(
        self,
        codes: Int[Tensor, "b t"],
        schedule: ScaleSchedule,
        k: int,
        block: Sample,
        copied: Int[Tensor, "b n"] | None = None,
    ) -> Float[Tensor, "b n d"]:
        """Inputs of the block that follows scale ``k`` (0-based) of growing images; ``block`` is its layout.

        ``codes`` holds at least scales 0..k. ``copied``: which codes would copy there. Equal to the same places of
        :meth:`embed`.
        """
        vectors = self.scale_inputs.block(codes, schedule, k).flatten(2).transpose(1, 2)
        x = self.scale_inputs.connector(vectors)
        if self.scale_inputs.place_embed is not None:
            x = x + self.scale_inputs.places(schedule, (k,))
        if copied is not None:
            x = x + self.scale_inputs.told(copied).to(x.dtype)
        device = x.device
        tags = self.scale_inputs.tags(block.scales[None].to(device), block.lengths[None].to(device))
        return x + tags.to(x.dtype)

    def point(self, hidden: Float[Tensor, "b n d"], copied: Int[Tensor, "b n"]) -> Float[Tensor, "b n d"]:
        """Hidden states of a scale's places with what points at the codes that would copy."""
        return hidden + self.scale_inputs.pointed(hidden, copied, self.head.weight[self.config.text_vocab :])

    def _places(self, group: ImageGroup) -> Tensor:
        blocks = [*range(group.scales - 1), *([len(group.schedule) - 1] if group.closed else [])]
        if not blocks:
            return self.head.weight.new_zeros(0, self.config.hidden)
        return self.scale_inputs.places(group.schedule, blocks).repeat(len(group.rows), 1)

    def hidden(self, batch: Batch) -> Float[Tensor, "b l d"]:
        """Hidden states of a whole batch (teacher forcing)."""
        copied = self.copies(batch)
        embeddings = self.embed(batch, copied)
        if self.sparse and torch.is_grad_enabled():
            mask = sparse_mask(batch.blocks, batch.documents)
        else:
            mask = block_mask(batch.blocks, batch.documents)
            if self.config.heads == self.config.kv_heads:
                # under adapters the embeddings have no gradient, and yet the layers train
                trains = any(parameter.requires_grad for parameter in self.parameters())
                mask = mask_of_rows(mask, embeddings, batch.documents, trains=trains)
        hidden = self.runner(embeddings, batch.positions, mask)
        if copied.places is None:
            return hidden
        flat = hidden.flatten(0, 1)
        head = self.head.weight[self.config.text_vocab :]
        more = self.scale_inputs.pointed(flat[copied.places], copied.codes, head)
        return flat.index_add(0, copied.places, more).view_as(hidden)

    def step(
        self,
        embeddings: Float[Tensor, "b l d"],
        positions: Float[Tensor, "3 b l"],
        mask: Tensor | RowGroups | None,
        cache: Cache,
    ) -> Float[Tensor, "b l d"]:
        """Hidden states of new places behind a cache."""
        return self.backbone.run(embeddings, positions, mask, cache)

    def logits(self, hidden: Float[Tensor, "*n d"]) -> Float[Tensor, "*n v"]:
        """Scores over text entries, then codes."""
        return self.head(hidden)

    def losses(self, batch: Batch, teacher: NextFlowModel | None = None, share: float = 1.0) -> LossReport:
        """Weighted cross-entropy of every place that predicts something. ``teacher``: a frozen model of the same
        vocabulary; ``share`` of what is aimed at is what it says, in ``total`` alone.
        """
        hidden = self.hidden(batch)
        places = (batch.targets != IGNORED).flatten().nonzero()[:, 0]
        targets = batch.targets.flatten()[places]
        weights = batch.weights.flatten()[places]
        picked = hidden.flatten(0, 1)[places]
        kind = picked.device.type
        compute = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else picked.dtype
        told = None
        if teacher is not None:
            with torch.no_grad():
                known = teacher.hidden(batch).flatten(0, 1)[places]
            told = Teacher(known.to(compute), teacher.head.weight, share)
        with torch.autocast(kind, enabled=False):
            total, losses, best = chunked_linear_cross_entropy(
                picked.to(compute), self.head.weight, targets, weights, teacher=told
            )
        scales = torch.where(targets < self.config.text_vocab, TEXT_SCALE, batch.scales.flatten()[places])
        return LossReport(total, losses, scales, best == targets, weights.sum())
