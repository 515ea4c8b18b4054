"""The plan of a run: what it costs on a machine, as a table."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ssl_vit.config import Section
from ssl_vit.cost import Cost, count
from ssl_vit.preflight.memory import GB, memory
from ssl_vit.recipe import Recipe, micro_batch

IN1K_IMAGES, IN1K_CLASSES = 1_281_167, 1000
RESERVE = 0.1
"""Share of a GPU's memory left to the CUDA context, kernels' workspaces and fragmentation."""


class PlanSection(Section):
    """The machine that a plan is for.

    Args:
        gpus: GPUs, over all machines
        gpu_memory: of one, in GB
        mfu: share of the peak that training reaches; on an H100 MAE has 0.20 to 0.24, with run.compile 0.27 to 0.30
        peak_tflops: of one GPU, dense, bf16; 989: H100 SXM, 312: A100
        images: of an epoch; default: those of data.train if it is packed, else ImageNet-1k's 1,281,167
        measure: run a few steps on the GPU of this machine and compare
        json_output: print one JSON object instead of a table
    """

    gpus: int = Field(default=8, ge=1)
    gpu_memory: float = Field(default=80.0, gt=0)
    mfu: float = Field(default=0.25, gt=0, le=1)
    peak_tflops: float = Field(default=989.0, gt=0)
    images: int | None = Field(default=None, ge=1)
    measure: bool = False
    json_output: bool = False


@dataclass
class Report:
    """Everything that a plan says; ``rows`` has a line for each strategy, with and without activation checkpointing."""

    recipe: str
    cost: Cost
    gpus: int
    images: int
    images_from: str
    batch_size: int
    micro_batch_size: int
    accumulation: int
    steps: int
    hours: float
    images_per_second: float
    checkpoint_bytes: float
    disk_bytes: float
    shards: str
    rows: list[dict[str, Any]] = field(default_factory=list)


def make_plan(recipe: Recipe, machine: PlanSection, name: str) -> Report:
    """All the numbers of a plan.

    Raises:
        InputError: the global batch cannot be cut that way.
    """
    from ssl_vit.training.plan import Plan

    micro = micro_batch(recipe.optim.batch_size, recipe.run.micro_batch_size, machine.gpus)
    if recipe.mixed_precision == "auto":
        recipe.mixed_precision = "bf16"  # what it will be on such a GPU
    if recipe.objective.get("num_classes", 0) is None:
        recipe.objective["num_classes"] = IN1K_CLASSES  # a head is small beside its encoder
    images, source, shards = _images(recipe, machine)
    cost = count(recipe)
    plan = Plan(recipe.optim, images, micro, machine.gpus)
    plan.check()
    speed = machine.gpus * machine.mfu * machine.peak_tflops * 1e12 / cost.flops
    moments = 2 if recipe.optim.name == "adamw" else 1
    checkpoint = 4.0 * (cost.total + moments * cost.trainable)
    steps_kept = recipe.run.keep_last + 1
    if recipe.run.keep_every is not None:
        steps_kept += plan.total_steps // max(recipe.run.keep_every.steps(plan.steps_per_epoch), 1)
    report = Report(
        name, cost, machine.gpus, images, source, recipe.optim.batch_size, micro, plan.accumulation, plan.total_steps,
        plan.total_steps * recipe.optim.batch_size / speed / 3600, speed, checkpoint, checkpoint * steps_kept, shards,
    )  # fmt: skip
    usable = machine.gpu_memory * GB * (1 - RESERVE)
    per_gpu = recipe.optim.batch_size // machine.gpus
    for strategy, bytes_of in memory(cost, machine.gpus, moments).items():
        for checkpointing, line in ((False, cost.activations), (True, cost.checkpointed)):
            if line is None:
                continue
            most = int(max(usable - bytes_of.fixed - line[0], 0) / line[1])
            fitting = max((m for m in range(1, per_gpu + 1) if per_gpu % m == 0 and m <= most), default=0)
            used = bytes_of.fixed + line[0] + line[1] * micro
            report.rows.append(
                {
                    "strategy": strategy, "checkpointing": checkpointing, **asdict(bytes_of),
                    "activations": line[0] + line[1] * micro, "total": used, "fits": used <= usable,
                    "largest_micro_batch": fitting,
                }
            )  # fmt: skip
    return report


def _images(recipe: Recipe, machine: PlanSection) -> tuple[int, str, str]:
    """Images of an epoch, where the number comes from, and how the shards spread."""
    from ssl_vit import splits
    from ssl_vit.data.index import INDEX

    folders = [Path(spec).expanduser() for spec in splits.train_specs(recipe.data)]
    if folders and all((folder / INDEX).is_file() for folder in folders):
        sizes = [int(size) for index in splits.open_train(recipe.data) for size in index.shard_sizes if size]
        lanes = recipe.data.num_lanes
        fits = lanes % machine.gpus == 0 and recipe.optim.batch_size % lanes == 0
        how = "each process reads its own lanes" if fits else "each process takes its slice of every batch"
        text = f"{len(sizes)} shards of {min(sizes)} to {max(sizes)} images; {lanes} lanes over {machine.gpus}: {how}"
        return machine.images or sum(sizes), "images=" if machine.images else "data.train", text
    source = "images=" if machine.images else "assumed: ImageNet-1k"
    return machine.images or IN1K_IMAGES, source, "data.train is not packed shards here: not looked at"


def show(report: Report, machine: PlanSection) -> str:
    """The table that people read."""
    cost = report.cost
    lines = [
        f"plan for {report.recipe} on {report.gpus} GPUs of {machine.gpu_memory:g} GB",
        f"parameters      encoder {cost.encoder / 1e6:.1f} M, objective {cost.total / 1e6:.1f} M, of it trained "
        f"{cost.trainable / 1e6:.1f} M",
        f"FLOPs           {cost.flops / 1e9:.1f} G per image and training step",
        f"batch           {report.batch_size} = micro-batch {report.micro_batch_size} x GPUs {report.gpus} x "
        f"accumulation {report.accumulation}",
        f"length          {report.steps:,} steps, {report.steps * report.batch_size:,} images "
        f"({report.images:,} an epoch; {report.images_from})",
        f"time            {report.hours:.1f} hours at {machine.mfu:.0%} of {machine.peak_tflops:g} TFLOP/s "
        f"({report.images_per_second:,.0f} images/s); the loader has to keep up",
        f"disk            {report.checkpoint_bytes / GB:.2f} GB a checkpoint, {report.disk_bytes / GB:.1f} GB at most",
        f"shards          {report.shards}",
        "",
        f"memory of one GPU in GB at micro-batch {report.micro_batch_size} (of {machine.gpu_memory:g}, {RESERVE:.0%} "
        "kept free)",
        f"{'strategy':<10}{'checkpointing':<15}{'weights':>9}{'gradients':>11}{'optimizer':>11}{'activations':>13}"
        f"{'total':>8}  {'fits':<6}largest micro-batch",
    ]
    for row in report.rows:
        numbers = [row[key] / GB for key in ("weights", "gradients", "optimizer", "activations", "total")]
        lines.append(
            f"{row['strategy']:<10}{'yes' if row['checkpointing'] else 'no':<15}{numbers[0]:>9.2f}{numbers[1]:>11.2f}"
            f"{numbers[2]:>11.2f}{numbers[3]:>13.2f}{numbers[4]:>8.2f}  {'yes' if row['fits'] else 'NO':<6}"
            f"{row['largest_micro_batch'] or 'none'}"
        )
    return "\n".join(lines)
