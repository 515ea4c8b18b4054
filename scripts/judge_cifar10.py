#!/usr/bin/env python
"""Every evaluation of an encoder on CIFAR-10 with its time: pretrained, as it begins, and trained on labels.

    python scripts/judge_cifar10.py CIFAR10 RUNS

CIFAR10: folder with train/CLASS/* and test/CLASS/*; RUNS: what scripts/reproduce_cifar10.sh left there (``mae``,
``supervised``). Two CPU cores take about an hour. Runs go to RUNS/judged, and what is finished is not done again.
Prints a Markdown table and writes RUNS/judged/table.json.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import OmegaConf

from ssl_vit.compare import read_run

ROOT = Path(__file__).resolve().parents[1]
RECIPES = ROOT / "configs"
MAE_RECIPE = RECIPES / "pretrain" / "mae_vit_tiny_cifar10.yaml"


class Protocol(NamedTuple):
    """One command and what the table takes from its result."""

    name: str
    pipeline: str
    recipe: str
    rows: dict[str, str]  # words of the row -> number in result.json
    words: tuple[str, ...] = ()
    scratch: tuple[str, ...] | None = ()  # further words for the encoder as it begins; None: not asked of it
    labels: bool = True  # also of the encoder that was trained on the same labels


FINETUNE = ("finetune", "finetune/vit_tiny_cifar10")
PROTOCOLS = [
    Protocol("all", "evaluate", "evaluate/features", {
        "kNN (20)": "knn/top1",
        "logistic regression": "linear/top1",
        "1 label a class": "few_shot/top1_shots1",
        "5 labels a class": "few_shot/top1_shots5",
        "10 labels a class": "few_shot/top1_shots10",
        "effective rank of 192": "rank/effective_rank",
        "alpha-ReQ": "rank/alpha",
        "standard deviation of a feature": "rank/feature_std",
    }),
    Protocol("sweep", "linear_probe", "linear_probe/sweep", {"grid of linear classifiers": "sweep/top1"}),
    Protocol("probe", "linear_probe", "linear_probe/mae_cifar10", {"MAE's linear probe": "heads/top1"}),
    Protocol("attentive", "linear_probe", "linear_probe/attentive_cifar10", {"attentive probe": "heads/top1"}),
    Protocol(
        "last_blocks", *FINETUNE, {"last 2 blocks fine-tuned": "accuracy/top1"},
        ("objective.tune_blocks=2",), scratch=None, labels=False,
    ),
    Protocol("finetune", *FINETUNE, {"fine-tuned": "accuracy/top1"}, scratch=("optim.layer_decay=1.0",), labels=False),
]  # fmt: skip


def as_it_begins() -> list[str]:
    """The encoder of MAE's recipe, for a command line without ``encoder.init``."""
    recipe: Any = OmegaConf.to_container(OmegaConf.load(MAE_RECIPE))
    encoder = [f"encoder.{key}={value}" for key, value in recipe["encoder"].items()]
    return [
        "encoder.init=null",
        *encoder,
        *(f"data.{key}={recipe['data'][key]}" for key in ("mean", "std", "crop_pct")),
    ]


def run(protocol: Protocol, encoder: str, words: list[str], out: Path) -> Path:
    """Run one command, unless its run is finished, and return its folder."""
    folder = out / f"{encoder}_{protocol.name}"
    command = [
        sys.executable, str(ROOT / "pipelines" / f"{protocol.pipeline}.py"),
        "--config", str(RECIPES / f"{protocol.recipe}.yaml"), f"run.dir={folder}", *protocol.words, *words,
    ]  # fmt: skip
    print(f"== {encoder}: {protocol.name}", file=sys.stderr, flush=True)
    subprocess.run(command, check=True, stdout=sys.stderr)
    return folder


def cell(folder: Path, measure: str) -> dict[str, float]:
    """A number, its standard error, and the seconds that it took: of the training steps, else of the evaluation."""
    numbers = json.loads((folder / "result.json").read_text())["evaluations"]["final"]
    name = measure.partition("/")[0]
    error = numbers.get(
        measure.replace("top1_shots", "spread_shots") if "shots" in measure else f"{name}/standard_error"
    )
    seconds = read_run(folder).minutes * 60
    return {"value": numbers[measure], "error": error, "seconds": seconds or numbers[f"{name}/seconds"]}


def main() -> None:
    """Measure and print."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    cifar, runs = Path(sys.argv[1]), Path(sys.argv[2])
    data = [f"data.train=folder:{cifar / 'train'}", f"data.val=folder:{cifar / 'test'}"]
    out = runs / "judged"
    table: dict[str, dict[str, Any]] = {row: {} for protocol in PROTOCOLS for row in protocol.rows}
    for protocol in PROTOCOLS:
        encoders = {"mae": [f"encoder.init={runs / 'mae'}"]}
        if protocol.scratch is not None:
            encoders["random"] = [*as_it_begins(), *protocol.scratch]
        if protocol.labels:
            encoders["supervised"] = [f"encoder.init={runs / 'supervised'}"]
        for encoder, words in encoders.items():
            folder = run(protocol, encoder, [*data, *words], out)
            for row, measure in protocol.rows.items():
                table[row][encoder] = cell(folder, measure)
    table["trained from scratch"] = {"supervised": cell(runs / "supervised", "accuracy/top1")}
    (out / "table.json").write_text(json.dumps(table, indent=1) + "\n")
    print("| measured | as it begins | MAE | supervised | time |\n|---|---|---|---|---|")
    for row, cells in table.items():
        texts = [text(cells.get(encoder)) for encoder in ("random", "mae", "supervised")]
        longest = max(found["seconds"] for found in cells.values())
        print(f"| {row} | {' | '.join(texts)} | {longest:.0f} s |")


def text(found: dict[str, Any] | None) -> str:
    """A cell of the table."""
    if found is None:
        return ""
    if found["error"] is None:
        return f"{found['value']:.3g}"
    return f"{found['value']:.3f} ({found['error']:.3f})"


if __name__ == "__main__":
    main()
