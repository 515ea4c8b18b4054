"""iBOT against independent statements: losses, heads, masks, schedules, views, teacher, layouts."""

from __future__ import annotations

import copy
import json
import math
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ROOT, TINY_ENCODER, TINY_SWIN, run_python, tiny_recipe
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.build import build_objective
from ssl_vit.config import InputError, check, load, to_yaml
from ssl_vit.data.masking import block_mask
from ssl_vit.data.multicrop import ColourView, MaskRule
from ssl_vit.data.views import seed_generators
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.positions import sincos2d_table
from ssl_vit.modules.ema import EMA
from ssl_vit.modules.heads import ProjectionHead
from ssl_vit.modules.self_distillation import Centre
from ssl_vit.objectives.base import Progress
from ssl_vit.objectives.ibot import IBOT
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.checkpoint import read_checkpoint
from ssl_vit.training.launch import Launch
from ssl_vit.training.metrics import read_metrics
from ssl_vit.training.optim import OptimSection, clip_gradients, parameter_groups, set_schedule

TINY = {"out_dim": 32, "hidden_dim": 24, "bottleneck_dim": 8, "local_crops": 2, "local_size": 16}


def tiny_ibot(encoder: dict[str, Any] | None = None, **changes: Any) -> IBOT:
    torch.manual_seed(0)
    return IBOT(create_encoder(**{**TINY_ENCODER, **(encoder or {})}), **{**TINY, **changes})


def make_batch(ibot: IBOT, size: int = 3) -> dict[str, Tensor]:
    seed_generators(5)
    view = ibot.views(ibot.encoder.img_size)
    channels = ibot.encoder.in_chans
    samples = [
        view({"image": torch.randint(0, 256, (channels, 40, 50), dtype=torch.uint8), "label": 0}) for _ in range(size)
    ]
    batch = {key: torch.stack([sample[key] for sample in samples]) for key in samples[0]}
    return {key: value if key == "mask" else value.float() / 128 - 1 for key, value in batch.items()}


def spread(ibot: IBOT) -> IBOT:
    """Teacher and student apart and centres away from 0, so that no term can stand in for another."""
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in ibot.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
        ibot.cls_centre.value.normal_(std=0.1)
        ibot.patch_centre.value.normal_(std=0.1)
    return ibot


# ---------------------------------------------------------------------------------------------- losses


def published_tokens(model: Any, image: Tensor, mask: Tensor | None, token: Tensor | None, pos: Tensor) -> Tensor:
    """Tokens of a timm ViT as iBOT's own class computes them, positions given."""
    x = model.patch_embed.proj(image)
    if mask is not None:
        assert token is not None
        x.permute(0, 2, 3, 1)[mask.unflatten(1, x.shape[2:])] = token.flatten()
    x = torch.cat([model.cls_token.expand(len(x), -1, -1), x.flatten(2).transpose(1, 2)], dim=1) + pos
    for block in model.blocks:
        x = block(x)
    return model.norm(x)


def published_head(head: ProjectionHead, x: Tensor) -> Tensor:
    x = F.normalize(head.mlp(x), dim=-1, p=2)
    weight = head.weight_g * head.weight_v / head.weight_v.norm(dim=1, keepdim=True)
    return x @ weight.T


def published_loss(ibot: IBOT, batch: dict[str, Tensor], temp: float, patch_temp: float) -> tuple[Tensor, Tensor]:
    """The nested loops of the published code, over all patches and all pairs of views."""
    teacher, student = ibot.encoder.model, ibot.student.model
    small_grid = batch["local_views"].shape[-1] // 8
    small_pos = torch.cat(
        [student.pos_embed[:, :1], sincos2d_table((small_grid, small_grid), 48).to(student.pos_embed)], 1
    )
    t_cls, t_patch, s_cls, s_patch = [], [], [], []
    for q in range(2):
        image, mask = batch["global_views"][:, q], batch["mask"][:, q]
        out = published_head(ibot.teacher_head, published_tokens(teacher, image, None, None, teacher.pos_embed))
        t_cls.append(((out[:, 0] - ibot.cls_centre.value) / temp).softmax(-1))
        t_patch.append(((out[:, 1:] - ibot.patch_centre.value) / patch_temp).softmax(-1))
        out = published_head(
            ibot.student_head, published_tokens(student, image, mask, ibot.mask_token, student.pos_embed)
        )
        s_cls.append(out[:, 0] / 0.1)
        s_patch.append(out[:, 1:] / 0.1)
    for v in range(batch["local_views"].shape[1]):
        out = published_tokens(student, batch["local_views"][:, v], None, None, small_pos)
        s_cls.append(published_head(ibot.student_head, out[:, 0]) / 0.1)
    cls, patch, pairs = torch.zeros(()).to(t_cls[0]), torch.zeros(()).to(t_cls[0]), 0
    for q in range(2):
        for v in range(len(s_cls)):
            if v == q:
                each = -(t_patch[q] * s_patch[v].log_softmax(-1)).sum(-1)
                mask = batch["mask"][:, v].to(each)
                patch = patch + ((each * mask).sum(-1) / mask.sum(-1).clamp(min=1.0)).mean() / 2
            else:
                cls = cls - (t_cls[q] * s_cls[v].log_softmax(-1)).sum(-1).mean()
                pairs += 1
    return cls / pairs, patch


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-10), (torch.float32, 1e-5)])
def test_loss_and_gradients_equal_the_published_loops(dtype: torch.dtype, tolerance: float) -> None:
    ibot = spread(tiny_ibot(norm_last_layer=False)).to(dtype).train()
    batch = {key: value if key == "mask" else value.to(dtype) for key, value in make_batch(ibot).items()}
    assert batch["mask"].any()
    assert not batch["mask"].flatten(0, 1).any(1).all(), "views with and without masks"
    ibot.before_step(Progress(0, 10, 3.0, 100.0, 0.0))
    loss, metrics = ibot(batch)
    cls, patch = published_loss(ibot, batch, 0.04 + 0.03 * 3 / 29, 0.04 + 0.03 * 3 / 29)
    torch.testing.assert_close(metrics["cls_loss"], cls.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(metrics["patch_loss"], patch.detach(), rtol=tolerance, atol=0)
    torch.testing.assert_close(loss, cls + patch, rtol=tolerance, atol=0)
    trained = [p for p in ibot.parameters() if p.requires_grad]
    for ours, theirs in zip(torch.autograd.grad(loss, trained), torch.autograd.grad(cls + patch, trained), strict=True):
        assert (ours - theirs).abs().max() <= 10 * tolerance * theirs.abs().max()


def test_losses_equal_lightly() -> None:
    """lightly's DINO loss and iBOT patch loss, also the centre that it moves to."""
    pytest.importorskip("lightly")
    from lightly.loss import DINOLoss, IBOTPatchLoss

    from ssl_vit.modules.self_distillation import (
        cross_view_loss,
        masked_loss,
        student_log_probabilities,
        teacher_probabilities,
    )

    torch.manual_seed(0)
    teacher, student, centre = torch.randn(5, 2, 16), torch.randn(5, 6, 16), torch.randn(16)
    theirs = DINOLoss(output_dim=16, student_temp=0.1, center_momentum=0.9)
    theirs.center.data = centre[None, None].clone()
    expected = theirs([*teacher.unbind(1)], [*student.unbind(1)], teacher_temp=0.05)
    ours = cross_view_loss(teacher_probabilities(teacher, centre, 0.05), student_log_probabilities(student, 0.1))
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)
    moving = Centre(16, 0.9)
    moving.value.copy_(centre)
    for part in (teacher[:2], teacher[2:]):  # two micro-batches
        moving.add(part.flatten(0, 1).sum(0), part.shape[0] * 2)
    moving.step(torch.ones(()))
    torch.testing.assert_close(moving.value, theirs.center.flatten(), rtol=1e-5, atol=1e-7)

    mask = torch.rand(4, 3, 3) < 0.5
    mask[1] = False
    patches, predicted = torch.randn(4, 9, 16), torch.randn(4, 9, 16)
    theirs = IBOTPatchLoss(output_dim=16, student_temp=0.1)
    flat = mask.flatten(1)
    expected = theirs(patches[flat], predicted[flat], mask, teacher_temp=0.06)
    weight = flat / flat.sum(1, keepdim=True).clamp(min=1)
    ours = masked_loss(
        teacher_probabilities(patches, torch.zeros(16), 0.06), student_log_probabilities(predicted, 0.1), weight
    )
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=0)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("norm_last_layer", [True, False])
def test_head_equals_lightly(norm_last_layer: bool) -> None:
    pytest.importorskip("lightly")
    from lightly.models.modules.heads import DINOProjectionHead

    torch.manual_seed(0)
    ours = ProjectionHead(12, 20, 16, 6, norm_last_layer)
    theirs = DINOProjectionHead(12, 16, 6, 20, norm_last_layer=norm_last_layer)
    linears = [module for module in theirs.layers if isinstance(module, torch.nn.Linear)]
    for mine, other in zip([m for m in ours.mlp if isinstance(m, torch.nn.Linear)], linears, strict=True):
        other.load_state_dict(mine.state_dict())
    theirs.last_layer.weight_v.data.copy_(ours.weight_v)
    tokens = torch.randn(7, 12)
    torch.testing.assert_close(ours(tokens), theirs(tokens), rtol=1e-5, atol=1e-6)
    names = {name for name, p in ours.named_parameters() if not p.requires_grad}
    assert names == ({"weight_g"} if norm_last_layer else set())
    count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
    assert count(ours) == count(theirs)
    assert (ours.weight_g == 1).all()
    assert ours.weight_v.abs().max() <= 6**-0.5


def test_the_head_keeps_float32_under_autocast() -> None:
    head, tokens = ProjectionHead(12, 20, 16, 6), torch.randn(7, 12)
    with torch.autocast("cpu", torch.bfloat16):
        logits = head.prototypes(tokens[:, :6])
    assert logits.dtype == torch.float32
    assert torch.equal(logits, head.prototypes(tokens[:, :6]))


# ------------------------------------------------------------------------------- teacher, centres, state


def test_teacher_is_the_exact_average_and_nothing_else_moves_it() -> None:
    ibot = spread(tiny_ibot()).train()
    before = {name: value.clone() for name, value in ibot.state_dict().items()}
    batch = make_batch(ibot)
    ibot.before_step(Progress(0, 10, 0.0, 1.0, 0.3))
    momentum = 1 - 0.004 * (1 + math.cos(0.3 * math.pi)) / 2
    assert ibot.momentum == pytest.approx(momentum, abs=1e-12)
    ibot(batch)
    for name, value in ibot.state_dict().items():
        assert torch.equal(value, before[name]), name
    ibot.after_step(torch.ones(()))
    for prefix, source in (("encoder.", "student."), ("teacher_head.", "student_head.")):
        for name in [n for n in before if n.startswith(prefix)]:
            expected = before[name] * ibot.momentum + before[source + name.removeprefix(prefix)] * (1 - ibot.momentum)
            assert torch.equal(ibot.state_dict()[name], expected), name
    assert not ibot.encoder.training
    assert not ibot.teacher_head.training
    assert ibot.student.training
    assert not [p for part in (ibot.encoder, ibot.teacher_head) for p in part.parameters() if p.requires_grad]


def test_a_skipped_step_moves_nothing() -> None:
    ibot = spread(tiny_ibot()).train()
    before = {name: value.clone() for name, value in ibot.state_dict().items()}
    batch = make_batch(ibot)
    batch["global_views"][0] = float("nan")
    ibot(batch)
    ibot.after_step(torch.zeros(()))
    assert all(torch.equal(value, before[name]) for name, value in ibot.state_dict().items())
    ibot(make_batch(ibot))
    ibot.after_step(torch.ones(()))
    assert all(value.isfinite().all() for value in ibot.state_dict().values()), "what was skipped is forgotten"


def test_buffers_are_copied() -> None:
    student, teacher = torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3)
    student(torch.randn(8, 3))
    EMA(teacher).update(student, 0.5, torch.zeros(()))
    assert teacher.num_batches_tracked == 0
    EMA(teacher).update(student, 0.5, torch.ones(()))
    assert torch.equal(teacher.running_mean, student.running_mean)
    assert teacher.num_batches_tracked == 1


def test_centres_are_means_over_all_patches_and_micro_batches() -> None:
    ibot = spread(tiny_ibot(centre_momentum=0.7)).double().train()
    batch = {k: v if k == "mask" else v.double() for k, v in make_batch(ibot, 4).items()}
    old = ibot.cls_centre.value.clone(), ibot.patch_centre.value.clone()
    with torch.no_grad():
        tokens = ibot.encoder(batch["global_views"].flatten(0, 1))
        means = ibot.teacher_head(tokens.prefix[:, 0]).mean(0), ibot.teacher_head(tokens.patches).mean((0, 1))
    for half in (slice(0, 2), slice(2, 4)):
        ibot({key: value[half] for key, value in batch.items()})
    ibot.after_step(torch.ones((), dtype=torch.float64))
    for centre, before, mean in zip((ibot.cls_centre, ibot.patch_centre), old, means, strict=True):
        torch.testing.assert_close(centre.value, 0.7 * before + 0.3 * mean, rtol=1e-10, atol=1e-12)


def test_student_starts_as_the_teacher_also_from_a_file(images: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    source = create_encoder(**TINY_ENCODER)
    torch.save(source.model.state_dict(), tmp_path / "encoder.pt")
    values = tiny_recipe(images, tmp_path, objective={"name": "ibot", **TINY})
    for init in (None, str(tmp_path / "encoder.pt")):
        values["encoder"]["init"] = init
        ibot = build_objective(check_recipe(check(Recipe, values)))
        for name, value in ibot.encoder.state_dict().items():
            assert torch.equal(value, ibot.student.state_dict()[name]), name
        for name, value in ibot.teacher_head.state_dict().items():
            assert torch.equal(value, ibot.student_head.state_dict()[name]), name
    assert torch.equal(ibot.student.model.cls_token, source.model.cls_token)


@pytest.mark.parametrize("ill", [True, False], ids=["collapsed", "healthy"])
def test_a_collapse_is_said_once_with_its_knobs(
    ill: bool, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """B80: teacher temperature 0.5 and batches of 4; a healthy small run gets no warning."""
    objective = {"name": "ibot", **TINY, "init_std": 0.02 if ill else 0.1, "momentum": 0.95}
    objective |= {"teacher_temp": [0.5, 0.5], "teacher_patch_temp": [0.5, 0.5]} if ill else {}
    values = tiny_recipe(images, tmp_path / "run", objective=objective, optim__epochs="160 steps")
    values["optim"] |= {"batch_size": 4 if ill else 16}
    values["run"] |= {"log_every": 10, "save_every": "160 steps"}
    run(check_recipe(check(Recipe, values)))
    found = [r.message for r in caplog.records if "collapse suspected" in r.message]
    assert len(found) == ill
    if ill:
        assert "lower objective.teacher_temp" in found[0]


def test_metrics_tell_a_collapse() -> None:
    """B80: all on one prototype: entropy 0; spread evenly: ln K and no divergence; neither when healthy."""
    ibot = spread(tiny_ibot()).eval()
    batch = make_batch(ibot)
    healthy = ibot(batch)[1]
    assert 0.01 < healthy["cls_entropy"] < math.log(32) - 0.01
    assert healthy["cls_kl"] > 0.01
    for value in (0.0, 50.0):
        even = copy.deepcopy(ibot)
        with torch.no_grad():
            for head in (even.student_head, even.teacher_head):
                head.weight_g.zero_()
            even.cls_centre.value.zero_()[0] -= value
            even.patch_centre.value.zero_()[0] -= value
        metrics = even(batch)[1]
        for part in ("cls", "patch"):
            assert metrics[f"{part}_entropy"].item() == pytest.approx(0 if value else math.log(32), abs=1e-4)
            assert metrics[f"{part}_centre_norm"].item() == pytest.approx(value)
            if not value:
                assert metrics[f"{part}_kl"].item() == pytest.approx(0, abs=1e-4)


# --------------------------------------------------------------------------------------------- schedules


def test_published_settings() -> None:
    """RECIPES: AdamW, 5e-4 x 1024/256, decay .04 to .4, 10 + 790 epochs to 1e-6, clip 3 of each parameter, 10 crops."""
    values = load(
        [ROOT / "configs" / "pretrain" / "ibot_vit_small_patch16_in1k.yaml"], ["data.train=builtin:digits-train"]
    )
    recipe = check_recipe(check(Recipe, values))
    optim, objective = recipe.optim, recipe.objective
    assert (optim.name, optim.betas, optim.batch_size, optim.base_lr) == ("adamw", (0.9, 0.999), 1024, 5e-4)
    assert (optim.weight_decay, optim.weight_decay_end, optim.min_lr) == (0.04, 0.4, 1e-6)
    assert (str(optim.epochs), str(optim.warmup_epochs)) == ("800", "10")
    assert (optim.clip_grad, optim.clip_mode) == (3.0, "per_parameter")
    assert {key: objective[key] for key in ("out_dim", "hidden_dim", "bottleneck_dim", "norm_last_layer")} == {
        "out_dim": 8192, "hidden_dim": 2048, "bottleneck_dim": 256, "norm_last_layer": False,
    }  # fmt: skip
    assert (objective["freeze_last_layer"], objective["momentum"], objective["student_temp"]) == (1, 0.996, 0.1)
    assert tuple(objective["teacher_temp"]) == tuple(objective["teacher_patch_temp"]) == (0.04, 0.07)
    assert (objective["warmup_teacher_temp_epochs"], objective["centre_momentum"]) == (30, 0.9)
    assert (tuple(objective["mask_ratio"]), tuple(objective["mask_variance"])) == ((0.0, 0.3), (0.0, 0.2))
    assert (objective["local_crops"], objective["local_size"]) == (10, 96)
    assert (tuple(objective["global_scale"]), tuple(objective["local_scale"])) == ((0.25, 1.0), (0.05, 0.25))
    assert recipe.encoder["drop_path_rate"] == 0.1
    assert recipe.encoder["pos_embed"] == "learned"


def test_schedules_equal_the_published_arrays() -> None:
    """cosine_scheduler and the concatenated linspace of the published code, at every step of 40 epochs of 5."""
    epochs, per_epoch = 40, 5
    total = epochs * per_epoch
    momentum = 1 + 0.5 * (0.996 - 1) * (1 + np.cos(np.pi * np.arange(total) / total))
    temps = np.concatenate([np.linspace(0.04, 0.07, 30), np.ones(epochs - 30) * 0.07])
    decay = 0.4 + 0.5 * (0.04 - 0.4) * (1 + np.cos(np.pi * np.arange(total) / total))
    ibot = tiny_ibot(teacher_patch_temp=(0.05, 0.05))
    optim = OptimSection(weight_decay=0.04, weight_decay_end=0.4)
    groups = parameter_groups(ibot, 0.04)
    for step in range(total):
        ibot.before_step(Progress(step, total, step / per_epoch, float(epochs), step / total))
        assert ibot.momentum == pytest.approx(momentum[step], abs=1e-12)
        assert ibot.cls_temp == pytest.approx(temps[step // per_epoch], abs=1e-12)
        assert ibot.patch_temp == pytest.approx(0.05)
        assert bool(ibot.resting) == (step < per_epoch)
        set_schedule(groups, optim, 1.0, step / total)
        assert [group["weight_decay"] for group in groups] == pytest.approx([decay[step], 0.0], abs=1e-12)


def test_clipping_of_each_parameter() -> None:
    torch.manual_seed(0)
    parameters = [torch.nn.Parameter(torch.zeros(n)) for n in (3, 40, 500)] + [torch.nn.Parameter(torch.zeros(2))]
    for parameter in parameters[:3]:
        parameter.grad = torch.randn_like(parameter)
    expected = []
    for parameter in parameters[:3]:
        scale = 3.0 / (parameter.grad.norm(2) + 1e-6)
        expected.append(parameter.grad * scale if scale < 1 else parameter.grad.clone())
    clip_gradients(parameters, torch.zeros(()), OptimSection(clip_grad=3.0, clip_mode="per_parameter"))
    for parameter, gradient in zip(parameters[:3], expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-6, atol=0)
    assert parameters[0].grad.norm() < 3 < torch.tensor(500.0).sqrt()
    assert parameters[3].grad is None


# ------------------------------------------------------------------------------------------------- masks


def published_blocks(height: int, width: int, high: float) -> np.ndarray:
    """iBOT's loader, restated with its draws in its order."""
    mask, count = np.zeros((height, width), dtype=bool), 0
    while count < high:
        delta = 0
        for _ in range(10):
            area = random.uniform((min(height, width) // 3) ** 2, high - count)
            aspect = math.exp(random.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if w < width and h < height:
                top, left = random.randint(0, height - h), random.randint(0, width - w)
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= high - count:
                    mask[top : top + h, left : left + w] = True
                    delta = int(new)
                    break
        if not delta:
            break
        count += delta
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (4, 4), (3, 7)])
def test_blocks_equal_the_published_loader(grid: tuple[int, int]) -> None:
    for seed in range(400):
        ratio = 0.1 + 0.4 * seed / 400
        random.seed(seed)
        expected = published_blocks(*grid, ratio * grid[0] * grid[1])
        random.seed(seed)
        wanted, smallest = ratio * grid[0] * grid[1], (min(grid) // 3) ** 2
        found = block_mask(grid, wanted, smallest, exact=False)
        assert np.array_equal(found.unflatten(0, grid).numpy(), expected)


@pytest.mark.parametrize("shape", ["block", "random"])
def test_masks_over_ten_thousand_draws(shape: str) -> None:
    """Half the views unmasked, the others 10 to 50 % (mean 30 %) of 196; never more than the loss computes."""
    seed_generators(0)
    rule = MaskRule((14, 14), (0.0, 0.3), (0.0, 0.2), shape)
    masks = torch.stack([rule.draw() for _ in range(10_000)])
    counts = masks.sum(1)
    assert rule.most == 98
    assert counts.max() <= 98
    masked = counts[counts > 0]
    assert len(masked) / 10_000 == pytest.approx(0.5, abs=0.02)  # four standard errors
    assert masked.float().mean().item() / 196 == pytest.approx(0.3, abs=0.015)
    assert masked.min() >= 0.05 * 196
    often = masks.float().mean(0).unflatten(0, (14, 14))
    assert often.min() > 0, "every patch is masked at times"
    if shape == "random":
        assert often.std() < 0.01
    else:  # blocks: neighbours agree more than chance
        pair = masks[counts > 0].unflatten(1, (14, 14))
        assert (pair[:, :, 1:] == pair[:, :, :-1]).float().mean() > 0.8


# ------------------------------------------------------------------------------------------------- views


def test_views_have_their_sizes_and_are_seeded() -> None:
    ibot = tiny_ibot({"img_size": (16, 48)})
    view = ibot.views((16, 48))
    sample = {"image": torch.randint(0, 256, (3, 50, 60), dtype=torch.uint8), "label": 0}
    drawn = []
    for seed in (3, 3, 4):
        seed_generators(seed)
        drawn.append(view(dict(sample)))
    first, again, other = drawn
    assert {key: (tuple(value.shape), value.dtype) for key, value in first.items()} == {
        "global_views": ((2, 3, 16, 48), torch.uint8),
        "local_views": ((2, 3, 16, 16), torch.uint8),
        "mask": ((2, 12), torch.bool),
    }
    assert all(torch.equal(first[key], again[key]) for key in first)
    assert not torch.equal(first["global_views"], other["global_views"])
    assert "local_views" not in tiny_ibot(local_crops=0).views((32, 32))(sample)


def test_colours_change_as_often_as_published() -> None:
    """Each change alone, by its probability over 2,000 draws, against Pillow's own result."""
    image = torch.randint(0, 256, (3, 8, 8), dtype=torch.uint8)
    picture = Image.fromarray(image.permute(1, 2, 0).numpy())
    nothing = {"jitter_prob": 0.0, "grey": 0.0, "blur": 0.0, "solarise": 0.0}
    seed_generators(0)
    for key, probability in (("jitter_prob", 0.8), ("grey", 0.2), ("blur", 0.1), ("solarise", 0.2)):
        view = ColourView((8, 8), (1.0, 1.0), (1.0, 1.0), 0.0, "bicubic", **{**nothing, key: probability})
        changed = [view.recolour(image) for _ in range(2000)]
        share = sum(not torch.equal(result, image) for result in changed) / 2000
        assert share == pytest.approx(probability, abs=0.04)
        assert all(result.dtype == torch.uint8 and result.shape == image.shape for result in changed)
        if key == "grey":
            grey = torch.from_numpy(np.array(picture.convert("L"))).expand(3, 8, 8)
            assert any(torch.equal(result, grey) for result in changed)
        if key == "solarise":
            solarised = torch.where(image < 128, image, 255 - image)
            assert any(torch.equal(result, solarised) for result in changed)
    none = ColourView((8, 8), (1.0, 1.0), (1.0, 1.0), 0.0, "bicubic", **nothing)
    assert torch.equal(none.view(image), image)
    published = tiny_ibot().view
    assert [v.blur for v in (published.first, published.second, published.small)] == [1.0, 0.1, 0.5]
    assert [v.solarise for v in (published.first, published.second, published.small)] == [0.0, 0.2, 0.0]


# --------------------------------------------------------------------------------------- sizes of images


def test_learned_positions_are_resized_as_published() -> None:
    """interpolate_pos_encoding of DINO and iBOT, forward and backward; the teacher still takes one size only."""
    ibot = tiny_ibot({"pos_embed": "learned", "img_size": (32, 48)}).double()
    model = ibot.student.model
    small = torch.randn(2, 3, 16, 24, dtype=torch.float64)
    patches = model.pos_embed[:, 1:].reshape(1, 4, 6, 48).permute(0, 3, 1, 2)
    resized = F.interpolate(patches, scale_factor=(2.1 / 4, 3.1 / 6), mode="bicubic").permute(0, 2, 3, 1).flatten(1, 2)
    positions = torch.cat([model.pos_embed[:, :1], resized], dim=1)
    expected = published_tokens(model, small, None, None, positions)
    tokens = ibot.student(small)
    torch.testing.assert_close(torch.cat(tokens, dim=1), expected, rtol=1e-10, atol=1e-10)
    ours = torch.autograd.grad(tokens.prefix.square().sum(), model.pos_embed)[0]
    theirs = torch.autograd.grad(expected[:, :1].square().sum(), model.pos_embed)[0]
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    with pytest.raises(ValueError, match="this encoder takes"):
        ibot.encoder(small)
    with pytest.raises(ValueError, match="this encoder takes"):
        ibot.student(torch.zeros(1, 3, 16, 20, dtype=torch.float64))


@pytest.mark.parametrize(
    ("encoder", "changes", "message"),
    [
        ({"class_token": False, "global_pool": "avg"}, {}, "needs a class token"),
        ({"name": "beit_base_patch16_224"}, {}, r"beit_base_patch16_224'.* images of one size only; allowed: a vit_\*"),
        ({"in_chans": 4}, {}, "in_chans=4"),
        ({}, {"local_size": 20}, "local_size=20: should be a multiple of patch_size=8; nearest: 16"),
        ({}, {"local_crops": -1}, "local_crops=-1"),
        ({}, {"mask_ratio": (0.0,), "mask_variance": (0.0,)}, "at least a patch"),
        ({}, {"mask_ratio": (0.3,), "mask_variance": (0.4,)}, "allowed: 0 <= variance"),
        ({}, {"mask_ratio": (0.3,)}, "one number for each"),
        ({}, {"teacher_temp": (0.0, 0.07)}, "teacher_temp"),
        ({}, {"momentum": 1.5}, "momentum=1.5"),
        ({}, {"centre_momentum": 1.0}, "centre_momentum=1.0"),
        ({}, {"out_dim": 0}, "head_out_dim=0"),
        ({}, {"grey": 1.5}, "grey=1.5"),
        ({}, {"global_scale": (0.0, 1.0)}, "crop_scale"),
    ],
)
def test_impossible_settings_are_refused(encoder: dict[str, Any], changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_ibot(encoder, **changes)


@pytest.mark.parametrize("encoder", [TINY_SWIN, {"name": "resnet18", "img_size": 32}], ids=["swin", "resnet"])
def test_networks_without_a_class_token_are_refused(encoder: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"iBOT needs a class token; allowed: vit_\* with one"):
        IBOT(create_encoder(**encoder), **TINY)


@pytest.mark.parametrize(
    ("name", "millions"), [("vit_small_patch16", 21.7), ("vit_base_patch16", 85.8), ("vit_large_patch16", 303.3)]
)
def test_published_sizes_on_the_meta_device(name: str, millions: float) -> None:
    with torch.device("meta"):
        ibot = IBOT(create_encoder(name=name, pos_embed="learned", drop_path_rate=0.1))
    width = ibot.encoder.embed_dim
    assert sum(p.numel() for p in ibot.student.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
    head = width * 2048 + 2048 + 2048 * 2048 + 2048 + 2048 * 256 + 256 + 256 * 8192 + 8192
    assert sum(p.numel() for p in ibot.student_head.parameters()) == head


# ----------------------------------------------------------------------------------------------- layouts


def test_resting_prototypes_are_refused_where_all_parameters_move() -> None:
    with pytest.raises(InputError, match=r"objective\.freeze_last_layer\), and ZeRO-2 moves all"):
        Launch("zero", 2, stage=2).check(tiny_ibot())
    Launch("zero", 2, stage=2).check(tiny_ibot(freeze_last_layer=0))
    Launch("ddp", 2).check(tiny_ibot(), clip_mode="per_parameter")


def ibot_recipe(images: Path, folder: Path, **optim: Any) -> dict[str, Any]:
    values = tiny_recipe(images, folder, objective={"name": "ibot", **TINY, "warmup_teacher_temp_epochs": 2})
    values["optim"] |= {"weight_decay_end": 0.4, "clip_grad": 0.3, "clip_mode": "per_parameter", **optim}
    values["run"] |= {"micro_batch_size": 4, "keep_last": 20}
    return values


def lines(folder: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if "loss" in line]


@pytest.mark.processes
def test_two_processes_micro_batches_and_resumes_are_one_training(images: Path, tmp_path: Path) -> None:
    """Prototypes rest for the first 4.5 of 12 steps. Losses and centres to 1e-5; a resume at step 4 bit for bit."""
    values = ibot_recipe(images, tmp_path / "one")
    run(check_recipe(check(Recipe, values)))
    whole = ibot_recipe(images, tmp_path / "whole")
    whole["run"] |= {"micro_batch_size": 16}
    run(check_recipe(check(Recipe, whole)))
    two = ibot_recipe(images, tmp_path / "two")
    (tmp_path / "r.yaml").write_text(to_yaml(two))
    words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "pipelines/pretrain_ibot.py"]
    done = run_python(*words, "--config", str(tmp_path / "r.yaml"), env={"ACCELERATE_USE_CPU": "true"})
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "two" / "environment.json").read_text())["num_processes"] == 2
    one = lines(tmp_path / "one")
    assert len(one) == 12
    for other in ("whole", "two"):
        assert [v["loss"] for v in lines(tmp_path / other)] == pytest.approx([v["loss"] for v in one], rel=1e-5)
        for key in ("cls_centre_norm", "patch_centre_norm", "grad_norm"):
            assert [v[key] for v in lines(tmp_path / other)] == pytest.approx([v[key] for v in one], rel=1e-4)

    states = [read_checkpoint(tmp_path / "one" / "checkpoints" / f"step_{s:08d}") for s in (0, 4, 8)]
    first, resting, moving = (state.weights["student_head.weight_v"] for state in states)
    assert torch.equal(first, resting), "not moved and not decayed either"
    assert not torch.equal(resting, moving)
    assert not torch.equal(
        states[0].weights["student_head.mlp.0.weight"], states[1].weights["student_head.mlp.0.weight"]
    )
    assert states[1].weights["cls_centre.value"].any()

    values["run"] |= {"dir": str(tmp_path / "again")}
    run(check_recipe(check(Recipe, values)), resume=str(tmp_path / "one" / "checkpoints" / "step_00000004"))
    assert [v["loss"] for v in lines(tmp_path / "again")] == [v["loss"] for v in one][4:]
    final = [read_checkpoint(tmp_path / name / "checkpoints" / "step_00000012").weights for name in ("one", "again")]
    assert final[0].keys() == final[1].keys()
    assert all(torch.equal(final[0][name], final[1][name]) for name in final[0])
    teacher = {name for name in final[0] if name.startswith("encoder.")}
    assert any(not torch.equal(final[0][n], final[0][n.replace("encoder.", "student.", 1)]) for n in teacher)
