"""What a training step may cost, counted and not timed: no value is waited for, no operation is added unseen."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_ENCODER
from test_objectives import NAMES, build
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from ssl_vit.encoders.base import create_encoder
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.objectives.mae import MAE


def step_without_values(objective: Objective, batch: dict[str, Tensor]) -> None:
    """Forward, backward, clipping, optimizer and ``after_step`` on tensors that have shapes and no values.

    What a GPU would have to be waited for (``item``, ``nonzero``, a boolean index, ``tolist``) raises.
    """
    mode = FakeTensorMode()
    for module in objective.modules():
        for tensors in (module._parameters, module._buffers):
            tensors.update({name: mode.from_tensor(t) for name, t in tensors.items() if t is not None})
    batch = {name: mode.from_tensor(tensor) for name, tensor in batch.items()}
    with mode:
        parameters = [p for p in objective.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(parameters, fused=True)
        objective.before_step(Progress(1, 10, 0.1, 1.0, 0.1))
        loss, _ = objective(batch)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        objective.after_step(torch.ones((), dtype=torch.bool))


@pytest.mark.parametrize("name", NAMES)
def test_a_step_waits_for_no_value(name: str, images: Path, tmp_path: Path) -> None:
    objective, batch = build(name, images, tmp_path)
    step_without_values(objective.train(), batch)


@pytest.mark.parametrize("look", [lambda x: float(x), lambda x: x[x > 0], lambda x: x.nonzero()])
def test_a_step_that_does_is_found(look: Any, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    objective, batch = build("mae", images, tmp_path)
    plain = objective.loss
    monkeypatch.setattr(objective, "loss", lambda batch: (look(batch["image"].mean()), plain(batch))[1])
    with pytest.raises((DataDependentOutputException, RuntimeError)):
        step_without_values(objective.train(), batch)


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
    assert base <= 122
