"""The loop: resume is exact, micro-batches do not matter, the schedule and the saved state are what they should be."""

from __future__ import annotations

import io
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, tiny_recipe
from safetensors.torch import load_file

from ssl_vit.config import Duration, InputError, check, to_yaml
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.checkpoint import Checkpoints, read_checkpoint
from ssl_vit.training.metrics import MetricsLog, read_metrics, truncate_metrics
from ssl_vit.training.optim import OptimSection, absolute_lr, build_optimizer, parameter_groups
from ssl_vit.training.schedules import warmup_cosine
from ssl_vit.training.trainer import Plan


def train(values: dict[str, Any], resume: str = "auto") -> Path:
    recipe = check_recipe(check(Recipe, values))
    run(recipe, resume)
    return Path(recipe.run.dir)


def losses(folder: Path) -> list[tuple[int, float]]:
    return [(line["step"], line["loss"]) for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


def newest(folder: Path) -> Path:
    found = Checkpoints(folder / "checkpoints").newest_whole(set_aside=False)
    assert found is not None
    return found[0]


def start_process(values: dict[str, Any], folder: Path, *words: str) -> subprocess.Popen[str]:
    """The recipe through its pipeline in a process of its own."""
    file = folder.with_suffix(".yaml")
    file.write_text(to_yaml(values))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "pipelines" / "pretrain_mae.py"), "--config", str(file), *words]
    return subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True)


def wait_for_step(folder: Path, step: int, process: subprocess.Popen[str]) -> None:
    for _ in range(1200):
        if process.poll() is not None:
            raise AssertionError(f"ended before step {step}: {process.stderr.read() if process.stderr else ''}")
        file = folder / "metrics.jsonl"
        if file.exists() and any(s >= step for s, _ in losses_so_far(file)):
            return
        time.sleep(0.05)
    raise AssertionError(f"step {step} not reached")


def losses_so_far(file: Path) -> list[tuple[int, float]]:
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return [(v["step"], v["loss"]) for v in map(json.loads, lines) if "loss" in v]


def test_a_killed_run_goes_on_bit_for_bit(images: Path, tmp_path: Path) -> None:
    """kill -9 in mid-epoch, resume in new processes with 2, then 3 workers, across epochs' ends (4.5 steps each)."""
    values = tiny_recipe(images, tmp_path / "straight", evals={"rank": {"every": "5 steps"}}, optim__epochs="40 steps")
    values["run"] |= {"save_every": "3 steps"}
    straight = train(values)
    broken = tmp_path / "broken"
    values["run"] |= {"dir": str(broken), "workers": 2}
    process = start_process(values, broken)
    wait_for_step(broken, 7, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert 0 < Checkpoints(broken / "checkpoints").steps()[-1] < 40
    values["run"] |= {"workers": 3}
    process = start_process(values, broken)
    message = process.communicate(timeout=120)[1]
    assert process.returncode == 0, message
    assert "resumed after step" in message
    assert losses(broken) == losses(straight)
    assert [s for s, _ in losses(broken)] == list(range(1, 41)), "each step once"
    final = [read_checkpoint(f / "checkpoints" / "step_00000040").weights for f in (straight, broken)]
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    ranks = [[v for v in read_metrics(f / "metrics.jsonl") if "rank/effective_rank" in v] for f in (straight, broken)]
    assert [v["step"] for v in ranks[1]] == [0, 5, 10, 15, 20, 25, 30, 35, 40]
    assert [v["rank/effective_rank"] for v in ranks[0]] == [v["rank/effective_rank"] for v in ranks[1]]


@pytest.mark.parametrize("step", [4, 9, 8])
def test_resume_at_any_step(images: Path, tmp_path: Path, step: int) -> None:
    """At 9 = 2 x 4.5 a checkpoint falls exactly on an epoch's end (B55), at 4 and 8 in mid-epoch (B53)."""
    values = tiny_recipe(images, tmp_path / "straight", run={"dir": str(tmp_path / "straight"), "workers": 0,
        "log_every": 1, "save_every": "1 steps", "keep_last": 20, "tensorboard": False})  # fmt: skip
    straight = train(values)
    values["run"] |= {"dir": str(tmp_path / "again")}
    again = train(values, resume=str(straight / "checkpoints" / f"step_{step:08d}"))
    assert losses(again) == losses(straight)[step:]
    assert losses(again)[-1][0] == 12, "all steps of the plan are done"


def test_a_finished_run_does_nothing(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="4 steps")
    folder = train(values)
    before = {f: f.stat().st_mtime_ns for f in folder.rglob("*")}
    train(values)
    assert {f: f.stat().st_mtime_ns for f in folder.rglob("*")} == before
    assert json.loads((folder / "status.json").read_text())["state"] == "finished"


def test_another_recipe_is_refused_with_its_keys(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="4 steps")
    train(values)
    values["optim"] |= {"base_lr": 2e-3}
    values["run"] |= {"log_every": 2}
    with pytest.raises(InputError, match=r"different: optim\.base_lr \(there 0\.001, now 0\.002\);"):
        train(values)
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("mine")
    values["run"] |= {"dir": str(tmp_path / "other")}
    with pytest.raises(InputError, match="holds no run"):
        train(values)
    with pytest.raises(InputError, match="not empty and --resume is never"):
        train(values, resume="never")


def test_changed_data_is_refused(images: Path, tmp_path: Path) -> None:
    from conftest import write_images

    own = write_images(tmp_path / "own", classes=2, per_class=20)
    values = tiny_recipe(own, tmp_path / "run")
    values["optim"] |= {"epochs": "6 steps"}
    folder = train(values)
    (folder / "result.json").unlink()
    write_images(own, classes=2, per_class=21)
    with pytest.raises(InputError, match=r"data\.train has changed"):
        train(values)


def test_a_damaged_checkpoint_is_named(images: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(images, tmp_path / "run", optim__epochs="4 steps"))
    checkpoint = folder / "checkpoints" / "step_00000004"
    data = bytearray((checkpoint / "objective.safetensors").read_bytes())
    data[-1] ^= 1
    (checkpoint / "objective.safetensors").write_bytes(bytes(data))
    with pytest.raises(InputError, match=r"objective\.safetensors: damaged"):
        read_checkpoint(checkpoint)


def test_retention_goes_by_step_also_after_a_resume(images: Path, tmp_path: Path) -> None:
    """B56: the newest is never deleted and the next resume starts from it."""
    values = tiny_recipe(images, tmp_path / "run")
    values["run"] |= {"save_every": "1 steps", "keep_last": 2, "keep_every": "5 steps"}
    folder = train(values)
    assert Checkpoints(folder / "checkpoints").steps() == [5, 10, 11, 12]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000012"
    assert newest(folder) == folder / "checkpoints" / "step_00000012"
    for step in (11, 12):  # as if it had been killed after step 10
        shutil.rmtree(folder / "checkpoints" / f"step_{step:08d}")
    (folder / "result.json").unlink()
    train(values)
    assert "resumed after step 10 of 12" in (folder / "train.log").read_text()
    assert Checkpoints(folder / "checkpoints").steps() == [5, 10, 11, 12]
    assert (folder / "checkpoints" / "latest").read_text().strip() == "step_00000012"


def test_a_run_that_died_before_its_first_step_has_one_start(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", evals={"rank": {}}, optim__epochs="4 steps")
    folder = train(values)
    shutil.rmtree(folder / "checkpoints" / "step_00000004")
    (folder / "result.json").unlink()
    before = losses(folder)
    train(values)
    assert losses(folder) == before
    assert [v["step"] for v in read_metrics(folder / "metrics.jsonl") if "rank/effective_rank" in v] == [0, 4]


def test_mfu_is_logged_where_the_peak_is_known(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert all("mfu" not in line for line in read_metrics(train(tiny_recipe(images, tmp_path / "a")) / "metrics.jsonl"))
    monkeypatch.setattr("ssl_vit.run.peak_rate", lambda recipe, device: 1000.0)
    lines = [v for v in read_metrics(train(tiny_recipe(images, tmp_path / "b")) / "metrics.jsonl") if "loss" in v]
    assert lines
    assert all(line["mfu"] == pytest.approx(line["images_per_second"] / 1000) for line in lines)


def test_a_half_checkpoint_is_not_one(images: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(images, tmp_path / "run", optim__epochs="8 steps"))
    (folder / "checkpoints" / "step_00000008" / "manifest.json").unlink()
    (folder / "checkpoints" / ".writing_00000099").mkdir()
    assert newest(folder) == folder / "checkpoints" / "step_00000004"


def test_weights_that_are_no_numbers_are_never_saved(tmp_path: Path) -> None:
    """NaN, and the empty placeholders of sharded weights (B62)."""
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, {"weight": torch.ones(2, 2)}, {}, {})
    with pytest.raises(FloatingPointError, match="weight"):
        checkpoints.save(2, {"weight": torch.tensor([1.0, float("nan")])}, {}, {})
    with pytest.raises(ValueError, match="empty tensors: weight"):
        checkpoints.save(3, {"weight": torch.ones(0)}, {}, {})
    assert checkpoints.steps() == [1]
    assert [f.name for f in tmp_path.iterdir() if f.name.startswith(".")] == []


@pytest.mark.parametrize("clip", [None, 0.5])
def test_micro_batches_do_not_matter(images: Path, tmp_path: Path, clip: float | None) -> None:
    """Level (b): the same global batch as 16, 8 + 8 and 4 x 4."""
    found = []
    for micro in (16, 8, 4):
        values = tiny_recipe(images, tmp_path / str(micro), optim__clip_grad=clip)
        values["run"] |= {"micro_batch_size": micro}
        found.append([loss for _, loss in losses(train(values))])
    for other in found[1:]:
        assert other == pytest.approx(found[0], rel=1e-5)


def test_bf16_trains_in_full_precision_weights(images: Path, tmp_path: Path) -> None:
    """Autocast only: weights and optimizer stay float32, losses are near those of float32, a resume is exact."""
    found = {}
    for precision in ("no", "bf16"):  # in processes of their own: accelerate keeps one precision a process
        values = tiny_recipe(images, tmp_path / precision, mixed_precision=precision)
        process = start_process(values, tmp_path / precision)
        assert process.wait(timeout=120) == 0
        found[precision] = losses(tmp_path / precision)
    whole, half = ([loss for _, loss in found[precision]] for precision in ("no", "bf16"))
    assert half == pytest.approx(whole, rel=0.02)
    assert half != whole
    saved = read_checkpoint(tmp_path / "bf16" / "checkpoints" / "step_00000008")
    assert {t.dtype for t in saved.weights.values()} == {torch.float32}
    assert {state["exp_avg"].dtype for state in saved.optimizer.values()} == {torch.float32}
    values["run"] |= {"dir": str(tmp_path / "again")}
    process = start_process(
        values, tmp_path / "again", "--resume", str(tmp_path / "bf16" / "checkpoints" / "step_00000008")
    )
    assert process.wait(timeout=120) == 0
    assert losses(tmp_path / "again") == found["bf16"][8:]


def test_auto_precision_is_saved_as_resolved(images: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(images, tmp_path / "run", mixed_precision="auto", optim__epochs="3 steps"))
    expected = "bf16" if torch.cuda.is_available() and torch.cuda.is_bf16_supported() else "no"
    assert f"mixed_precision: '{expected}'" in (folder / "recipe.yaml").read_text().replace('"', "'")
    assert f"precision {expected}" in (folder / "train.log").read_text()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_a_terminal_gets_a_progress_bar(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    folder = train(tiny_recipe(images, tmp_path / "run", optim__epochs="5 steps"))
    assert "5/5" in terminal.getvalue()
    assert re.search(r"loss \d\.\d+ .*lr .*images/s .*data_wait", terminal.getvalue())
    assert "step 3/5" not in (folder / "train.log").read_text(), "no plain lines beside the bar"


def test_the_loss_falls(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="60 steps")
    found = [loss for _, loss in losses(train(values))]
    assert sum(found[-5:]) < 0.9 * sum(found[:5])


def test_learning_rate_of_the_published_recipe() -> None:
    """MAE: 1.5e-4 x 4096 / 256, 40 epochs up from 0, half a cosine to 0 by step; the same for any layout (B43, B81)."""
    optim = OptimSection()
    assert absolute_lr(optim) == pytest.approx(2.4e-3)
    plans = [Plan(optim, 1_281_152, micro, ranks) for micro, ranks in ((4096, 1), (64, 64), (32, 8))]
    total = plans[0].total_steps
    assert total == math.ceil(800 * 1_281_152 / 4096)
    for step in (0, 1, 5000, 12511, 12512, 100_000, total - 1):
        epoch = step * 4096 / 1_281_152
        expected = 2.4e-3 * epoch / 40 if epoch < 40 else 2.4e-3 * 0.5 * (1 + math.cos(math.pi * (epoch - 40) / 760))
        for plan in plans:
            assert plan.learning_rate(step) == pytest.approx(expected, rel=1e-4, abs=1e-12)
    assert warmup_cosine(total, total, 10, 1.0, 0.1) == pytest.approx(0.1)


@pytest.mark.parametrize(("micro", "ranks"), [(64, 1), (32, 2), (16, 2), (16, 1)])
def test_accumulation_is_derived(micro: int, ranks: int) -> None:
    """B81."""
    plan = Plan(OptimSection(batch_size=64, epochs=Duration(1, "epochs")), 640, micro, ranks)
    assert plan.accumulation * micro * ranks == 64
    assert plan.total_steps == 10
    assert plan.learning_rate(3) == Plan(plan.optim, 640, 64, 1).learning_rate(3)


def test_parameter_groups_of_mae(images: Path, tmp_path: Path) -> None:
    """RECIPES 2.5.7: class and mask tokens are decayed; biases, norms and fixed tables are not."""
    from ssl_vit.build import build_objective

    objective = build_objective(check_recipe(check(Recipe, tiny_recipe(images, tmp_path))))
    decayed, spared = parameter_groups(objective, 0.05)
    assert (decayed["weight_decay"], spared["weight_decay"]) == (0.05, 0.0)
    assert {"encoder.model.cls_token", "mask_token"} <= set(decayed["names"])
    assert all(name.endswith((".weight", "_token")) for name in decayed["names"])
    assert all(name.endswith(".bias") or "norm" in name for name in spared["names"])
    together = {*decayed["names"], *spared["names"]}
    assert together == {name for name, p in objective.named_parameters() if p.requires_grad}
    assert not {name for name in together if "pos_embed" in name}
    assert build_optimizer(objective, OptimSection()).param_groups[0]["lr"] == pytest.approx(2.4e-3)


def test_metrics_survive_a_cut_line(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 1, "loss": 1.0}\n{"step": 2, "loss": 0.5}\n{"step": 3, "lo')
    truncate_metrics(file, 1)
    assert read_metrics(file) == [{"step": 1, "loss": 1.0}]


def test_tensorboard_has_each_step_once_after_a_resume(tmp_path: Path) -> None:
    """B99: to step 100, on from the checkpoint of step 60 to 120; other processes write nothing."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def line(step: int) -> dict[str, Any]:
        return {"step": step, "epoch": 0.1, "loss": 1.0 / step, "lr": 0.1, "images_per_second": 1.0, "data_wait": 0.0,
                "samples_seen": step}  # fmt: skip

    for start, stop in ((0, 100), (60, 120)):
        for folder, main in ((tmp_path, True), (tmp_path / "other", False)):
            log = MetricsLog(folder, start, 120, tensorboard=True, active=main)
            for step in range(start + 1, stop + 1):
                log.train(line(step))
            log.close()
        time.sleep(1.1)
    assert not (tmp_path / "other").exists()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Scalars("train/loss")
    assert [event.step for event in events] == list(range(1, 121))
    assert [v["step"] for v in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, 121))


def test_a_broken_tracker_does_not_stop_a_run(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch.utils.tensorboard as tensorboard

    def broken(*args: object, **kwargs: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(tensorboard.SummaryWriter, "add_scalar", broken)
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="3 steps")
    values["run"] |= {"tensorboard": True}
    assert len(losses(train(values))) == 3


def test_numbers_of_a_training_line(images: Path, tmp_path: Path) -> None:
    folder = train(tiny_recipe(images, tmp_path / "run", optim__epochs="5 steps"))
    first = read_metrics(folder / "metrics.jsonl")[0]
    assert set(first) >= {"step", "epoch", "loss", "lr", "images_per_second", "data_wait", "samples_seen"}
    assert (first["step"], first["samples_seen"], first["lr"]) == (1, 16, 0.0)
    assert first["epoch"] == pytest.approx(16 / 72)
    for name in ("recipe.yaml", "environment.json", "train.log", "status.json", "result.json", "README.md", "encoder"):
        assert (folder / name).exists(), name


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mae", "classification"])
def test_compiled_blocks_train_the_same(name: str, images: Path, tmp_path: Path) -> None:
    """The losses of an uncompiled run to 1e-5, the same names in its checkpoints, and each resumes the other."""
    runs = {}
    for compiled in (False, True):
        values = tiny_recipe(images, tmp_path / str(compiled), evals={"knn": {}})
        values["objective"] = {"name": name, **({} if name == "classification" else values["objective"])}
        values["run"]["compile"] = compiled
        runs[compiled] = train(values)
    plain, fast = (losses(runs[compiled]) for compiled in (False, True))
    for (step, expected), (again, found) in zip(plain, fast, strict=True):
        assert step == again
        assert found == pytest.approx(expected, rel=1e-5)
    names = [
        load_file(sorted((run / "checkpoints").glob("step_*"))[-1] / "objective.safetensors").keys()
        for run in runs.values()
    ]
    assert names[0] == names[1]
