"""Drawing in GenEval's own terms: its metadata for the six types, its rule, and its files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

from nextflow_ar.evaluation.judge import Found
from nextflow_ar.evaluation.playground_tasks import Metadata, geneval_rule
from nextflow_ar.evaluation.world.lines import Item
from nextflow_ar.evaluation.world.verdict import Verdict


def geneval_metadata(item: Item) -> Metadata:
    """What a request of the line ``draw_scene`` asks, with GenEval's keys ``tag``, ``include``, ``exclude``, ``prompt``."""
    canvas, tag = item.expected[0], item.tag
    include: list[dict[str, Any]] = []
    kinds = (
        [(kind, 1) for kind in (canvas.items[1].kind, canvas.items[0].kind)]
        if canvas.relation
        else canvas.counts
    )
    for (name, colour), count in kinds:
        told = colour is not None and tag != "single_object"
        include.append({"class": name, "count": count} | ({"color": colour} if told else {}))
    if canvas.relation:
        include[1]["position"] = [canvas.relation, 0]
    exclude = [{"class": w["class"], "count": w["count"] + 1} for w in include] if tag == "counting" else []
    return {"tag": tag, "include": include, "exclude": exclude, "prompt": item.asked}


def geneval(metadata: Metadata, verdict: Verdict) -> bool:
    """GenEval's rule: looser than ours, other things may stand around and the background is nobody's matter."""
    things = [
        cast(Found, thing) for thing in verdict.things
    ]  # name, colour, place and size are read, no more
    return geneval_rule(metadata, things)


def result_row(metadata: Metadata, row: Mapping[str, Any]) -> dict[str, Any]:
    """A line of the results file that GenEval's ``summary_scores`` reads."""
    return {
        "filename": row.get("picture") or f"{row['part']}-{row['index']}",
        "tag": metadata["tag"],
        "prompt": metadata["prompt"],
        "correct": bool(row["extra"]["geneval"]),
        "reason": row["fault"],
        "metadata": metadata,
    }
