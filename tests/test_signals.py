"""A run that is asked to stop saves, says so and goes on later, whoever got the signal."""

from __future__ import annotations

import contextlib
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
import torch
from conftest import ROOT, tiny_recipe, write_images
from test_trainer import losses, train, wait_for_step

from ssl_vit.config import to_yaml
from ssl_vit.training.checkpoint import Checkpoints, read_checkpoint
from ssl_vit.training.signals import ONE_REQUEST, Preempted, StopRequest

pytestmark = pytest.mark.processes

LAUNCH = ["-m", "accelerate.commands.launch"]
TWO = [*LAUNCH, "--config_file", str(ROOT / "configs" / "accelerate" / "cpu_2.yaml")]


def start(values: dict[str, Any], folder: Path, launcher: list[str]) -> subprocess.Popen[str]:
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(values))
    command = [sys.executable, *launcher, str(ROOT / "pipelines" / "pretrain_mae.py"), "--config", str(file)]
    return subprocess.Popen(
        command, env={**os.environ, "OMP_NUM_THREADS": "1"}, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


def wait_until_stopped(folder: Path) -> dict[str, Any]:
    for _ in range(1200):
        if status(folder)["state"] != "running":
            return status(folder)
        time.sleep(0.05)
    raise AssertionError(f"still {status(folder)}")


def wait_for(path: Path, pattern: str, process: subprocess.Popen[str]) -> None:
    for _ in range(6000):
        if path.is_dir() and list(path.glob(pattern)):
            return
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)
    raise AssertionError(f"no {pattern} in {path}")


@pytest.mark.parametrize(
    ("launcher", "target", "number"),
    [
        ([], "process", signal.SIGTERM),
        ([], "process", signal.SIGUSR1),
        ([], "group", signal.SIGINT),
        (LAUNCH, "process", signal.SIGKILL),
        (LAUNCH, "process", signal.SIGTERM),
        pytest.param(LAUNCH, "group", signal.SIGTERM, marks=pytest.mark.slow),
        (TWO, "one rank", signal.SIGTERM),
        (TWO, "group", signal.SIGTERM),
        pytest.param(TWO, "process", signal.SIGUSR1, marks=pytest.mark.slow),
    ],
    ids=[
        "trainer-TERM", "trainer-USR1", "group-INT", "launcher-KILL", "launcher-TERM", "launched-group-TERM",
        "one-of-two-ranks-TERM", "group-of-two-TERM", "launcher-of-two-USR1",
    ],
)  # fmt: skip
def test_a_signal_saves_and_the_run_goes_on(
    images: Path, tmp_path: Path, launcher: list[str], target: str, number: int
) -> None:
    """B59: in the trainer, only in the launcher, in the whole group with its loader workers."""
    folder = tmp_path / "run"
    values = tiny_recipe(images, folder, optim__epochs="9000 steps")
    values["run"] |= {"save_every": "100000 steps", "workers": 2}
    process = start(values, folder, launcher)
    wait_for_step(folder, 3, process)
    if target == "group":
        os.killpg(process.pid, number)
    elif target == "one rank":
        ranks = [p for p in psutil.Process(process.pid).children() if "pretrain_mae.py" in " ".join(p.cmdline())]
        ranks[1].send_signal(number)
    else:
        process.send_signal(number)
    left = wait_until_stopped(folder)
    process.communicate(timeout=60)
    assert (left["state"], left["exit_code"]) == ("preempted", 75), left
    if not launcher:
        assert process.returncode == 75
    assert Checkpoints(folder / "checkpoints").steps()[-1] == left["step"] >= 3
    assert losses(folder)[-1][0] == left["step"]


def test_a_signal_during_an_evaluation_is_answered_at_once(images: Path, tmp_path: Path) -> None:
    """kNN on images one by one, on two processes: a checkpoint of the step that is being judged."""
    folder = tmp_path / "run"
    values = tiny_recipe(images, folder, evals={"knn": {"k": [5], "every": "4 steps"}}, optim__epochs="9000 steps")
    values["run"] |= {"save_every": "100000 steps", "eval_batch_size": 1, "workers": 2}
    process = start(values, folder, TWO)
    wait_for_step(folder, 4, process)
    os.killpg(process.pid, signal.SIGTERM)
    left = wait_until_stopped(folder)
    process.communicate(timeout=60)
    assert (left["state"], left["exit_code"]) == ("preempted", 75), left
    assert Checkpoints(folder / "checkpoints").steps()[-1] == left["step"]


def test_a_signal_during_a_save_waits_for_it(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save = torch.save

    def interrupted(value: Any, path: Path) -> None:
        if path.parent.name == ".writing_00000004":
            os.kill(os.getpid(), signal.SIGTERM)
        save(value, path)

    monkeypatch.setattr(torch, "save", interrupted)
    with pytest.raises(Preempted, match="SIGTERM: saved after step 5"):
        train(tiny_recipe(images, tmp_path / "run"))
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps() == [4, 5]
    for step in (4, 5):
        assert read_checkpoint(tmp_path / "run" / "checkpoints" / f"step_{step:08d}").step == step


def test_a_signal_while_packing_keeps_what_is_packed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    images = write_images(tmp_path / "many", classes=2, per_class=1500, size=64)
    folder = tmp_path / "run"
    process = start(tiny_recipe(images, folder), folder, [])
    wait_for(tmp_path / "cache", ".*.packing", process)
    process.send_signal(signal.SIGTERM)
    message = process.communicate(timeout=60)[1]
    assert process.returncode == 75, message
    assert message.startswith("SIGTERM: stopped before the first checkpoint; start the same command again")
    assert status(folder)["state"] == "preempted"
    left = [f.name for f in (tmp_path / "cache").iterdir() if not f.name.endswith(".lock")]
    assert left
    assert all(name.startswith(".") for name in left), "nothing that looks whole"
    again = start(tiny_recipe(images, folder), folder, [])
    assert again.wait(timeout=120) == 0


def test_no_library_swallows_a_signal() -> None:
    """Many go on after any Exception, e.g. progress bars and decoders."""
    with StopRequest(), pytest.raises(Preempted, match="SIGTERM"), contextlib.suppress(Exception):
        signal.raise_signal(signal.SIGTERM)


def test_a_second_signal_ends_a_process_at_once() -> None:
    """Two within a moment are one request (a launcher hands on what its group got); a later one is meant."""
    code = (
        "import time, torch; from ssl_vit.training.signals import StopRequest\n"
        "with StopRequest() as stop:\n    stop.waits = True; print('ready', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    process.send_signal(signal.SIGTERM)
    time.sleep(ONE_REQUEST)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    assert process.wait(timeout=10) == 128 + signal.SIGTERM
    process.stdout.close()


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
