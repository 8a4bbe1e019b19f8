"""What a model writes, taken apart as it grows: words that are said, and the plan of a picture, which is not.

A model that was taught to (``planned`` in docs/training.md) lays a picture out in words before it begins it: "the dog goes
away. plan: a car left, blue background". The plan is for the picture and not for the reader.
"""

from __future__ import annotations

import re

MARK = "plan:"
"""How a plan begins."""
_PLAN = re.compile(rf"(?:^|\s)\s*{MARK}")
_MAYBE = re.compile(r"(?:\s+|^)(?:" + "|".join(MARK[:n] for n in range(len(MARK) - 1, 0, -1)) + r")$|\s+$")


def split(text: str, *, final: bool) -> tuple[str, str | None]:
    """(words that are said, the plan behind them or None). An end that may turn out to begin a plan is left out of both,
    unless the text is ``final``.
    """
    found = _PLAN.search(text)
    if found is not None:
        return text[: found.start()], text[found.start() :].strip()
    unsure = None if final else _MAYBE.search(text)
    return (text if unsure is None else text[: unsure.start()]), None
