"""Seconds of a 1024 px picture with the paper's 7B shape on one GPU: random weights in bf16, made on the device; static
caches, CUDA graphs per scale, compiled layers. Split by phase; guidance on and off; one picture and several at a time.
The goal is 1.0 s on an H200; the paper says 5 s.

    python benchmarks/gpu_7b.py                                    # about 3 minutes on an H200
    python benchmarks/gpu_7b.py --ways graphs compiled --attention split masked --batch 1 --repeats 5
    python benchmarks/gpu_7b.py --bits fp8 --ways compiled         # needs torchao
    python benchmarks/gpu_7b.py --tiny                             # the same code with a tiny shape, on a CPU too
"""

import argparse
import collections
import contextlib
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch

from nextflow_ar.config import ImageTokenizerConfig, ModelConfig, from_dict, load_yaml
from nextflow_ar.generation.engine import ImageRequest
from nextflow_ar.generation.fast import StaticDrawer, compile_layers
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle
from nextflow_ar.model.costs import ImageShape, TextShape, count, forward_flops
from nextflow_ar.model.lowbit import quantise
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.vocab import Vocabulary, train_text_tokenizer
from nextflow_ar.storage import StorageError
from nextflow_ar.tokenizer.image_tokenizer import ImageTokenizer
from nextflow_ar.types import Document, ImageReady, Text

RECIPES = Path(__file__).parent.parent / "recipes"
GOAL = 1.0
WORDS = "a photograph of a lighthouse on a rocky coast at dusk, waves, gulls, a red boat in front of it, soft light"
TINY = {
    "text_vocab": 300, "codes": 32, "code_dim": 10, "hidden": 64, "layers": 2, "heads": 4, "kv_heads": 2,
    "intermediate": 96, "max_positions": 512, "rope_sections": (2, 3, 3),
}  # fmt: skip


@dataclass(frozen=True)
class Result:
    """One way of drawing. ``seconds``: of a picture, decoded, median; ``phases``: seconds of one drawing of ``batch``
    pictures, measured apart with the device waited for. ``first``: of the first drawing, recording and compiling included.
    ``tflops``: what the transformer's formula says was done, per second, in 1e12.
    """

    way: str
    attention: str
    guidance: bool
    batch: int
    seconds: float
    least: float
    cpu: float
    first: float
    tflops: float
    gigabytes: float
    phases: dict[str, float]


def shapes(tiny):
    """(model, image tokenizer, schedule): the recipes' own; tiny ones for a trial."""
    model = from_dict(ModelConfig, load_yaml(RECIPES / "7b_pretrain_1024.yaml")["model"])
    tokenizer = from_dict(ImageTokenizerConfig, load_yaml(RECIPES / "full_decoder.yaml")["tokenizer"])
    if not tiny:
        return model, tokenizer, ScaleSchedule.square(18)
    quantizer = replace(tokenizer.quantizer, codebook_size=TINY["codes"], semantic_dim=4, pixel_dim=6)
    semantic = replace(tokenizer.semantic, hidden=32, layers=1, heads=1, intermediate=48, decoder_layers=1)
    channels = {"encoder_channels": (8, 8, 16, 16), "decoder_channels": (8, 8, 16, 16), "decoder_blocks": 1}
    tokenizer = replace(tokenizer, quantizer=quantizer, semantic=semantic, **channels)
    return replace(model, **TINY), tokenizer, ScaleSchedule.square(6)


def random_bundle(config, tokenizer, device, dtype):
    """Random weights, made where they stay, in the type that they stay in."""
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model = NextFlowModel(config)
    finally:
        torch.set_default_dtype(usual)
    generator = torch.Generator(device).manual_seed(0)
    model.initialise(generator)
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.02, generator=generator)
    with torch.device(device):
        pictures = ImageTokenizer(tokenizer).eval().requires_grad_(False)
        pictures.quantizer.codebook.normal_(0.0, 0.5, generator=generator)
    vocab = Vocabulary(train_text_tokenizer([WORDS], 300), config.text_vocab, config.codes)
    return Bundle(model.eval().requires_grad_(False), pictures, vocab, {})


def wait(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@torch.inference_mode()
def draw(drawer, requests, watch=None):
    """Codes of the requests, then their pictures (B, H, W, 3); ``watch`` as the drawer's."""
    noise = "device" if drawer.device.type == "cuda" else "host"
    events = drawer.images(requests, noise=noise, watch=watch)
    codes = torch.stack([e.codes.target for e in events if isinstance(e, ImageReady)]).to(drawer.device)
    half = torch.autocast(drawer.device.type, torch.bfloat16, enabled=drawer.device.type == "cuda")
    with watch("image decode") if watch else contextlib.nullcontext(), half:
        out = [drawer.bundle.image_tokenizer.decode_bytes(one[None], drawer.schedule) for one in codes]
        return torch.cat(out).cpu()


def phases_of(drawer, requests):
    """Seconds of each phase of one drawing; what no phase holds is "rest"."""
    found, device = collections.Counter(), drawer.device

    @contextlib.contextmanager
    def watch(name):
        wait(device)
        began = time.perf_counter()
        yield
        wait(device)
        found[name] += time.perf_counter() - began

    began = time.perf_counter()
    draw(drawer, requests, watch)
    whole = time.perf_counter() - began
    return dict(found) | {"rest": whole - sum(found.values())}


def measure(bundle, schedule, way, attention, guidance, batch, given):
    """A result: first drawing, repeats, phases."""
    device = bundle.model.head.weight.device
    settings = SamplingSettings(guidance=5.0 if guidance else 1.0, top_k=given.top_k, top_p=given.top_p)
    document = Document((Text(WORDS),))
    prompt = len(bundle.vocab.encode(WORDS))
    requests = [ImageRequest(document, schedule, seed, settings) for seed in range(batch)]
    graphs = device.type == "cuda" and way != "eager"
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    drawer = StaticDrawer(
        bundle, schedule, batch, guided=guidance, prefix=-(-(prompt + 1) // 64) * 64, attention=attention, graphs=graphs
    )  # fmt: skip
    began = time.perf_counter()
    draw(drawer, requests)
    wait(device)
    first, seconds, cpu = time.perf_counter() - began, [], []
    for _ in range(given.repeats):
        began, worked = time.perf_counter(), time.process_time()
        draw(drawer, requests)
        wait(device)
        seconds.append((time.perf_counter() - began) / batch)
        cpu.append((time.process_time() - worked) / batch)
    phases = phases_of(drawer, requests)
    flops = 0.0
    for text in (prompt, 0) if guidance else (prompt,):
        counts = count([*([TextShape(text)] if text else []), ImageShape(schedule, True)])
        layers, head = forward_flops(counts, bundle.model.config)
        flops += layers + head * bundle.model.config.codes / bundle.model.config.vocab
    model_seconds = sum(s for name, s in phases.items() if name.startswith(("prefill", "scale"))) / batch
    memory = torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else 0.0
    return Result(
        way, attention, guidance, batch, statistics.median(seconds), min(seconds), statistics.median(cpu), first,
        flops / model_seconds / 1e12, memory, phases,
    )  # fmt: skip


def show(result):
    """A line of the table, and the phases in milliseconds beneath it."""
    r = result
    print(
        f"{r.way:<10}{r.attention:<8}{'on' if r.guidance else 'off':>9}{r.batch:>6}{r.seconds:>12.3f}{r.least:>9.3f}"
        f"{r.cpu:>8.3f}{r.first:>8.1f}{r.tflops:>9.1f}{r.gigabytes:>7.1f}"
    )
    print("          " + ", ".join(f"{name} {s * 1e3:.1f}" for name, s in r.phases.items()), flush=True)


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true", help="a tiny shape, to try the code")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 4])
    parser.add_argument("--guidance", nargs="+", choices=("on", "off"), default=["on", "off"])
    parser.add_argument(
        "--ways", nargs="+", choices=("eager", "graphs", "compiled"), default=["graphs", "compiled"]
    )
    parser.add_argument("--attention", nargs="+", choices=("split", "masked"), default=["split"])
    parser.add_argument("--bits", choices=("int8", "int4", "fp8"))
    parser.add_argument("--layers", type=int, help="fewer layers, for a card that holds less")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--top-k", type=int, default=0)
    parser.add_argument("--top-p", type=float, default=0.9)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device(given.device)
    if device.type == "cpu" and not given.tiny:
        sys.exit("gpu_7b: the 7B shape needs a GPU; --tiny runs the same code here")
    torch.set_float32_matmul_precision("high")
    config, tokenizer, schedule = shapes(given.tiny)
    config = replace(config, layers=given.layers or config.layers)
    began = time.perf_counter()
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    bundle = random_bundle(config, tokenizer, device, dtype)
    try:
        changed = quantise(bundle.model, given.bits) if given.bits else 0
    except StorageError as error:
        sys.exit(f"gpu_7b: {error}")
    wait(device)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU, graphs off"
    weights = sum(p.numel() for p in bundle.model.parameters())
    bits = f", {changed} layers in {given.bits}" if changed else ""
    print(f"{name}, torch {torch.__version__}, {weights / 1e9:.2f}B parameters in {dtype}{bits}, "
          f"{schedule.num_tokens} tokens, made in {time.perf_counter() - began:.1f} s")  # fmt: skip
    print(f"{'way':<10}{'attends':<8}{'guidance':>9}{'batch':>6}{'s/picture':>12}{'least':>9}{'cpu':>8}{'first':>8}"
          f"{'TFLOP/s':>9}{'GB':>7}     (phases in ms)")  # fmt: skip
    results = []
    for way in sorted(given.ways, key=("eager", "graphs", "compiled").index):  # compiled layers stay so
        if way == "compiled":
            compile_layers(bundle.model)
        for attention in given.attention:
            for guidance in given.guidance:
                for batch in given.batch:
                    results.append(measure(bundle, schedule, way, attention, guidance == "on", batch, given))
                    show(results[-1])
    best = min((r for r in results if r.guidance), key=lambda r: r.seconds, default=results[0])
    if not given.tiny:
        verdict = "met" if best.seconds <= GOAL else "missed"
        print(
            f"goal {GOAL:.1f} s a picture: {verdict} ({best.seconds:.2f} s: {best.way}, batch {best.batch})"
        )
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(json.dumps({"device": name, "results": [asdict(r) for r in results]}, indent=1))
    return results


if __name__ == "__main__":
    main()
