"""Conversations as documents: Qwen's chat marks around every turn."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from nextflow_ar.sequence.vocab import TURN_END, TURN_START
from nextflow_ar.types import Image, Mark, Segment, Text

JOINT = "\n"
"""Between neighbouring texts of one role, which are one text in pieces."""


def whole(parts: Iterable[tuple[str, Text | Image]]) -> list[tuple[str, Text | Image]]:
    """(role, segment) pairs in which neighbouring texts of one role, supervised alike, are one text, as rows of data have
    them (nothing stands between a text and a picture); texts without words are left out.
    """
    found: list[tuple[str, Text | Image]] = []
    for role, segment in parts:
        if isinstance(segment, Text):
            if not segment.text.strip():
                continue
            said, before = found[-1] if found else ("", None)
            if isinstance(before, Text) and (said, before.supervised) == (role, segment.supervised):
                found[-1] = role, replace(before, text=f"{before.text}{JOINT}{segment.text}")
                continue
        found.append((role, segment))
    return found


def turns(parts: Iterable[tuple[str, Text | Image]]) -> tuple[Segment, ...]:
    """(role, segment) pairs with every turn as ``<|im_start|>role``, its segments, ``<|im_end|>``.

    Consecutive segments of one role are one turn. A turn that holds a response learns to end with its mark.
    """
    segments: list[Segment] = []
    previous, learned = None, False
    for role, segment in parts:
        if role != previous:
            if previous is not None:
                segments += [Mark(TURN_END, supervised=learned), Text("\n")]
            segments += [Mark(TURN_START), Text(role + "\n")]
            previous, learned = role, False
        learned = learned or segment.supervised
        segments.append(segment)
    segments.append(Mark(TURN_END, supervised=learned))
    return tuple(segments)


def opened(parts: Iterable[tuple[str, Text | Image]]) -> tuple[Segment, ...]:
    """:func:`turns` up to where the assistant says or draws what comes next: in a turn of its own, or in the last one where
    that is the assistant's already.
    """
    return turns([*parts, ("assistant", Text(""))])[:-2]
