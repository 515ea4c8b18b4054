"""Generic over every objective in the folder: real views, a finite loss, gradients, state, clean refusals."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ROOT,
    TINY_BEIT,
    TINY_DECODER,
    TINY_ENCODER,
    TINY_TOKENIZER,
    tiny_recipe,
    tiny_teacher,
    tokenizer_file,
)

from ssl_vit.build import build_objective
from ssl_vit.config import check, part_names
from ssl_vit.data.loader import Pixels, TrainBatches
from ssl_vit.objectives.base import CALLS, Objective, Progress
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.splits import open_sets

NAMES = [n for n in part_names("ssl_vit.objectives", "Objective") if n not in ("ema_mae", "frozen_mae")]
TINY: dict[str, dict[str, Any]] = {
    "mae": TINY_DECODER,
    "simmim": {"mask_unit": 8},
    "ibot": {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 2, "local_size": 16},
    "classification": {"num_classes": 3},
    "probe": {"num_classes": 3},
    "deit": {"num_classes": 3, "teacher": tiny_teacher},
    "beit": {**TINY_BEIT, "tokenizer": tokenizer_file()},
    "tokenizer_training": TINY_TOKENIZER,
}
"""Constructor arguments that make an objective tiny, or functions of a folder that make them; one without an entry is
built with its defaults."""
ENCODERS = {"deit": "deit_tiny_distilled_patch16_224"}
"""Encoders of objectives that need one of their own."""


COLOURS: dict[str, dict[str, Any]] = {
    "ibot": {"jitter_prob": 0.0, "grey": 0.0, "solarise": 0.0, "blur": [0.0, 0.0, 0.0]},
    "beit": {"color_jitter": 0.0},
}
"""What turns off augmentations that only colour pictures have."""


def made(arguments: dict[str, Any], tmp_path: Path) -> dict[str, Any]:
    """Arguments with what functions of a folder make in their place."""
    return {key: value(tmp_path.parent / "parts") if callable(value) else value for key, value in arguments.items()}


def recipe_of(name: str, images: Path, tmp_path: Path) -> dict[str, Any]:
    values = tiny_recipe(images, tmp_path, objective={"name": name, **made(TINY.get(name, {}), tmp_path)})
    values["encoder"]["name"] = ENCODERS.get(name, values["encoder"]["name"])
    return values


def build(name: str, images: Path, tmp_path: Path) -> tuple[Objective, dict[str, torch.Tensor]]:
    """A tiny objective and a real batch from its own views."""
    return build_from(recipe_of(name, images, tmp_path))


def build_from(values: dict[str, Any]) -> tuple[Objective, dict[str, torch.Tensor]]:
    """The objective of a recipe and a real batch from its own views."""
    recipe = check_recipe(check(Recipe, values))
    objective = build_objective(recipe)
    sets = open_sets(recipe.data)
    pixels = Pixels((0.5,) * 3, (0.5,) * 3)
    views = objective.views(objective.encoder.img_size)
    batches = TrainBatches(sets.train, sets.stream(recipe), views, pixels, seed=0, batch_size=4, micro_batch_size=4)
    batch, reports = batches[0]
    assert not reports
    return objective, pixels.to_device(batch, torch.device("cpu"))


@pytest.mark.parametrize("name", NAMES)
def test_views_are_picklable(name: str, images: Path, tmp_path: Path) -> None:
    objective, _ = build(name, images, tmp_path)
    views = objective.views(objective.encoder.img_size)
    assert pickle.loads(pickle.dumps(views)) == views


@pytest.mark.parametrize("name", NAMES)
def test_loss_reaches_every_trainable_parameter(name: str, images: Path, tmp_path: Path) -> None:
    check_gradients(*build(name, images, tmp_path))


def check_gradients(objective: Objective, batch: dict[str, torch.Tensor]) -> None:
    """A finite loss and detached numbers; gradients in all that trains and in nothing else."""
    objective.train()
    objective.before_step(Progress(0, 10, 0.0, 1.0, 0.0))
    loss, metrics = objective(batch)
    assert loss.shape == ()
    assert loss.isfinite()
    assert all(isinstance(value, torch.Tensor) and not value.requires_grad for value in metrics.values())
    loss.backward()
    for parameter_name, parameter in objective.named_parameters():
        if parameter.requires_grad:
            assert parameter.grad is not None, parameter_name
            assert parameter.grad.isfinite().all(), parameter_name
            assert parameter.grad.abs().sum() > 0, parameter_name
        else:
            assert parameter.grad is None, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_a_step_moves_what_trains_and_nothing_else(name: str, images: Path, tmp_path: Path) -> None:
    objective, batch = build(name, images, tmp_path)
    objective.train()
    before = {k: v.clone() for k, v in objective.named_parameters()}
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    objective.before_step(Progress(0, 10, 0.0, 1.0, 0.0))
    objective(batch)[0].backward()
    optimizer.step()
    for parameter_name, parameter in objective.named_parameters():
        moved = not torch.equal(parameter, before[parameter_name])
        assert moved == parameter.requires_grad, parameter_name


@pytest.mark.parametrize("name", NAMES)
def test_loss_treats_samples_alone(name: str, images: Path, tmp_path: Path) -> None:
    """Level (b): the loss of a batch is the mean over its halves, for objectives that do not declare otherwise."""
    objective, batch = build(name, images, tmp_path)
    off = {"encoder.drop_path_rate", "objective.mix.mixup", "objective.mix.cutmix"}  # 0 in the tiny encoder, by default
    others = set(objective.level_c) - off
    if others:
        pytest.skip(f"level (c): {others}")
    objective = objective.double().eval()
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    whole, _ = objective(batch)
    halves = [objective({k: v[i : i + 2] for k, v in batch.items()})[0] for i in (0, 2)]
    torch.testing.assert_close(whole, torch.stack(halves).mean(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_state_round_trip(name: str, images: Path, tmp_path: Path) -> None:
    objective, batch = build(name, images, tmp_path)
    torch.manual_seed(99)
    other, _ = build(name, images, tmp_path)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(1.0)
    other.load_state_dict(objective.state_dict())
    objective.eval(), other.eval()
    assert torch.equal(objective(batch)[0], other(batch)[0])


@pytest.mark.parametrize("name", NAMES)
def test_calls_go_through_one_door(name: str, images: Path, tmp_path: Path) -> None:
    objective, batch = build(name, images, tmp_path)
    objective.eval()
    image = batch["image"] if "image" in batch else batch["global_views"][:, 0]
    tokens = objective({"image": image}, call="encode")
    grid = objective.encoder.grid_size
    assert tokens.patches.shape == (4, grid[0] * grid[1], objective.encoder.token_dim)
    assert objective.encoder.pool(tokens).shape == (4, objective.encoder.embed_dim)
    with pytest.raises(ValueError, match="allowed: loss, encode"):
        objective(batch, call="enocde")
    if "pictures" in CALLS and hasattr(objective, "pictures"):
        pictures = objective({"image": image}, call="pictures")
        assert {picture.shape for picture in pictures.values()} == {image.shape}


def test_an_objective_alone_measures_but_does_not_train() -> None:
    from ssl_vit.encoders.base import create_encoder

    objective = Objective(create_encoder(**TINY_ENCODER))
    assert objective({"image": torch.zeros(1, 3, 32, 32)}, call="encode").patches.shape == (1, 16, 48)
    with pytest.raises(ValueError, match="allowed: encode"):
        objective({"image": torch.zeros(1, 3, 32, 32)}, call="loss")


@pytest.mark.parametrize("precision", ["bf16", "no"])
@pytest.mark.parametrize("name", NAMES)
def test_pictures_of_one_colour_are_no_trouble(name: str, precision: str, images: Path, tmp_path: Path) -> None:
    """B68: patches without variance give finite losses and gradients, losses in float32."""
    objective, batch = build(name, images, tmp_path)
    objective.train()
    objective.before_step(Progress(0, 10, 0.0, 1.0, 0.0))
    for key in ("image", "global_views", "local_views"):
        if key in batch:
            batch[key] = torch.full_like(batch[key], 0.7)
    if "target_image" in batch:
        batch["target_image"] = torch.full_like(batch["target_image"], 7)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        loss, metrics = objective(batch)
    loss.backward()
    assert loss.dtype == torch.float32
    assert loss.isfinite()
    assert all(value.isfinite().all() for value in metrics.values())
    for parameter_name, parameter in objective.named_parameters():
        assert parameter.grad is None or parameter.grad.isfinite().all(), parameter_name


@pytest.mark.parametrize("channels", [1, 4])
@pytest.mark.parametrize("name", NAMES)
def test_grey_and_four_channels_from_training_to_export(name: str, channels: int, tmp_path: Path) -> None:
    """B70: the number of channels reaches decoder, normalisation, pictures, probes and exports."""
    import json

    import numpy as np
    import tifffile
    import timm

    from ssl_vit.run import run

    generator = np.random.default_rng(0)
    for c in range(3):
        (tmp_path / "images" / f"class_{c}").mkdir(parents=True)
        for i in range(8):
            pixels = (60 * c + generator.integers(0, 100, (32, 32, channels))).astype(np.uint8)
            file = tmp_path / "images" / f"class_{c}" / f"{i}.tif"
            layout = "contig" if channels > 1 else None
            tifffile.imwrite(file, pixels.squeeze(), photometric="minisblack", planarconfig=layout)
    values = recipe_of(name, tmp_path / "images", tmp_path / "run")
    values["encoder"]["in_chans"] = channels
    values["objective"] |= COLOURS.get(name, {})
    if name == "deit":
        values["objective"]["teacher"] = tiny_teacher(tmp_path / "teacher", in_chans=channels)
    if name == "beit":
        values["objective"]["tokenizer"] = tokenizer_file(in_chans=channels)
    values["evals"] = {"knn": {"k": [5]}, "linear": {}, "rank": {}}
    values["evals"] |= {"pictures": {"count": 2}} if name in ("mae", "simmim") else {}
    values["optim"] |= {"epochs": "2 steps", "warmup_epochs": 0, "batch_size": 8}
    run(check_recipe(check(Recipe, values)))
    folder = tmp_path / "run"
    result = json.loads((folder / "result.json").read_text())
    assert result["bad_samples"] == 0
    assert result["export_difference"] <= 1e-5
    model = timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True)
    assert model(torch.zeros(1, channels, 32, 32)).shape == (1, 48)
    assert len(model.pretrained_cfg["mean"]) == channels


@pytest.mark.parametrize("name", NAMES)
def test_what_an_objective_logs_is_explained(name: str, images: Path, tmp_path: Path) -> None:
    """In the table of docs/training.md, with what to do if it is not well."""
    objective, batch = build(name, images, tmp_path)
    objective.before_step(Progress(0, 10, 0.0, 1.0, 0.0))
    _, metrics = objective.train()(batch)
    document = (ROOT / "docs" / "training.md").read_text(encoding="utf-8")
    table = document[document.index("## 5.") :]
    assert [key for key in metrics if f"`{key}`" not in table] == []
