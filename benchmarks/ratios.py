"""The benchmark of ratios, all in one run: pictures per second of our engine, scale by scale, beside loops that emit the
final grid token by token at equal width, depth, number of parameters and number of final tokens: a raster scan over our
own backbone, and transformers' Janus and Emu3 by their own ``generate``. Weights are random, guidance is on, caches are on,
pictures are left as codes. Then FLOPs of the engine's work, counted by torch, beside our formula and the paper's.

    python benchmarks/ratios.py                        # 64, 256 and 1024 px
    python benchmarks/ratios.py --quick                # 64 and 256 px, one layer
    python benchmarks/ratios.py --sizes 1024 --layers 6 --loops ours raster --json out/ratios.json
"""

import argparse
import itertools
import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
import transformers
from _raster import raster
from torch.utils.flop_counter import FlopCounterMode

from nextflow_ar.generation.engine import Engine, ImageRequest
from nextflow_ar.generation.pipeline import best_dtype, resolve_model
from nextflow_ar.generation.sampling import SamplingSettings
from nextflow_ar.model.checkpoint import Bundle, load_bundle
from nextflow_ar.model.costs import Counts, ImageShape, TextShape, count, forward_flops
from nextflow_ar.model.nextflow import NextFlowModel
from nextflow_ar.scales import ScaleSchedule
from nextflow_ar.types import Document, ImageReady, Text

SCALES = {64: 8, 256: 12, 1024: 18}
"""Pixels to scales: 8x8 (downsampling 8, as nano has it), 16x16 and 64x64 final tokens (downsampling 16)."""
PROMPT = 100
"""Text tokens of the prompt: what the paper's formula has."""
GUIDANCE = 3.0
LOOPS = ("ours", "raster", "janus", "emu3")


@dataclass(frozen=True)
class Row:
    """One loop at one size. ``wall``, ``cpu``: seconds of a picture (median). ``parameters``: of what a picture needs,
    embeddings and heads included; ``stack``: of the transformer's layers alone. ``steps``: forward passes behind the
    prompt.
    """

    size: int
    loop: str
    layers: int
    parameters: int
    stack: int
    final_tokens: int
    steps: int
    wall: float
    cpu: float


@dataclass(frozen=True)
class Count:
    """FLOPs of one picture without guidance: counted by torch, and by formula. ``layers_*`` are the transformer's layers
    alone; ``paper`` is the paper's expression at this width, or None where it says nothing of the size.
    """

    size: int
    layers: int
    counted: int
    formula: float
    layers_counted: int
    layers_formula: float
    paper: float | None


def our_engine(scales, layers, seed=0):
    """Our engine over a random model of nano's width."""
    device = torch.device("cpu")
    nano = load_bundle(resolve_model("nano"), device, torch.float32)
    schedule = ScaleSchedule.square(scales)
    config = replace(nano.model.config, layers=layers, max_positions=schedule.num_tokens + 2 * PROMPT)
    model, generator = NextFlowModel(config), torch.Generator().manual_seed(seed)
    model.initialise(generator)
    with torch.no_grad():
        model.head.weight.normal_(0.0, 0.02, generator=generator)
    model = model.to(best_dtype(device)).eval().requires_grad_(False)
    return Engine(Bundle(model, nano.image_tokenizer, nano.vocab, {})), schedule


def prompt_of(vocab, tokens):
    """A text of exactly so many tokens."""
    text = ""
    for letter in itertools.cycle("zqjxvwkz"):
        if len(vocab.encode(text)) == tokens:
            return text
        text += letter
    raise AssertionError


def our_picture(engine, schedule, prompt, guidance=GUIDANCE):
    """Draw one picture's codes, as the pipeline does."""
    settings = SamplingSettings(guidance=guidance, top_p=0.95)
    request = ImageRequest(Document((Text(prompt),)), schedule, 0, settings)
    for event in engine.images([request]):
        if isinstance(event, ImageReady):
            return event.codes.target
    raise AssertionError


def text_sizes(config, vocabulary):
    """What Llama's and Emu3's text stacks have in common with ours."""
    return {
        "vocab_size": vocabulary, "hidden_size": config.hidden, "intermediate_size": config.intermediate,
        "num_hidden_layers": config.layers, "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads, "max_position_embeddings": config.max_positions,
        "bos_token_id": 1, "pad_token_id": 0, "eos_token_id": 2,
    }  # fmt: skip


def janus(config, tokens):
    """(parameters, those of its layers, picture) of a random Janus of our size; ``picture(n)`` draws n tokens by its own
    generate.
    """
    side = round(tokens**0.5)
    text = transformers.LlamaConfig(**text_sizes(config, config.text_vocab))
    vision = transformers.JanusVisionConfig(
        hidden_size=32, num_hidden_layers=1, num_attention_heads=1, image_size=16 * side, patch_size=16,
        projection_dim=config.hidden, depth=1, num_image_tokens=tokens,
    )  # fmt: skip
    pixels = transformers.JanusVQVAEConfig(
        embed_dim=8, num_embeddings=config.codes, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1,
        latent_channels=32, projection_dim=config.hidden, image_token_embed_dim=config.hidden,
    )  # fmt: skip
    whole = transformers.JanusConfig(text_config=text, vision_config=vision, vq_config=pixels)
    model = transformers.JanusForConditionalGeneration(whole).to(best_dtype(torch.device("cpu"))).eval()
    model.generation_config.generation_kwargs = {"boi_token_id": 3}
    ids = torch.randint(4, config.text_vocab, (1, PROMPT))

    def picture(n=tokens):
        model.model.vision_model.config.num_image_tokens = n
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), generation_mode="image", do_sample=True,
            top_p=0.95, top_k=0, guidance_scale=GUIDANCE, max_length=PROMPT + n, bos_token_id=1, pad_token_id=0,
        )  # fmt: skip

    own = model.model
    parts = (own.language_model, own.generation_embeddings, own.generation_aligner, own.generation_head)
    return sum(map(size_of, parts)), size_of(own.language_model.layers), picture


def emu3(config, tokens):
    """As :func:`janus`, of Emu3: every row of the grid ends with a mark that is generated too."""
    side, first = round(tokens**0.5), config.text_vocab
    names = {f"<|visual token {i:06d}|>": first + i for i in range(config.codes)}
    names |= {"<image>": 4, "<|extra_200|>": 5}
    text = transformers.Emu3TextConfig(**text_sizes(config, config.vocab))
    pixels = transformers.Emu3VQVAEConfig(
        codebook_size=config.codes, base_channels=32, channel_multiplier=[1, 1], num_res_blocks=1, hidden_size=32,
        attn_resolutions=[],
    )  # fmt: skip
    whole = transformers.Emu3Config(text_config=text, vq_config=pixels, vocabulary_map=names)
    model = transformers.Emu3ForConditionalGeneration(whole).to(best_dtype(torch.device("cpu"))).eval()
    ids, visual, mark = (
        torch.randint(6, first, (1, PROMPT)),
        torch.arange(first, config.vocab),
        torch.tensor([5]),
    )

    def allowed(_, so_far):
        return mark if (len(so_far) - PROMPT + 1) % (side + 1) == 0 else visual

    def picture(n=tokens):
        new = n + n // side
        return model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new,
            do_sample=True, top_p=0.95, top_k=0, guidance_scale=GUIDANCE,
            negative_prompt_ids=torch.ones(1, 1, dtype=torch.long), prefix_allowed_tokens_fn=allowed,
        )[:, PROMPT:]  # fmt: skip

    text = model.model.text_model
    return size_of(text) + size_of(model.lm_head), size_of(text.layers), picture


def size_of(module):
    """Number of parameters."""
    return sum(p.numel() for p in module.parameters())


def timed(work, repeats):
    """(wall, processor) seconds of ``work``, medians."""
    seconds = []
    for _ in range(repeats):
        wall, cpu = time.perf_counter(), time.process_time()
        work()
        seconds.append((time.perf_counter() - wall, time.process_time() - cpu))
    return tuple(statistics.median(column) for column in zip(*seconds, strict=True))


def measure(size, layers, loops, repeats):
    """A row per loop at one size."""
    engine, schedule = our_engine(SCALES[size], layers)
    config, final = engine.model.config, schedule.sizes[-1]
    prompt, rows = prompt_of(engine.vocab, PROMPT), []
    with torch.inference_mode():
        for loop in loops:
            if loop in ("ours", "raster"):
                parameters, stack = size_of(engine.model), size_of(engine.model.backbone.layers)
            else:
                parameters, stack, picture = (janus if loop == "janus" else emu3)(config, final)
            short = min(final, 16) if loop != "emu3" else round(final**0.5)
            if loop == "ours":
                works = [lambda: our_picture(engine, schedule, prompt)] * 2
                steps = len(schedule) - 1
            elif loop == "raster":
                works = [lambda n=n: raster(engine, schedule, prompt, n, GUIDANCE) for n in (short, final)]
                steps = final
            else:
                works = [lambda n=n, picture=picture: picture(n) for n in (short, final)]
                steps = final + (round(final**0.5) if loop == "emu3" else 0)
            works[0]()  # kernels of these shapes are made
            wall, cpu = timed(works[1], repeats)
            rows.append(Row(size, loop, layers, parameters, stack, final, steps, wall, cpu))
            print(line(rows[-1], rows), flush=True)
    return rows


def line(row, rows):
    """A row of the table; ratios are to our loop at the same size."""
    ours = next((r for r in rows if r.size == row.size and r.loop == "ours"), None)
    told = f"{row.wall / ours.wall:>9.2f}{row.cpu / ours.cpu:>9.2f}" if ours else ""
    return (
        f"{row.size:>5}  {row.loop:<8}{row.layers:>6}{row.parameters / 1e6:>9.2f}M"
        f"{row.stack / 1e6:>9.2f}M{row.final_tokens:>7}{row.steps:>7}"
        f"{row.wall:>9.3f}{row.cpu:>9.3f}{1 / row.wall:>12.3f}{told}"
    )


def cpu_attention(query, key, value, *_, **__):
    """FLOPs of the CPU's fused attention, which torch's counter does not know: shapes (B, H, L, D)."""
    b, h, n, d = query
    return 2 * b * h * n * key[2] * (d + value[-1])


def paper_flops(hidden, counts):
    """The paper's FLOPs of one layer: 12 h^2 a token and 4 h a visible pair. With its 10,184 tokens (100 of text) and
    64,053,978 pairs (the text sees itself both ways) this is its 122,208 h^2 + 256,215,912 h.
    """
    return 12 * counts.tokens * hidden**2 + 4 * counts.pairs * hidden


def paper_counts(counts):
    """Counts as the paper takes them: text sees text both ways."""
    return Counts(counts.tokens, counts.pairs + PROMPT * (PROMPT - 1) / 2, counts.predicted)


def flops(size, layers):
    """FLOPs of one picture of the engine, drawn without guidance."""
    engine, schedule = our_engine(SCALES[size], layers)
    config, ops = engine.model.config, torch.ops.aten
    extra = {ops._scaled_dot_product_flash_attention_for_cpu: cpu_attention}
    with FlopCounterMode(display=False, custom_mapping=extra) as counter:
        our_picture(engine, schedule, prompt_of(engine.vocab, PROMPT), guidance=1.0)
    found = counter.get_flop_counts()
    inner = sum(sum(v.values()) for k, v in found.items() if k.endswith("DecoderLayer"))
    counts = count([TextShape(PROMPT), ImageShape(schedule, True)])
    by_layers, head = forward_flops(counts, config)
    ours = by_layers + head * config.codes / config.vocab  # the engine scores codes alone
    paper = layers * paper_flops(config.hidden, paper_counts(counts))
    return Count(size, layers, counter.get_total_flops(), ours, inner, by_layers, paper)


def show_flops(found):
    """The second table, and how the paper's expression stands to what is counted."""
    print("\nGFLOPs of a picture without guidance, prompt of 100 tokens")
    print(f"{'px':>5}{'layers':>8}{'counted':>11}{'formula':>11}{'ratio':>8}{'in layers':>11}{'formula':>11}{'ratio':>8}"
          f"{'paper':>11}{'ratio':>8}")  # fmt: skip
    for c in found:
        print(
            f"{c.size:>5}{c.layers:>8}{c.counted / 1e9:>11.2f}{c.formula / 1e9:>11.2f}{c.counted / c.formula:>8.3f}"
            f"{c.layers_counted / 1e9:>11.2f}{c.layers_formula / 1e9:>11.2f}{c.layers_counted / c.layers_formula:>8.3f}"
            f"{c.paper / 1e9:>11.2f}{c.layers_counted / c.paper:>8.3f}"
        )


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", choices=SCALES, default=list(SCALES))
    parser.add_argument("--layers", type=int, help="of every size; default: 6, at 1024 px 2")
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=LOOPS)
    parser.add_argument("--repeats", type=int, default=3, help="at 1024 px always one")
    parser.add_argument("--no-flops", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--quick", action="store_true", help="64 and 256 px, one layer, once")
    given = parser.parse_args(arguments)
    if given.quick:
        given.sizes, given.layers, given.repeats = [64, 256], 1, 1
    transformers.logging.set_verbosity_error()
    torch.manual_seed(0)
    print(f"{torch.get_num_threads()} threads, {best_dtype(torch.device('cpu'))}, guidance {GUIDANCE:g}")
    print(f"{'px':>5}  {'loop':<8}{'depth':>6}{'params':>10}{'layers':>10}{'final':>7}{'steps':>7}{'wall s':>9}{'cpu s':>9}"
          f"{'pictures/s':>12}{'x wall':>9}{'x cpu':>9}")  # fmt: skip
    rows, counts = [], []
    for size in given.sizes:
        layers = given.layers or (2 if size == 1024 else 6)
        rows += measure(size, layers, given.loops, 1 if size == 1024 else given.repeats)
    if not given.no_flops:
        counts = [flops(size, given.layers or (2 if size == 1024 else 6)) for size in given.sizes]
        show_flops(counts)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        told = {"rows": [asdict(r) for r in rows], "flops": [asdict(c) for c in counts]}
        given.json.write_text(json.dumps(told, indent=1))
    return rows, counts


if __name__ == "__main__":
    main()
