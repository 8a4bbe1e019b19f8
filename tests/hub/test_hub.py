"""Auto classes of transformers over a checkpoint folder, and uploads with a stand-in for the Hub."""

from __future__ import annotations

import ast
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.hub import NextFlowConfig, NextFlowForConditionalGeneration, NextFlowProcessor, register
from nextflow_ar.hub.tokens import document_of
from nextflow_ar.model.checkpoint import SHIM_FILE, Bundle, load_bundle
from nextflow_ar.sequence.layout import build
from nextflow_ar.storage import StorageError
from nextflow_ar.types import Image, Mark, Text

CARD = "# a tiny model\n\nIts card.\n"


@pytest.fixture(scope="module")
def folder(bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("hub") / "tiny"
    NextFlowPipeline(replace(bundle, card=CARD)).save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def model(folder: Path) -> NextFlowForConditionalGeneration:
    return NextFlowForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)


@pytest.fixture(scope="module")
def processor(folder: Path) -> NextFlowProcessor:
    return NextFlowProcessor.from_pretrained(folder)


def picture(seed: int, size: tuple[int, int] = (60, 40)) -> PILImage.Image:
    return PILImage.fromarray(np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8))


def test_the_folder_goes_round_with_its_card(folder: Path, bundle: Bundle, tmp_path: Path) -> None:
    again = load_bundle(folder)
    assert again.card == CARD and again.generation == bundle.generation
    for name, value in again.model.state_dict().items():
        assert torch.equal(value, bundle.model.state_dict()[name].bfloat16().float()), name
    NextFlowPipeline(again).save_pretrained(tmp_path / "other", card="another")
    assert (tmp_path / "other" / "README.md").read_text() == "another"
    assert (tmp_path / "other" / "model.safetensors").read_bytes() == (
        folder / "model.safetensors"
    ).read_bytes()
    config = json.loads((folder / "config.json").read_text())
    assert config["model_type"] == "nextflow_ar"
    assert config["auto_map"]["AutoModel"] == "nextflow_hub.NextFlowForConditionalGeneration"


def test_trust_remote_code_finds_the_classes(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers import AutoConfig, AutoModel, AutoProcessor, dynamic_module_utils
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path))
    monkeypatch.setattr(sys, "path", [*sys.path])
    CONFIG_MAPPING._extra_content.pop("nextflow_ar", None)  # as if nothing had been registered
    with pytest.raises(ValueError, match="custom code"):
        AutoConfig.from_pretrained(folder, trust_remote_code=False)
    assert isinstance(AutoConfig.from_pretrained(folder, trust_remote_code=True), NextFlowConfig)
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    processor = AutoProcessor.from_pretrained(folder, trust_remote_code=True)
    assert isinstance(model, NextFlowForConditionalGeneration) and isinstance(processor, NextFlowProcessor)
    assert model(**processor(text="two dogs")).logits.shape[-1] == 324
    assert list(tmp_path.rglob("nextflow_hub.py")), "the folder's own file was what named them"


def test_the_shim_holds_nothing_but_an_import(folder: Path) -> None:
    body = ast.parse((folder / SHIM_FILE).read_text()).body
    assert [type(statement).__name__ for statement in body] == ["Expr", "ImportFrom", "Assign"]
    assert isinstance(body[1], ast.ImportFrom) and body[1].module == "nextflow_ar.hub"


def test_registered_classes_need_no_trust(folder: Path) -> None:
    from transformers import AutoConfig, AutoModel, AutoModelForMultimodalLM, AutoProcessor

    register()
    register()
    config = AutoConfig.from_pretrained(folder)
    assert isinstance(config, NextFlowConfig) and config.architecture.layers == config.num_hidden_layers == 2
    assert isinstance(AutoModel.from_pretrained(folder), NextFlowForConditionalGeneration)
    assert isinstance(AutoModelForMultimodalLM.from_pretrained(folder), NextFlowForConditionalGeneration)
    assert isinstance(AutoProcessor.from_pretrained(folder), NextFlowProcessor)


def test_text_and_pictures_are_the_pipelines(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor
) -> None:
    one, two = picture(0), picture(1, (40, 60))
    inputs = processor(images=[one, two], text=["two dogs?", "a cat"])
    ids = model.generate(**inputs, max_new_tokens=8)
    assert isinstance(ids, torch.Tensor)
    texts = processor.post_process_multimodal_output(ids[:, inputs["input_ids"].shape[1] :])
    asked = [
        model.pipeline.describe(p, question=q, max_tokens=8)[0]
        for p, q in ((one, "two dogs?"), (two, "a cat"))
    ]
    assert [t.strip() for t in texts] == asked
    hot = SamplingSettings(guidance=2.0, top_p=0.95, temperature=8.0)
    drawn = model.generate(
        **processor(text="two dogs"), generation_mode="image", seed=3, temperature=8.0, size=(24, 24)
    )
    assert np.array_equal(
        drawn[0], model.pipeline.generate("two dogs", seed=3, settings=hot, size=(24, 24))[0]
    )


def test_scores_are_those_of_the_layout(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor
) -> None:
    inputs = processor(images=[picture(2), []], text=["a cat", "a picture of three frogs"])
    out = model(**inputs, labels=inputs["input_ids"])
    assert out.logits.shape == (*inputs["input_ids"].shape, 324)
    short = int((1 - inputs["attention_mask"][0]).sum())
    alone = processor(images=[picture(2)], text="a cat")
    assert torch.allclose(out.logits[0, short:], model(**alone).logits[0], atol=1e-4)
    text = processor(text="a picture of three frogs")["input_ids"][0]
    laid = build(document_of(text.tolist(), iter(()), model.pipeline.bundle.vocab), model.pipeline.bundle.vocab,
                 model.pipeline.bundle.layout)  # fmt: skip
    assert laid.tokens.tolist() == text.tolist()
    logged = out.logits[1, -len(text) : -1].log_softmax(-1)
    wanted = -logged.gather(1, text[1:, None]).mean()
    single = model(**processor(text="a picture of three frogs"), labels=text[None])
    assert torch.allclose(single.loss, wanted, atol=1e-4)


def test_conversations_are_laid_out_as_the_checkpoint_says(
    processor: NextFlowProcessor, bundle: Bundle
) -> None:
    messages = [
        {
            "role": "user",
            "content": [{"type": "image", "image": picture(0)}, {"type": "text", "text": "a cat <boi>"}],
        },
        {"role": "assistant", "content": "two dogs"},
        {"role": "user", "content": "a cat"},
    ]
    talking = NextFlowProcessor(processor.tokenizer, dialogue=True)
    inputs = talking.apply_chat_template(messages)
    codes = NextFlowPipeline(bundle).encode(picture(0))
    segments = document_of(inputs["input_ids"][0].tolist(), iter([codes]), bundle.vocab).segments
    kinds = [
        s.token if isinstance(s, Mark) else s.text if isinstance(s, Text) else "picture" for s in segments
    ]
    start, end = "<|im_start|>", "<|im_end|>"
    assert kinds == [
        start, "user\n", "picture", "a cat <boi>", end, "\n", start, "assistant\ntwo dogs", end, "\n", start,
        "user\na cat", end, "\n", start, "assistant\n",
    ]  # fmt: skip
    raw = processor.apply_chat_template(messages[2:])["input_ids"][0].tolist()
    assert raw == bundle.vocab.encode("a cat")
    drawn = document_of(
        [*bundle.vocab.encode("x"), bundle.vocab.boi, bundle.vocab.eoi], iter([codes]), bundle.vocab
    )
    assert isinstance(drawn.segments[1], Image) and not drawn.segments[1].supervised


def test_any_to_any(model: NextFlowForConditionalGeneration, processor: NextFlowProcessor) -> None:
    transformers = pytest.importorskip("transformers.pipelines.any_to_any")
    register()
    from transformers import pipeline

    pipe = pipeline("any-to-any", model=model, processor=processor)
    assert isinstance(pipe, transformers.AnyToAnyPipeline)
    said = pipe(text=[{"role": "user", "content": [{"type": "image", "image": picture(4)}]}], max_new_tokens=6,
                return_full_text=False)  # fmt: skip
    assert said[0]["generated_text"].strip() == model.pipeline.describe(picture(4), max_tokens=6)[0]
    drawn = pipe(text="two dogs", generation_mode="image")
    assert np.array_equal(drawn[0]["generated_image"], model.pipeline.generate("two dogs")[0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m, p: p(images=["http://x/y.png"], text="a"), "addresses are not fetched"),
        (lambda m, p: p(images=[np.zeros((4, 4))], text="a"), "a picture is a Pillow image"),
        (lambda m, p: p(images=[picture(0)], text=["a", "b"]), "2 texts, but pictures for 1"),
        (lambda m, p: m.generate(p(text="a")["input_ids"], generation_mode="audio"), "text or image"),
        (
            lambda m, p: m.generate(p(text="a")["input_ids"], max_length=8),
            "generate knows no max_length here",
        ),
        (lambda m, p: m.generate(p(text="a")["input_ids"], num_return_sequences=3), "num_return_sequences"),
        (lambda m, p: type(m).from_pretrained("nano", dtype="foo"), "dtype is one such as float32"),
        (lambda m, p: type(m).from_pretrained("nano", device_map="balanced"), "device_map is one device"),
        (lambda m, p: type(m).from_pretrained("nano", load_in_8bit=True), "is not loaded with load_in_8bit"),
        (lambda m, p: m.documents(torch.tensor([[p.vocab.boi]])), "stands alone"),
        (lambda m, p: m.documents(torch.tensor([[p.vocab.boi, p.vocab.eoi]])), "fewer pictures"),
        (
            lambda m, p: m.documents(p(text="a")["input_ids"], [torch.zeros(8, 8, 3, dtype=torch.uint8)]),
            "more pictures",
        ),
        (lambda m, p: NextFlowForConditionalGeneration(m.config), "use from_pretrained"),
        (
            lambda m, p: p.apply_chat_template([{"role": "user", "content": [{"type": "video"}]}]),
            "text and image",
        ),
    ],
)
def test_mistakes_are_one_line(
    model: NextFlowForConditionalGeneration, processor: NextFlowProcessor, call: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        call(model, processor)
    assert "\n" not in str(error.value)


def test_the_former_name_of_dtype_counts(folder: Path) -> None:
    for asked in (torch.float32, "float32", torch.bfloat16):
        loaded = NextFlowForConditionalGeneration.from_pretrained(folder, torch_dtype=asked)
        wanted = getattr(torch, asked) if isinstance(asked, str) else asked
        assert {p.dtype for p in loaded.model.parameters()} == {wanted}
    placed = NextFlowForConditionalGeneration.from_pretrained(folder, device_map={"": "cpu"}, dtype="auto")
    config = NextFlowConfig.from_pretrained(folder)
    assert NextFlowForConditionalGeneration.from_pretrained(folder, config=config).config is config
    config.rope_theta = 5.0
    with pytest.raises(
        ValueError, match=r"config is of another architecture than .*: it differs in rope_theta"
    ):
        NextFlowForConditionalGeneration.from_pretrained(folder, config=config)
    assert placed.device.type == "cpu"


class FakeHub:
    """Keeps what would be uploaded."""

    files: dict[str, bytes] = {}  # noqa: RUF012
    made: tuple[str, bool] | None = None
    broken = False

    def __init__(self, token: str | None = None) -> None:
        self.token = token

    def create_repo(self, repo_id: str, private: bool, exist_ok: bool) -> None:
        FakeHub.made = (repo_id, private)

    def upload_folder(self, repo_id: str, folder_path: Path) -> str:
        if FakeHub.broken:
            raise OSError("no network\nhere")
        files = [f for f in Path(folder_path).rglob("*") if f.is_file()]
        FakeHub.files = {f.relative_to(folder_path).as_posix(): f.read_bytes() for f in files}
        return f"https://huggingface.co/{repo_id}"


def test_push_to_hub(
    folder: Path, bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    model: NextFlowForConditionalGeneration,
) -> None:  # fmt: skip
    monkeypatch.setattr("huggingface_hub.HfApi", FakeHub)
    pipeline = NextFlowPipeline(replace(bundle, card=CARD))
    assert pipeline.push_to_hub("me/tiny", private=True) == "https://huggingface.co/me/tiny"
    assert FakeHub.made == ("me/tiny", True)
    pushed = FakeHub.files
    assert pushed["README.md"].decode() == CARD
    here = {f.relative_to(folder).as_posix(): f.read_bytes() for f in folder.rglob("*") if f.is_file()}
    assert pushed == here
    for name, data in pushed.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(data)
    assert load_bundle(tmp_path).card == CARD  # checksums hold
    model.push_to_hub("me/other")
    assert FakeHub.made == ("me/other", False) and FakeHub.files["README.md"].decode() == CARD
    FakeHub.broken = True
    with pytest.raises(StorageError, match="me/tiny: the upload failed \\(no network here\\)"):
        pipeline.push_to_hub("me/tiny")
    FakeHub.broken = False
