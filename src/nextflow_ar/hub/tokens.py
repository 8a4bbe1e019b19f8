"""Documents as rows of token ids and back, as transformers passes them around: a picture is ``<boi><eoi>``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from nextflow_ar.sequence.vocab import TURN_END, TURN_START, Vocabulary
from nextflow_ar.types import Codes, Document, Image, Mark, Segment, Text

RESPONDER = "assistant\n"


def ids_of(segments: Sequence[Segment], vocab: Vocabulary) -> list[int]:
    """Token ids of segments. Special tokens that a text spells out stay text."""
    ids: list[int] = []
    for segment in segments:
        if isinstance(segment, Text):
            ids += vocab.encode(segment.text)
        elif isinstance(segment, Mark):
            ids.append(vocab.special(segment.token))
        else:
            ids += [vocab.boi, vocab.eoi]
    return ids


def document_of(
    ids: Sequence[int], pictures: Iterator[Codes], vocab: Vocabulary, *, seen: bool = False
) -> Document:
    """The document of a row of token ids, its pictures taken from ``pictures`` in order.

    What stands in an assistant's turn is a response, so its pictures are laid out with all their scales, unless they are
    ``seen`` as any other picture is (see :class:`~nextflow_ar.generation.documents.Manner`).
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
            segments.append(Image(codes, supervised=answering and not seen))
            number += 1
        else:
            run.append(token)
        number += 1
    close()
    return Document(tuple(segments))


def changes(document: Document) -> bool:
    """Whether a picture that answers a document changes the last one in it: that was shown in the turn that is answered, or
    there are no turns.
    """
    started = [i for i, one in enumerate(document.segments) if one == Mark(TURN_START)]
    shown = [i for i, one in enumerate(document.segments) if isinstance(one, Image)]
    return bool(shown) and (not started or sum(i > shown[-1] for i in started) == 1)


def asks(document: Document) -> bool:
    """Whether a document is a question about one picture and nothing else, as ``NextFlowPipeline.describe`` asks it."""
    started = [i for i, one in enumerate(document.segments) if one == Mark(TURN_START)]
    shown = [i for i, one in enumerate(document.segments) if isinstance(one, Image)]
    return len(shown) == 1 and (not started or (len(started) == 2 and shown[0] < started[1]))


def blind(document: Document) -> Document | None:
    """A document without its pictures, which guidance of words contrasts with; None where it has no picture or no words."""
    left = tuple(one for one in document.segments if not isinstance(one, Image))
    said = [
        # behind the mark that begins a turn stands the role, on a line of its own
        one.text.partition("\n")[2] if i and document.segments[i - 1] == Mark(TURN_START) else one.text
        for i, one in enumerate(document.segments)
        if isinstance(one, Text)
    ]
    return Document(left) if len(left) < len(document.segments) and any(map(str.strip, said)) else None
