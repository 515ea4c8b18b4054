"""Watching a run: every checkpoint measured once, while it is trained and after, into the same TensorBoard."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, run_python, tiny_recipe

from ssl_vit.training.run_folder import RunFolder
from ssl_vit.watch import ENDED, NOTHING_NEW, next_step


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "watch" / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.processes
def test_checkpoints_are_measured_while_they_come_and_once(images: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    recipe = tiny_recipe(images, run, evals={"knn": {"every": "2 steps"}})
    recipe["optim"] |= {"epochs": "6 steps"}
    recipe["run"] |= {"save_every": "2 steps", "keep_last": 9}
    (tmp_path / "run.yaml").write_text(json.dumps(recipe))
    refused = run_python("pipelines/knn.py", "--watch", str(run))
    assert refused.returncode == 2
    assert f"--watch {run}: holds no run (no recipe.yaml)" in refused.stderr
    command = [sys.executable, "pipelines/pretrain_mae.py", "--config", str(tmp_path / "run.yaml")]
    trainer = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    while not (run / "recipe.yaml").is_file():
        assert trainer.poll() is None, trainer.communicate()[1]
        time.sleep(0.1)
    watcher = subprocess.Popen(
        [sys.executable, "pipelines/knn.py", "--watch", str(run), "run.workers=0"], cwd=ROOT, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip
    _, said = trainer.communicate(timeout=120)
    assert trainer.returncode == 0, said
    _, said = watcher.communicate(timeout=120)
    assert watcher.returncode == 0, said
    assert [line["step"] for line in lines(run)] == [0, 2, 4, 6]
    own = {
        line["step"]: line
        for line in map(json.loads, (run / "metrics.jsonl").read_text().splitlines())
        if "knn/top1" in line
    }
    for line in lines(run):
        assert line["knn/top1"] == own[line["step"]]["knn/top1"], "what the run itself measured then"
    before = lines(run)
    again = run_python("pipelines/knn.py", "--watch", str(run), "run.workers=0")
    assert again.returncode == 0, again.stderr
    assert lines(run) == before, "nothing is measured twice"
    other = run_python("pipelines/linear_probe.py", "--watch", str(run), "run.workers=0")
    assert other.returncode == 0, other.stderr
    assert [line["step"] for line in lines(run) if "linear/top1" in line] == [line["step"] for line in before]
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run / "tensorboard" / "watch")).Reload()
    assert [event.step for event in events.Scalars("knn/top1")] == [line["step"] for line in before]
    assert [event.step for event in events.Scalars("linear/top1")] == [line["step"] for line in before]


def test_what_comes_next(tmp_path: Path) -> None:
    run, place = RunFolder(tmp_path / "run"), RunFolder(tmp_path / "run" / "watch")
    run.status("running", 0)
    assert next_step(run, place, ["knn"], set()) == NOTHING_NEW
    for step in (2, 4):
        folder = run.checkpoints / f"step_{step:08d}"
        folder.mkdir(parents=True)
        (folder / "manifest.json").write_text("{}")
    assert next_step(run, place, ["knn"], set()) == 2
    assert next_step(run, place, ["knn"], {2}) == 4
    place.path.mkdir()
    (place.path / "metrics.jsonl").write_text('{"step": 2, "knn/top1": 0.5}\n{"step": 4, "knn/top1": 0.5}\n')
    assert next_step(run, place, ["knn"], set()) == NOTHING_NEW
    assert next_step(run, place, ["knn", "linear"], set()) == 2, "measured by one evaluation is not by another"
    run.status("finished", 4)
    assert next_step(run, place, ["knn"], set()) == ENDED
