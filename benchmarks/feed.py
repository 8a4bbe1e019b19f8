"""How fast a recipe's episodes become batches without codes: in this process, and by others as training takes them.

python benchmarks/feed.py                                   # recipes/gpu_model.yaml, two processes
python benchmarks/feed.py --recipe recipes/world_finish.yaml --workers 1 --steps 20
"""

import argparse
import time
from pathlib import Path

import torch

from nextflow_ar.config import from_dict, load_yaml
from nextflow_ar.data.episodes import EpisodeSource
from nextflow_ar.model.checkpoint import checkpoint_folder, load_architecture
from nextflow_ar.sequence.layout import LayoutOptions
from nextflow_ar.sequence.vocab import Vocabulary
from nextflow_ar.tokenizer.image_tokenizer import tokenizer_config
from nextflow_ar.training.crew import Crew
from nextflow_ar.training.episode_feed import Drafting
from nextflow_ar.training.episode_sources import Place
from nextflow_ar.training.recipe import ModelRecipe


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument(
        "--recipe", type=Path, default=Path(__file__).parent.parent / "recipes/gpu_model.yaml"
    )
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)
    recipe = from_dict(ModelRecipe, load_yaml(given.recipe))
    config, text = load_architecture(checkpoint_folder("nano"))  # bundled: its words and codes do here
    drafting = Drafting(
        {i: source for i, source in enumerate(recipe.sources) if isinstance(source, EpisodeSource)},
        tokenizer_config("nano"), Vocabulary(text, config.text_vocab, config.codes),
        LayoutOptions(config.rope_range, recipe.alpha, recipe.text_weight, config.context_images, config.copies), config,
        Place(),
    )  # fmt: skip
    make = drafting.together()
    make(0)  # sprites are rendered once
    began, seen = time.process_time(), 0
    for step in range(1, given.steps + 1):
        seen += sum(draft.seen for draft in make(step))
    alone = seen / (time.process_time() - began)
    print(
        f"{seen / given.steps:.0f} places a step; in order, by one process: {alone:.0f} places a CPU second"
    )
    began = time.process_time()
    seen = sum(draft.seen for draft in make(10 * given.steps + 7))
    print(f"one step on its own, as processes in turn make it: {seen / (time.process_time() - began):.0f}")
    crew = Crew(drafting.together, given.steps + 1, given.workers)
    crew.get(0)
    began, mine, seen = time.perf_counter(), time.process_time(), 0
    for step in range(1, given.steps + 1):
        seen += sum(draft.seen for draft in crew.get(step))
    passed, mine = time.perf_counter() - began, time.process_time() - mine
    crew.close()
    print(
        f"{given.workers} processes: {seen / passed:.0f} places a second, "
        f"{mine / given.steps * 1e3:.0f} ms of this process a step"
    )
    return {"alone": alone, "seen": seen}


if __name__ == "__main__":
    main()
