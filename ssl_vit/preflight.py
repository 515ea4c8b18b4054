"""What a run will cost, before it starts: parameters, FLOPs, memory, time and disk; nothing is allocated."""

from __future__ import annotations

import copy
import json
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pydantic import Field

from ssl_vit.cli import USAGE, Arguments, find_recipe, refuse
from ssl_vit.config import InputError, Section, check, help_lines, load
from ssl_vit.recipe import Recipe, check_recipe, micro_batch

GB = 1e9
IN1K_IMAGES = 1_281_167
RESERVE = 0.1
"""Share of a GPU's memory left to the CUDA context, kernels' workspaces and fragmentation."""


class PlanSection(Section):
    """The machine that a plan is for.

    Args:
        gpus: GPUs, over all machines
        gpu_memory: of one, in GB
        mfu: share of the peak that training reaches; 0.3 to 0.45 is usual for ViTs on H100s
        peak_tflops: of one GPU, dense, bf16; 989: H100 SXM, 312: A100
        images: of an epoch; default: those of data.train if it is packed, else ImageNet-1k's 1,281,167
        measure: run a few steps on the GPU of this machine and compare
        json_output: print one JSON object instead of a table
    """

    gpus: int = Field(default=8, ge=1)
    gpu_memory: float = Field(default=80.0, gt=0)
    mfu: float = Field(default=0.35, gt=0, le=1)
    peak_tflops: float = Field(default=989.0, gt=0)
    images: int | None = Field(default=None, ge=1)
    measure: bool = False
    json_output: bool = False


@dataclass(frozen=True)
class Cost:
    """What one objective costs, counted without allocating it.

    Args:
        encoder: parameters of the encoder.
        total: parameters of the objective.
        trainable: those with gradients.
        gathered: parameters outside the transformer blocks, and of the largest block.
        flops: of a training step, per image (forward and backward, GEMMs and attention).
        activations: bytes kept for the backward pass: (fixed, per image).
        checkpointed: the same with ``encoder.grad_checkpointing``, None where the encoder has no such thing.
    """

    encoder: int
    total: int
    trainable: int
    gathered: tuple[int, int]
    flops: float
    activations: tuple[float, float]
    checkpointed: tuple[float, float] | None


def count(recipe: Recipe) -> Cost:
    """Count parameters, FLOPs and activations of a recipe's objective with fake tensors."""
    import torch

    from ssl_vit.training.strategies import transformer_blocks

    torch.manual_seed(recipe.seed)
    objective, run = _fake(recipe)
    flops, two = run(2)
    _, four = run(4)
    checkpointed = None
    if "grad_checkpointing" in recipe.encoder:
        other = copy.deepcopy(recipe)
        other.encoder["grad_checkpointing"] = True
        _, run_checkpointed = _fake(other)
        checkpointed = _line(run_checkpointed(2)[1], run_checkpointed(4)[1])
    sizes = [sum(p.numel() for p in block.parameters()) for block in transformer_blocks(objective)]
    total = sum(p.numel() for p in objective.parameters())
    return Cost(
        encoder=sum(p.numel() for p in objective.encoder.parameters()),
        total=total,
        trainable=sum(p.numel() for p in objective.parameters() if p.requires_grad),
        gathered=(total - sum(sizes), max(sizes, default=0)),
        flops=flops / 2,
        activations=_line(two, four),
        checkpointed=checkpointed,
    )


def _line(two: float, four: float) -> tuple[float, float]:
    """(fixed, per image) from the bytes at two batch sizes."""
    slope = (four - two) / 2
    return two - 2 * slope, slope


def _fake(recipe: Recipe) -> tuple[Any, Callable[[int], tuple[float, float]]]:
    """The objective without memory, and a function of the batch size: (FLOPs of a step, bytes of activations)."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    recipe = copy.deepcopy(recipe)
    recipe.encoder["init"] = recipe.objective["init"] = None
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return step_counter(recipe, mode)


def step_counter(recipe: Recipe, mode: Any = None) -> tuple[Any, Callable[[int], tuple[float, float]]]:
    """As :func:`_fake`, with real tensors if there is no ``mode``; autocast as the recipe says."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from ssl_vit import build
    from ssl_vit.objectives.base import Progress
    from ssl_vit.training.strategies import transformer_blocks

    pixels = build.resolve_pixels(copy.deepcopy(recipe.data), recipe.encoder)
    with torch.device("cpu" if mode is None else "meta"):
        objective = build.build_objective(recipe).train()
    if mode is not None:
        with mode:
            objective.to_empty(device="cpu")  # fake: shapes without memory
    view = objective.views(objective.encoder.img_size)
    height, width = objective.encoder.img_size
    kept: dict[int, int] = {}
    own: set[int] = set()

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage.nbytes()
        return tensor

    for block in transformer_blocks(objective):
        # what a checkpointed block keeps: its input
        block.register_forward_pre_hook(lambda module, inputs: (keep(inputs[0]), None)[1])

    def run(batch_size: int) -> tuple[float, float]:
        blank = torch.zeros(pixels.in_chans, height, width, dtype=torch.uint8)
        views = [view({"image": blank, "label": 0}) for _ in range(batch_size)]
        batch = {key: torch.stack([v[key] for v in views]) for key in views[0]}
        batch = pixels.to_device(batch, torch.device("cpu"))
        if mode is not None:
            batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        kept.clear()
        own.clear()
        own.update(t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers()))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
        counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
        with mode or nullcontext(), counter:
            objective.before_step(Progress(0, 100, 0.0, 1.0, 0.0))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                loss, _ = objective(batch, call="loss")
            loss.backward()
        objective.zero_grad(set_to_none=True)
        return counter.get_total_flops(), float(sum(kept.values()))

    return objective, run


def _attention_flops() -> dict[Any, Callable[..., int]]:
    """The CPU's fused attention, which torch's counter does not know; backward is twice forward, as for GEMMs."""
    import torch
    from torch.utils.flop_counter import sdpa_flop_count

    def forward(q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return sdpa_flop_count(q, k, v)

    def backward(grad: Any, q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * sdpa_flop_count(q, k, v)

    ops = torch.ops.aten
    return {
        ops._scaled_dot_product_flash_attention_for_cpu: forward,
        ops._scaled_dot_product_flash_attention_for_cpu_backward: backward,
    }


@dataclass(frozen=True)
class Memory:
    """Bytes on one device, without activations.

    Args:
        weights: parameters, with what is gathered for a block.
        gradients: with buffers of their exchange.
        optimizer: moments, and DeepSpeed's own copy of the weights.
    """

    weights: float
    gradients: float
    optimizer: float

    @property
    def fixed(self) -> float:
        """All of it."""
        return self.weights + self.gradients + self.optimizer


def memory(cost: Cost, gpus: int, moments: int) -> dict[str, Memory]:
    """Of each strategy; everything is float32, whatever autocast computes in.

    Args:
        cost: of the objective.
        gpus: devices.
        moments: numbers an optimizer keeps for each trainable parameter.
    """
    weights, gradients, state = 4.0 * cost.total, 4.0 * cost.trainable, 4.0 * moments * cost.trainable
    outside, block = cost.gathered
    bucket = 2 * 4 * 50e6  # configs/deepspeed: two of 50 million numbers
    if gpus == 1:
        return {"one GPU": Memory(weights, gradients, state)}
    return {
        "DDP": Memory(weights, 2 * gradients, state),  # the buckets of the exchange are a second copy
        "ZeRO-1": Memory(weights, gradients + bucket, (state + gradients) / gpus),
        "ZeRO-2": Memory(weights, gradients / gpus + bucket, (state + gradients) / gpus),
        "ZeRO-3": Memory(weights / gpus + 4.0 * (outside + 2 * block), gradients / gpus + bucket, state / gpus),
        "FSDP2": Memory(weights / gpus + 4.0 * (outside + 2 * block), gradients / gpus + 4.0 * block, state / gpus),
    }


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
    from ssl_vit import build
    from ssl_vit.data.index import INDEX

    specs = [recipe.data.train] if isinstance(recipe.data.train, str) else list(recipe.data.train or [])
    folders = [Path(spec).expanduser() for spec in specs]
    if folders and all((folder / INDEX).is_file() for folder in folders):
        indexes = [build.open_data(recipe.data, str(folder)) for folder in folders]
        sizes = [int(size) for index in indexes for size in index.shard_sizes]
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


def measured(recipe: Recipe, micro: int) -> str:
    """A few steps on this machine's GPU, beside the plan's numbers.

    Raises:
        InputError: there is none.
    """
    import torch

    if not torch.cuda.is_available():
        raise InputError("measure=true: this machine has no CUDA GPU; leave it out for the calculated plan")
    from ssl_vit import build
    from ssl_vit.training.optim import build_optimizer

    objective = build.build_objective(recipe).cuda().train()
    optimizer = build_optimizer(objective, recipe.optim)
    pixels = build.resolve_pixels(copy.deepcopy(recipe.data), recipe.encoder)
    height, width = objective.encoder.img_size
    view = objective.views(objective.encoder.img_size)
    blank = torch.zeros(pixels.in_chans, height, width, dtype=torch.uint8)
    views = [view({"image": blank, "label": 0}) for _ in range(micro)]
    batch = {key: torch.stack([v[key] for v in views]) for key in views[0]}
    batch = pixels.to_device(batch, torch.device("cuda"))
    torch.cuda.reset_peak_memory_stats()
    for step in range(13):
        if step == 3:
            torch.cuda.synchronize()
            start = time.perf_counter()
        with torch.autocast("cuda", torch.bfloat16, enabled=recipe.mixed_precision == "bf16"):
            loss, _ = objective(batch, call="loss")
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    torch.cuda.synchronize()
    speed = 10 * micro / (time.perf_counter() - start)  # pyright: ignore[reportPossiblyUnboundVariable]
    peak = torch.cuda.max_memory_allocated() / GB
    return f"measured on one {torch.cuda.get_device_name()}: {speed:.0f} images/s, peak {peak:.2f} GB"


def main(doc: str | None, pipeline: str, default: str) -> None:
    """The door of ``pipelines/plan.py``: the recipe's keys, and those of :class:`PlanSection`."""
    configs = Path(pipeline).resolve().parents[1] / "configs"
    try:
        arguments = Arguments.parse(sys.argv[1:])
        if arguments.help:
            print("\n".join([(doc or "").strip(), "", USAGE, "", "the machine:", *help_lines(PlanSection)]))
            return
        own = set(PlanSection.model_fields)
        machine_words = [w for w in arguments.words if w.lstrip("-").partition("=")[0] in own]
        words = [w for w in arguments.words if w not in machine_words]
        files = [find_recipe(file, configs) for file in arguments.files] or [configs / default]
        machine = check(PlanSection, load([], machine_words), "plan")
        values = load(files, words)
        values["data"] = {**(values.get("data") or {})}
        values["data"]["train"] = values["data"].get("train") or "unset"
        recipe = check_recipe(check(Recipe, values))
        report = make_plan(recipe, machine, files[-1].name)
        print(json.dumps(asdict(report)) if machine.json_output else show(report, machine))
        if machine.measure:
            print(measured(recipe, report.micro_batch_size))
    except InputError as error:
        refuse(error)
