"""Where weights, gradients and optimizer state live: whole on every process, or in the parts of ZeRO or FSDP2.

A strategy makes the step and gives weights and optimizer state back whole, by parameter name, so that one checkpoint
format serves every strategy and any number of processes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from ssl_vit import distributed
from ssl_vit.objectives.base import Objective
from ssl_vit.training.optim import OptimSection, begin_momentum, build_optimizer, clip_gradients

OptimizerState = dict[str, dict[str, Tensor]]
"""Parameter name -> name in the optimizer (``exp_avg``, ``step`` ...) -> tensor, whole and on the CPU."""


class Strategy:
    """Whole weights everywhere: one process, or several under DDP.

    Args:
        accelerator: holds device, precision and processes.
        objective: what is trained; moved to the device.
        optim: the optimizer and its clipping.
        accumulation: micro-batches a step.
    """

    gathers = False
    """Whether weights have to be gathered before anything else than the wrapped objective may use them."""

    def __init__(self, accelerator: Accelerator, objective: Objective, optim: OptimSection, accumulation: int) -> None:
        self.accelerator, self.objective, self.optim, self.accumulation = accelerator, objective, optim, accumulation
        self.device = accelerator.device
        self._prepare()
        self.named = {name: p for name, p in objective.named_parameters() if p.requires_grad}

    def _prepare(self) -> None:
        self.wrapped: Any = self.accelerator.prepare(self.objective)
        self.optimizer = build_optimizer(self.objective, self.optim)
        begin_momentum(self.optimizer)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The optimizer's groups: their ``lr`` and ``weight_decay`` are set before each step."""
        return self.optimizer.param_groups

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over processes at the last."""
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.wrapped):
            yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's loss."""
        (loss / self.accumulation).backward()

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip and make the step, unless a gradient is not finite.

        Returns:
            Whether the step was skipped (float, 1 or 0) and the norm of all gradients before clipping; scalars on the
            device, not waited for, the same on every process.
        """
        parameters = list(self.named.values())
        norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None], foreach=True)
        norm = whole(norm)
        clip_gradients(parameters, norm, self.optim)
        for parameter in self.objective.resting:
            parameter.grad = None
        skipped = (~norm.isfinite()).float()
        # fused optimizers look at the flag on the device: nobody waits
        self.optimizer.found_inf = skipped  # pyright: ignore[reportAttributeAccessIssue]
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return skipped, norm

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the objective's state, whole and on the CPU of the main process (empty on others)."""
        return self._gathered(self.objective.state_dict())

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state, on the main process (names without tensors on others)."""
        return {name: self._gathered(self.optimizer.state.get(p, {})) for name, p in self.named.items()}

    def load(self, weights: dict[str, Tensor] | None, optimizer: OptimizerState) -> None:
        """Take up weights (None: they are already there) and optimizer state of a checkpoint."""
        if weights is not None:
            self._load_weights(weights)
        self.optimizer.state.clear()
        for name, values in optimizer.items():
            parameter = self.named[name]
            self.optimizer.state[parameter] = {key: like(parameter, value) for key, value in values.items()}
        begin_momentum(self.optimizer)

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        with torch.no_grad():
            for name, tensor in self.objective.state_dict().items():
                tensor.copy_(like(tensor, weights[name]))

    def _gathered(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        gathered = ((name, whole(tensor.detach())) for name, tensor in tensors.items())
        # a copy: saving goes on while training must not change it
        return {name: tensor.to("cpu", copy=True) for name, tensor in gathered if distributed.is_main()}


class FSDP2(Strategy):
    """Parameters, gradients and optimizer state in parts: torch's ``fully_shard`` around each transformer block.

    The same on CPUs and GPUs; accelerate's own FSDP never engages on a CPU and so could not be tested there.
    """

    gathers = True

    def _prepare(self) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        objective = self.objective.to(self.device)
        mesh = init_device_mesh(self.device.type, (distributed.world_size(),))
        for block in transformer_blocks(objective):
            fully_shard(block, mesh=mesh)
        self.wrapped = fully_shard(objective, mesh=mesh)
        forward_in_precision(objective, self.accelerator)
        self.optimizer = build_optimizer(objective, self.optim)  # after sharding: the parameters are new objects

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over processes at the last."""
        self.wrapped.set_requires_gradient_sync(last)
        yield


def transformer_blocks(objective: nn.Module) -> list[nn.Module]:
    """The modules that are gathered one after the other; everything else is gathered for the whole forward pass."""
    return [module for module in objective.modules() if hasattr(module, "attn") and hasattr(module, "mlp")]


def forward_in_precision(objective: nn.Module, accelerator: Accelerator) -> None:
    """Let the forward pass compute in the recipe's precision alone: its outputs are float32, as under DDP."""
    if accelerator.mixed_precision == "bf16":
        from accelerate.utils import convert_outputs_to_fp32

        autocast = torch.autocast(accelerator.device.type, torch.bfloat16)
        objective.forward = convert_outputs_to_fp32(autocast(objective.forward))


def compile_blocks(objective: nn.Module) -> None:
    """Compile each transformer block by itself, in place, for the shapes of training; names stay as they are."""
    for block in transformer_blocks(objective):
        block.compile(dynamic=False)


def whole(tensor: Tensor) -> Tensor:
    """A sharded tensor gathered (all processes take part), any other as it is."""
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def like(target: Tensor, value: Tensor) -> Tensor:
    """``value`` on the target's device, and in its parts if it has the target's shape and that is sharded."""
    from torch.distributed.tensor import DTensor, distribute_tensor

    value = value.to(target.device)
    if isinstance(target, DTensor) and value.shape == target.shape:
        return distribute_tensor(value, target.device_mesh, target.placements)
    return value
