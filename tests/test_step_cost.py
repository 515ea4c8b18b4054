"""What a training step may cost, counted and not timed: no value is waited for, no operation is added unseen."""

from __future__ import annotations

import traceback
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_ENCODER
from test_objectives import NAMES, build, recipe_of
from test_trainer import train
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.config import check
from ssl_vit.cost import peak_rate
from ssl_vit.data.loader import Pixels
from ssl_vit.encoders.base import create_encoder
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.objectives.mae import MAE
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.training import trainer
from ssl_vit.training.optim import OptimSection
from ssl_vit.training.signals import Flags
from ssl_vit.training.strategies import Strategy
from ssl_vit.training.supply import MicroBatch
from ssl_vit.training.trainer import Trainer


class Transfers(TorchDispatchMode):
    """Notes the copies between host and device that the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.waited: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func._schema.name == "aten::_to_copy":
            source, goal, free = args[0], result, (kwargs or {}).get("non_blocking")
        elif func._schema.name == "aten::copy_":
            goal, source, *rest = args
            free = rest == [True]
        else:
            return result
        if source.device.type != goal.device.type and not free:
            self.waited.append(f"{source.device} to {goal.device}\n{''.join(traceback.format_stack()[-8:-1])}")
        return result


def step_without_values(objective: Objective, batch: dict[str, Tensor], device: torch.device) -> list[str]:
    """A training step as the trainer makes it, from a batch on the host to the flags; a GPU need not be there.

    Tensors have shapes and a device and no values: what a GPU would have to be waited for (``item``, ``nonzero``, a
    boolean index, ``tolist``) raises. On a GPU the backward pass is left out, which torch begins on real ones only.

    Returns:
        Copies between host and device that the host would wait for.
    """
    mode = FakeTensorMode()

    def moved(tensor: Tensor) -> Tensor:
        with mode:
            return torch.empty_like(mode.from_tensor(tensor), device=device)

    for module in objective.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(moved(parameter.data), parameter.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = moved(buffer)
    batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
    accelerator: Any = SimpleNamespace(device=device, prepare=lambda module: module)
    strategy = Strategy(accelerator, objective, OptimSection(clip_grad=1.0), accumulation=1)
    training: Any = SimpleNamespace(skips=SimpleNamespace(barred={2}))
    pixels = Pixels((0.5,) * 3, (0.5,) * 3)
    with mode, Transfers() as transfers:
        objective.before_step(Progress(1, 10, 0.1, 1.0, 0.1))
        loss, _ = objective(pixels.to_device(batch, device))
        loss = Trainer._finite_or_nan(training, loss, 1)
        if device.type == "cpu":
            strategy.backward(loss)
        else:
            for parameter in strategy.named.values():
                parameter.grad = torch.empty_like(parameter)
        skipped, _ = strategy.step()
        objective.after_step(1 - skipped)
        Flags(device).agreed(15, skipped)
    return transfers.waited


GPU = torch.device("cuda")


@pytest.mark.parametrize("device", [torch.device("cpu"), GPU], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_no_value(name: str, device: torch.device, images: Path, tmp_path: Path) -> None:
    objective, batch = build(name, images, tmp_path)
    assert step_without_values(objective.train(), batch, device) == []


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_training_waits_for_the_gpu_at_its_log_line_only(
    name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """torch raises where anything else does; the first steps make the optimizer's state and start codebooks."""
    note, mean_values = Trainer._note_samples, trainer.mean_values

    def noted(self: Trainer, micro: MicroBatch, step: int) -> None:
        torch.cuda.set_sync_debug_mode("error" if step > 2 else "default")
        note(self, micro, step)

    def means(values: dict[str, Tensor]) -> dict[str, float]:
        torch.cuda.set_sync_debug_mode("default")
        return mean_values(values)

    monkeypatch.setattr(Trainer, "_note_samples", noted)
    monkeypatch.setattr(trainer, "mean_values", means)
    values = recipe_of(name, images, tmp_path / "run")
    values["evals"] = {}
    values["run"] |= {"log_every": 1000, "save_every": "100 steps"}
    try:
        train(values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("look", [lambda x: float(x), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_a_step_that_does_is_found(look: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = build("mae", images, tmp_path)
    plain: Any = objective.loss
    monkeypatch.setattr(objective, "loss", lambda batch: (look(batch["image"].mean()), plain(batch))[1])
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        step_without_values(objective.train(), batch, GPU)


@pytest.mark.parametrize(
    "copy", [lambda x: torch.tensor([1.0], device=x.device), lambda x: x.cpu(), lambda x: x.new_tensor(1)]
)
def test_a_copy_that_is_waited_for_is_found(
    copy: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    objective, batch = build("mae", images, tmp_path)
    plain: Any = objective.loss
    monkeypatch.setattr(objective, "loss", lambda batch: (copy(batch["image"].mean()), plain(batch))[1])
    (found,) = step_without_values(objective.train(), batch, GPU)
    assert "cuda" in found


@pytest.mark.parametrize("name", NAMES)
def test_flops_of_a_step_are_counted(name: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """For mfu, which is logged on GPUs: nothing may be in the way of counting there."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    recipe = check_recipe(check(Recipe, recipe_of(name, images, tmp_path / "run") | {"mixed_precision": "bf16"}))
    rate = peak_rate(recipe, GPU)
    assert rate is not None
    assert 1e6 < 989.4e12 / rate < 1e10, "FLOPs an image of encoders with 32 pixels and two blocks"


@pytest.mark.parametrize("name", NAMES)
def test_whoever_keeps_a_loss_keeps_a_number(name: str, images: Path, tmp_path: Path) -> None:
    """Some losses of torch keep the memory of all errors behind their mean; a step keeps one of each micro-batch."""
    objective, batch = build(name, images, tmp_path)
    objective.before_step(Progress(1, 10, 0.1, 1.0, 0.1))
    loss, metrics = objective.train()(batch)
    kept = {key: value.untyped_storage().nbytes() for key, value in {"loss": loss, **metrics}.items()}
    assert max(kept.values()) <= 16, kept


class Operations(TorchDispatchMode):
    """Counts the operations that compute: each is a kernel on a GPU; views and empty tensors are none."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.removeprefix("aten::")
        if not func.is_view and not name.startswith(("empty", "detach", "_unsafe_view")):
            self.count[name] += 1
        return result


def operations(depth: int, decoder_depth: int) -> int:
    """Of MAE's forward and backward pass."""
    encoder = create_encoder(**TINY_ENCODER | {"depth": depth})
    objective = MAE(encoder, decoder_embed_dim=32, decoder_depth=decoder_depth, decoder_num_heads=2).train()
    mask = torch.zeros(4, 16, dtype=torch.bool)
    mask[:, :12] = True
    batch = {"image": torch.randn(4, 3, 32, 32), "mask": mask}
    with Operations() as counted:
        objective(batch)[0].backward()
    return counted.count.total()


def test_operations_of_mae() -> None:
    """Numbers to lower: an operation more in a block is one more for every block of every step.

    A block: 4 affine maps, attention, 2 norms, GELU, 2 sums; backward twice the maps, their 4 biases, the rest once,
    and two copies in which the gradients of queries, keys and values become one.
    """
    base = operations(1, 1)
    assert operations(2, 1) - base == 10 + 20
    assert operations(1, 2) - base == 10 + 20
    assert base <= 119
