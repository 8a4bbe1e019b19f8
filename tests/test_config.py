"""Strict configurations: complete or an error of one line."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from nextflow_ar.config import (
    ConfigError,
    ImageTokenizerConfig,
    ModelConfig,
    from_dict,
    load_json,
    load_yaml,
    override,
    to_dict,
    within,
)
from nextflow_ar.training.optim import OptimizerConfig
from tests.conftest import TINY_MODEL, TINY_TOKENIZER


@pytest.mark.parametrize(
    ("kind", "config"), [(ModelConfig, TINY_MODEL), (ImageTokenizerConfig, TINY_TOKENIZER)]
)
def test_a_configuration_survives_json(kind: type, config: object, tmp_path: Path) -> None:
    values = json.loads(json.dumps(to_dict(config)))
    assert from_dict(kind, values) == config
    (tmp_path / "c.json").write_text(json.dumps(values))
    assert load_json(kind, tmp_path / "c.json") == config


def test_mistakes_are_named() -> None:
    values = to_dict(TINY_TOKENIZER)
    for change, message in (
        ({"downsampel": 8}, r"^here: unknown key 'downsampel'; accepted: downsample, num_scales, "),
        ({"num_scales": "many"}, r"^here: 'num_scales': .*valid integer.* \(got 'many'\)$"),
        (
            {"quantizer": {**values["quantizer"], "size": 3}},
            r"unknown key 'quantizer.size'; accepted: codebook_size, ",
        ),
        ({"quantizer": {}}, r"missing key 'quantizer.codebook_size'"),
        (
            {"quantizer": {**values["quantizer"], "semantic_weight": math.inf}},
            r"^here: quantizer.semantic_weight: a finite number is expected, got inf$",
        ),
        (
            {"encoder_channels": [8, math.nan]},
            r"^here: encoder_channels.1: a finite number is expected, got nan$",
        ),
    ):
        with pytest.raises(ConfigError, match=message) as caught:
            from_dict(ImageTokenizerConfig, values | change, "here")
        assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="'rope': input should be 'qwen' or 'per_axis'"):
        from_dict(ModelConfig, to_dict(TINY_MODEL) | {"rope": "none"})


def test_what_may_be_endless() -> None:
    values = {
        "lr": 1e-3, "muon_lr": 0.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.9, "warmup": 1, "schedule": "constant",
        "decay": 0.1, "final": 0.1, "clip": math.inf,
    }  # fmt: skip
    assert from_dict(OptimizerConfig, values).clip == math.inf
    for key, value in (("clip", math.nan), ("clip", -math.inf), ("lr", math.inf)):
        with pytest.raises(ConfigError, match=f"{key}: a finite number is expected"):
            from_dict(OptimizerConfig, values | {key: value})


def test_overrides() -> None:
    values = {"a": {"b": 1}, "c": "x"}
    changed = override(values, ["a.b=2", "c=[1, 2]", "d.e=1e-3", "f=text", "g=null"])
    assert changed == {"a": {"b": 2}, "c": [1, 2], "d": {"e": 1e-3}, "f": "text", "g": None}
    assert values == {"a": {"b": 1}, "c": "x"}
    listed = {"a": [{"b": 1}, {"b": 2}]}
    assert override(listed, ["a.1.b=5", "a.0=3"]) == {"a": [3, {"b": 5}]}
    for wrong in ("a.2.b=1", "a.x=1"):
        with pytest.raises(ConfigError, match="is no entry of a list of 2"):
            override(listed, [wrong])
    with pytest.raises(ConfigError, match="--set takes KEY=VALUE"):
        override(values, ["a.b"])
    with pytest.raises(ConfigError, match="'c' is a value, not a group of keys"):
        override(values, ["c.d=1"])
    with pytest.raises(ConfigError, match=r"^--set a=\[1,: the value is not valid YAML: [^\n]+$"):
        override(values, ["a=[1,"])


def test_ranges_say_what_they_accept() -> None:
    for accepted, good, bad in (
        ("above 0", (1e-9, math.inf), (0, -1, math.nan)),
        ("at least 0", (0, 7), (-1, math.inf, math.nan)),
        ("at least 1", (1, 7), (0, 0.5, math.inf)),
        ("from 0 to 1", (0, 1), (-0.1, 1.1, math.nan)),
        ("at least 0 and below 1", (0, 0.999), (1, -0.1)),
        ("a number of seconds of at least 0", (0, math.inf), (-1, math.nan)),
    ):
        for value in good:
            within(accepted, key=value, none=None)
        for value in bad:
            with pytest.raises(ConfigError, match=rf"^key is {accepted}, got {value}$"):
                within(accepted, other=good[0], key=value)


def test_sizes_that_no_network_has_are_refused() -> None:
    model, tokenizer = to_dict(TINY_MODEL), to_dict(TINY_TOKENIZER)
    for change, message in (
        ({"layers": 0}, "layers is at least 1, got 0"),
        ({"heads": 5}, "heads divides hidden, got 5 for a hidden of 48"),
        ({"kv_heads": 2}, "kv_heads divides heads, got 2 for 3 heads"),
        ({"rope_sections": [4, 4, 4]}, r"rope_sections add up to half a head, 8 of 48 / 3, got \(4, 4, 4\)"),
        ({"rms_eps": -1.0}, "rms_eps is above 0, got -1.0"),
    ):
        with pytest.raises(ConfigError, match=f"^here: {message}$"):
            from_dict(ModelConfig, model | change, "here")
    for change, message in (
        ({"num_scales": 0}, "num_scales is at least 1, got 0"),
        ({"decoder_channels": []}, "decoder_channels is at least 1, got 0"),
        (
            {"semantic": {**tokenizer["semantic"], "heads": 3}},
            "'semantic': heads divides hidden, got 3 for a .*",
        ),
        (
            {"quantizer": {**tokenizer["quantizer"], "refine": 2}},
            "'quantizer': refine is from 0 to 1, got 2.0",
        ),
    ):
        with pytest.raises(ConfigError, match=f"^here: {message}$"):
            from_dict(ImageTokenizerConfig, tokenizer | change, "here")


def test_yaml_files(tmp_path: Path) -> None:
    path = tmp_path / "r.yaml"
    with pytest.raises(ConfigError, match="No such file"):
        load_yaml(path)
    for text, message in (("a: [", "not valid YAML"), ("- 1", "expected a mapping")):
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            load_yaml(path)
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match=r"not a text file|not valid YAML"):
        load_yaml(path)
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_json(ModelConfig, path) if path.write_text("{") else None
    with pytest.raises(ConfigError, match="No such file"):
        load_json(ModelConfig, tmp_path / "none.json")
