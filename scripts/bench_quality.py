#!/usr/bin/env python
"""Quality per time: our MAE pipeline against transformers' ViTMAE in the usual loop, on the same cores and images.

    python scripts/bench_quality.py CIFAR10 OUT [steps=600] [seeds=3]

CIFAR10: folder with train/CLASS/* and test/CLASS/*. The other side is what a careful user writes: ImageFolder, Pillow,
torchvision's transforms, a DataLoader with two workers, ``ViTMAEForPreTraining``, AdamW. Both take encoder, decoder,
crops, batch, schedule and weight decay from configs/pretrain/mae_vit_tiny_cifar10.yaml, and begin with the same
weights.

For each seed: both for the same steps, then ours for as many steps as fit into the time of the other, each with its
whole schedule. Time is that of the training loop, loader included; start-up and evaluation are not counted. kNN and
linear probe on all test images. Prints a Markdown table with the spread over seeds and writes OUT/table.json; what is
finished is not done again.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ssl_vit.build import build_objective
from ssl_vit.compare import read_run
from ssl_vit.config import check, load
from ssl_vit.export.transformers_folder import export_mae
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.training.optim import absolute_lr, is_decayed
from ssl_vit.training.schedules import warmup_cosine

ROOT = Path(__file__).resolve().parents[1]
RECIPE = ROOT / "configs" / "pretrain" / "mae_vit_tiny_cifar10.yaml"
WARMUP = 0.1  # of the steps
MEASURES = ("knn/top1", "linear/top1")


def words(cifar: Path, steps: int, seed: int) -> list[str]:
    """What both sides change in the recipe."""
    return [
        f"data.train=folder:{cifar / 'train'}", f"seed={seed}", f"optim.epochs={steps} steps",
        f"optim.warmup_epochs={round(WARMUP * steps)} steps",
        *(f"evals.{name}=null" for name in load([RECIPE], [])["evals"]),
    ]  # fmt: skip


def pipeline(name: str, arguments: list[str]) -> None:
    """Run one of the pipelines."""
    command = [sys.executable, str(ROOT / "pipelines" / f"{name}.py"), *arguments]
    subprocess.run(command, check=True, stdout=sys.stderr)


def ours(cifar: Path, folder: Path, steps: int, seed: int) -> float:
    """Train with the pipeline and return the seconds of its training loop."""
    pipeline("pretrain_mae", ["--config", str(RECIPE), *words(cifar, steps, seed), f"run.dir={folder}"])
    return 60 * read_run(folder).minutes


def theirs(cifar: Path, folder: Path, steps: int, seed: int) -> float:
    """Train ``ViTMAEForPreTraining``, leave its folder, and return the seconds of the training loop."""
    from transformers import ViTMAEForPreTraining

    if (folder / "seconds").exists():
        return float((folder / "seconds").read_text())
    recipe = check_recipe(check(Recipe, load([RECIPE], words(cifar, steps, seed))))
    torch.manual_seed(seed)
    data = {"mean": recipe.data.mean, "std": recipe.data.std, "interpolation": "bicubic", "crop_pct": 1.0}
    mae: Any = build_objective(recipe)
    export_mae(mae, folder / "begin", data)
    loaded: Any = ViTMAEForPreTraining
    model: nn.Module = loaded.from_pretrained(folder / "begin").train()
    optim = recipe.optim
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for n, p in named if is_decayed(n, p) is decayed], "weight_decay": optim.weight_decay * decayed}
        for decayed in (True, False)
    ]
    peak = absolute_lr(optim)
    optimizer = torch.optim.AdamW(groups, lr=peak, betas=optim.betas, eps=optim.eps)
    start = time.perf_counter()
    for step, image in enumerate(batches(cifar, recipe, steps)):
        for group in optimizer.param_groups:
            group["lr"] = warmup_cosine(step, steps, round(WARMUP * steps), peak, optim.min_lr)
        loss = model(image).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 50 == 0:
            print(f"transformers, seed {seed}: step {step} of {steps}, loss {loss:.4f}", file=sys.stderr, flush=True)
    seconds = time.perf_counter() - start
    trained: Any = model
    trained.save_pretrained(folder / "trained")
    (folder / "seconds").write_text(str(seconds))
    return seconds


def batches(cifar: Path, recipe: Recipe, steps: int) -> Iterator[Tensor]:
    """Normalised images (B, 3, H, W), epoch after epoch."""
    from torchvision import datasets, transforms

    view: Any = recipe.objective
    transform = transforms.Compose([
        transforms.RandomResizedCrop(
            recipe.encoder["img_size"], view["crop_scale"], view["crop_ratio"], transforms.InterpolationMode.BICUBIC
        ),
        transforms.RandomHorizontalFlip(view["flip"]),
        transforms.ToTensor(),
        transforms.Normalize(recipe.data.mean, recipe.data.std),
    ])  # fmt: skip
    loader = torch.utils.data.DataLoader(
        datasets.ImageFolder(cifar / "train", transform), recipe.optim.batch_size, shuffle=True, num_workers=2,
        drop_last=True, persistent_workers=True,
    )  # fmt: skip
    done = 0
    while True:
        for image, _ in loader:
            yield image
            done += 1
            if done == steps:
                return


def judge(cifar: Path, encoder: Path, out: Path) -> dict[str, float]:
    """KNN and linear probe of what was trained."""
    recipe: Any = load([RECIPE], [])
    pipeline("evaluate", [
        f"encoder.init={encoder}", f"data.train=folder:{cifar / 'train'}", f"data.val=folder:{cifar / 'test'}",
        "data.crop_pct=1.0", *(f"data.{key}={recipe['data'][key]}" for key in ("mean", "std")),
        "evals.few_shot=null", "evals.rank=null", f"run.dir={out}",
    ])  # fmt: skip
    return json.loads((out / "result.json").read_text())["evaluations"]["final"]


def main() -> None:
    """Train, measure and print."""
    options = {"steps": 600, "seeds": 3}
    settings = [word.partition("=") for word in sys.argv[3:]]
    if len(sys.argv) < 3 or any(key not in options or not value.isdigit() for key, _, value in settings):
        sys.exit(__doc__)
    options |= {key: int(value) for key, _, value in settings}
    cifar, out, steps = Path(sys.argv[1]), Path(sys.argv[2]), options["steps"]
    found: dict[str, list[dict[str, float]]] = {}

    def add(side: str, encoder: Path, folder: Path, done: int, seconds: float) -> None:
        numbers = judge(cifar, encoder, folder / "judged")
        row = {"steps": done, "seconds": seconds, **{measure: numbers[measure] for measure in MEASURES}}
        found.setdefault(side, []).append(row)

    for seed in range(options["seeds"]):
        peer = out / f"transformers_{seed}"
        seconds = theirs(cifar, peer, steps, seed)
        add("transformers, usual loop", peer / "trained", peer, steps, seconds)
        folder = out / f"ours_{seed}"
        own = ours(cifar, folder / "run", steps, seed)
        add("ours, equal steps", folder / "run", folder, steps, own)
        longer, folder = round(steps * seconds / own), out / f"ours_longer_{seed}"
        add("ours, equal time", folder / "run", folder, longer, ours(cifar, folder / "run", longer, seed))
    (out / "table.json").write_text(json.dumps(found, indent=1) + "\n")
    print(f"| side | steps | seconds | {' | '.join(MEASURES)} |\n|---|---|---|---|---|")
    for side, rows in found.items():
        print(f"| {side} | {' | '.join(spread([row[key] for row in rows]) for key in rows[0])} |")


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    digits = 4 if max(values) <= 1 else 0
    deviation = f" (± {statistics.stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


if __name__ == "__main__":
    main()
