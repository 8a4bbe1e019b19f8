"""Peak memory and seconds of the loss, forward and backward, over the paper's vocabulary (151,936 text entries and 16,384
codes): chunk by chunk, torch's own fused loss where it exists, and plain cross-entropy of all logits. One process each.

    python benchmarks/loss_memory.py [--places 8192] [--hidden 512] [--dtype bfloat16]

``above inputs`` leaves out the process itself, hidden states and head; the head's gradient is in it, for all alike.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

CASES = ("plain", "plain, fp32 logits", "torch", "chunked")


def peak():
    """The process's peak memory so far in MiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def loss_of(case, hidden, weight, targets, weights):
    """The weighted sum of one case."""
    import torch.nn.functional as F

    from nextflow_ar.model.loss import chunked_linear_cross_entropy

    if case == "chunked":
        return chunked_linear_cross_entropy(hidden, weight, targets, weights)[0]
    if case == "torch":
        from torch.nn import LinearCrossEntropyOptions

        options = LinearCrossEntropyOptions()
        each = F.linear_cross_entropy(hidden, weight, targets, reduction="none", options=options)
        return (each.float() * weights).sum()
    logits = F.linear(hidden, weight)
    if case == "plain, fp32 logits":
        logits = logits.float()
    return (F.cross_entropy(logits, targets, reduction="none").float() * weights).sum()


def measure(case, given):
    """Peak and seconds of one case, and a part of its gradients into a file."""
    import torch

    dtype = getattr(torch, given.dtype)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(given.places, given.hidden, generator=generator).to(dtype).requires_grad_()
    weight = torch.empty(given.entries, given.hidden, dtype=dtype)
    weight.normal_(0, given.hidden**-0.5, generator=generator).requires_grad_()
    targets = torch.randint(0, given.entries, (given.places,), generator=generator)
    weights = torch.rand(given.places, generator=generator) / given.places
    (hidden[:8] @ weight[:64].T).float().sum()  # the kernels' own memory is not the loss's
    before, began = peak(), time.process_time()
    total = loss_of(case, hidden, weight, targets, weights)
    total.backward()
    seconds = time.process_time() - began
    found = {"loss": float(total.detach()), "peak": peak(), "before": before, "seconds": seconds}
    torch.save([hidden.grad.float(), weight.grad[::7].float()], given.gradients)
    print(json.dumps(found))


def difference(one, other):
    """Norm of the difference of two files' gradients, as a share of the second's norm; the larger of the two gradients."""
    import torch

    pairs = zip(torch.load(one), torch.load(other), strict=True)
    return max(float((a - b).norm() / b.norm()) for a, b in pairs)


def run(case, given, folder):
    """One case in a process of its own: its figures, or why there are none."""
    own = [f"--{k}={getattr(given, k)}" for k in ("places", "entries", "hidden", "dtype")]
    command = [sys.executable, __file__, "--case", case, "--gradients", str(folder / case), *own]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines()
        return {"why": lines[-1][:80] if lines else f"exit status {done.returncode} (out of memory?)"}
    return json.loads(done.stdout.splitlines()[-1])


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--places", type=int, default=8192)
    parser.add_argument("--entries", type=int, default=151936 + 16384)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--cases", default="plain;torch;chunked", help="; between: " + "; ".join(CASES))
    parser.add_argument("--case", default=None)
    parser.add_argument("--gradients", default=None)
    given = parser.parse_args()
    if given.case:
        measure(given.case, given)
        return
    print(f"{given.places} places, {given.entries} entries, hidden {given.hidden}, {given.dtype}")
    print(
        f"{'':20s}{'peak MiB':>10s}{'above inputs':>14s}{'CPU s':>9s}{'loss':>11s}{'gradients differ':>18s}"
    )
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), {}
        cases = given.cases.split(";")
        for case in cases:
            found[case] = r = run(case, given, folder)
            if "why" in r:
                print(f"{case:20s} not measured: {r['why']}")
                continue
            first = cases[0] if "why" not in found[cases[0]] else case
            apart = difference(folder / case, folder / first)
            print(
                f"{case:20s}{r['peak']:10.0f}{r['peak'] - r['before']:14.0f}{r['seconds']:9.1f}{r['loss']:11.5f}"
                f"{apart:18.1e}",
                flush=True,
            )
    plain, ours = found[cases[0]], found[cases[-1]]
    if "peak" in plain and "peak" in ours:
        above = (plain["peak"] - plain["before"]) / (ours["peak"] - ours["before"])
        print(
            f"{cases[0]} / {cases[-1]}: {plain['peak'] / ours['peak']:.1f} of all, {above:.1f} above inputs"
        )


if __name__ == "__main__":
    main()
