"""Several runs in one process group: what test_strategies.py starts through a launcher.

    group.py JOBS.json        JOBS: [{"recipe": FILE, "resume": "auto" | PATH, "poison": [steps]}]

Beside that it leaves in RUN/held_RANK.json the shares of all trained numbers, and of the optimizer's, that it holds.
``poison`` makes the loss of those steps (counted from 1) infinite on the last process. After each run every process
leaves the hash of the weights that it holds, gathered where they are in parts, in RUN/weights_RANK.txt.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import sys
from pathlib import Path
from typing import Any

import conftest  # noqa: F401  the objectives of tests
import torch

from ssl_vit import distributed
from ssl_vit.config import check, load
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.strategies import whole
from ssl_vit.training.trainer import Trainer


def weights_hash(trainer: Trainer) -> str:
    strategy, digest = trainer.strategy, hashlib.sha256()
    gather: Any = contextlib.nullcontext()
    if getattr(strategy, "stage", 0) == 3:
        from deepspeed.runtime.zero import GatheredParameters

        gather = GatheredParameters(list(strategy.objective.parameters()))
    with gather:
        for _, tensor in sorted(strategy.objective.state_dict().items()):
            digest.update(whole(tensor).detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


def held(trainer: Trainer) -> dict[str, float]:
    """Shares of the trained parameters and of the optimizer's moments that this process holds itself."""
    strategy = trainer.strategy
    total = sum(getattr(p, "ds_numel", p.numel()) for p in strategy.named.values())

    def local(tensor: Any) -> int:
        tensor = getattr(tensor, "ds_tensor", tensor)  # ZeRO-3's part
        return (tensor.to_local() if hasattr(tensor, "to_local") else tensor).numel()

    optimizer = getattr(strategy.optimizer, "optimizer", strategy.optimizer)  # inside DeepSpeed's
    moments = sum(local(state["exp_avg"]) for state in optimizer.state.values())
    return {"parameters": sum(map(local, strategy.named.values())) / total, "moments": moments / total}


def infinite(trainer: Trainer, steps: list[int]) -> None:
    """Make the loss of some steps infinite on the last process."""
    objective: Objective = trainer.strategy.objective
    loss, before_step, now = objective.loss, objective.before_step, {"step": 0}  # pyright: ignore

    def noted(progress: Any) -> None:
        now["step"] = progress.step + 1
        before_step(progress)

    def poisoned(batch: dict[str, Any]) -> Any:
        value, metrics = loss(batch)
        bad = now["step"] in steps and distributed.rank() == distributed.world_size() - 1
        return value * (float("inf") if bad else 1.0), metrics

    objective.before_step, objective.loss = noted, poisoned  # pyright: ignore


def train(job: dict[str, Any]) -> None:
    recipe = check_recipe(check(Recipe, load([Path(job["recipe"])], [])))
    seen: list[Trainer] = []
    fit = Trainer.fit

    def watched(self: Trainer) -> None:
        seen.append(self)
        infinite(self, job.get("poison", []))
        fit(self)

    Trainer.fit = watched
    try:
        run(recipe, job.get("resume", "auto"))
    finally:
        Trainer.fit = fit
    (Path(recipe.run.dir) / f"held_{distributed.rank()}.json").write_text(json.dumps(held(seen[0])))
    (Path(recipe.run.dir) / f"weights_{distributed.rank()}.txt").write_text(weights_hash(seen[0]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        train(each)
        distributed.barrier()
    distributed.shutdown()
