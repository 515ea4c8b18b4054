"""DeepSpeed's ZeRO as a strategy; the one file that knows its inside."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from ssl_vit import distributed
from ssl_vit.training.optim import build_optimizer
from ssl_vit.training.strategies import OptimizerState, Strategy, transformer_blocks


class Zero(Strategy):
    """DeepSpeed's ZeRO stages 1 to 3 through accelerate; the engine clips, steps and skips by itself."""

    def _prepare(self) -> None:
        optimizer = build_optimizer(self.objective, self.optim)
        self.wrapped, _ = self.accelerator.prepare(self.objective, optimizer)
        self.optimizer: Any = self.wrapped.optimizer
        self.stage = int(self.wrapped.zero_optimization_stage())
        self.gathers = self.stage == 3
        if self.gathers:
            # encoders use parameters of modules that they do not call; the objective's forward gathers these
            from deepspeed.runtime.zero import register_external_parameter

            inside = {p for block in transformer_blocks(self.objective) for p in block.parameters()}
            for parameter in self.objective.parameters():
                if parameter not in inside:
                    register_external_parameter(self.objective, parameter)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Around forward and backward of one micro-batch; gradients are averaged over processes at the last."""
        self.wrapped.set_gradient_accumulation_boundary(last)
        yield

    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch's loss; the engine divides by the accumulation."""
        self.wrapped.backward(loss)

    def step(self) -> tuple[Tensor, Tensor]:
        """Clip and make the step, unless a gradient is not finite; DeepSpeed looks at the norm on the host."""
        self.wrapped.step()
        skipped = torch.tensor(float(self.optimizer.overflow), device=self.device)
        norm = torch.as_tensor(self.wrapped.get_global_grad_norm(), device=self.device)
        return skipped, norm.float()

    def weights(self) -> dict[str, Tensor]:
        """Every tensor of the objective's state, whole and on the CPU of the main process (empty on others)."""
        if self.stage < 3:
            return super().weights()
        from deepspeed.runtime.zero import GatheredParameters

        parameters, found = dict(self.objective.named_parameters()), {}
        for name, tensor in self.objective.state_dict().items():
            parameter = parameters.get(name)
            with contextlib.nullcontext() if parameter is None else GatheredParameters([parameter]):
                found |= self._gathered({name: tensor if parameter is None else parameter})
        return found

    def optimizer_state(self) -> OptimizerState:
        """The optimizer's state, on the main process (names without tensors on others)."""
        from deepspeed.utils import safe_get_full_optimizer_state

        flat = self._flat_states()
        if not flat:
            return {name: {} for name in self.named}
        self._link()
        counted = {key: value for key, value in flat[0].items() if value.ndim == 0}
        keys = sorted(key for key, value in flat[0].items() if value.ndim)
        return {
            name: self._gathered(counted | {key: cast(Tensor, safe_get_full_optimizer_state(p, key)) for key in keys})
            for name, p in self.named.items()
        }

    def load(self, weights: dict[str, Tensor] | None, optimizer: OptimizerState) -> None:
        """Take up weights (None: they are already there) and optimizer state of a checkpoint."""
        from deepspeed.utils import safe_set_full_optimizer_state

        if weights is not None:
            self._load_weights(weights)
        first = next(iter(optimizer.values()), {})
        self.optimizer.optimizer.state.clear()
        if not first:
            return
        for flat in self._flat_parameters():  # empty parts first, filled below
            self.optimizer.optimizer.state[flat] = {
                key: value.clone().to(flat.device) if value.ndim == 0 else torch.zeros_like(flat.data)
                for key, value in first.items()
            }
        self._link()
        for name, values in optimizer.items():
            for key, value in values.items():
                if value.ndim:
                    safe_set_full_optimizer_state(self.named[name], value.to(self.device).float(), key)

    def _load_weights(self, weights: dict[str, Tensor]) -> None:
        from deepspeed.runtime.zero import GatheredParameters
        from deepspeed.utils import safe_set_full_fp32_param

        parameters = dict(self.objective.named_parameters())
        with torch.no_grad():
            for name, tensor in self.objective.state_dict().items():
                parameter, value = parameters.get(name), weights[name].to(self.device)
                if parameter is None:
                    tensor.copy_(value)
                    continue
                with GatheredParameters([parameter], modifier_rank=0) if self.stage == 3 else contextlib.nullcontext():
                    parameter.copy_(value) if self.stage < 3 or distributed.is_main() else None
                if parameter.requires_grad:
                    safe_set_full_fp32_param(parameter, value.float())

    def _link(self) -> None:
        """Tell each parameter its place in the flat state; DeepSpeed does so after the first group only."""
        if self.stage < 3:
            self.optimizer._hp_optimizer_states_linked = False
            self.optimizer._lazy_init_hp_params_optimizer_state()

    def _flat_parameters(self) -> list[Tensor]:
        parts = "fp32_partitioned_groups_flat" if self.stage == 3 else "single_partition_of_fp32_groups"
        return list(getattr(self.optimizer, parts))

    def _flat_states(self) -> list[dict[str, Tensor]]:
        state = self.optimizer.optimizer.state
        return [state[flat] for flat in self._flat_parameters() if flat in state]
