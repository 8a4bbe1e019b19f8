"""The command ``nextflow-ar plan``."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from nextflow_ar.training.plan import Plan

_GIB = 2**30


def plan(
    recipe: Annotated[Path, typer.Argument(help="Recipe file of kind model (recipes/*.yaml).")],
    gpus: Annotated[int, typer.Option("--gpus", min=1, help="How many.")] = 1,
    gpu: Annotated[
        str, typer.Option("--gpu", help="h100, h200, a100, b200, l40s; this (or cpu) measures the machine.")
    ] = "h100",
    efficiency: Annotated[
        float, typer.Option("--efficiency", help="Share of the peak that products reach (ignored with this).")
    ] = 0.55,
    changes: Annotated[
        list[str] | None, typer.Option("--set", help="Change a key: a.b=c. May be repeated.")
    ] = None,
    measure: Annotated[bool, typer.Option("--measure", help="The same as --gpu this.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Machine-readable output.")] = False,
) -> None:
    """Tokens, FLOPs, memory per GPU and days of a training stage before it runs, and what helps where it does not fit."""
    import torch

    from nextflow_ar.config import ConfigError, from_dict, load_yaml, override
    from nextflow_ar.training.hardware import GPUS
    from nextflow_ar.training.plan import make_plan, measured_plan, read_stage
    from nextflow_ar.training.recipe import ModelRecipe

    here = measure or gpu in ("this", "cpu")
    if not here and gpu not in GPUS:
        raise ConfigError(f"--gpu is one of {', '.join(GPUS)}, this, cpu, got {gpu!r}")
    if here and gpus != 1:
        raise ConfigError("--gpu this plans for the one machine that it measures: leave --gpus at 1")
    values = override(load_yaml(recipe), changes or [])
    if values.get("kind") == "model":  # read_stage looks at single keys: a misspelt one would change nothing
        from_dict(ModelRecipe, values, str(recipe))
    stage = read_stage(values, str(recipe), cuda=not here or torch.cuda.is_available())
    found = measured_plan(stage) if here else make_plan(stage, GPUS[gpu], gpus, efficiency)
    typer.echo(json.dumps(as_dict(found)) if as_json else table(found))


def as_dict(plan: Plan) -> dict[str, Any]:
    """Plain values of a plan: bytes, seconds, FLOPs."""
    p = plan.parameters
    return {
        "gpu": plan.gpu.name, "gpus": plan.gpus, "efficiency": plan.efficiency, "parameters": p.total,
        "trained": plan.trained, "tokens": plan.tokens, "flops": plan.flops, "steps": plan.steps,
        "memory": asdict(plan.memory) | {"total": plan.memory.total, "available": plan.gpu.memory},
        "fits": plan.fits, "seconds": asdict(plan.times) | {"step": plan.times.step}, "days": plan.days,
        "utilisation": plan.utilisation, "tokens_per_second_per_gpu": _rate(plan),
        "knobs": [asdict(knob) for knob in plan.knobs], "paper_tokens": plan.paper_tokens,
        "accumulate": plan.accumulate, "recipe_steps": plan.asked,
    }  # fmt: skip


def _rate(plan: Plan) -> float:
    return plan.tokens / (plan.steps * plan.times.step * plan.gpus)


def table(plan: Plan) -> str:
    """The plan for reading."""
    p, m, t, peak = plan.parameters, plan.memory, plan.times, plan.gpu.flops
    paper = f" (paper: {plan.paper_tokens:.3g})" if plan.paper_tokens else ""
    size = (
        f"layers {p.layers:,}, embeddings {p.embeddings:,}, head {p.head:,}, connector and codes {p.inputs:,}"
    )
    lines = [
        f"parameters   {p.total:,} ({size}); trained {plan.trained:,}",
        f"tokens       {plan.tokens:.4g}{paper} in {plan.steps:,.0f} steps",
        f"FLOPs        {plan.flops:.4g}, {plan.flops / plan.tokens:.3g} a token",
        f"machine      {plan.gpus} x {plan.gpu.name}, {peak / 1e12:.4g} TFLOP/s {plan.gpu.products}, products at "
        f"{plan.efficiency:.2f} of it ({plan.gpu.source})",
        "memory       " + ", ".join(f"{k} {v / _GIB:.2f}" for k, v in asdict(m).items()),
        f"             in all {m.total / _GIB:.1f} of {plan.gpu.memory / _GIB:.0f} GiB: "
        + ("fits" if plan.fits else "does not fit"),
        f"a step       {t.step:.3f} s: products {t.products:.3f}, elementwise {t.elementwise:.3f}, optimiser "
        f"{t.optimizer:.4f}; communication {t.communication:.3f} beside",
        f"speed        {_rate(plan):,.0f} tokens/s per GPU, utilisation {plan.utilisation:.2f}",
        f"days         {plan.days:.3g}",
    ]
    if plan.accumulate is not None:
        lines.append(
            f"accumulate   has to be {plan.accumulate}, so that a GPU computes one row of a step at a time"
        )
    if plan.asked is not None:
        lines.append(
            f"steps        the recipe says {plan.asked:,.0f}, {plan.asked / plan.steps:.3g} times what its documents take"
        )
    if not plan.fits:
        lines.append("what helps, each alone (GiB per GPU; time of an update):")
        lines += [f"  {k.name:<38}{k.memory / _GIB:8.1f}{k.slower:8.2f}x" for k in plan.knobs]
    return "\n".join(lines)
