"""Runs side by side: what each measured at its start and now, how fast it went, and the curves."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any, BinaryIO

from omegaconf import OmegaConf
from pydantic import Field

from ssl_vit.config import InputError, Section
from ssl_vit.data.commands import command
from ssl_vit.data.formats import say
from ssl_vit.training.metrics import read_metrics
from ssl_vit.training.run_folder import RunFolder


class CompareOptions(Section):
    """The settings of comparing."""

    out: Path = Field(Path("comparison"), description="folder of compare.md, compare.json and compare.png")
    measures: str = Field(
        "knn/top1,linear/top1", description="numbers of the table, those that no run has left out; all: every accuracy"
    )


@dataclass(frozen=True)
class Record:
    """What one run says of itself.

    Attributes:
        name: of its folder.
        objective: what was trained; empty for a mere measurement.
        state: of the run: finished, running, ...
        images: seen in training.
        images_per_second: median over the logged steps.
        minutes: of training steps, evaluations and saves not counted.
        measured: (images seen, numbers) of each evaluation, in the order of the steps; of those that were made by
            watching, the numbers are named ``watch/...``.
        losses: (images seen, loss) of each logged step.
    """

    name: str
    objective: str
    state: str
    images: int
    images_per_second: float
    minutes: float
    measured: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    losses: list[tuple[int, float]] = field(default_factory=list)

    def change(self, measure: str) -> tuple[float, float, float | None] | None:
        """First and last value of a number, and the standard error of the last; None: it was not measured."""
        found = [numbers for _, numbers in self.measured if measure in numbers]
        if not found:
            return None
        error = found[-1].get(measure.replace("top1", "standard_error")) if measure.endswith("/top1") else None
        return found[0][measure], found[-1][measure], error


def read_run(path: Path) -> Record:
    """Read a run's folder, which may still be running.

    Raises:
        InputError: it is no run, or nothing is in it yet.
    """
    folder = RunFolder(path)
    if not (path / "recipe.yaml").is_file() or not (path / "metrics.jsonl").is_file():
        raise InputError(f"{path}: no run (recipe.yaml and metrics.jsonl are not both there); give folders of run.dir=")
    lines = read_metrics(path / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line]
    size = steps[-1]["samples_seen"] // steps[-1]["step"] if steps else 0
    measured = [(line["step"] * size, line) for line in lines if "loss" not in line]
    watched = path / "watch" / "metrics.jsonl"
    for line in read_metrics(watched) if watched.is_file() else ():
        measured.append((line["step"] * size, {f"watch/{key}": value for key, value in line.items() if key != "step"}))
    seconds, before = 0.0, 0
    for line in steps:
        seconds += (line["samples_seen"] - before) / line["images_per_second"]
        before = line["samples_seen"]
    recipe: Any = OmegaConf.to_container(OmegaConf.load(path / "recipe.yaml"))
    return Record(
        name=path.resolve().name,
        objective=str((recipe.get("objective") or {}).get("name", "")),
        state=str(folder.read_status().get("state", "unknown")),
        images=before,
        images_per_second=median(line["images_per_second"] for line in steps) if steps else 0.0,
        minutes=seconds / 60,
        measured=sorted(measured, key=lambda pair: pair[0]),
        losses=[(line["samples_seen"], line["loss"]) for line in steps],
    )


def table(records: Sequence[Record], measures: Sequence[str]) -> str:
    """A Markdown table, a row a run; ``start -> now (± standard error)``."""
    head = ["run", "objective", "images seen", "images/s", "minutes", *measures]
    rows = [head, ["---"] * len(head)]
    for record in records:
        cells = [
            record.name if record.state == "finished" else f"{record.name} ({record.state})",
            record.objective or "-",
            f"{record.images:,}" if record.images else "-",
            f"{record.images_per_second:.0f}" if record.images else "-",
            f"{record.minutes:.1f}" if record.images else "-",
        ]
        for measure in measures:
            change = record.change(measure)
            if change is None:
                cells.append("-")
                continue
            first, last, error = change
            once = sum(measure in numbers for _, numbers in record.measured) == 1
            text = f"{last:.4f}" if once else f"{first:.4f} -> {last:.4f}"
            cells.append(text if error is None else f"{text} (± {error:.4f})")
        rows.append(cells)
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    rows[1] = ["-" * width for width in widths]
    return "\n".join("| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in rows)


def figure(records: Sequence[Record], measures: Sequence[str], file: Path | BinaryIO) -> None:
    """Every measure and the losses over the images seen, one panel each, as a PNG."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter, MaxNLocator

    panels = [*measures, "loss"]
    columns = min(len(panels), 3)
    rows = -(-len(panels) // columns)
    picture = Figure(figsize=(4.5 * columns, 3.4 * rows), layout="constrained")
    places = picture.subplots(rows, columns, squeeze=False).ravel()
    for axes in places[len(panels) :]:
        axes.set_axis_off()
    for axes, panel in zip(places, panels, strict=False):
        for record in records:
            points = [(seen, numbers[panel]) for seen, numbers in record.measured if panel in numbers]
            points = record.losses if panel == "loss" else points
            if points:
                x, y = zip(*points, strict=True)
                axes.plot(x, y, marker="" if panel == "loss" else "o", markersize=3, linewidth=1.2, label=record.name)
        axes.set_title(panel if panel != "loss" else "training loss (each objective has its own)", fontsize=9)
        axes.set_xlabel("images seen", fontsize=8)
        axes.tick_params(labelsize=8)
        axes.xaxis.set_major_locator(MaxNLocator(5))
        axes.xaxis.set_major_formatter(EngFormatter(sep=""))
        axes.grid(alpha=0.3)
    handles, labels = places[len(panels) - 1].get_legend_handles_labels()
    if handles:
        picture.legend(handles, labels, loc="outside lower center", ncols=min(len(labels), 6), fontsize=8)
    picture.savefig(file, dpi=150, format="png")


def compare(paths: Sequence[Path], options: CompareOptions) -> None:
    """Print the table and write it with its numbers and curves.

    Raises:
        InputError: a folder is no run, or none of the measures was measured.
    """
    records = [read_run(path) for path in paths]
    known = list(dict.fromkeys(k for r in records for _, numbers in r.measured for k in numbers if k.endswith("/top1")))
    asked = known if options.measures == "all" else [name.strip() for name in options.measures.split(",")]
    measures = [name for name in asked if any(record.change(name) for record in records)]
    if not measures:
        raise InputError(f"measures={options.measures}: none was measured; these were: {', '.join(known) or 'none'}")
    text = table(records, measures)
    say(text)
    options.out.mkdir(parents=True, exist_ok=True)
    (options.out / "compare.md").write_text(text + "\n", encoding="utf-8")
    rows: list[dict[str, Any]] = [{k: v for k, v in asdict(r).items() if k != "losses"} for r in records]
    (options.out / "compare.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    figure(records, measures, options.out / "compare.png")
    say(f"{options.out}: compare.md, compare.json, compare.png")


def compare_main(argv: Sequence[str] | None = None) -> None:
    """``compare.py RUN... [key=value ...]``."""

    def run(words: list[str], options: CompareOptions) -> None:
        compare([Path(word).expanduser() for word in words], options)

    text = "Compare runs: what each measured at its start and now, images a second, and curves."
    command("compare.py", text, ["RUN..."], CompareOptions, run, argv)
