"""Settings of the shipped recipes as their releases and papers state them."""

from __future__ import annotations

import pytest
from conftest import ROOT
from test_configs import checked

from ssl_vit.config import plain
from ssl_vit.recipe import Recipe
from ssl_vit.training.optim import absolute_lr


def shipped(name: str) -> Recipe:
    return checked(ROOT / "configs" / "pretrain" / f"{name}.yaml")


@pytest.mark.parametrize(
    ("name", "epochs", "rates", "window", "size"),
    [
        ("swin_base", 100, (2e-4, 1e-6, 1e-5), 6, 192),
        ("swin_base_800ep", 800, (1e-4, 5e-7, None), 6, 192),
        ("swin_large", 800, (1e-4, 5e-7, None), 12, 192),
        ("vit_base_patch16", 800, (1e-4, 5e-7, None), None, 224),
    ],
)
def test_simmim(
    name: str, epochs: int, rates: tuple[float, float, float | None], window: int | None, size: int
) -> None:
    """microsoft/SimMIM, configs/*pretrain*: BASE_LR, WARMUP_LR and MIN_LR, all per 512 images, at 16 x 128."""
    recipe = shipped(f"simmim_{name}_in1k")
    optim, objective, encoder = recipe.optim, recipe.objective, recipe.encoder
    peak, start, end = rates
    assert optim.batch_size == 2048
    assert absolute_lr(optim) == pytest.approx(peak * 4)
    assert optim.warmup_lr == pytest.approx(start * 4)
    assert (str(optim.epochs), str(optim.warmup_epochs)) == (str(epochs), "10")
    if end is None:
        assert (optim.schedule, [str(m) for m in optim.milestones], optim.gamma) == ("multistep", ["700"], 0.1)
    else:
        assert (optim.schedule, optim.min_lr) == ("cosine", pytest.approx(end * 4))
    assert (optim.name, optim.betas, optim.eps) == ("adamw", (0.9, 0.999), 1e-8)
    assert (optim.weight_decay, optim.clip_grad) == (0.05, 5.0)
    assert (objective["mask_unit"], objective["mask_ratio"], objective["crop_scale"]) == (32, 0.6, (0.67, 1.0))
    assert (objective["interpolation"], objective["flip"]) == ("bilinear", 0.5)
    assert encoder["img_size"] == size
    if window:
        assert (encoder["window_size"], encoder["drop_path_rate"]) == (window, 0.0)
    else:
        assert (encoder["rel_pos"], encoder["abs_pos"], encoder["layer_scale"]) == ("shared", False, 0.1)
        assert encoder["drop_path_rate"] == 0.1


@pytest.mark.parametrize("name", ["large_patch16", "huge_patch14"])
def test_supervised_baseline_of_mae(name: str) -> None:
    """arXiv 2111.06377, table 11: 1e-4 x 4096/256, .9/.95, decay .3, 200 epochs, 20 of warm-up, EMA .9999."""
    recipe = shipped(f"classification_vit_{name}_in1k")
    optim, objective = recipe.optim, plain(recipe.objective)
    assert (optim.batch_size, absolute_lr(optim), optim.betas) == (4096, pytest.approx(1.6e-3), (0.9, 0.95))
    assert (optim.weight_decay, optim.clip_grad, optim.schedule) == (0.3, None, "cosine")
    assert (str(optim.epochs), str(optim.warmup_epochs)) == ("200", "20")
    assert (objective["label_smoothing"], objective["mix"]["mixup"], objective["mix"]["cutmix"]) == (0.1, 0.8, 1.0)
    assert (objective["augment"]["auto_augment"], objective["augment"]["erase"]) == ("rand-m9-mstd0.5-inc1", 0.0)
    assert (objective["ema_decay"], recipe.encoder["drop_path_rate"]) == (0.9999, 0.2)


@pytest.mark.parametrize(("name", "epochs"), [("base", 400), ("large", 250)])
def test_ibot(name: str, epochs: int) -> None:
    """Epochs, batch, masks and crops: arXiv 2111.07832; the rest: SERE's command for iBOT ViT-B, as the heads say."""
    recipe = shipped(f"ibot_vit_{name}_patch16_in1k")
    optim, objective = recipe.optim, recipe.objective
    assert (optim.batch_size, str(optim.epochs), str(optim.warmup_epochs)) == (1024, str(epochs), "10")
    assert (optim.lr_divisor, optim.base_lr, optim.min_lr) == (256, 7.5e-4, 2e-6)
    assert (optim.weight_decay, optim.weight_decay_end) == (0.04, 0.4)
    assert (optim.clip_grad, optim.clip_mode) == (0.3, "per_parameter")
    assert (objective["freeze_last_layer"], objective["norm_last_layer"]) == (3, True)
    assert (objective["teacher_temp"], objective["teacher_patch_temp"]) == ((0.04, 0.07), (0.04, 0.07))
    assert (objective["warmup_teacher_temp_epochs"], objective["student_temp"]) == (50, 0.1)
    assert (objective["global_scale"], objective["local_scale"]) == ((0.32, 1.0), (0.05, 0.32))
    assert (objective["local_crops"], objective["local_size"], objective["mask_shape"]) == (10, 96, "block")
    assert (objective["mask_ratio"], objective["mask_variance"]) == ((0.0, 0.3), (0.0, 0.2))
    assert [objective[key] for key in ("out_dim", "hidden_dim", "bottleneck_dim")] == [8192, 2048, 256]
    assert recipe.encoder["drop_path_rate"] == 0.1
