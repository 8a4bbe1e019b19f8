"""Documents as rows of token ids and back, as transformers passes them around: a picture is ``<boi><eoi>``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextflow_ar.sequence.vocab import TURN_END, TURN_START, Vocabulary
from nextflow_ar.types import Codes, Document, Image, Mark, Segment, Text

RESPONDER = "assistant\n"


def ids_of(segments: Sequence[Segment | None], vocab: Vocabulary) -> list[int]:
    """Token ids of segments; None or an image is a picture. Special tokens that a text spells out stay text."""
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Text):
            ids += vocab.encode(segment.text)
        elif isinstance(segment, Mark):
            ids.append(vocab.special(segment.token))
        else:
            ids += [vocab.boi, vocab.eoi]
    return ids


def document_of(ids: Sequence[int], pictures: Iterator[Codes], vocab: Vocabulary) -> Document:
    """The document of a row of token ids, its pictures taken from ``pictures`` in order.

    What stands in an assistant's turn is a response, so its pictures are laid out with all their scales.
    Raises ValueError, one line, when pictures are missing or an image mark stands alone.
    """
    marks = {vocab.special(token): token for token in (TURN_START, TURN_END)}
    segments: list[Segment] = []
    run: list[int] = []
    answering = begun = False

    def close() -> None:
        nonlocal answering, begun
        if run:
            text = vocab.decode(run)
            if begun:
                answering = text.startswith(RESPONDER)
            segments.append(Text(text, supervised=answering))
            begun = False
            run.clear()

    number = 0
    while number < len(ids):
        token = int(ids[number])
        if token in marks:
            close()
            begun = marks[token] == TURN_START
            answering = answering and not begun
            segments.append(Mark(marks[token]))
        elif token == vocab.boi:
            close()
            if number + 1 >= len(ids) or int(ids[number + 1]) != vocab.eoi:
                raise ValueError("<boi> stands alone: a picture is <boi><eoi> in token ids")
            codes = next(pictures, None)
            if codes is None:
                raise ValueError("there are fewer pictures than <boi><eoi> in the token ids")
            segments.append(Image(codes, supervised=answering))
            number += 1
        else:
            run.append(token)
        number += 1
    close()
    return Document(tuple(segments))
