"""A run that is asked to stop saves, says so and goes on later, whoever got the signal."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import ROOT, tiny_recipe
from test_trainer import losses, train, wait_for_step

from ssl_vit.config import to_yaml
from ssl_vit.training.checkpoint import Checkpoints

LAUNCH = ["-m", "accelerate.commands.launch"]
TORCHRUN = ["-m", "torch.distributed.run", "--nproc_per_node", "2"]


def start(values: dict[str, Any], folder: Path, launcher: list[str]) -> subprocess.Popen[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"} | (
        {"ACCELERATE_USE_CPU": "true"} if launcher == TORCHRUN else {}
    )
    command = [sys.executable, *launcher, str(ROOT / "pipelines" / "pretrain_mae.py"), "--config", str(file)]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True)


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def wait_until_stopped(folder: Path) -> dict[str, Any]:
    for _ in range(400):
        if status(folder)["state"] != "running":
            return status(folder)
        time.sleep(0.05)
    raise AssertionError(f"still {status(folder)}")


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        ([], "process", signal.SIGTERM),
        ([], "process", signal.SIGUSR1),
        ([], "group", signal.SIGINT),
        (LAUNCH, "launcher", signal.SIGKILL),
        (TORCHRUN, "one rank", signal.SIGTERM),
    ],
    ids=["trainer-TERM", "trainer-USR1", "group-INT", "launcher-KILL", "one-of-two-ranks-TERM"],
)
def test_a_signal_saves_and_the_run_goes_on(
    images: Path, tmp_path: Path, launcher: list[str], target: str, number: int
) -> None:
    folder = tmp_path / "run"
    values = tiny_recipe(images, folder, optim__epochs="4000 steps")
    values["run"] |= {"save_every": "100000 steps", "workers": 1}
    process = start(values, folder, launcher)
    wait_for_step(folder, 3, process)
    if target == "group":
        os.killpg(process.pid, number)
    elif target == "one rank":
        psutil.Process(process.pid).children()[1].send_signal(number)
    else:
        process.send_signal(number)
    left = wait_until_stopped(folder)
    process.communicate(timeout=60)
    assert (left["state"], left["exit_code"]) == ("preempted", 75), left
    if not launcher:
        assert process.returncode == 75
    assert Checkpoints(folder / "checkpoints").steps()[-1] == left["step"] >= 3
    assert losses(folder)[-1][0] == left["step"]


def test_a_stopped_run_ends_like_a_straight_one(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "straight", optim__epochs="60 steps")
    values["run"] |= {"save_every": "100000 steps"}
    straight = train(values)
    values["run"] |= {"dir": str(tmp_path / "stopped")}
    process = start(values, tmp_path / "stopped", [])
    wait_for_step(tmp_path / "stopped", 2, process)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    if process.returncode == 75:  # else it was done before the signal came
        process = start(values, tmp_path / "stopped", [])
        process.communicate(timeout=60)
    assert process.returncode == 0
    assert losses(tmp_path / "stopped") == losses(straight)
