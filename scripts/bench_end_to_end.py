#!/usr/bin/env python
"""Loader and training step of a recipe, each alone and both together, on the same data, cores and device.

    python scripts/bench_end_to_end.py --config RECIPE data.train=SHARDS [steps=60] [key=value ...]

Alone: the loader hands its batches to nobody; the step (forward, backward, AdamW) gets one batch again and again.
Together: the training as pipelines/ start it, without evaluations; its first steps, which start workers, are left out.
Prints images/s, the share that is lost against the slower of the two, data_wait, and the workers that the step needs.

On a CPU both share the cores: OMP_NUM_THREADS for the step plus run.workers should not exceed them.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from bench_step import Contender

from ssl_vit import build, splits
from ssl_vit.config import InputError, check, load
from ssl_vit.data.loader import Batch, TrainBatches, iterate
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.metrics import read_metrics

WARM = 4
"""Batches or steps of each part that are not timed."""


def parse() -> tuple[Recipe, int]:
    """The recipe, without evaluations, for so many steps."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, help="a recipe of configs/pretrain")
    parser.add_argument("words", nargs="*", help="key=value, of the recipe, or steps=N")
    options = parser.parse_args()
    steps = next((int(word.partition("=")[2]) for word in options.words if word.startswith("steps=")), 60)
    if steps <= WARM:
        parser.error(f"steps={steps}: allowed: more than the {WARM} that are not timed")
    words = [word for word in options.words if not word.startswith("steps=")]
    values = load([Path(options.config)], words)
    values["evals"] = {}
    values["optim"] |= {"epochs": f"{steps} steps", "warmup_epochs": 0}
    values["run"] |= {"log_every": max(WARM, steps // 5), "tensorboard": False}
    return check_recipe(check(Recipe, values)), steps


def loader_alone(batches: TrainBatches, workers: int, steps: int, pin_memory: bool) -> tuple[Batch, float]:
    """One of its batches, and images/s."""
    loader = iterate(batches, range((steps + WARM) * batches.accumulation), workers, pin_memory)
    warm = [next(loader) for _ in range(WARM * batches.accumulation)]
    start = time.perf_counter()
    count = sum(1 for _ in loader)
    return warm[0][0], count * batches.micro_batch_size / (time.perf_counter() - start)


def step_alone(recipe: Recipe, objective: Objective, batch: Batch, steps: int, device: str) -> float:
    """Images/s of forward, backward and optimizer."""
    options = argparse.Namespace(device=device, precision=build.resolve_precision(recipe))
    contender = Contender(lambda: objective, lambda m, b: m(b)[0], options)
    objective.before_step(Progress(10, 100, 0.1, 1.0, 0.1))
    contender.timed(batch, WARM)
    return len(batch["index"]) / contender.timed(batch, steps)


def together(recipe: Recipe) -> tuple[float, float]:
    """Images/s and data_wait of a training."""
    with tempfile.TemporaryDirectory() as folder:
        recipe.run.dir = f"{folder}/run"
        run(recipe)
        lines = [line for line in read_metrics(Path(folder) / "run" / "metrics.jsonl") if "loss" in line][1:]
    rate, waiting = (statistics.fmean(line[key] for line in lines) for key in ("images_per_second", "data_wait"))
    return rate, waiting


def main() -> None:
    """Measure the three and print them."""
    recipe, steps = parse()
    workers = recipe.run.workers = build.loader_workers(recipe.run)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sets = splits.open_sets(recipe.data)
    pixels = build.resolve_pixels(recipe.data, recipe.encoder)
    objective = build.build_objective(recipe)
    batches = TrainBatches(
        sets.train, sets.stream(recipe), objective.views(objective.encoder.img_size), pixels, recipe.seed,
        recipe.optim.batch_size, recipe.run.micro_batch_size or recipe.optim.batch_size,
    )  # fmt: skip
    batch, loading = loader_alone(batches, workers, steps, device == "cuda")
    stepping = step_alone(recipe, objective, pixels.to_device(batch, torch.device(device)), steps, device)
    del objective
    both, waiting = together(recipe)
    name = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {torch.get_num_threads()} threads"
    each = loading / max(workers, 1)
    print(
        f"{name}, batch {recipe.optim.batch_size}: loader alone {loading:.0f} images/s ({workers} workers, {each:.0f} "
        f"each), step alone {stepping:.0f}, together {both:.0f}: {1 - both / min(loading, stepping):.1%} lost against "
        f"the slower; data_wait {waiting:.1%}; this step needs {math.ceil(stepping / each)} workers"
    )


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        sys.exit(f"error: {error}")
