"""Parameters, FLOPs and memory of an objective, counted with tensors that have shapes but no memory."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from ssl_vit.config import InputError
from ssl_vit.recipe import Recipe

GB = 1e9


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

    with torch.device("cpu" if mode is None else "meta"):
        objective = build.build_objective(recipe).train()
    if mode is not None:
        with mode:
            objective.to_empty(device="cpu")  # fake: shapes without memory
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
        batch = _blank_batch(objective, recipe, batch_size, "cpu")
        if mode is not None:
            batch = {key: mode.from_tensor(value) for key, value in batch.items()}
        kept.clear()
        own.clear()
        own.update(t.untyped_storage()._cdata for t in (*objective.parameters(), *objective.buffers()))
        autocast = torch.autocast("cpu", torch.bfloat16, enabled=recipe.mixed_precision == "bf16")
        counter = FlopCounterMode(display=False, custom_mapping=_attention_flops())
        with mode or nullcontext(), counter:
            # not the first step, in which a codebook looks at values
            objective.before_step(Progress(1, 100, 0.01, 1.0, 0.01))
            with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor), autocast:
                loss, _ = objective(batch, call="loss")
            loss.backward()
        objective.zero_grad(set_to_none=True)
        return counter.get_total_flops(), float(sum(kept.values()))

    return objective, run


def _blank_batch(objective: Any, recipe: Recipe, batch_size: int, device: str) -> dict[str, Any]:
    """The objective's own views of a black image, as the loader would give them."""
    import torch

    from ssl_vit import build

    pixels = build.resolve_pixels(copy.deepcopy(recipe.data), recipe.encoder)
    blank = torch.zeros(pixels.in_chans, *objective.encoder.img_size, dtype=torch.uint8)
    view = objective.views(objective.encoder.img_size)
    views = [view({"image": blank, "label": 0}) for _ in range(batch_size)]
    batch = {key: torch.stack([v[key] for v in views]) for key in views[0]}
    return pixels.to_device(batch, torch.device(device))


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
    batch = _blank_batch(objective, recipe, micro, "cuda")
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
