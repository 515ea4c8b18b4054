"""Every family of encoders in the objectives that allow it: it learns, resumes bit for bit, is probed and exported."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import (
    TINY_BEIT,
    TINY_BEIT_ENCODER,
    TINY_DECODER,
    TINY_ENCODER,
    TINY_HYBRID,
    TINY_SWIN,
    TINY_TOKENIZER,
    run_python,
    tiny_recipe,
    tiny_teacher,
    tokenizer_file,
)
from test_objectives import build_from, check_gradients, made
from test_trainer import losses, train

from ssl_vit.config import to_yaml
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder

SIMMIM = {"name": "simmim", "mask_unit": 8}
MAE = {"name": "mae", **TINY_DECODER}
# the centre is there after a step: targets that still settle would hide that anything is learnt
IBOT = {
    "name": "ibot", "out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 1, "local_size": 16,
    "centre_momentum": 0.0,
}  # fmt: skip
BEIT = {"name": "beit", **TINY_BEIT, "tokenizer": tokenizer_file()}
DVAE = {"name": "tokenizer_training", **TINY_TOKENIZER}
DEIT = {"name": "deit", "num_classes": 3, "teacher": tiny_teacher}
SUPERVISED = {"name": "classification", "num_classes": 3}
TINY_RESNET = {"name": "resnet18", "img_size": 32, "channels": [8, 8, 16, 16], "layers": [1, 1, 1, 1]}
TINY_DISTILLED = {**TINY_ENCODER, "name": "deit_tiny_distilled_patch16_224"}
PAIRS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "vit-simmim": (TINY_ENCODER, SIMMIM),
    "swin-simmim": (TINY_SWIN, SIMMIM),
    "swin-supervised": (TINY_SWIN, SUPERVISED),
    "hybrid-mae": (TINY_HYBRID, MAE),
    "hybrid-simmim": (TINY_HYBRID, SIMMIM),
    "hybrid-beit": (TINY_HYBRID, BEIT),
    "hybrid-dvae": (TINY_HYBRID, DVAE),
    "hybrid-ibot": (TINY_HYBRID, IBOT),
    "hybrid-deit": (TINY_HYBRID, {**DEIT, "distillation_token": False}),
    "hybrid-supervised": (TINY_HYBRID, SUPERVISED),
    "beit-simmim": (TINY_BEIT_ENCODER, SIMMIM),
    "beit-supervised": (TINY_BEIT_ENCODER, SUPERVISED),
    "resnet-supervised": (TINY_RESNET, SUPERVISED),
}
OTHERS = {"beit": (TINY_BEIT_ENCODER, {**BEIT, "early_layer": 1}), "deit": (TINY_DISTILLED, DEIT)}
"""Whose whole runs are in tests of their own."""


def recipe_of(pair: str, images: Path, folder: Path, **changes: Any) -> dict[str, Any]:
    encoder, objective = (PAIRS | OTHERS)[pair]
    return tiny_recipe(images, folder, objective=made(objective, folder), encoder=dict(encoder), **changes)


@pytest.mark.parametrize("pair", PAIRS)
def test_a_whole_run(pair: str, images: Path, tmp_path: Path) -> None:
    evals = {"knn": {"k": [5]}, "linear": {}, "rank": {}}
    values = recipe_of(pair, images, tmp_path / "run", evals=evals, optim__epochs="40 steps")
    values["run"] |= {"save_every": "20 steps", "keep_last": 3}
    folder = train(values)
    found = [loss for _, loss in losses(folder)]
    assert sum(found[-5:]) < 0.95 * sum(found[:5])
    values["run"] |= {"dir": str(tmp_path / "again")}
    again = train(values, resume=str(folder / "checkpoints" / "step_00000020"))
    assert losses(again) == losses(folder)[20:]
    exported = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True).eval()
    config = encoder_config(folder)
    config.pop("data")
    ours = create_encoder(**config).eval()
    fill_encoder(ours, folder)
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported(image), ours.pool(ours(image)), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pair", PAIRS)
def test_loss_reaches_every_trainable_parameter(pair: str, images: Path, tmp_path: Path) -> None:
    objective, batch = build_from(recipe_of(pair, images, tmp_path))
    with torch.no_grad():
        for parameter in objective.parameters():  # what starts at 0 hides what lies before it
            parameter.add_(0.01 * torch.randn_like(parameter))
    check_gradients(objective, batch)


@pytest.mark.slow
@pytest.mark.processes
def test_two_processes_train_like_one(images: Path, tmp_path: Path) -> None:
    """One process group goes through all pairs; the losses of 5 steps are those of one process (level b).

    Not the one with batch norm, where the images of a micro-batch influence each other.
    """
    expected, jobs = {}, []
    for pair in (name for name in PAIRS | OTHERS if name != "resnet-supervised"):
        values = recipe_of(pair, images, tmp_path / pair / "one", optim__epochs="5 steps")
        if "dvae" in pair:  # so warm that no noise decides which code is drawn; codes are learnt by their divergence
            values["objective"] |= {"temperature": [1e8, 1e8], "kl_weight": 1.0, "anneal": 0.0}
        expected[pair] = losses(train(values))
        values["run"] |= {"dir": str(tmp_path / pair / "two"), "micro_batch_size": 4}
        (tmp_path / f"{pair}.yaml").write_text(to_yaml(values))
        jobs.append({"recipe": str(tmp_path / f"{pair}.yaml")})
    (tmp_path / "jobs.json").write_text(json.dumps(jobs))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "tests/group.py", str(tmp_path / "jobs.json")]
    done = run_python(*words, env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr[-6000:]
    for pair, one in expected.items():
        facts = json.loads((tmp_path / pair / "two" / "environment.json").read_text())
        assert (facts["num_processes"], facts["micro_batch_size"]) == (2, 4)
        two = losses(tmp_path / pair / "two")
        assert [step for step, _ in two] == [1, 2, 3, 4, 5]
        assert [loss for _, loss in two] == pytest.approx([loss for _, loss in one], rel=1e-5), pair
