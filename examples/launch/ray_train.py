"""A training recipe on a Ray cluster: python examples/launch/ray_train.py RECIPE --workers 16 [--set KEY=VALUE ...]

Needs the extra ``ray``. Ray starts one process a GPU and joins them; the run's folder (``out``) must be on a file system
that all nodes see. After a failure Ray starts all processes anew, and they go on from the last checkpoint.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def train(config: dict[str, Any]) -> None:
    """What each process does: the same as ``nextflow-ar train``."""
    from nextflow_ar.app.stages import run_recipe

    run_recipe(Path(config["recipe"]), config["changes"])


def main() -> None:
    """Read the command line, start the processes, wait for them."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("recipe", help="a recipe file that all nodes see")
    parser.add_argument("--workers", type=int, required=True, help="processes, one GPU each")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", dest="changes")
    parser.add_argument("--storage", required=True, help="folder on all nodes for Ray's own records")
    parser.add_argument("--restarts", type=int, default=3)
    parser.add_argument("--cpu", action="store_true", help="no GPUs: to try it out")
    args = parser.parse_args()

    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchConfig, TorchTrainer

    trainer = TorchTrainer(
        train,
        train_loop_config={"recipe": str(Path(args.recipe).resolve()), "changes": args.changes},
        # gloo beside nccl: counts and checkpoints travel as CPU tensors
        torch_config=TorchConfig(backend="gloo" if args.cpu else "cpu:gloo,cuda:nccl"),
        scaling_config=ScalingConfig(num_workers=args.workers, use_gpu=not args.cpu),
        run_config=RunConfig(
            name="nextflow-ar",
            storage_path=str(Path(args.storage).resolve()),
            failure_config=FailureConfig(max_failures=args.restarts),
        ),
    )
    trainer.fit()


if __name__ == "__main__":
    main()
