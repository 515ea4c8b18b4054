"""A run that cannot be lost: killed anywhere, out of disk, damaged, started twice, or with numbers that are none."""

from __future__ import annotations

import errno
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_recipe
from test_trainer import losses, start_process, train, wait_for_step

from ssl_vit.build import build_objective
from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.objectives.mae import MAE
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.training.checkpoint import Checkpoints, read_checkpoint
from ssl_vit.training.metrics import read_metrics, truncate_metrics
from ssl_vit.training.run_folder import RunFolder
from ssl_vit.training.skips import Diverged, Skips

pytestmark = pytest.mark.processes


def start_child(values: dict[str, Any]) -> int:
    """A training process without the seconds that a new interpreter takes."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            train(values)
            code = 0
        finally:
            os._exit(code)
    return child


@pytest.mark.parametrize("objective", [pytest.param("mae", marks=pytest.mark.slow), "ema_mae"])
def test_ten_kills_leave_no_trace(objective: str, images: Path, tmp_path: Path) -> None:
    """kill -9 at ten random moments, three of them while a checkpoint is being written; also with an EMA teacher."""
    evals = {"rank": {"every": "25 steps"}}
    values = tiny_recipe(images, tmp_path / "straight", evals=evals, optim__epochs="400 steps")
    values["objective"]["name"] = objective
    values["run"] |= {"save_every": "2 steps"}
    straight = train(values)
    broken = tmp_path / "broken"
    values["run"] |= {"dir": str(broken)}
    draw, found, in_save = random.Random(), [], 0
    for i in range(10):
        child = start_child(values)
        if i % 3 == 1:
            while not list((broken / "checkpoints").glob(".writing_*")) and os.waitpid(child, os.WNOHANG) == (0, 0):
                pass
            in_save += bool(list((broken / "checkpoints").glob(".writing_*")))
        else:
            time.sleep(draw.uniform(0.3, 0.9))
        os.kill(child, signal.SIGKILL)
        assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGKILL, "it ended before it was killed"
        found.append(max([0, *Checkpoints(broken / "checkpoints").steps()]))
    assert os.waitpid(start_child(values), 0)[1] == 0
    print(f"killed with checkpoints of steps {found}, {in_save} times while one was being written")
    assert found[-1] > 0
    assert losses(broken) == losses(straight), "each step once, bit for bit"
    final = [read_checkpoint(f / "checkpoints" / "step_00000400") for f in (straight, broken)]
    assert all(torch.equal(tensor, final[1].weights[name]) for name, tensor in final[0].weights.items())
    measured = [
        [v for v in read_metrics(f / "metrics.jsonl") if "rank/effective_rank" in v] for f in (straight, broken)
    ]
    assert [v["rank/effective_rank"] for v in measured[0]] == [v["rank/effective_rank"] for v in measured[1]]
    assert not list((broken / "checkpoints").glob(".writing_*"))


def damage(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


@pytest.mark.parametrize("name", ["objective.safetensors", "optimizer.pt", "state.json", "manifest.json"])
def test_a_damaged_checkpoint_falls_back(name: str, images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps")
    folder = train(values)
    before = losses(folder)
    (folder / "result.json").unlink()
    shutil.rmtree(folder / "checkpoints" / "step_00000012")
    train(values | {"optim": values["optim"]})  # writes 12 again from 8
    (folder / "result.json").unlink()
    damage(folder / "checkpoints" / "step_00000012" / name)
    train(values)
    log = (folder / "train.log").read_text()
    assert "resumed after step 8 of 12" in log
    assert losses(folder) == before
    assert (folder / "checkpoints" / "damaged_00000012").is_dir()
    assert read_checkpoint(folder / "checkpoints" / "step_00000012").step == 12


def test_a_named_checkpoint_that_is_damaged_is_refused(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="4 steps")
    checkpoint = train(values) / "checkpoints" / "step_00000004"
    damage(checkpoint / "objective.safetensors")
    values["run"] |= {"dir": str(tmp_path / "other")}
    with pytest.raises(InputError, match=r"objective\.safetensors: damaged"):
        train(values, resume=str(checkpoint))


Usage = namedtuple("Usage", "total used free")


def test_a_full_disk_costs_a_checkpoint_not_the_run(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Full before the save of step 4 and in the middle of that of step 8: what was there stays, the run goes on."""
    free, saves, save = [10**12, 1000, 10**12, 10**12], [], torch.save

    def failing(value: Any, path: Path) -> None:
        saves.append(path.parent.name)
        if saves[-1] == ".writing_00000008":
            raise OSError(errno.ENOSPC, "No space left on device")
        save(value, path)

    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, free.pop(0)))
    monkeypatch.setattr(torch, "save", failing)
    folder = train(tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps"))
    text = (folder / "train.log").read_text()
    assert re.search(r"step 4: not saved: .*a checkpoint needs 6\d MiB, 0 are free", text)
    assert "step 8: not saved: [Errno 28] No space left on device" in text
    assert Checkpoints(folder / "checkpoints").steps() == [0, 12]
    assert not list((folder / "checkpoints").glob(".writing_*"))
    assert len(losses(folder)) == 12


def test_a_last_checkpoint_that_cannot_be_written_is_an_error(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps")
    with monkeypatch.context() as patch:
        free = iter([10**12, 10**12, 10**12, 1000])
        patch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, next(free)))
        with pytest.raises(OSError, match="the checkpoint of the last step could not be written"):
            train(values)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 8]
    assert len(losses(train(values))) == 12, "with space again the same command finishes it"


def test_the_best_checkpoint_is_kept(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", evals={"rank": {"every": "1 steps"}}, optim__epochs="20 steps")
    values["run"] |= {"keep_best": "rank/effective_rank", "keep_last": 2}
    folder = train(values)
    measured = {v["step"]: v["rank/effective_rank"] for v in read_metrics(folder / "metrics.jsonl") if "loss" not in v}
    best = max(measured, key=lambda step: measured[step])
    state = read_checkpoint(folder / "checkpoints" / "step_00000020").state
    assert state["best"] == {"name": "rank/effective_rank", "value": measured[best], "step": best}
    assert best in Checkpoints(folder / "checkpoints").steps()
    values["run"] |= {"keep_best": "knn/top1", "dir": str(tmp_path / "other")}
    with pytest.raises(InputError, match=r"run\.keep_best='knn/top1': allowed: numbers of evals: rank"):
        train(values)


def test_a_folder_in_use_is_refused(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="4000 steps")
    process = start_process(values, tmp_path / "run")
    try:
        wait_for_step(tmp_path / "run", 2, process)
        second = start_process(values, tmp_path / "run")
        message = second.communicate(timeout=60)[1]
        assert second.returncode == 2
        assert f"a live process is working in it (process {process.pid} on" in message
        assert json.loads((tmp_path / "run" / "status.json").read_text())["state"] == "running"
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
    assert process.returncode == 75


def poison(monkeypatch: pytest.MonkeyPatch, bad: Any) -> None:
    """Losses for which ``bad(step)`` is true are NaN; steps are counted from 1."""
    loss, now = MAE.loss, {"step": 0}

    def before_step(self: MAE, progress: Any) -> None:
        now["step"] = progress.step + 1

    def poisoned(self: MAE, batch: dict[str, Any]) -> Any:
        value, metrics = loss(self, batch)
        return value * (float("nan") if bad(now["step"]) else 1.0), metrics

    monkeypatch.setattr(MAE, "before_step", before_step, raising=False)
    monkeypatch.setattr(MAE, "loss", poisoned)


def test_a_skipped_step_leaves_weights_and_optimizer(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It keeps its number, batch and lr; a resume behind it is exact."""
    poison(monkeypatch, lambda step: step in (3, 6))
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps")
    values["run"] |= {"save_every": "1 steps", "keep_last": 20, "log_samples": True}
    folder = train(values)
    before, after = (read_checkpoint(folder / "checkpoints" / f"step_{step:08d}") for step in (5, 6))
    assert all(torch.equal(tensor, after.weights[name]) for name, tensor in before.weights.items())
    assert all(
        torch.equal(value, after.optimizer[name][key])
        for name, values_of in before.optimizer.items()
        for key, value in values_of.items()
    )
    assert after.state["skipped"] == [3, 6]
    named = read_metrics(folder / "bad_batches.jsonl")
    assert [line["step"] for line in named] == [3, 6]
    trained = {line["step"]: line["samples"] for line in read_metrics(folder / "samples" / "rank_0.jsonl")}
    assert sorted(named[1]["samples"]) == sorted(trained[6])
    values["run"] |= {"dir": str(tmp_path / "again")}
    again = train(values, resume=str(folder / "checkpoints" / "step_00000007"))
    assert losses(again) == losses(folder)[7:]


def test_going_back_to_a_checkpoint_leaves_none_after_it(images: Path, tmp_path: Path) -> None:
    """Killed before its next checkpoint, the run that went back goes on from there, its metrics without a gap."""
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps")
    values["run"] |= {"save_every": "4 steps", "keep_last": 20}
    folder = train(values)
    before = losses(folder)
    (folder / "result.json").unlink()
    recipe = check_recipe(check(Recipe, values))
    data = read_checkpoint(folder / "checkpoints" / "step_00000004").state["data"]
    RunFolder(folder).restore(str(folder / "checkpoints" / "step_00000004"), build_objective(recipe), data)
    truncate_metrics(folder / "metrics.jsonl", 4)
    assert Checkpoints(folder / "checkpoints").steps() == [0, 4]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000004"
    assert losses(train(values)) == before


def test_too_many_skips_go_back_once(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three in a row: back to the checkpoint of step 4, steps 6 to 8 make no update, no step is logged twice."""
    attempts: list[int] = []

    def bad(step: int) -> bool:
        attempts.append(step)
        return step in (6, 7, 8) and attempts.count(step) == 1

    poison(monkeypatch, bad)
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="12 steps", optim__max_skips=3)
    values["run"] |= {"save_every": "4 steps", "keep_last": 20}
    folder = train(values)
    assert "going back to step_00000004" in (folder / "train.log").read_text()
    assert [step for step, _ in losses(folder)] == list(range(1, 13))
    named = [(line["step"], line["barred"]) for line in read_metrics(folder / "bad_batches.jsonl")]
    assert named == [(6, False), (7, False), (8, False), (6, True), (7, True), (8, True)]
    state = read_checkpoint(folder / "checkpoints" / "step_00000012").state
    assert state["skipped"] == [6, 7, 8] == state["barred"]


def test_a_run_that_stays_broken_stops_with_a_cure(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    poison(monkeypatch, lambda step: step >= 6)
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="20 steps", optim__max_skips=3)
    with pytest.raises(FloatingPointError, match=r"steps 9 to 11.*also after going back.*lower optim\.base_lr"):
        train(values)
    folder = RunFolder(tmp_path / "run")
    steps = Checkpoints(folder.checkpoints).steps()
    assert steps
    for step in steps:
        saved = read_checkpoint(folder.checkpoints / f"step_{step:08d}")
        assert all(tensor.isfinite().all() for tensor in saved.weights.values())


def test_rows_are_counted_without_gaps(tmp_path: Path) -> None:
    skips = Skips(tmp_path / "bad_batches.jsonl", 3, samples=lambda step: [])
    for step in (1, 2, 4, 5, 7):
        skips.note(step)
    skips.note(8)
    with pytest.raises(Diverged, match="steps 7 to 9"):
        skips.note(9)


def test_a_preempted_evaluation_is_made_up_for(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signal during the evaluation of step 6: saved at once, and step 6 is measured first after the restart."""
    from ssl_vit.evaluation.rank import Rank
    from ssl_vit.training.signals import Preempted

    measure = Rank.__call__

    def interrupted(self: Rank, subject: Any) -> dict[str, float]:
        if subject.step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return measure(self, subject)

    values = tiny_recipe(images, tmp_path / "straight", evals={"rank": {"every": "3 steps"}}, optim__epochs="12 steps")
    values["run"] |= {"save_every": "100 steps"}
    straight = train(values)
    values["run"] |= {"dir": str(tmp_path / "run")}
    with monkeypatch.context() as patch:
        patch.setattr(Rank, "__call__", interrupted)
        with pytest.raises(Preempted, match="SIGTERM: saved after step 6"):
            train(values)
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == 6
    folder = train(values)
    numbers = [
        [(v["step"], v["rank/effective_rank"]) for v in read_metrics(f / "metrics.jsonl") if "loss" not in v]
        for f in (straight, folder)
    ]
    assert numbers[0] == numbers[1]
    assert losses(folder) == losses(straight)


@pytest.mark.parametrize("objective", [pytest.param("mae", marks=pytest.mark.slow), "ema_mae"])
def test_two_processes_go_on_bit_for_bit(objective: str, images: Path, tmp_path: Path) -> None:
    """Both killed with -9, twice, at random moments, and started again: the losses of a straight run of two."""
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(values: dict[str, Any]) -> subprocess.Popen[str]:
        (tmp_path / "recipe.yaml").write_text(to_yaml(values))
        (tmp_path / "jobs.json").write_text(json.dumps([{"recipe": str(tmp_path / "recipe.yaml")}]))
        command = [*launch, str(Path(__file__).parent / "group.py"), str(tmp_path / "jobs.json")]
        return subprocess.Popen(command, env=environment, start_new_session=True, stderr=subprocess.PIPE, text=True)

    found, draw = [], random.Random()
    for name, kills in (("straight", 0), ("broken", 2)):
        values = tiny_recipe(images, tmp_path / name, optim__epochs="150 steps")
        values["objective"]["name"] = objective
        values["run"] |= {"save_every": "5 steps"}
        for kill in range(kills):
            process = start(values)
            wait_for_step(tmp_path / name, 20 + 50 * kill, process)
            time.sleep(draw.uniform(0, 0.3))
            os.killpg(process.pid, signal.SIGKILL)
            process.communicate()
        process = start(values)
        message = process.communicate(timeout=120)[1]
        assert process.returncode == 0, message[-3000:]
        assert ("resumed after step" in (tmp_path / name / "train.log").read_text()) is (kills > 0)
        found.append(losses(tmp_path / name))
    assert found[0] == found[1]
    hashes = [(tmp_path / name / "weights_0.txt").read_text() for name in ("straight", "broken")]
    assert hashes[0] == hashes[1]
