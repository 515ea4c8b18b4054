"""Every shipped recipe loads, is complete and honest in its head, builds, and takes one step at tiny size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, TINY_DECODER, TINY_SWIN, tiny_recipe

from ssl_vit.build import build_encoder, build_evaluations, build_objective
from ssl_vit.config import check, load, to_yaml
from ssl_vit.recipe import EvaluationRecipe, Recipe, check_recipe, objective_class
from ssl_vit.run import run

PRETRAIN = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
MEASURE = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if f.parent.name in ("linear_probe", "knn", "evaluate"))
ENCODER_MILLIONS = {
    "mae_vit_base_patch16_in1k": 85.8,
    "mae_vit_large_patch16_in1k": 303.3,
    "mae_vit_huge_patch14_in1k": 630.8,
}


def checked(file: Path, **data: Any) -> Recipe:
    values = load([file], [])
    values["data"] = {**values["data"], "train": "builtin:digits-train", **data}
    return check_recipe(check(Recipe, values))


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda f: f.stem)
def test_loads_and_round_trips(file: Path, tmp_path: Path) -> None:
    recipe = checked(file)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    again = check_recipe(check(Recipe, load([tmp_path / "again.yaml"], [])))
    assert to_yaml(again) == to_yaml(recipe)
    assert file.read_text().startswith("# "), "a recipe opens with what it is"
    assert build_evaluations(recipe.evals, labelled=True).keys() == recipe.evals.keys()


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda f: f.stem)
def test_builds_on_the_meta_device(file: Path) -> None:
    recipe = checked(file)
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
        arguments = {k: v for k, v in recipe.objective.items() if k not in ("name", "init")}
        objective_class(recipe)(encoder, **arguments)
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    if file.stem in ENCODER_MILLIONS:
        assert millions == pytest.approx(ENCODER_MILLIONS[file.stem], abs=0.2)


@pytest.mark.parametrize("file", PRETRAIN, ids=lambda f: f.stem)
def test_takes_one_step_at_tiny_size(file: Path, images: Path, tmp_path: Path) -> None:
    values = load([file], [])
    tiny = tiny_recipe(images, tmp_path / "run", evals={})
    values["encoder"] |= {"img_size": 32, "in_chans": 3}
    if "patch_size" in values["encoder"]:
        values["encoder"] |= {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    if "first_patch_size" in values["encoder"]:
        values["encoder"] |= TINY_SWIN
    values["objective"] |= TINY_DECODER if values["objective"]["name"] == "mae" else {}
    values["objective"] |= {"mask_unit": 8} if values["objective"]["name"] == "simmim" else {}
    values["data"] |= {"train": tiny["data"]["train"], "val": tiny["data"]["val"], "mean": [0.5] * 3, "std": [0.5] * 3}
    values["optim"] |= {"batch_size": 8, "epochs": "1 steps", "warmup_epochs": 0}
    values["run"], values["evals"] = tiny["run"], {"knn": {}}
    values["mixed_precision"] = "no"
    run(check_recipe(check(Recipe, values)))
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()


@pytest.mark.parametrize("file", MEASURE, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_measuring_recipes_load(file: Path) -> None:
    values = load([file], ["encoder.name=vit_tiny_patch16_224", "data.val=builtin:digits-test"])
    recipe = check_recipe(check(EvaluationRecipe, values))
    assert build_evaluations(recipe.evals, labelled=True)


def test_published_settings_of_mae() -> None:
    """RECIPES: AdamW .9/.95, 1.5e-4 x 4096/256 = 2.4e-3, wd .05, 40 epochs warm-up, 75 %, decoder 512 x 8 x 16."""
    for name, patch in (("base_patch16", 16), ("large_patch16", 16), ("huge_patch14", 14)):
        recipe = checked(ROOT / "configs" / "pretrain" / f"mae_vit_{name}_in1k.yaml")
        optim, objective = recipe.optim, recipe.objective
        assert (optim.name, optim.betas, optim.weight_decay, optim.clip_grad) == ("adamw", (0.9, 0.95), 0.05, None)
        assert (optim.batch_size, optim.base_lr * optim.batch_size / 256) == (4096, pytest.approx(2.4e-3))
        assert (str(optim.epochs), str(optim.warmup_epochs), optim.min_lr) == ("800", "40", 0.0)
        assert objective["mask_ratio"] == 0.75
        assert objective["norm_pix_loss"] is True
        assert tuple(objective[f"decoder_{k}"] for k in ("embed_dim", "depth", "num_heads")) == (512, 8, 16)
        assert tuple(objective["crop_scale"]) == (0.2, 1.0)
        assert recipe.encoder["patch_size"] == patch


def test_objectives_are_built_from_the_seed() -> None:
    recipe = checked(ROOT / "configs" / "pretrain" / "mae_digits.yaml")
    first, second = build_objective(recipe), build_objective(recipe)
    other = build_objective(recipe.model_copy(update={"seed": 1}))
    name = "encoder.model.blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])
