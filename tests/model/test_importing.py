"""Starting from a Qwen2.5-VL that transformers itself saved: text behaviour unchanged, codes ready to be aligned."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast, Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from nextflow_ar.app.cli import run
from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model import importing
from nextflow_ar.model.backbone import load_language_model
from nextflow_ar.model.importing import Wiring, initialise_from
from nextflow_ar.sequence.batch import collate
from nextflow_ar.sequence.layout import build
from nextflow_ar.storage import StorageError
from nextflow_ar.types import Document, Text
from tests.conftest import CORPUS, tiny_image_tokenizer

SENTENCE = "a red circle on a blue background and two dogs"


def save_qwen(
    folder: Path, *, rows: int, tied: bool, shard: str = "5GB"
) -> Qwen2_5_VLForConditionalGeneration:
    """A random Qwen2.5-VL with a text tokenizer of its own, as transformers writes them."""
    torch.manual_seed(0)
    config = Qwen2_5_VLConfig(
        text_config={
            "vocab_size": rows, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
            "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 256, "tie_word_embeddings": tied,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [2, 3, 3]},
            "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0],
        },
        tie_word_embeddings=tied,
    )  # fmt: skip
    model = Qwen2_5_VLForConditionalGeneration(config).eval()
    model.save_pretrained(folder, max_shard_size=shard)
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=290,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(CORPUS, trainer)
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>").save_pretrained(folder)
    return model


@pytest.mark.parametrize(
    ("rows", "tied", "shard", "wiring"),
    [
        (320, False, "5GB", Wiring()),
        (290, False, "20KB", Wiring()),
        (320, True, "5GB", Wiring()),
        (320, False, "5GB", Wiring(scale_input="accumulated", positions="learned_1d")),
    ],
    ids=["spare rows", "rows added, sharded", "tied head", "baseline"],
)
@torch.no_grad()
def test_text_behaviour_is_unchanged(
    rows: int, tied: bool, shard: str, wiring: Wiring, tmp_path: Path
) -> None:
    theirs = save_qwen(tmp_path / "qwen", rows=rows, tied=tied, shard=shard)
    if shard == "20KB":
        assert len(list((tmp_path / "qwen").glob("*.safetensors"))) > 1
    bundle = initialise_from(tmp_path / "qwen", tiny_image_tokenizer(), wiring)
    assert bundle.model.config.text_vocab % 64 == 0 and bundle.model.config.rope_sections == (2, 3, 3)
    sample = build(Document((Text(SENTENCE),)), bundle.vocab, bundle.layout)
    ours = bundle.model.logits(bundle.model.hidden(collate([sample])))[0]
    wanted = theirs(input_ids=sample.tokens[None]).logits[0]
    torch.testing.assert_close(ours[:, :290], wanted[:, :290], atol=1e-5, rtol=1e-5)
    assert float(ours[:, bundle.model.config.text_vocab :].abs().max()) == 0  # codes start level
    assert bundle.vocab.decode(bundle.vocab.encode(SENTENCE)) == SENTENCE
    assert bundle.vocab.boi == 290 and bundle.vocab.eoi == 291
    mean = theirs.model.language_model.embed_tokens.weight[:290].mean(0)
    torch.testing.assert_close(bundle.model.backbone.embed_tokens.weight[290], mean, atol=1e-6, rtol=1e-5)
    assert torch.equal(bundle.model.scale_inputs.code_embed.weight, bundle.image_tokenizer.quantizer.codebook)


def test_the_model_takes_over_the_loaded_weights_and_draws_only_what_is_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_qwen(tmp_path / "qwen", rows=320, tied=False)
    language = load_language_model(tmp_path / "qwen", torch.bfloat16)
    monkeypatch.setattr(importing, "load_language_model", lambda *_: language)
    tokenizer, drawn = tiny_image_tokenizer(), set[tuple[int, ...]]()
    normal = torch.Tensor.normal_

    def noted(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if tensor.device.type == "cpu":
            drawn.add(tuple(tensor.shape))
        return normal(tensor, *args, **kwargs)

    monkeypatch.setattr(torch.Tensor, "normal_", noted)
    models = [
        initialise_from(tmp_path / "qwen", tokenizer, dtype=torch.bfloat16, seed=seed).model
        for seed in (0, 0, 1)
    ]
    assert drawn == {(24, 10), (32, 10), (32, 32), (19, 32)}  # codes, connector, scale and length embeddings
    for name, weight in language.weights.items():
        own = models[0].backbone.state_dict()[name]
        assert own.data_ptr() == weight.data_ptr() or name == "embed_tokens.weight", name
    one, two, three = (dict(model.named_parameters()) for model in models)
    assert {p.dtype for p in one.values()} == {torch.bfloat16}
    assert models[0].backbone.rotary_emb.inv_freq.dtype == torch.float32
    assert all(torch.equal(p, two[name]) for name, p in one.items())
    differ = {name for name, p in one.items() if not torch.equal(p, three[name])}
    assert differ == {
        "scale_inputs.connector.0.weight", "scale_inputs.connector.2.weight", "scale_inputs.scale_embed.weight",
        "scale_inputs.length_embed.weight",
    }  # fmt: skip


@pytest.mark.parametrize("wrong", ["missing", "biases", "wrapped", "head", "shape", "tower", "none"])
def test_weights_that_are_not_there_are_not_drawn_at_random(wrong: str, tmp_path: Path) -> None:
    save_qwen(tmp_path, rows=320, tied=wrong == "none")
    path = tmp_path / "model.safetensors"
    weights = load_file(path)
    up = "model.layers.1.mlp.up_proj.weight"
    lacking = {
        "missing": [up], "biases": [k for k in weights if k.endswith("q_proj.bias")], "head": ["lm_head.weight"],
        "tower": [k for k in weights if ".blocks." in k or k.startswith("visual.")],
    }.get(wrong, [])  # fmt: skip
    assert set(lacking) <= set(weights) and (lacking or wrong in ("wrapped", "shape", "none"))
    weights = {k: v for k, v in weights.items() if k not in lacking}
    if wrong == "wrapped":
        weights = {f"base_model.{k}": v for k, v in weights.items()}
    if wrong == "shape":
        weights[up] = weights[up][:, :8].contiguous()
    save_file(weights, path, {"format": "pt"})
    if wrong in ("none", "tower"):  # a tied head has no weights of its own, and the ViT is not taken over
        assert len(load_language_model(tmp_path, torch.float32).weights) > 20
        return
    what = {
        "missing": r"lack \S*layers\.1\.mlp\.up_proj\.weight \(1 in all\)", "biases": r"lack \S*q_proj\.bias \(2 in all\)",
        "head": r"lack lm_head\.weight \(1 in all\)", "shape": r"do not fit \S*up_proj\.weight \(1 in all\)",
        "wrapped": r"lack \S+ \(\d\d in all\)",
    }[wrong]  # fmt: skip
    with pytest.raises(StorageError, match=f"^{tmp_path}: its weights {what}$"):
        load_language_model(tmp_path, torch.float32)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e6, "mrope_section": [2, 3, 3]}},
            "its rope_scaling is linear, default or mrope is accepted",
        ),
        ({"hidden_act": "gelu"}, "its hidden_act is gelu, silu is accepted"),
        (
            {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 0, "layer_types": None},
            "its layer_types is sliding_attention, full_attention is accepted",
        ),
    ],
)  # fmt: skip
def test_settings_that_our_text_stack_does_not_have_are_refused(
    changes: dict[str, Any], why: str, tmp_path: Path
) -> None:
    save_qwen(tmp_path, rows=320, tied=False)
    config = json.loads((tmp_path / "config.json").read_text())
    config["text_config"] = {k: v for k, v in (config["text_config"] | changes).items() if v is not None}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(StorageError, match=f"no Qwen2.5-VL to load: {why}$"):
        load_language_model(tmp_path, torch.float32)


def test_entries_beyond_the_table_start_as_the_mean(tmp_path: Path) -> None:
    theirs = save_qwen(tmp_path, rows=280, tied=False)  # the tokenizer has 290
    bundle = initialise_from(tmp_path, tiny_image_tokenizer())
    mean = theirs.model.language_model.embed_tokens.weight.mean(0)
    for row in (280, 289, 290, 319):
        torch.testing.assert_close(bundle.model.backbone.embed_tokens.weight[row], mean, atol=1e-6, rtol=1e-5)


def test_init_as_a_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_qwen(tmp_path / "qwen", rows=320, tied=False)
    tiny_image_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "model"
    parts = ["--language-model", str(tmp_path / "qwen"), "--image-tokenizer", str(tmp_path / "tokenizer")]
    assert run(["init", *parts, "-o", str(out)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    pipeline = NextFlowPipeline.from_pretrained(out)
    assert pipeline.generate("two dogs", seed=1)[0].size == (40, 40)
    assert json.loads((out / "config.json").read_text())["text_vocab"] == 320
    assert run(["init", "--language-model", str(tmp_path / "tokenizer"), *parts[2:], "-o", str(out)]) == 1
    line = capsys.readouterr().err
    assert line.startswith("nextflow-ar: ") and "no Qwen2.5-VL" in line and line.count("\n") == 1
    assert run(["init", *parts, "-o", str(out)]) == 0  # over its own earlier output
    capsys.readouterr()
    (tmp_path / "recipe.yaml").write_text("kind: model\n")
    (tmp_path / "metrics.jsonl").write_text("")
    for folder, told in (("tokenizer", "which is read from"), ("final", "is what the run in")):
        before = sorted((tmp_path / folder).rglob("*"))
        assert run(["init", *parts, "-o", str(tmp_path / folder)]) == 1
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1
        assert sorted((tmp_path / folder).rglob("*")) == before
    assert run(["export", str(out), "-o", str(tmp_path / "new")]) == 0
    assert run(["export", str(out), "-o", str(tmp_path / "new")]) == 0
    capsys.readouterr()
    for folder, told in (("model", "which is read from"), ("final", "is what the run in")):
        assert run(["export", str(out), "-o", str(tmp_path / folder)]) == 1
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1


@pytest.mark.parametrize("name", ["nope", "a/b/c", "./nope/x", "/nope"])
def test_what_can_be_no_hub_id_is_refused_at_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def asked(*_: object, **__: object) -> None:
        pytest.fail("the Hub was asked")

    monkeypatch.setattr("nextflow_ar.model.backbone.AutoConfig.from_pretrained", asked)
    with pytest.raises(StorageError, match=f"^{name}: .*neither a folder here nor a Hub id OWNER/NAME$"):
        load_language_model(name, torch.float32)


def test_a_long_reason_is_cut_between_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object, **__: object) -> None:
        raise OSError("something went wrong\n" * 40)

    monkeypatch.setattr("nextflow_ar.model.backbone.AutoConfig.from_pretrained", fails)
    with pytest.raises(
        StorageError, match=r"^\S+: no Qwen2.5-VL to load: (something went wrong ){5,}.*\.\.\.$"
    ) as told:
        load_language_model(tmp_path, torch.float32)
    words = str(told.value).removesuffix(" ...").split()
    assert words[-1] in ("something", "went", "wrong") and "\n" not in str(told.value)


def test_init_reaches_the_baseline_s_wiring(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_qwen(tmp_path / "qwen", rows=320, tied=False)
    tiny_image_tokenizer().save_pretrained(tmp_path / "tokenizer")
    out = tmp_path / "model"
    parts = ["--language-model", str(tmp_path / "qwen"), "--image-tokenizer", str(tmp_path / "tokenizer")]
    chosen = ["--positions", "learned_1d", "--scale-input", "accumulated", "--rope-range", "12"]
    assert run(["init", *parts, "-o", str(out), *chosen]) == 0
    config = json.loads((out / "config.json").read_text())
    assert (config["positions"], config["scale_input"], config["rope_range"]) == (
        "learned_1d",
        "accumulated",
        12.0,
    )
    pipeline = NextFlowPipeline.from_pretrained(out)
    table = pipeline.bundle.model.scale_inputs.place_embed.weight
    assert table.shape == (10_083, 32) and 0.019 < float(table.float().std()) < 0.021
    assert pipeline.generate("two dogs", seed=1)[0].size == (40, 40)
    capsys.readouterr()
    for wrong, told in (
        (["--positions", "absolute"], "'positions': input should be 'rope', 'learned' or 'learned_1d' (got 'absolute')"),
        (["--scale-input", "whole"], "'scale_input': input should be 'residual' or 'accumulated' (got 'whole')"),
        (["--context-images", "closing", "--closing-input", "residual"], "closing needs closing_input: accumulated"),
    ):  # fmt: skip
        assert run(["init", *parts, "-o", str(tmp_path / "no"), *wrong]) == 2
        line = capsys.readouterr().err
        assert told in line and line.count("\n") == 1 and not (tmp_path / "no").exists()


def test_a_text_tokenizer_without_chat_marks_is_refused(tmp_path: Path) -> None:
    save_qwen(tmp_path / "qwen", rows=320, tied=False)
    text = (tmp_path / "qwen" / "tokenizer.json").read_text().replace("<|im_start|>", "<|other|>")
    (tmp_path / "qwen" / "tokenizer.json").write_text(text)
    with pytest.raises(StorageError, match=r"lacks <\|im_start\|>"):
        initialise_from(tmp_path / "qwen", tiny_image_tokenizer())
