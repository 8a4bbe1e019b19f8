"""A conversation over HTTP that goes on from what the server kept."""

from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image as PILImage

from nextflow_ar.generation.pipeline import NextFlowPipeline
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.types import Image
from tests.app.serving import running


def red() -> str:
    """A picture as a data URL."""
    out = io.BytesIO()
    PILImage.new("RGB", (40, 40), (220, 30, 30)).save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def test_a_conversation_is_continued_and_its_pictures_are_not_read_again(
    bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next turn feeds what is new, the picture that was drawn has its very codes, and the answer stays the same."""
    keeping = NextFlowPipeline(bundle, kept_bytes=2**26)
    encoded: list[int] = []
    true_encode = bundle.image_tokenizer.encode_bytes
    with running(keeping) as up:
        client, engine = up.client(), keeping.engine
        messages: list = [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": red()}}, {"type": "text", "text": "what is this?"}]}]  # fmt: skip

        def said(more: dict | None = None) -> object:
            asked = {"seed": 4, "top_k": 20, "max_pictures": 0, **(more or {})}
            return client.chat.completions.create(
                model="tiny", messages=messages, max_tokens=6, temperature=6.0, extra_body=asked
            )

        drawn = client.images.generate(prompt="two dogs", extra_body={"seed": 7})
        codes = keeping.pictures.get(next(iter(keeping.pictures._values)))
        monkeypatch.setattr(
            bundle.image_tokenizer, "encode_bytes", lambda p: encoded.append(1) or true_encode(p)
        )
        first = said()
        assert len(encoded) == 1
        fed, reused = engine.fed, engine.reused
        own = "data:image/png;base64," + (drawn.data[0].b64_json or "")  # type: ignore[index]
        messages += [
            first.choices[0].message,  # type: ignore[attr-defined]
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": own}}]},
        ]
        asked: list = []
        true_job = engine.job
        monkeypatch.setattr(engine, "job", lambda n, r: asked.append(r) or true_job(n, r))
        second = said()
        assert len(encoded) == 1  # neither the client's picture nor our own
        shown = [s for s in asked[-1].document.segments if isinstance(s, Image)]
        assert codes is not None and torch.equal(shown[-1].codes.target, codes.codes.target)
        turn = first.usage.prompt_tokens  # type: ignore[attr-defined]
        assert engine.reused - reused == turn and engine.fed - fed == second.usage.prompt_tokens - turn  # type: ignore
        engine.kept.clear()
        again = said()
        assert again.choices[0].message.content == second.choices[0].message.content  # type: ignore[attr-defined]
        assert engine.fed - fed == 2 * second.usage.prompt_tokens - turn  # type: ignore[attr-defined]
        with up.http() as http:
            page = http.get("/metrics").text
        for name, value in (
            ("prefix_reused_tokens_total", engine.reused), ("prefix_fed_tokens_total", engine.fed),
            ("prefix_hits_total", engine.kept.hits), ("pictures_known_total", keeping.pictures.hits),
        ):  # fmt: skip
            assert value > 0 and f"nextflow_ar_{name} {float(value)}" in page
