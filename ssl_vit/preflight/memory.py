"""What a training needs of the memory of one device, calculated or measured."""

from __future__ import annotations

import time
from dataclasses import dataclass

from ssl_vit.config import InputError
from ssl_vit.cost import Cost, blank_batch
from ssl_vit.recipe import Recipe

GB = 1e9


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
    batch = blank_batch(objective, recipe, micro, "cuda")
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
