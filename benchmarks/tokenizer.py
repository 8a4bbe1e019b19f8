"""Encode and decode, pictures per second and peak memory at 64, 256 and 1024 px; beside AutoencoderKL (the
Stable Diffusion size) and VQModel of diffusers with random weights, where it is installed. One process per case.
"nano, /16" is nano-tokenizer's shape with one more level, 16,384 codes and random weights: 18 scales at downsampling 8 end
at 512 px.

    python benchmarks/tokenizer.py [--sizes 64,256,1024] [--seconds 6]
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace

CASES = ("nano-tokenizer", "nano, /16", "AutoencoderKL", "VQModel")


def models(name):
    """(encode, decode) of one model: pixels (1, 3, H, W) in -1..1 to a latent, and back."""
    import torch

    if name.startswith("nano"):
        from nextflow_ar import ImageTokenizer

        tokenizer = ImageTokenizer.from_pretrained("nano-tokenizer")
        if name == "nano, /16":
            old = tokenizer.config
            assert old.semantic is not None
            torch.manual_seed(0)
            tokenizer = ImageTokenizer(
                replace(
                    old,
                    downsample=16,
                    encoder_channels=(*old.encoder_channels, 128),
                    decoder_channels=(*old.decoder_channels, 160),
                    quantizer=replace(old.quantizer, codebook_size=16384),
                    semantic=replace(old.semantic, patch=16),
                )
            ).eval()
            tokenizer.quantizer.codebook.normal_()

        def encode(x):
            schedule = tokenizer.schedule_for(x.shape[2], x.shape[3])
            return tokenizer.quantize(x, schedule).target, schedule

        return encode, lambda latent: tokenizer.decode_pixels(*latent)
    import diffusers

    torch.manual_seed(0)
    if name == "AutoencoderKL":
        model = diffusers.AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2, latent_channels=4,
        ).eval()  # fmt: skip
        return lambda x: model.encode(x).latent_dist.mode(), lambda z: model.decode(z).sample
    model = diffusers.VQModel(
        down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(128, 256, 512), layers_per_block=2, latent_channels=3, num_vq_embeddings=8192,
    ).eval()  # fmt: skip
    return lambda x: model.encode(x).latents, lambda z: model.decode(z).sample


def measure(name, size, seconds):
    """Pictures per second each way and the process's peak memory in MiB."""
    import torch

    encode, decode = models(name)
    x = torch.rand(1, 3, size, size) * 2 - 1
    out = {"model": name, "size": size}
    with torch.inference_mode():
        latent = encode(x)
        for part, work in (("encode", lambda: encode(x)), ("decode", lambda: decode(latent))):
            work()
            began, count = time.perf_counter(), 0
            while time.perf_counter() - began < seconds:
                work()
                count += 1
            out[part] = count / (time.perf_counter() - began)
    out["peak"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return out


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--sizes", default="64,256,1024")
    parser.add_argument("--seconds", type=float, default=6)
    parser.add_argument("--case", default=None)
    given = parser.parse_args()
    if given.case:
        name, size = given.case.split(":")
        print(json.dumps(measure(name, int(size), given.seconds)))
        return
    print(f"{'model':16s} {'px':>5s} {'encode/s':>9s} {'decode/s':>9s} {'peak MiB':>9s}")
    for size in given.sizes.split(","):
        for name in CASES:
            command = [sys.executable, __file__, "--case", f"{name}:{size}", "--seconds", str(given.seconds)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(f"{name:16s} {size:>5s} not measured: {done.stderr.strip().splitlines()[-1][:80]}")
                continue
            r = json.loads(done.stdout.splitlines()[-1])
            print(f"{name:16s} {size:>5s} {r['encode']:9.2f} {r['decode']:9.2f} {r['peak']:9.0f}", flush=True)


if __name__ == "__main__":
    main()
