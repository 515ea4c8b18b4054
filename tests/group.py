"""Several runs in one process group: what test_strategies.py starts through a launcher.

    group.py JOBS.json        JOBS: [{"recipe": FILE, "resume": "auto" | PATH, "poison": [steps]}]

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

import torch

from ssl_vit import distributed
from ssl_vit.config import check, load
from ssl_vit.objectives.mae import MAE
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


def poisoned(steps: list[int]) -> Any:
    """MAE.loss, infinite in some steps."""
    loss, calls = MAE.loss, {"step": 0}

    def before_step(self: MAE, progress: Any) -> None:
        calls["step"] = progress.step + 1

    def infinite(self: MAE, batch: dict[str, Any]) -> Any:
        value, metrics = loss(self, batch)
        bad = calls["step"] in steps and distributed.rank() == distributed.world_size() - 1
        return value * (float("inf") if bad else 1.0), metrics

    MAE.before_step, MAE.loss = before_step, infinite
    return loss


def train(job: dict[str, Any]) -> None:
    recipe = check_recipe(check(Recipe, load([Path(job["recipe"])], [])))
    seen: list[Trainer] = []
    fit, loss = Trainer.fit, poisoned(job.get("poison", []))

    def watched(self: Trainer) -> None:
        seen.append(self)
        fit(self)

    Trainer.fit = watched
    try:
        run(recipe, job.get("resume", "auto"))
    finally:
        Trainer.fit, MAE.loss = fit, loss
        del MAE.before_step
    (Path(recipe.run.dir) / f"weights_{distributed.rank()}.txt").write_text(weights_hash(seen[0]))


if __name__ == "__main__":
    torch.set_num_threads(1)
    for each in json.loads(Path(sys.argv[1]).read_text()):
        train(each)
        distributed.barrier()
    distributed.shutdown()
