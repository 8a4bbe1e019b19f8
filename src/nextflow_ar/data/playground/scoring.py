"""Whether an answer in words is right: it is read as its kind is read, and compared with the truth read in the same way."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from nextflow_ar.data.playground.episodes import Answer
from nextflow_ar.data.playground.reading import (
    read_choice,
    read_colour,
    read_full,
    read_name,
    read_number,
    read_place,
    read_plan,
    read_short,
    read_yes_no,
)
from nextflow_ar.data.playground.telling import read_motion

READERS: dict[str, Callable[[str], Any]] = {
    "yes_no": read_yes_no,
    "number": read_number,
    "colour": read_colour,
    "place": read_place,
    "choice": read_choice,
    "name": read_name,
    "short_caption": read_short,
    "full_caption": read_full,
    "motion": read_motion,
    "plan": read_plan,
}
"""How every kind of answer is read; "free" answers have one wording and are compared as text."""


def is_right(answer: Answer, said: str) -> bool:
    """Whether ``said`` means the same as the right answer; what cannot be read is wrong."""
    if answer.kind == "free":
        return said.strip().lower() == answer.text
    read = READERS[answer.kind]
    found = read(said)
    return found is not None and found == read(answer.text)
