"""Training steps on one GPU, forward and backward: FlexAttention against torch's fused kernel under a mask, compiled layers
against eager ones, for a small model's packed rows and for the paper's 7B layers with whole pictures.

    python benchmarks/gpu_training.py                      # a minute on an H100
    python benchmarks/gpu_training.py --shapes 7b --layers 4 --pictures 1
    python benchmarks/gpu_training.py --tiny               # the same code with tiny shapes, on a CPU too (not compiled)
"""

import argparse
import json
import statistics
import time
from dataclasses import replace
from pathlib import Path

import torch

from nextflow_ar.config import ModelConfig, from_dict, load_yaml
from nextflow_ar.model.flops import batch_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.sequence.batch import collate, pack
from nextflow_ar.sequence.layout import LayoutOptions, build
from nextflow_ar.sequence.vocab import Vocabulary, train_text_tokenizer
from nextflow_ar.training.meters import measured_peak
from nextflow_ar.types import Codes, Document

RECIPES = Path(__file__).parent.parent / "recipes"
WORDS = "a lighthouse on a rocky coast at dusk, a red boat in front of it"
TINY = {
    "hidden": 64,
    "layers": 2,
    "heads": 2,
    "kv_heads": 2,
    "intermediate": 96,
    "codes": 64,
    "text_vocab": 300,
}


def batch_of(config, scales, rows, width, generator):
    """Rows filled with pictures behind words, as training packs them."""
    vocab = Vocabulary(train_text_tokenizer([WORDS], 300), config.text_vocab, config.codes)
    schedule, options, packed = ScaleSchedule.square(scales), LayoutOptions(config.rope_range, 0.9, 4.0), []
    for _ in range(rows):
        held = []
        while True:
            codes = torch.randint(config.codes, (schedule.num_tokens,), generator=generator)
            sample = build(Document.text_to_image(WORDS, Codes.plain(schedule, codes)), vocab, options)
            if sum(map(len, held)) + len(sample) > width:
                break
            held.append(sample)
        packed.append(pack(held))
    return collate(packed, width)


def measure(config, batch, way, device, repeats):
    """(seconds of a step, of the first one, GB at the peak)."""
    torch.manual_seed(0)
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if config.hidden > 1024 else torch.float32)
    try:
        with device:
            model = NextFlowModel(config)
    finally:
        torch.set_default_dtype(usual)
    model.initialise(torch.Generator(device).manual_seed(0))
    torch.compiler.reset()
    if way != "eager":
        model.compile_backbone(flex=way == "flex")
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(repeats + 1):
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16):
            report = model.losses(batch)
        report.total.backward()
        model.zero_grad(set_to_none=True)
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
    memory = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
    return statistics.median(seconds[1:]), seconds[0], memory


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--shapes", nargs="+", choices=("small", "7b"), default=["small", "7b"])
    parser.add_argument("--ways", nargs="+", choices=("eager", "sdpa", "flex"), default=["sdpa", "flex"])
    parser.add_argument("--layers", type=int, default=4, help="of the 7B shape")
    parser.add_argument("--pictures", type=int, default=1, help="of 1024 px in a row of the 7B shape")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    peak = measured_peak(device)
    print(f"matrix products: {peak:.1f} TFLOP/s in bf16")
    print(
        f"{'shape':<8}{'way':<7}{'places':>9}{'s/step':>9}{'first':>8}{'places/s':>11}{'TFLOP/s':>9}{'share':>7}{'GB':>7}"
    )
    found = []
    for shape in given.shapes:
        name, scales, rows, width = {
            "small": ("gpu_model", 8, 128, 512),
            "7b": ("7b_pretrain_1024", 18, 1, -(-10_200 * given.pictures // 128) * 128),
        }[shape]
        config = from_dict(ModelConfig, load_yaml(RECIPES / f"{name}.yaml")["model"])
        if shape == "7b":
            config = replace(config, layers=given.layers)
        if given.tiny:
            config, scales, rows, width = replace(config, **TINY, rope_sections=(4, 6, 6)), 6, 2, 256
        batch = batch_of(config, scales, rows, width, generator).to(device)
        work = batch_flops(batch, config)
        for way in given.ways:
            seconds, first, memory = measure(config, batch, way, device, given.repeats)
            rate, places = work / seconds / 1e12, int((batch.documents >= 0).sum())
            print(
                f"{shape:<8}{way:<7}{places:>9}{seconds:>9.4f}{first:>8.1f}{places / seconds:>11.0f}{rate:>9.1f}"
                f"{rate / peak:>7.2f}{memory:>7.1f}", flush=True
            )  # fmt: skip
            found.append({"shape": shape, "way": way, "places": places, "seconds": seconds, "tflops": rate})
    if given.json:
        given.json.write_text(json.dumps({"peak": peak, "results": found}, indent=1))
    return found


if __name__ == "__main__":
    main()
