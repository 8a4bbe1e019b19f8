"""Answers in words and pictures: conversations, stories, moving pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

from PIL import Image as PILImage

from nextflow_ar.generation.base import THOUGHT_SETTINGS, Loaded, Picture, RequestError, fold_seed, listed
from nextflow_ar.generation.documents import Part, part
from nextflow_ar.generation.engine import WriteRequest
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Codes, Event, Image, ImageReady, Planned, TextDelta

GREEDY = SamplingSettings(temperature=0.0)
STORY_TOKENS = 48
"""Most text tokens of a story for each of its pictures."""
COUNTED = ("no", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
"""How a small number of frames is said, as people write it."""
NEXT_FRAME = "what comes next?"
SHOWN_FRAMES = 4
"""Most frames that are shown when the next one is asked for."""


class Message(TypedDict):
    """What one side said: ``role`` "system", "user" or "assistant"; ``content`` a text, or texts and pictures in order."""

    role: str
    content: str | Sequence[str | Picture]


class Telling(Loaded):
    """What a loaded checkpoint says and draws in turn."""

    def chat_requests(
        self,
        messages: Sequence[Message] | Sequence[dict[str, Any]],
        *,
        max_tokens: int = 256,
        max_pictures: int = 5,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        text_settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
    ) -> WriteRequest:
        """The engine's request for the answer to a conversation; its events carry codes only (:meth:`decode` draws them).

        Pictures are drawn in ``size``, by default that of the conversation's last picture. A checkpoint without dialogue
        never learnt where an answer ends behind a picture: there, its first picture ends it.
        Raises RequestError, one line, for messages that make no conversation.
        """
        parts = self._parts(messages)
        shown = [segment.codes.schedule for _, segment in parts if isinstance(segment, Image)]
        schedule = self.schedule_for(size) if size is not None or not shown else shown[-1]
        if not self.manner.dialogue:
            max_pictures = min(1, max_pictures)
        return self._writing(
            parts, schedule, max_tokens, max_pictures, seed, settings, text_settings or GREEDY,
            last_image_ends=not self.manner.dialogue,
        )  # fmt: skip

    def _parts(self, messages: Sequence[Message] | Sequence[dict[str, Any]]) -> list[Part]:
        parts: list[Part] = []
        for message in messages:
            role, content = message.get("role"), message.get("content")
            if role not in ("system", "user", "assistant"):
                raise RequestError(f"a message's role is system, user or assistant, got {role!r}")
            if content is None:
                raise RequestError("a message has content: a text, or a list of texts and pictures")
            several = [content] if isinstance(content, str | PILImage.Image | Codes) else list(content)
            parts += [
                part(role, one if isinstance(one, str) else self.encode(one))
                for one in several
                if not isinstance(one, str) or one.strip()
            ]
        if not any(role == "user" for role, _ in parts):
            raise RequestError("the conversation is empty: say something first")
        return parts

    def _writing(
        self,
        parts: Sequence[Part],
        schedule: ScaleSchedule,
        max_tokens: int,
        max_pictures: int,
        seed: int,
        settings: SamplingSettings | None,
        text_settings: SamplingSettings,
        *,
        last_image_ends: bool,
    ) -> WriteRequest:
        return WriteRequest(
            self.manner.document(parts), max_tokens, max_pictures, schedule, seed, text_settings,
            settings or self.defaults, self.manner.ends, self.manner.unconditional, last_image_ends,
            self.told_thoughts if max_pictures else 0, self.thought_settings,
        )  # fmt: skip

    def write(
        self, request: WriteRequest, on_event: Callable[[Event], None] | None = None
    ) -> list[str | PILImage.Image]:
        """What the model writes, texts and pictures in turn. ``on_event`` sees every event; ImageReady has its picture."""
        out: list[str | PILImage.Image] = []
        text = ""
        for event in self.engine.run([request]):
            if isinstance(event, TextDelta):
                text += event.text
            if isinstance(event, ImageReady):
                picture = self.decode(event.codes)
                event = ImageReady(event.row, event.codes, picture)
                out += [text.strip(), picture]
                text = ""
            if on_event is not None:
                on_event(event)
        return [one for one in (*out, text.strip()) if not isinstance(one, str) or one]

    def chat(
        self,
        messages: Sequence[Message] | Sequence[dict[str, Any]],
        *,
        max_tokens: int = 256,
        max_pictures: int = 5,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        text_settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[str | PILImage.Image]:
        """The assistant's answer to a conversation: texts, and a picture wherever the model begins one.

        ``settings`` are the pictures', ``text_settings`` the words' (None: greedy). Raises RequestError or ContextError.
        """
        request = self.chat_requests(
            messages, max_tokens=max_tokens, max_pictures=max_pictures, seed=seed, settings=settings,
            text_settings=text_settings, size=size,
        )  # fmt: skip
        return self.write(request, on_event)

    def story(
        self,
        prompt: str,
        *,
        max_pictures: int = 5,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[str | PILImage.Image]:
        """Sentences and pictures in turn, until the model ends or ``max_pictures`` are drawn.

        ``settings`` are the pictures'. Raises RequestError or ContextError.
        """
        if not prompt.strip():
            raise RequestError(
                "the prompt is empty: say what to tell, such as 'a story about a dog in three pictures'"
            )
        request = self._writing(
            [part("user", prompt)], self.schedule_for(size), STORY_TOKENS * max(1, max_pictures), max_pictures,
            seed, settings, THOUGHT_SETTINGS, last_image_ends=True,
        )  # fmt: skip
        return self.write(request, on_event)

    def video(
        self,
        prompt: str = "",
        *,
        first: Picture | Sequence[Picture] | None = None,
        frames: int = 5,
        seed: int = 0,
        settings: SamplingSettings | None = None,
        size: tuple[int, int] | None = None,
        on_event: Callable[[Event], None] | None = None,
    ) -> list[PILImage.Image]:
        """``frames`` pictures of something that moves: from words, or continuing ``first``, one frame or several.

        With ``first``, each next frame is asked for behind those before it (at most the last four), with the prompt or the
        checkpoint's own question; the given frames come first in the list, as the tokenizer reads them. Two frames say
        which way things move, one does not. Raises RequestError or ContextError.
        """
        if frames < 1:
            raise RequestError(f"a video has at least one frame, got {frames}")
        if first is not None:
            return self._continued(prompt, listed(first), frames, seed, settings, on_event)
        if not prompt.strip():
            raise RequestError("the prompt is empty: say what moves, such as 'a red car moves left'")
        phrase = str(self.bundle.generation.get("video", "{prompt}"))
        said = COUNTED[frames] if frames < len(COUNTED) else str(frames)
        asked = phrase.replace("{prompt}", prompt.strip()).replace("{frames}", said)
        request = self._writing(
            [part("user", asked)],
            self.schedule_for(size),
            0,
            frames,
            seed,
            settings,
            GREEDY,
            last_image_ends=True,
        )
        return [one for one in self.write(request, on_event) if not isinstance(one, str)]

    def _continued(
        self,
        prompt: str,
        first: Sequence[Picture],
        frames: int,
        seed: int,
        settings: SamplingSettings | None,
        on_event: Callable[[Event], None] | None,
    ) -> list[PILImage.Image]:
        if not first:
            raise RequestError("there is no first frame")
        codes = [self.encode(picture) for picture in first]
        asked = prompt.strip() or str(self.bundle.generation.get("next_frame", NEXT_FRAME))
        while len(codes) < frames:
            parts = [part("user", one) for one in codes[-SHOWN_FRAMES:]]
            request = self.request(
                [*parts, part("user", asked)], codes[-1].schedule, fold_seed(seed, len(codes)), settings
            )
            for event in self.stream([request], think=bool(self.told_thoughts)):
                if isinstance(event, TextDelta):  # a frame's plan is nothing that is said
                    event = Planned(event.row, event.text)
                if on_event is not None:
                    on_event(event)
                if isinstance(event, ImageReady):
                    codes.append(event.codes)
        return [self.decode(one) for one in codes[:frames]]
