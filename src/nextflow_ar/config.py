"""Architecture configurations, and strict loading of configurations from YAML and JSON.

Architecture dataclasses have no defaults: a configuration is complete or an error, and it is saved with the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import ConfigDict, TypeAdapter, ValidationError

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A configuration does not fit: the message is one line naming the place and what is accepted."""


@dataclasses.dataclass(frozen=True)
class SemanticConfig:
    """Tiny or full SigLIP2 vision tower (``Siglip2VisionModel``) and the decoder that reads its features back."""

    __pydantic_config__ = _STRICT
    patch: int
    hidden: int
    layers: int
    heads: int
    intermediate: int
    position_grid: int
    decoder_layers: int


@dataclasses.dataclass(frozen=True)
class QuantizerConfig:
    """Dual codebook with one shared index (paper section 2).

    ``semantic_dim``: 0 for a tokenizer of the pixel branch alone. ``normalize``: nearest by the angle of each half.
    ``refine``: share of a 3x3 convolution in every enlarged grid, as VAR has it (0: none, as in TokenFlow and NextFlow).
    """

    __pydantic_config__ = _STRICT
    codebook_size: int
    semantic_dim: int
    pixel_dim: int
    semantic_weight: float
    normalize: bool
    refine: float

    @property
    def dim(self) -> int:
        """Length of a whole code vector: semantic half, then pixel half."""
        return self.semantic_dim + self.pixel_dim


@dataclasses.dataclass(frozen=True)
class ImageTokenizerConfig:
    """Image tokenizer: pixel CNN, semantic tower, quantiser. Channels are listed from full resolution to the grid.

    ``num_scales``: scales of the size that is drawn by default; any of the 18 works. ``semantic``: null for the pixel
    branch alone (then ``quantizer.semantic_dim`` is 0).
    """

    __pydantic_config__ = _STRICT
    downsample: int
    num_scales: int
    encoder_channels: tuple[int, ...]
    encoder_blocks: int
    decoder_channels: tuple[int, ...]
    decoder_blocks: int
    decoder_sees_semantic: bool
    quantizer: QuantizerConfig
    semantic: SemanticConfig | None


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The decoder-only transformer around transformers' Qwen2.5-VL text stack.

    ``text_vocab``: entries of the text tokenizer, special tokens, ``<boi>`` and ``<eoi>`` included; the ``codes`` vision
    codes follow it. ``rope``: "qwen" keeps Qwen's contiguous frequency sections, "per_axis" gives every axis the whole
    range. ``rope_range``: the constant C of Multiscale 3D RoPE. ``scale_input``: what grid k is fed, the residual of
    grid k-1 alone (NextFlow) or the accumulated features (TokenFlow). ``closing_input``: what the block after the last
    grid is fed, that grid's residual alone or the sum over all scales, the whole picture. ``context_images``: a picture
    that is given, not drawn, is laid out with all its scales, or as its closing block alone (which then has to hold the
    whole picture). ``positions``: where a cell's place comes from. "rope": Multiscale 3D RoPE. "learned_1d": the baseline
    without it, as in VAR and TokenFlow: a learned embedding for every cell of every scale, and a RoPE of one axis, in
    which all cells of a grid stand at one position, the grid's, as a word would. "learned": both 3D RoPE and an embedding
    by a cell's number in its grid, whatever the grid. ``copies``: a picture that is drawn behind another one of its size is
    told, cell by cell, the code that would bring it nearer to that one, and may point at it (not in the paper; absent in
    configurations from before it was there).
    """

    __pydantic_config__ = _STRICT
    text_vocab: int
    codes: int
    code_dim: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    max_positions: int
    rms_eps: float
    rope: Literal["qwen", "per_axis"]
    rope_theta: float
    rope_sections: tuple[int, int, int]
    rope_range: float
    max_scales: int
    scale_input: Literal["residual", "accumulated"]
    closing_input: Literal["residual", "accumulated"]
    context_images: Literal["scales", "closing"]
    positions: Literal["rope", "learned", "learned_1d"]
    copies: bool = False

    def __post_init__(self) -> None:
        if self.context_images == "closing" and self.closing_input != "accumulated":
            raise ValueError("context_images: closing needs closing_input: accumulated")

    @property
    def vocab(self) -> int:
        """Entries of the shared output head: text, then codes."""
        return self.text_vocab + self.codes


def _one_line(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    place = ".".join(str(part) for part in first["loc"]) or "top level"
    if first["type"] == "unexpected_keyword_argument":
        return f"{where}: unknown key '{place}'"
    if first["type"] == "missing":
        return f"{where}: missing key '{place}'"
    return f"{where}: '{place}': {first['msg'].lower()} (got {first['input']!r:.80})"


def _accepted(kind: Any, loc: tuple[Any, ...]) -> str:
    for part in loc[:-1]:
        fields = {f.name: f.type for f in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            return ""
        kind = _field_type(kind, str(part))
    if not dataclasses.is_dataclass(kind):
        return ""
    return "; accepted: " + ", ".join(f.name for f in dataclasses.fields(kind))


def _field_type(kind: Any, name: str) -> Any:
    import typing

    hint = typing.get_type_hints(kind).get(name)
    for option in (hint, *typing.get_args(hint)):
        if dataclasses.is_dataclass(option):
            return option
    return None


def from_dict(kind: type[T], values: object, where: str = "config") -> T:
    """Build dataclass ``kind`` from plain values, strictly.

    Raises ConfigError, one line, on an unknown or missing key or a value of the wrong type.
    """
    try:
        return cast(T, TypeAdapter(kind).validate_python(values))
    except ValidationError as error:
        first = error.errors()[0]
        extra = _accepted(kind, first["loc"]) if first["type"] == "unexpected_keyword_argument" else ""
        raise ConfigError(_one_line(error, where) + extra) from None


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a configuration dataclass."""
    return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


def load_yaml(path: Path) -> dict[str, Any]:
    """Mapping in a YAML file. Raises ConfigError when it is missing or not a mapping."""
    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a text file") from None
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected a mapping of keys to values")
    return values


def override(values: dict[str, Any], assignments: list[str]) -> dict[str, Any]:
    """``values`` with ``a.b=c`` assignments applied (c is read as YAML; of a list, ``a.0.b`` is the first entry's).

    Raises ConfigError on a bad assignment.
    """
    out = json.loads(json.dumps(values))
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key:
            raise ConfigError(f"--set takes KEY=VALUE such as optimizer.lr=1e-3, got {assignment!r}")
        node = out
        *parents, last = key.split(".")
        for parent in parents:
            node = _entry(node, parent, assignment) if isinstance(node, list) else node.setdefault(parent, {})
            if not isinstance(node, (dict, list)):
                raise ConfigError(f"--set {assignment}: '{parent}' is a value, not a group of keys")
        value = yaml.safe_load(text)
        if isinstance(value, str):
            with contextlib.suppress(ValueError):  # YAML 1.1 reads 1e-3 as text
                value = float(value)
        if isinstance(node, list):
            _entry(node, last, assignment)
            node[int(last)] = value
        else:
            node[last] = value
    return out


def _entry(values: list[Any], index: str, assignment: str) -> Any:
    if not index.isdigit() or int(index) >= len(values):
        raise ConfigError(
            f"--set {assignment}: '{index}' is no entry of a list of {len(values)} (the first is 0)"
        )
    return values[int(index)]


def load_json(kind: type[T], path: Path) -> T:
    """Dataclass ``kind`` from a JSON file. Raises ConfigError when it is missing, not JSON, or does not fit."""
    try:
        values = json.loads(path.read_text())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"{path}: not valid JSON: {error}") from None
    return from_dict(kind, values, str(path))
