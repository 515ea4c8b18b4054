#!/usr/bin/env python
"""What a sweep of linear classifiers costs beside one probe, on the same encoder, data and cores.

    python scripts/bench_probe.py encoder.init=RUN data.train=folder:cifar10/train data.val=folder:cifar10/test

Each evaluation runs in a process of its own through pipelines/linear_probe.py, features included, in turns.
Prints the seconds of each round and the ratio of the medians.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
RECIPES = {"probe": ("features", "linear"), "sweep": ("sweep", "sweep")}
ROUNDS = 3


def seconds(recipe: str, name: str, words: list[str]) -> tuple[float, float]:
    """Seconds of one evaluation, and its accuracy."""
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, str(ROOT / "pipelines" / "linear_probe.py"), "--config",
            str(ROOT / "configs" / "linear_probe" / f"{recipe}.yaml"), f"run.dir={folder}/run", *words,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        final = json.loads((Path(folder) / "run" / "result.json").read_text())["evaluations"]["final"]
    return final[f"{name}/seconds"], final[f"{name}/top1"]


def main() -> None:
    """Print a line a round and the ratio."""
    words = sys.argv[1:]
    if not any(word.startswith("encoder.") for word in words) or "--help" in words:
        sys.exit(__doc__)
    taken: dict[str, list[float]] = {name: [] for name in RECIPES}
    for number in range(ROUNDS):
        for name, (recipe, evaluation) in RECIPES.items():
            time, top1 = seconds(recipe, evaluation, words)
            taken[name].append(time)
            print(f"round {number + 1}: {name:6} {time:7.1f} s, top1 {top1:.4f}", flush=True)
    ratio = statistics.median(taken["sweep"]) / statistics.median(taken["probe"])
    print(f"a sweep takes {ratio:.2f} times one probe (medians of {ROUNDS})")


if __name__ == "__main__":
    main()
