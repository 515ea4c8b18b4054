"""Every shipped recipe loads, is complete and honest in its head, builds, and takes one step at tiny size."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import (
    ROOT,
    TINY_BEIT,
    TINY_DECODER,
    TINY_SWIN,
    TINY_TOKENIZER,
    TINY_VQKD,
    teacher_folder,
    tiny_recipe,
    tiny_teacher,
    tokenizer_file,
)

from ssl_vit.build import build_encoder, build_evaluations, build_objective
from ssl_vit.config import check, load, plain, to_yaml
from ssl_vit.modules.feature_teacher import FeatureTeacherSection
from ssl_vit.modules.tokenizer import TokenizerFile
from ssl_vit.recipe import (
    EmbeddingRecipe,
    EvaluationRecipe,
    Recipe,
    TransferRecipe,
    check_recipe,
    objective_class,
)
from ssl_vit.run import run
from ssl_vit.training.optim import absolute_lr

PRETRAIN = sorted((ROOT / "configs" / "pretrain").glob("*.yaml"))
FINETUNE = sorted((ROOT / "configs" / "finetune").glob("*.yaml"))
JUDGE = sorted(f for f in (ROOT / "configs").rglob("*.yaml") if f.parent.name in ("linear_probe", "knn", "evaluate"))
PROBE = [f for f in JUDGE if "objective" in load([f], [])]
TRAIN = PRETRAIN + FINETUNE + PROBE
MEASURE = [f for f in JUDGE if f not in PROBE]
ENCODER_MILLIONS = {
    "mae_vit_base_patch16_in1k": 85.8,
    "mae_vit_large_patch16_in1k": 303.3,
    "mae_vit_huge_patch14_in1k": 630.8,
    "classification_vit_base_patch16_in1k": 85.8,
    "classification_vit_base_patch16_deit_in1k": 85.8,
    "classification_vit_small_patch16_deit_in1k": 21.7,
    "classification_vit_tiny_patch16_deit_in1k": 5.5,
    "classification_vit_large_patch16_in1k": 303.3,
    "classification_vit_large_patch16_augreg_in1k": 303.3,
    "classification_vit_huge_patch14_in1k": 630.8,
    "deit_vit_base_patch16_in1k": 85.8,
    "deit_vit_small_patch16_in1k": 21.7,
    "deit_vit_tiny_patch16_in1k": 5.5,
    "beit_vit_base_patch16_in1k": 85.7,
    "beit_vit_large_patch16_in1k": 303.1,
    "beitv2_vit_base_patch16_in1k": 85.7,
    "beitv2_vit_large_patch16_in1k": 303.1,
}


def given_files(recipe: Recipe) -> None:
    """What a recipe leaves to its user: a tokenizer, a teacher."""
    objective, size, patch = recipe.objective, recipe.encoder["img_size"], recipe.encoder.get("patch_size")
    if objective["name"] == "beit":
        target = objective["target_size"] or size  # v1: half the size, half the patch
        objective["tokenizer"] = TokenizerFile(
            **tokenizer_file(target, patch * target // size, recipe.encoder["in_chans"])
        )
    if objective.get("kind") == "vqkd":
        objective["teacher"] = FeatureTeacherSection(weights=teacher_folder(size, patch))


def tiny_objective(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Arguments that make a recipe's objective tiny, its files included."""
    if values["name"] == "beit":
        early = 1 if values["early_layer"] else None
        return {**TINY_BEIT, "tokenizer": tokenizer_file(), "target_size": None, "early_layer": early}
    if values["name"] == "tokenizer_training":
        return {**TINY_VQKD, "teacher": {"weights": teacher_folder()}} if values["kind"] == "vqkd" else TINY_TOKENIZER
    if values["name"] == "simmim":
        return {"mask_unit": 8}
    if "teacher" in values:
        return {"teacher": tiny_teacher(folder)}
    if values["name"] == "probe":  # a tiny encoder has two blocks
        return {
            "stages": values["stages"]
            and [[-2, -1] if isinstance(s, list) and s != [-1] else -1 for s in values["stages"]]
        }
    return TINY_DECODER if values["name"] == "mae" else {}


def checked(file: Path, **data: Any) -> Recipe:
    values = load([file], [])
    values["data"] = {**values["data"], "train": "builtin:digits-train", **data}
    if "name" not in values["encoder"]:  # the file that is fine-tuned tells it
        values["encoder"]["name"] = "vit_tiny_patch16_224"
    return check_recipe(check(Recipe, values))


@pytest.mark.parametrize("file", TRAIN, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_loads_and_round_trips(file: Path, tmp_path: Path) -> None:
    recipe = checked(file)
    (tmp_path / "again.yaml").write_text(to_yaml(recipe))
    again = check_recipe(check(Recipe, load([tmp_path / "again.yaml"], [])))
    assert to_yaml(again) == to_yaml(recipe)
    assert file.read_text().startswith("# "), "a recipe opens with what it is"
    assert build_evaluations(recipe.evals, labelled=True).keys() == recipe.evals.keys()


@pytest.mark.parametrize("file", TRAIN, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_builds_on_the_meta_device(file: Path, tmp_path: Path) -> None:
    recipe = checked(file)
    given_files(recipe)
    with torch.device("meta"):
        encoder = build_encoder(recipe.encoder)
        arguments = {k: v for k, v in recipe.objective.items() if k not in ("name", "init")}
        if "num_classes" in arguments:
            arguments["num_classes"] = 1000
        if "teacher" in arguments and recipe.objective["name"] == "deit":
            arguments["teacher"] = check(
                type(arguments["teacher"]), tiny_teacher(tmp_path, 1000, recipe.encoder["in_chans"])
            )
        if recipe.data.mean and "mean" in inspect.signature(objective_class(recipe)).parameters:
            arguments |= {"mean": recipe.data.mean, "std": recipe.data.std}
        objective_class(recipe)(encoder, **arguments)
    millions = sum(p.numel() for p in encoder.parameters()) / 1e6
    if file in PRETRAIN and file.stem in ENCODER_MILLIONS:
        assert millions == pytest.approx(ENCODER_MILLIONS[file.stem], abs=0.2)


@pytest.mark.parametrize("file", TRAIN, ids=lambda f: f"{f.parent.name}/{f.stem}")
def test_takes_one_step_at_tiny_size(file: Path, images: Path, tmp_path: Path) -> None:
    values = load([file], [])
    tiny = tiny_recipe(images, tmp_path / "run", evals={})
    values["encoder"] |= {"img_size": 32, "in_chans": 3}
    if "name" not in values["encoder"]:
        values["encoder"] |= {"name": "vit_tiny_patch16_224", "patch_size": 8}
    if "patch_size" in values["encoder"]:
        values["encoder"] |= {"patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    if "first_patch_size" in values["encoder"]:
        values["encoder"] |= TINY_SWIN
    values["objective"] |= tiny_objective(values["objective"], tmp_path)
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


@pytest.mark.parametrize(
    "name",
    [
        "classification_vit_base_patch16_deit_in1k", "classification_vit_small_patch16_deit_in1k",
        "classification_vit_tiny_patch16_deit_in1k",
        "deit_vit_base_patch16_in1k", "deit_vit_small_patch16_in1k", "deit_vit_tiny_patch16_in1k",
    ],
)  # fmt: skip
def test_published_settings_of_deit(name: str) -> None:
    """AdamW .9/.999, 5e-4 x 1024/512, wd .05, 300 epochs, RandAugment, Mixup .8, CutMix 1, erase .25, 3 repeats."""
    recipe = checked(ROOT / "configs" / "pretrain" / f"{name}.yaml")
    optim, objective = recipe.optim, plain(recipe.objective)
    assert (optim.name, optim.betas, optim.weight_decay, optim.clip_grad) == ("adamw", (0.9, 0.999), 0.05, None)
    assert (optim.batch_size, absolute_lr(optim), optim.min_lr) == (1024, pytest.approx(1e-3), 1e-5)
    assert optim.warmup_lr == 1e-6
    assert (str(optim.epochs), str(optim.warmup_epochs), recipe.data.repeats) == ("300", "5", 3)
    assert (objective["mix"]["mixup"], objective["mix"]["cutmix"], objective["label_smoothing"]) == (0.8, 1.0, 0.1)
    assert (objective["augment"]["auto_augment"], objective["augment"]["erase"]) == ("rand-m9-mstd0.5-inc1", 0.25)
    assert recipe.encoder["drop_path_rate"] == 0.1
    if name.startswith("deit"):
        assert (objective["distillation"], objective["alpha"], objective["teacher"]["name"]) == (
            "hard",
            0.5,
            "regnety_160",
        )


@pytest.mark.parametrize("name", ["base_patch16", "large_patch16_augreg"])
def test_published_settings_of_augreg(name: str) -> None:
    """RECIPES: 1e-3, decay 1e-4 relative to it, 10k steps, 300 epochs, batch 4096, medium2, sigmoid loss, bias -6.9."""
    recipe = checked(ROOT / "configs" / "pretrain" / f"classification_vit_{name}_in1k.yaml")
    optim, objective = recipe.optim, plain(recipe.objective)
    assert (optim.batch_size, absolute_lr(optim), optim.clip_grad) == (4096, 1e-3, 1.0)
    assert absolute_lr(optim) * optim.weight_decay == pytest.approx(1e-4)
    assert (str(optim.epochs), str(optim.warmup_epochs)) == ("300", "10000 steps")
    assert (objective["loss"], objective["head_bias"], objective["representation"]) == ("sigmoid", -6.9, True)
    assert (objective["mix"]["mixup"], objective["augment"]["auto_augment"]) == (0.5, "rand-m15-mmax15-n2")


def test_published_settings_of_beit() -> None:
    """AdamW 1.5e-3 absolute at 2048, wd .05, clip 3 (v1's L: 1), 75 of 196 in blocks of 16 and more, two crops."""
    names = {
        "beit_vit_base_patch16_in1k": (800, 0.999, 0.1, 0.1, None, 0.08, 112, "lanczos", True),
        "beit_vit_large_patch16_in1k": (800, 0.999, 1e-5, 0.1, None, 0.08, 112, "lanczos", True),
        "beitv2_vit_base_patch16_in1k": (1600, 0.999, 0.1, 0.1, 9, 0.2, None, "bicubic", False),
        "beitv2_vit_base_patch16_in1k_300ep": (300, 0.98, 0.1, 0.0, 9, 0.2, None, "bicubic", False),
        "beitv2_vit_large_patch16_in1k": (1600, 0.999, 1e-5, 0.1, 21, 0.2, None, "bicubic", False),
        "beitv2_vit_large_patch16_in1k_300ep": (300, 0.98, 1e-5, 0.0, 21, 0.2, None, "bicubic", False),
    }
    for name, (epochs, beta2, scale, drop_path, early, crop, size, interpolation, varying) in names.items():
        recipe = checked(ROOT / "configs" / "pretrain" / f"{name}.yaml")
        optim, objective, encoder = recipe.optim, recipe.objective, recipe.encoder
        assert (optim.batch_size, optim.base_lr, optim.lr_divisor, optim.min_lr) == (2048, 1.5e-3, None, 1e-5), name
        clip = 1.0 if name == "beit_vit_large_patch16_in1k" else 3.0
        assert (optim.betas, optim.weight_decay, optim.clip_grad) == ((0.9, beta2), 0.05, clip), name
        assert (str(optim.epochs), str(optim.warmup_epochs)) == (str(epochs), "10"), name
        assert (encoder["layer_scale"], encoder["drop_path_rate"]) == (scale, drop_path), name
        assert (encoder["rel_pos"], encoder["abs_pos"]) == ("shared", False), name
        found = {key: objective[key] for key in ("early_layer", "target_size", "target_interpolation", "varying_count")}
        assert list(found.values()) == [early, size, interpolation, varying], name
        assert (objective["num_masked"], objective["min_block"], objective["crop_scale"]) == (75, 16, (crop, 1.0)), name
        assert (recipe.data.mean, recipe.data.std) == ([0.485, 0.456, 0.406], [0.229, 0.224, 0.225]), name


def test_published_settings_of_vqkd() -> None:
    recipe = checked(ROOT / "configs" / "pretrain" / "tokenizer_vqkd_vit_base_patch16_in1k.yaml")
    optim, objective = recipe.optim, recipe.objective
    assert optim.base_lr * optim.batch_size / (optim.lr_divisor or 1) == pytest.approx(2e-4)
    assert (optim.betas, optim.weight_decay, str(optim.epochs), str(optim.warmup_epochs)) == (
        (0.9, 0.99),
        1e-4,
        "100",
        "10",
    )
    assert [objective[key] for key in ("codebook_size", "code_dim", "decay", "commitment")] == [8192, 32, 0.99, 1.0]
    assert (objective["decoder_depth"], objective["crop_scale"]) == (3, (0.08, 1.0))


FINETUNING = {  # epochs, warm-up, batch, peak lr, layer decay, drop path, std of the head; and what is not as usual
    "beit_vit_base_patch16": (100, 20, 1024, 4e-3, 0.65, 0.1, 2e-5, {}),
    "beit_vit_large_patch16": (50, 5, 1024, 1e-3, 0.75, 0.2, 2e-5, {}),
    "beitv2_vit_base_patch16": (100, 20, 1024, 5e-4, 0.6, 0.2, 2e-5, {}),
    "beitv2_vit_large_patch16": (50, 5, 1024, 2e-4, 0.8, 0.2, 2e-5, {}),
    "deit_base_patch16_384": (30, 5, 512, 5e-6, None, 0.1, 0.02,
                              {"warmup_lr": 1e-6, "min_lr": 5e-6, "weight_decay": 1e-8}),
    "ibot_vit_small_patch16": (200, 20, 1024, None, 0.75, 0.1, 2e-5, {}),  # the published lr is swept
    "ibot_vit_base_patch16": (100, 20, 1024, None, 0.65, 0.2, 2e-5, {}),
    "ibot_vit_large_patch16": (50, 5, 1024, None, 0.75, 0.4, 2e-5, {}),
    "mae_vit_base_patch16": (100, 5, 1024, 2e-3, 0.65, 0.1, 2e-5, {}),
    "mae_vit_large_patch16": (50, 5, 1024, 4e-3, 0.75, 0.2, 2e-5, {}),
    "mae_vit_huge_patch14": (50, 5, 1024, 4e-3, 0.75, 0.3, 2e-5, {}),
    "simmim_swin_base": (100, 20, 2048, 5e-3, 0.9, 0.1, 0.02, {"warmup_lr": 1e-6, "clip_grad": 5.0}),
    "simmim_vit_base_patch16": (100, 20, 2048, 5e-3, 0.65, 0.1, 2e-5, {"warmup_lr": 1e-6, "clip_grad": 5.0}),
}  # fmt: skip


def test_every_published_recipe_of_finetuning_is_pinned() -> None:
    assert {f"{name}_in1k" for name in FINETUNING} == {file.stem for file in FINETUNE if file.stem.endswith("_in1k")}


@pytest.mark.parametrize("name", FINETUNING)
def test_published_settings_of_finetuning(name: str) -> None:
    """The commands and defaults of the releases: MAE's FINETUNE.md, run_class_finetuning.py of BEiT and iBOT, SimMIM's
    main_finetune.py, which scales the ends of the schedule like its peak, and DeiT's README."""
    epochs, warmup, batch, lr, layer_decay, drop_path, head_std, others = FINETUNING[name]
    recipe = checked(ROOT / "configs" / "finetune" / f"{name}_in1k.yaml")
    optim, objective, encoder, data = recipe.optim, plain(recipe.objective), recipe.encoder, recipe.data
    usual = {
        "name": "adamw", "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.05, "schedule": "cosine",
        "warmup_lr": 0.0, "min_lr": 1e-6, "clip_grad": None,
    }  # fmt: skip
    assert {key: getattr(optim, key) for key in usual} == {**usual, **others}
    assert (str(optim.epochs), str(optim.warmup_epochs), optim.batch_size) == (str(epochs), str(warmup), batch)
    assert lr is None or absolute_lr(optim) == pytest.approx(lr)
    assert (optim.layer_decay, encoder["drop_path_rate"], objective["head_std"]) == (layer_decay, drop_path, head_std)
    assert (objective["loss"], objective["label_smoothing"], objective["ema_decay"]) == ("ce", 0.1, None)
    assert objective["mix"] == {"mixup": 0.8, "cutmix": 1.0, "prob": 1.0, "switch_prob": 0.5, "mode": "batch"}
    augment = objective["augment"]
    assert (augment["auto_augment"], augment["color_jitter"], augment["erase"]) == ("rand-m9-mstd0.5-inc1", 0.0, 0.25)
    assert (augment["crop_scale"], augment["flip"], augment["interpolation"]) == ([0.08, 1.0], 0.5, "bicubic")
    method = name.partition("_")[0]
    assert (encoder["img_size"], data.repeats) == ((384, 3) if method == "deit" else (224, 1))
    assert data.mean == ([0.5] * 3 if method == "beit" else [0.485, 0.456, 0.406])
    assert (data.crop_pct, data.interpolation) == (0.875, "bicubic")
    if "swin" in name:
        assert encoder["window_size"] == 7
        return
    pooled = ("token", False) if method in ("ibot", "deit") else ("avg", True)
    assert (encoder["global_pool"], encoder.get("fc_norm")) == pooled
    if encoder["name"].startswith("beit"):
        scale = 1e-5 if "large" in name else 0.1
        assert (encoder["rel_pos"], encoder["abs_pos"], encoder["layer_scale"]) == ("layer", False, scale)


IBOT_RATES = [digit * 10.0**power for power in range(-4, 1) for digit in range(1, 10)]
DINOV2_RATES = [1e-5, 2e-5, 5e-5, 1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 5e-3, 1e-2, 2e-2, 5e-2, 0.1]
PROBES = {  # optimizer, batch, peak lr, epochs, warm-up, decay; stages, pools, final norm, rates, BatchNorm, filter
    "mae": ("lars", 16384, 6.4, "90", "10", 0.0, [-1], ["token"], True, [1.0], True, "bicubic"),
    "beit": ("adamw", 1024, 4e-3, "100", "0", 1e-4, None, ["both"], False, [1.0], False, "bilinear"),
    "ibot": ("sgd", 1024, 4.0, "100", "0", 0.0, [-1], ["both"], True, IBOT_RATES, False, "bilinear"),
    "ibot_vit_small": (
        "sgd", 1024, 4.0, "100", "0", 0.0, [[-4, -3, -2, -1]], ["token"], True, IBOT_RATES, False, "bilinear",
    ),
    "dinov2": (
        "sgd", 1024, 4.0, "12500 steps", "0", 0.0, [[-1], [-4, -3, -2, -1]], ["token", "tokens_avg"], True,
        DINOV2_RATES, False, "bicubic",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PROBES)
def test_published_settings_of_probes(name: str) -> None:
    """MAE's main_linprobe.py, BEiT's run_linear_eval.py, iBOT's eval_linear_multi.py and DINOv2's eval/linear.py."""
    optimizer, batch, lr, epochs, warmup, decay, *inputs, rates, batch_norm, interpolation = PROBES[name]
    recipe = checked(ROOT / "configs" / "linear_probe" / f"{name}_in1k.yaml")
    optim, objective = recipe.optim, plain(recipe.objective)
    assert (optim.name, optim.betas[0], optim.batch_size) == (optimizer, 0.9, batch)
    assert absolute_lr(optim) == pytest.approx(lr)
    assert (str(optim.epochs), str(optim.warmup_epochs)) == (epochs, warmup)
    assert (optim.weight_decay, optim.min_lr, optim.schedule, optim.clip_grad) == (decay, 0.0, "cosine", None)
    assert [objective[key] for key in ("stages", "pools", "final_norm")] == inputs
    assert objective["learning_rates"] == pytest.approx(rates)
    assert (objective["batch_norm"], objective["head_std"]) == (batch_norm, 0.01)
    augment = objective["augment"]
    assert (augment["crop_scale"], augment["flip"], augment["interpolation"]) == ([0.08, 1.0], 0.5, interpolation)
    assert (augment["auto_augment"], augment["color_jitter"], augment["erase"]) == (None, 0.0, 0.0)
    assert augment["crop_retry"] == (name != "mae")


def test_objectives_are_built_from_the_seed() -> None:
    recipe = checked(ROOT / "configs" / "pretrain" / "mae_digits.yaml")
    first, second = build_objective(recipe), build_objective(recipe)
    other = build_objective(recipe.model_copy(update={"seed": 1}))
    name = "encoder.model.blocks.0.attn.qkv.weight"
    assert torch.equal(first.state_dict()[name], second.state_dict()[name])
    assert not torch.equal(first.state_dict()[name], other.state_dict()[name])


@pytest.mark.parametrize(("folder", "section"), [("embed", EmbeddingRecipe), ("transfer", TransferRecipe)])
def test_other_measuring_recipes_load(folder: str, section: type) -> None:
    files = sorted((ROOT / "configs" / folder).glob("*.yaml"))
    assert files
    for file in files:
        recipe = check_recipe(check(section, load([file], ["encoder.name=vit_tiny_patch16_224"])))
        assert recipe.run.dir.startswith("runs/"), file


def test_vtab_is_whole() -> None:
    recipe = check(TransferRecipe, load([ROOT / "configs" / "transfer" / "vtab.yaml"], []))
    groups = [row.group for row in recipe.sets]
    assert {group: groups.count(group) for group in groups} == {"natural": 7, "specialised": 4, "structured": 8}
    assert [(row.hf or "").removeprefix("clip-benchmark/wds_").removeprefix("vtab-") for row in recipe.sets] == [
        "caltech101", "cifar100", "dtd", "flowers", "pets", "svhn", "sun397",
        "pcam", "eurosat", "resisc45", "diabetic_retinopathy",
        "clevr_count_all", "clevr_closest_object_distance", "dmlab", "dsprites_label_x_position",
        "dsprites_label_orientation", "kitti_closest_vehicle_distance", "smallnorb_label_azimuth",
        "smallnorb_label_elevation",
    ]  # fmt: skip
    for row in recipe.sets:
        folder = (row.hf or "").replace("clip-benchmark/", "vtab/")
        assert (row.train, row.val) == (f"{folder}/train", f"{folder}/test")
    assert recipe.train_images == 1000
    assert recipe.missing == "skip"
