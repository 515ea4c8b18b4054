"""The plan: FLOPs by the published formula, activations as a real step keeps them, memory, clear refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python, tiny_recipe
from torch.profiler import ProfilerActivity, profile

from ssl_vit.config import check, load
from ssl_vit.cost import Cost, count, peak_rate, step_counter
from ssl_vit.preflight.memory import memory
from ssl_vit.preflight.table import PlanSection, make_plan
from ssl_vit.recipe import Recipe, check_recipe


def published(name: str) -> Recipe:
    values = load([ROOT / "configs" / "pretrain" / f"{name}.yaml"], ["data.train=unset", "mixed_precision=bf16"])
    return check_recipe(check(Recipe, values))


def block(n: int, d: int) -> float:
    return 24 * n * d**2 + 4 * n**2 * d


@pytest.mark.parametrize(
    ("name", "width", "depth", "side", "patch", "parameters", "published_gflops"),
    [
        ("mae_vit_base_patch16_in1k", 768, 12, 14, 16, 85.8e6, 58.7),
        pytest.param("mae_vit_large_patch16_in1k", 1024, 24, 14, 16, 303.3e6, 124.5, marks=pytest.mark.slow),
        pytest.param("mae_vit_huge_patch14_in1k", 1280, 32, 16, 14, 630.8e6, 291.4, marks=pytest.mark.slow),
    ],
)
def test_flops_of_mae(
    name: str, width: int, depth: int, side: int, patch: int, parameters: float, published_gflops: float
) -> None:
    """Training = 3 x forward: encoder on a quarter, decoder on all, head on the masked patches only."""
    cost = count(published(name))
    num, keep, decoder, pixels = side**2, side**2 // 4, 512, 3 * patch**2
    forward = depth * block(keep + 1, width) + 8 * block(num + 1, decoder)
    forward += 2 * keep * pixels * width + 2 * (keep + 1) * width * decoder + 2 * (num - keep) * decoder * pixels
    unused = 2 * keep * pixels * width  # no gradient of the image
    assert cost.flops == pytest.approx(3 * forward - unused, rel=1e-3)
    everywhere = depth * block(keep + 1, width) + 8 * block(num + 1, decoder) + 2 * num * pixels * width
    everywhere += 2 * (keep + 1) * width * decoder + 2 * (num + 1) * decoder * pixels
    assert 3 * everywhere / 1e9 == pytest.approx(published_gflops, rel=2e-3), (
        "there all patches are projected and predicted"
    )
    assert cost.encoder == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_activations_are_those_of_a_real_step(
    images: Path, tmp_path: Path, precision: str, checkpointing: bool
) -> None:
    """Within 5 % of what torch's profiler sees allocated when the forward pass of a real step has ended."""
    values = tiny_recipe(images, tmp_path, mixed_precision=precision, encoder__depth=6, encoder__embed_dim=192)
    values["encoder"] |= {"img_size": 64, "grad_checkpointing": checkpointing}
    values["objective"] |= {"decoder_embed_dim": 128, "decoder_depth": 2}
    recipe = check_recipe(check(Recipe, values))
    cost = count(recipe)
    fixed, per_image = cost.checkpointed if checkpointing and cost.checkpointed else cost.activations
    objective, _ = step_counter(recipe)
    view = objective.views(objective.encoder.img_size)
    blank = torch.zeros(3, 64, 64, dtype=torch.uint8)
    views = [view({"image": blank, "label": 0}) for _ in range(32)]
    batch = {key: torch.stack([v[key] for v in views]) for key in views[0]}
    batch["image"] = batch["image"].float()

    def forward() -> torch.Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            return objective(batch, call="loss")[0]

    forward().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        loss = forward()
    real = sum(event.self_cpu_memory_usage for event in seen.key_averages())
    assert loss.isfinite()
    assert fixed + 32 * per_image == pytest.approx(real, rel=0.05)


def test_fake_and_real_counts_agree(images: Path, tmp_path: Path) -> None:
    recipe = check_recipe(check(Recipe, tiny_recipe(images, tmp_path)))
    cost = count(recipe)
    _, run = step_counter(recipe)
    for batch_size in (2, 6):
        flops, kept = run(batch_size)
        assert flops == batch_size * cost.flops
        assert kept == pytest.approx(cost.activations[0] + batch_size * cost.activations[1], rel=1e-6)


def test_memory_of_the_strategies() -> None:
    cost = Cost(80, 100, 90, (10, 5), 1.0, (0.0, 1.0), None)
    found = memory(cost, gpus=4, moments=2)
    bucket = 2 * 4 * 50e6
    assert (found["DDP"].weights, found["DDP"].gradients, found["DDP"].optimizer) == (400, 720, 720)
    assert found["ZeRO-1"].optimizer == (720 + 360) / 4
    assert found["ZeRO-2"].gradients == 90 + bucket
    assert found["FSDP2"].weights == 100 + 4 * 20
    assert found["ZeRO-3"].fixed - bucket == 100 + 80 + 90 + 180
    assert memory(cost, gpus=1, moments=1).keys() == {"one GPU"}
    assert memory(cost, gpus=1, moments=1)["one GPU"].fixed == 400 + 360 + 360


def test_the_largest_micro_batch_fits_and_the_next_does_not() -> None:
    recipe = published("mae_vit_huge_patch14_in1k")
    report = make_plan(recipe, PlanSection(gpus=8, gpu_memory=80), "huge")
    assert report.steps == 250_228
    assert {row["checkpointing"] for row in report.rows} == {False, True}
    for row in report.rows:
        line = report.cost.checkpointed if row["checkpointing"] else report.cost.activations
        assert line is not None
        fixed, most = row["weights"] + row["gradients"] + row["optimizer"] + line[0], row["largest_micro_batch"]
        assert 512 % most == 0
        assert fixed + line[1] * most <= 72e9
        assert most == 512 or fixed + line[1] * 2 * most > 72e9
        assert row["fits"] == (row["total"] <= 72e9)


def plan(*words: str) -> Any:
    return run_python("pipelines/plan.py", *words)


def test_the_command(tmp_path: Path, images: Path) -> None:
    from ssl_vit.data.pack import pack

    pack(str(images), tmp_path / "shards")
    words = ["--config", "configs/pretrain/mae_vit_tiny_cifar10.yaml", f"data.train={tmp_path / 'shards'}", "gpus=2"]
    done = plan(*words, "optim.batch_size=64", "optim.epochs=200", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (found["images"], found["images_from"], found["batch_size"]) == (72, "data.train", 64)
    assert "64 lanes over 2: each process reads its own lanes" in found["shards"]
    assert not (tmp_path / "runs").exists()
    values = load([ROOT / "configs/pretrain/mae_vit_tiny_cifar10.yaml"], [f"data.train={tmp_path / 'shards'}"])
    values["data"]["limit"] = 50
    assert make_plan(check_recipe(check(Recipe, values)), PlanSection(), "limited").images == 50


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["gpus=0"], "gpus"),
        (["gpus=7"], "optim.batch_size=4096: should be a multiple of the 7 processes; nearest: 4095"),
        (["gpu_memroy=80"], "gpu_memroy"),
        (["--measure"], "has no CUDA GPU"),
    ],
)
def test_bad_input_is_one_message(words: list[str], message: str) -> None:
    if words == ["--measure"] and torch.cuda.is_available():
        pytest.skip("there is a GPU")
    done = plan(*words)
    assert done.returncode == 2
    assert message in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    ("device", "name", "peak"),
    [
        ("cuda", "NVIDIA A100-SXM4-80GB", 312e12), ("cuda", "NVIDIA H100 80GB HBM3", 989.4e12),
        ("cuda", "NVIDIA H100 PCIe", 756e12), ("cuda", "NVIDIA L40S", 362e12), ("cuda", "NVIDIA L40", None),
        ("cuda", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("cpu", "", None),
    ],
)  # fmt: skip
def test_the_rate_at_the_peak(
    device: str, name: str, peak: float | None, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: name)
    recipe = check_recipe(check(Recipe, tiny_recipe(images, tmp_path / "run")))
    found = peak_rate(recipe, torch.device(device))
    assert found == (None if peak is None else pytest.approx(peak / count(recipe).flops))
