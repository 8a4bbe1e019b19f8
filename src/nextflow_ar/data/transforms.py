"""What a stage does to a document before it is laid out (paper section 3), and what a document teaches.

Records are the parts of an extraction: mappings with ``role``, ``supervised`` and ``text`` or codes.
"""

from __future__ import annotations

from typing import Any

from nextflow_ar.types import Document, Image, Mark, Text

Part = dict[str, Any]


def _is_picture(part: Part) -> bool:
    return part["text"] is None


def invert(parts: list[Part], question: str = "") -> list[Part]:
    """A text-to-image record turned into captioning: the picture as context, the prompt as response; ``question``, if there
    is one, is asked between them.

    Text-to-image: texts as context, then one picture to be drawn, nothing else. System texts stay in front. Every other
    record (edits, stories, plans before a picture) comes back as it is. A given picture is not self-corrected: an
    extraction has its plain codes beside (:func:`nextflow_ar.data.extraction.as_document`).
    """
    prompt = _prompt(parts)
    if not prompt:
        return parts
    *before, last = parts
    told = [{**part, "role": "assistant", "supervised": True} for part in prompt]
    shown = {**last, "role": "user", "supervised": False}
    asked = [{**prompt[0], "role": "user", "supervised": False, "text": question}] if question else []
    return [*(part for part in before if part["role"] == "system"), shown, *asked, *told]


def invertible(parts: list[Part]) -> bool:
    """Whether :func:`invert` turns a record round."""
    return bool(_prompt(parts))


def plan(parts: list[Part]) -> list[Part]:
    """A text-to-image record (see :func:`invert`) whose prompt is said once more by the assistant, as the plan in
    words that it writes before it draws; every other record as it is.
    """
    told = [{**part, "role": "assistant", "supervised": True} for part in _prompt(parts)]
    return [*parts[:-1], *told, parts[-1]]


def _prompt(parts: list[Part]) -> list[Part]:
    """What is asked in a text-to-image record; nothing of any other."""
    *before, last = parts
    prompt = [part for part in before if part["role"] != "system"]
    simple = _is_picture(last) and last["supervised"]
    if not simple or any(_is_picture(part) or part["supervised"] for part in before):
        return []
    return prompt


def drop_condition(parts: list[Part]) -> list[Part]:
    """A record without what stands before its first drawn picture, so that guidance has something to contrast with.

    This is the empty document that sampling starts its unconditional half from. A record that draws nothing stays.
    """
    drawn = next((i for i, part in enumerate(parts) if _is_picture(part) and part["supervised"]), 0)
    return parts[drawn:]


def contents(document: Document) -> list[Text | Image]:
    """What is said and shown, without chat marks and the roles and line ends that stand beside them."""
    found: list[Text | Image] = []
    before: Mark | Text | Image | None = None
    for segment in document.segments:
        if not isinstance(segment, Mark) and not isinstance(before, Mark):
            found.append(segment)
        before = segment
    return found


def draws(document: Document) -> bool:
    """Whether some picture carries loss."""
    return any(isinstance(s, Image) and s.supervised for s in document.segments)


def reads(document: Document) -> bool:
    """Whether some text carries loss that a picture stands before."""
    seen = False
    for segment in document.segments:
        seen = seen or isinstance(segment, Image)
        if seen and isinstance(segment, Text) and segment.supervised:
            return True
    return False


def task_of(document: Document) -> str:
    """The name that a document's losses are reported under.

    "story" draws several pictures, "edit" one after another that is given, "draw" one; "read" writes after a picture
    that is given, "write" has no picture.
    """
    pictures = [s for s in document.segments if isinstance(s, Image)]
    drawn = sum(s.supervised for s in pictures)
    if drawn:
        return "story" if drawn > 1 else "edit" if len(pictures) > 1 else "draw"
    return "read" if pictures else "write"
