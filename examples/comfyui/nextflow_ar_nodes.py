"""ComfyUI nodes: load, generate, edit, inpaint, vary, describe. Copy this file into ComfyUI/custom_nodes.

ComfyUI passes pictures as (B, H, W, 3) float tensors in 0..1 and masks as (B, H, W) or (H, W), 1 where to redraw.
"""

import numpy as np
import torch
from PIL import Image

from nextflow_ar import NextFlowPipeline

CATEGORY = "NextFlow-AR"
SEED = ("INT", {"default": 0, "min": 0, "max": 2**63 - 1, "control_after_generate": True})
COUNT = (
    "INT",
    {"default": 1, "min": 1, "max": 64, "tooltip": "How many pictures, each with a seed of its own."},
)
TEXT = {"multiline": True, "default": ""}
SAMPLING = {
    "guidance": (
        "FLOAT",
        {"default": -1.0, "min": -1.0, "max": 30.0, "step": 0.1, "tooltip": "-1: the model's own"},
    ),
    "temperature": (
        "FLOAT",
        {"default": -1.0, "min": -1.0, "max": 5.0, "step": 0.05, "tooltip": "-1: the model's own"},
    ),
    "top_k": (
        "INT",
        {"default": -1, "min": -1, "max": 65536, "tooltip": "0: all codes; -1: the model's own"},
    ),
    "top_p": (
        "FLOAT",
        {"default": -1.0, "min": -1.0, "max": 1.0, "step": 0.01, "tooltip": "-1: the model's own"},
    ),
}


def to_pictures(images):
    """(B, H, W, C) in 0..1 -> Pillow images."""
    return [
        Image.fromarray(np.asarray(i.cpu()[..., :3].clamp(0, 1) * 255 + 0.5, dtype=np.uint8)) for i in images
    ]


def to_tensor(pictures):
    """Pillow images of one size -> (B, H, W, 3) in 0..1."""
    return torch.stack([torch.from_numpy(np.array(p.convert("RGB"), np.float32) / 255) for p in pictures])


def masks_for(mask, pictures):
    """A mask tensor -> one bool array per picture, of the picture's size; a single mask serves all."""
    masks = mask[None] if mask.ndim == 2 else mask
    masks = [masks[min(i, len(masks) - 1)] for i in range(len(pictures))]
    found = []
    for each, picture in zip(masks, pictures, strict=True):
        grey = Image.fromarray(np.asarray(each.cpu().clamp(0, 1) * 255, np.uint8))
        found.append(np.asarray(grey.resize(picture.size, Image.Resampling.NEAREST)) > 127)
    return found


def settings(model, **given):
    return model.defaults.changed(**{k: v if v >= 0 else None for k, v in given.items()})


def bar_for(images, scales):
    """Something that is called with every event and moves ComfyUI's progress bar, where ComfyUI is there."""
    try:
        from comfy.utils import ProgressBar
    except ImportError:
        return None
    bar = ProgressBar(images * scales)
    return lambda event: bar.update(1) if type(event).__name__ == "ScaleReady" else None


class Load:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("NEXTFLOW_MODEL",), ("model",)
    DESCRIPTION = "Load a NextFlow-AR checkpoint: nano (bundled), a folder, or a Hub id."

    @classmethod
    def INPUT_TYPES(cls):
        dtypes = ["auto", "bfloat16", "float32"]
        return {
            "required": {
                "name": (
                    "STRING",
                    {"default": "nano", "tooltip": "nano, a checkpoint folder, or OWNER/NAME"},
                ),
                "device": (["auto", "cpu", "cuda"], {"default": "auto"}),
                "dtype": (dtypes, {"default": "auto"}),
            }
        }

    def run(self, name, device="auto", dtype="auto"):
        if device == "auto":
            device = "cuda" if torch.cuda.is_available() else "cpu"
        chosen = None if dtype == "auto" else getattr(torch, dtype)
        return (NextFlowPipeline.from_pretrained(name.strip(), device=device, dtype=chosen),)


class Generate:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Draw pictures from words, scale by scale."

    @classmethod
    def INPUT_TYPES(cls):
        side = {"default": 0, "min": 0, "max": 4096, "tooltip": "0: the model's own size"}
        return {
            "required": {
                "model": ("NEXTFLOW_MODEL",),
                "prompt": ("STRING", TEXT),
                "seed": SEED,
                "count": COUNT,
            },
            "optional": {
                "width": ("INT", side),
                "height": ("INT", side),
                "think": (["as the model prefers", "yes", "no"],),
                **SAMPLING,
            },
        }

    def run(self, model, prompt, seed, count=1, width=0, height=0, think="as the model prefers", **sampling):
        size = (width, height) if width and height else None
        pictures = model.generate(
            prompt,
            n=count,
            seed=seed,
            settings=settings(model, **sampling),
            size=size,
            think={"yes": True, "no": False}.get(think),
            on_event=bar_for(count, len(model.schedule_for(size))),
        )
        return (to_tensor(pictures),)


class Edit:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Change pictures by an instruction, each for itself, or draw one from all of them together."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("NEXTFLOW_MODEL",),
                "images": ("IMAGE",),
                "instruction": ("STRING", TEXT),
                "seed": SEED,
            },
            "optional": {"together": ("BOOLEAN", {"default": False}), **SAMPLING},
        }

    def run(self, model, images, instruction, seed, together=False, **sampling):
        pictures, chosen = to_pictures(images), settings(model, **sampling)
        groups = [pictures] if together else [[p] for p in pictures]
        found = [model.edit(group, instruction, seed=seed, settings=chosen)[0] for group in groups]
        return (to_tensor(found),)


class Inpaint:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Draw what a mask marks anew. The prompt says what the whole picture shows then."

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("NEXTFLOW_MODEL",),
                "images": ("IMAGE",),
                "mask": ("MASK",),
                "prompt": ("STRING", TEXT),
                "seed": SEED,
            },
            "optional": dict(SAMPLING),
        }

    def run(self, model, images, mask, prompt, seed, **sampling):
        pictures, chosen = to_pictures(images), settings(model, **sampling)
        pairs = zip(pictures, masks_for(mask, pictures), strict=True)
        return (to_tensor([model.inpaint(p, m, prompt, seed=seed, settings=chosen)[0] for p, m in pairs]),)


class Vary:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("IMAGE",), ("images",)
    DESCRIPTION = "Keep a picture's coarse scales and draw the finer ones anew."

    @classmethod
    def INPUT_TYPES(cls):
        scales = {"default": 4, "min": 1, "max": 18, "tooltip": "The first scale that is drawn anew."}
        return {
            "required": {
                "model": ("NEXTFLOW_MODEL",),
                "images": ("IMAGE",),
                "from_scale": ("INT", scales),
                "seed": SEED,
                "count": COUNT,
            },
            "optional": {"prompt": ("STRING", TEXT), **SAMPLING},
        }

    def run(self, model, images, from_scale, seed, count=1, prompt="", **sampling):
        options = {"from_scale": from_scale, "prompt": prompt, "n": count, "seed": seed}
        options["settings"] = settings(model, **sampling)
        return (to_tensor([v for p in to_pictures(images) for v in model.variations(p, **options)]),)


class Describe:
    CATEGORY, FUNCTION = CATEGORY, "run"
    RETURN_TYPES, RETURN_NAMES = ("STRING",), ("text",)
    DESCRIPTION = "Say what pictures show, or answer a question about each; one line for each picture."
    OUTPUT_NODE = True

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {"model": ("NEXTFLOW_MODEL",), "images": ("IMAGE",)},
            "optional": {
                "question": ("STRING", TEXT),
                "max_tokens": ("INT", {"default": 64, "min": 1, "max": 4096}),
            },
        }

    def run(self, model, images, question="", max_tokens=64):
        texts = model.describe(to_pictures(images), question=question or None, max_tokens=max_tokens)
        text = "\n".join(texts)
        return {"ui": {"text": texts}, "result": (text,)}


_NODES = {
    "Load": Load,
    "Generate": Generate,
    "Edit": Edit,
    "Inpaint": Inpaint,
    "Vary": Vary,
    "Describe": Describe,
}
NODE_CLASS_MAPPINGS = {f"NextFlowAR{name}": node for name, node in _NODES.items()}
NODE_DISPLAY_NAME_MAPPINGS = {f"NextFlowAR{name}": f"NextFlow-AR {name}" for name in _NODES}
