"""Architecture configurations, and strict loading of configurations from YAML and JSON.

Architecture dataclasses have no defaults: a configuration is complete or an error, and it is saved with the weights.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import yaml
from pydantic import ConfigDict, Tag, TypeAdapter, ValidationError

T = TypeVar("T")
_STRICT = ConfigDict(extra="forbid")


class ConfigError(ValueError):
    """A configuration does not fit: the message is one line naming the place and what is accepted."""


Accepted = Literal[
    "above 0",
    "at least 0",
    "at least 1",
    "from 0 to 1",
    "at least 0 and below 1",
    "a number of seconds of at least 0",
]
"""Ranges that settings have; endless ones only where that means something (no clipping, never)."""
_RANGES: dict[Accepted, Callable[[float], bool]] = {
    "above 0": lambda x: x > 0,
    "at least 0": lambda x: 0 <= x < math.inf,
    "at least 1": lambda x: 1 <= x < math.inf,
    "from 0 to 1": lambda x: 0 <= x <= 1,
    "at least 0 and below 1": lambda x: 0 <= x < 1,
    "a number of seconds of at least 0": lambda x: x >= 0,
}


def within(accepted: Accepted, **values: float | None) -> None:
    """Raises ConfigError, one line, for the first value outside a range: its key, what is accepted, and the value.

    None is a setting that is not there.
    """
    for key, value in values.items():
        if value is not None and not _RANGES[accepted](value):
            raise ConfigError(f"{key} is {accepted}, got {value}")


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

    def __post_init__(self) -> None:
        within("at least 1", patch=self.patch, hidden=self.hidden, layers=self.layers, heads=self.heads)
        within("at least 1", intermediate=self.intermediate, position_grid=self.position_grid)
        within("at least 0", decoder_layers=self.decoder_layers)
        _divides(self.hidden, heads=self.heads)


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

    def __post_init__(self) -> None:
        within("at least 1", codebook_size=self.codebook_size, pixel_dim=self.pixel_dim)
        within("at least 0", semantic_dim=self.semantic_dim, semantic_weight=self.semantic_weight)
        within("from 0 to 1", refine=self.refine)

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

    def __post_init__(self) -> None:
        within("at least 1", downsample=self.downsample, num_scales=self.num_scales)
        within("at least 1", encoder_blocks=self.encoder_blocks, decoder_blocks=self.decoder_blocks)
        for name in ("encoder_channels", "decoder_channels"):
            within("at least 1", **{name: min(getattr(self, name), default=0)})


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
        sizes = ("text_vocab", "codes", "code_dim", "hidden", "layers", "heads", "kv_heads", "intermediate")
        places = ("max_positions", "max_scales")
        within("at least 1", **{name: getattr(self, name) for name in (*sizes, *places)})
        within("above 0", rms_eps=self.rms_eps, rope_theta=self.rope_theta, rope_range=self.rope_range)
        within("at least 0", rope_sections=min(self.rope_sections))
        _divides(self.hidden, heads=self.heads)
        if self.heads % self.kv_heads:
            raise ValueError(f"kv_heads divides heads, got {self.kv_heads} for {self.heads} heads")
        half = self.hidden / self.heads / 2
        if sum(self.rope_sections) != half:
            raise ValueError(
                f"rope_sections add up to half a head, {half:g} of {self.hidden} / {self.heads}, got {self.rope_sections}"
            )

    @property
    def vocab(self) -> int:
        """Entries of the shared output head: text, then codes."""
        return self.text_vocab + self.codes


def _divides(hidden: int, *, heads: int) -> None:
    if hidden % heads:
        raise ValueError(f"heads divides hidden, got {heads} for a hidden of {hidden}")


def _one_line(error: ValidationError, values: object, where: str) -> str:
    first = error.errors()[0]
    kind, details = first["type"], first.get("ctx", {})
    place = ".".join(_places(first["loc"], values, missing=kind == "missing"))
    if kind == "unexpected_keyword_argument":
        return f"{where}: unknown key '{place}'"
    if kind == "missing":
        return f"{where}: missing key '{place}'"
    if kind == "union_tag_invalid":
        kinds = details["expected_tags"].replace("'", "")
        return f"{where}: '{place}.kind' is one of {kinds}, got {details['tag']!r}"
    if kind == "value_error":  # of a configuration's own: it says what it got
        return f"{where}: {place and repr(place) + ': '}{details['error']}"
    return f"{where}: '{place or 'top level'}': {first['msg'].lower()} (got {first['input']!r:.80})"


def _places(loc: tuple[int | str, ...], values: Any, *, missing: bool) -> list[str]:
    """The keys that lead to an error. pydantic also names which of several types it tried, which nobody wrote."""
    found = []
    for number, part in enumerate(loc):
        if isinstance(values, dict):
            written = part in values
        else:
            written = isinstance(values, (list, tuple)) and isinstance(part, int) and part < len(values)
        if written:
            values = cast(Any, values)[part]
        elif not (missing and number == len(loc) - 1):
            continue
        found.append(str(part))
    return found


def _accepted(kind: Any, loc: tuple[Any, ...]) -> str:
    """What keys stand beside the one at ``loc``, where the types of ``kind`` tell."""
    kinds = _options(kind)
    for part in loc[:-1]:
        found = [_options(hint) for one in kinds if (hint := _inside(one, part)) is not None]
        tagged = [one for one in kinds if part in _tags(one)]
        if not found and not tagged:
            return ""
        kinds = [one for several in found for one in several] or tagged
    fields = [dataclasses.fields(one) for one in map(_bare, kinds) if dataclasses.is_dataclass(one)]
    return "; accepted: " + ", ".join(f.name for f in fields[0]) if len(fields) == 1 else ""


def _options(hint: Any) -> list[Any]:
    """The types that a hint allows; a tag stays on its own."""
    bare = _bare(hint)
    if typing.get_origin(bare) in (typing.Union, types.UnionType):
        return [one for option in typing.get_args(bare) for one in _options(option)]
    return [hint]


def _bare(hint: Any) -> Any:
    return _bare(typing.get_args(hint)[0]) if typing.get_origin(hint) is typing.Annotated else hint


def _tags(hint: Any) -> list[str]:
    """Names that pydantic tells a type of several apart by."""
    found = [one.tag for one in getattr(hint, "__metadata__", ()) if isinstance(one, Tag)]
    return [*found, getattr(_bare(hint), "__name__", "")]


def _inside(hint: Any, part: Any) -> Any:
    """The type of an entry or a field of a type, None where it has none such."""
    bare = _bare(hint)
    if dataclasses.is_dataclass(bare):
        return typing.get_type_hints(bare, include_extras=True).get(str(part))
    arguments = typing.get_args(bare)
    if typing.get_origin(bare) in (list, tuple, set) and isinstance(part, int) and arguments:
        return arguments[0]
    if typing.get_origin(bare) in (dict, Mapping) and len(arguments) == 2:
        return arguments[1]
    return None


def from_dict(kind: type[T], values: object, where: str = "config") -> T:
    """Build dataclass ``kind`` from plain values, strictly.

    Raises ConfigError, one line, on an unknown or missing key, a value of the wrong type, or a number that is none or
    endless; ``clip`` and seconds may be endless.
    """
    for key, value in _numbers(values):
        never = key.rpartition(".")[2] == "clip" or key.endswith("_seconds")
        if not math.isfinite(value) and not (never and value == math.inf):
            raise ConfigError(f"{where}: {key}: a finite number is expected, got {value}")
    try:
        return cast(T, TypeAdapter(kind).validate_python(values))
    except ValidationError as error:
        first = error.errors()[0]
        extra = _accepted(kind, first["loc"]) if first["type"] == "unexpected_keyword_argument" else ""
        raise ConfigError(_one_line(error, values, where) + extra) from None


def _numbers(values: object, key: str = "") -> Iterator[tuple[str, float]]:
    """All floats in plain values, with their places (``optimizer.lr``)."""
    if isinstance(values, float):
        yield key, values
    elif isinstance(values, dict | list | tuple):
        pairs = values.items() if isinstance(values, dict) else enumerate(values)
        for name, value in pairs:
            yield from _numbers(value, f"{key}.{name}" if key else str(name))


def to_dict(config: Any) -> dict[str, Any]:
    """Plain JSON values of a configuration dataclass."""
    return cast(dict[str, Any], TypeAdapter(type(config)).dump_python(config, mode="json"))


class _Once(yaml.SafeLoader):
    """YAML of plain values in which no key stands twice: the second would silently be taken."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        """Looked at as it is written, before ``<<`` is followed."""
        node = super().compose_mapping_node(anchor)
        assert isinstance(node, yaml.MappingNode)
        seen: set[tuple[str, str]] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            if (key.tag, key.value) in seen:
                told = f"the key {key.value!r} stands twice (line {key.start_mark.line + 1})"
                raise yaml.constructor.ConstructorError(problem=told)
            seen.add((key.tag, key.value))
        return node


def load_yaml(path: Path) -> dict[str, Any]:
    """Mapping in a YAML file. Raises ConfigError when it is missing or not a mapping."""
    try:
        values = yaml.load(path.read_text(), _Once)
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
        try:
            value = yaml.safe_load(text)
        except yaml.YAMLError as error:
            reason = " ".join(str(getattr(error, "problem", None) or error).split())
            raise ConfigError(f"--set {assignment}: the value is not valid YAML: {reason}") from None
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
