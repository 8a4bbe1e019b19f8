"""What requests may say: OpenAI's fields and ours beside them. Anything else is an error that names it."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator

from nextflow_ar.generation.sampling import MOST, PerScale, SamplingSettings

SEEDS = 2**63

PER_SCALE = "One value, two (first and last scale), or one per scale."
OF_WORDS = "One value: it is the words', which have no scales."
# Only told: what is said of other numbers is SamplingSettings' own line, here as everywhere.
Number = Annotated[float, Field(json_schema_extra={"minimum": 0, "maximum": MOST})]
Values = Annotated[float | list[float], Field(description=PER_SCALE)]
Numbers = Annotated[Number | list[Number], Field(description=PER_SCALE)]


class Strict(BaseModel):
    """No unknown fields, no numbers that are none."""

    model_config = ConfigDict(extra="forbid", allow_inf_nan=False)


class Sampling(Strict):
    """Fields that steer sampling; all of them ours but ``temperature``, ``top_p`` and ``seed``."""

    seed: Annotated[int, Field(ge=0, lt=SEEDS, description="The same seed gives the same result.")] | None = (
        None
    )
    temperature: Numbers | None = None
    top_k: Values | None = None
    top_p: Values | None = None
    guidance_scale: Numbers | None = None

    @field_validator("temperature", "top_k", "top_p", "guidance_scale", mode="before")
    @classmethod
    def _list_in_a_form(cls, value: Any) -> Any:
        if isinstance(value, str) and "," in value:
            return value.split(",")
        return value

    @field_validator("temperature", "top_k", "top_p", "guidance_scale")
    @classmethod
    def _few(cls, value: float | list[float] | None) -> float | list[float] | None:
        if isinstance(value, list) and not 1 <= len(value) <= 32:
            raise ValueError("takes 1 to 32 values")
        return value

    def values(self, *names: str) -> dict[str, PerScale | None]:
        """The named fields under the engine's names."""
        found = {name: getattr(self, name) for name in names}
        plain = {n: tuple(v) if isinstance(v, list) else v for n, v in found.items()}
        return {{"guidance_scale": "guidance"}.get(n, n): v for n, v in plain.items()}


class Sized(Sampling):
    """Sampling, and the size of what is drawn."""

    size: Annotated[str, Field(description="WIDTHxHEIGHT, or auto: the model's largest square.")] | None = (
        None
    )

    @field_validator("size")
    @classmethod
    def _two_sides(cls, value: str | None) -> str | None:
        if value is None or value == "auto":
            return None
        if not re.fullmatch(r"[1-9]\d{0,4}x[1-9]\d{0,4}", value):
            raise ValueError("takes WIDTHxHEIGHT in pixels such as 64x64, or auto")
        return value

    @property
    def sides(self) -> tuple[int, int] | None:
        """(width, height), None: the model's own."""
        return None if self.size is None else (int(self.size.split("x")[0]), int(self.size.split("x")[1]))


class ImageBody(Sized):
    """``POST /v1/images/generations``."""

    prompt: str
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    response_format: Literal["b64_json"] | None = None
    stream: bool | None = False
    partial_images: (
        Annotated[int, Field(ge=0, le=18, description="Pictures after so many earlier scales, streamed.")]
        | None
    ) = 0
    output_format: Literal["png", "jpeg", "webp"] | None = "png"
    output_compression: Annotated[int, Field(ge=0, le=100)] | None = None
    background: Literal["opaque", "auto"] | None = None
    negative_prompt: Annotated[str, Field(description="What guidance leads away from.")] | None = None
    think: Annotated[bool, Field(description="Plan in words before drawing.")] | None = None
    quality: Annotated[str, Field(description="Taken and not used.")] | None = None
    style: Annotated[str, Field(description="Taken and not used.")] | None = None
    moderation: Annotated[str, Field(description="Taken and not used: nothing is moderated.")] | None = None
    user: Annotated[str, Field(description="Taken and not used.")] | None = None
    safety_identifier: Annotated[str, Field(description="Taken and not used.")] | None = None

    def settings(self, defaults: SamplingSettings) -> SamplingSettings:
        """Sampling of the pictures. Raises SettingError."""
        return defaults.changed(**self.values("temperature", "top_k", "top_p", "guidance_scale"))


class EditBody(ImageBody):
    """The fields of ``POST /v1/images/edits`` beside its files."""

    input_fidelity: Annotated[str, Field(description="Taken and not used.")] | None = None


class PictureAddress(Strict):
    """Where a picture is: a ``data:`` URL, or http(s) where the server fetches such."""

    url: str
    detail: Annotated[str, Field(description="Taken and not used.")] | None = None


class TextPart(Strict):
    """A text of a message."""

    type: Literal["text"]
    text: str


class PicturePart(Strict):
    """A picture of a message."""

    type: Literal["image_url"]
    image_url: PictureAddress


class GivenPicture(Strict):
    """A picture of an earlier answer, given back. ``offset``: how many characters of ``content`` stand before it."""

    type: Literal["image_url"] = "image_url"
    image_url: PictureAddress
    index: int | None = None
    offset: Annotated[int, Field(ge=0)] | None = None


Part = Annotated[TextPart | PicturePart, Field(discriminator="type")]


class Message(BaseModel):
    """A turn. An answer of this server can be given back as it came, so unknown fields of messages are let pass."""

    model_config = ConfigDict(extra="ignore")

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part] | None = None
    images: list[GivenPicture] | None = None


class StreamOptions(Strict):
    """``include_usage``: a last chunk with the figures."""

    include_usage: bool | None = False
    include_obfuscation: bool | None = None


class ChatBody(Sized):
    """``POST /v1/chat/completions``. ``temperature``, ``top_k`` and ``top_p`` are the text's, one value each;
    ``guidance_scale`` is the pictures', and may differ by scale.
    """

    temperature: Annotated[Number | list[Number], Field(description=OF_WORDS)] | None = None
    top_k: Annotated[float | list[float], Field(description=OF_WORDS)] | None = None
    top_p: Annotated[float | list[float], Field(description=OF_WORDS)] | None = None
    messages: Annotated[list[Message], Field(min_length=1, max_length=1024)]
    model: str | None = None
    n: Annotated[int, Field(ge=1)] | None = 1
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    max_pictures: Annotated[int, Field(ge=0, description="Pictures that the answer may hold.")] | None = None
    modalities: list[Literal["text", "image"]] | None = None
    stop: str | Annotated[list[str], Field(max_length=4)] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    frequency_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    presence_penalty: Annotated[float, Field(ge=0, le=0)] | None = None
    logprobs: Literal[False] | None = None
    user: Annotated[str, Field(description="Taken and not used.")] | None = None
    safety_identifier: Annotated[str, Field(description="Taken and not used.")] | None = None
    metadata: Annotated[dict[str, str], Field(description="Taken and not used.")] | None = None
    store: Literal[False] | None = None

    @field_validator("temperature", "top_k", "top_p")
    @classmethod
    def _of_words(cls, value: float | list[float] | None) -> float | list[float] | None:
        if isinstance(value, list) and len(value) > 1:
            raise ValueError(f"takes one value in a conversation, got {len(value)}: words have no scales")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end the answer, the empty ones left out."""
        given = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return tuple(text for text in given if text)
