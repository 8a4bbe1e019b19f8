"""Requests as documents, laid out as training lays out the tasks: raw, or as turns of a dialogue."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from nextflow_ar.sequence.dialogue import opened, turns, whole
from nextflow_ar.sequence.vocab import END_OF_TEXT, TURN_END
from nextflow_ar.types import Codes, Document, Image, Text

Part = tuple[str, Text | Image]
"""Who says or shows it ("system", "user" or "assistant"), and what."""

ARROW = "->"
"""Between the two pictures of an example."""


def part(role: str, what: str | Codes) -> Part:
    """A text or a picture in a role. What the assistant said or drew is a response, so a drawn picture has its scales."""
    supervised = role == "assistant"
    return role, Text(what.strip(), supervised) if isinstance(what, str) else Image(what, supervised)


@dataclass(frozen=True)
class Manner:
    """How a checkpoint's documents are laid out. ``dialogue``: with chat marks around every turn. ``seen``: what the
    assistant drew in earlier turns is shown as any other picture is, not scale by scale.
    """

    dialogue: bool
    seen: bool = False

    def document(self, parts: Sequence[Part], *, finished: bool = False) -> Document:
        """The parts in order, neighbouring texts of one role as one (:func:`whole`), up to where the answer begins;
        ``finished``: none comes, so the last turn ends.
        """
        parts = whole(parts)
        if self.seen:
            parts = [
                (role, replace(one, supervised=False) if isinstance(one, Image) else one)
                for role, one in parts
            ]
        if not self.dialogue:
            return Document(tuple(segment for _, segment in parts))
        return Document(turns(parts) if finished else opened(parts))

    @property
    def unconditional(self) -> Document:
        """What guidance contrasts with: nothing before the picture, as ``condition_dropout`` leaves it in training."""
        return self.document(())

    @property
    def ends(self) -> tuple[str, ...]:
        """Marks that end an answer."""
        return (END_OF_TEXT, TURN_END) if self.dialogue else (END_OF_TEXT,)
