"""SimMIM and Swin: equal to transformers' and timm's, masks as published, schedules, whole runs, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from conftest import TINY_ENCODER, TINY_SWIN
from torch import Tensor

from ssl_vit.data.masking import masked_units, unit_mask
from ssl_vit.encoders.base import create_encoder
from ssl_vit.objectives.simmim import SimMIM
from ssl_vit.training.optim import OptimSection, build_optimizer
from ssl_vit.training.plan import Plan


def swin(**changes: Any) -> Any:
    torch.manual_seed(0)
    return create_encoder(**{**TINY_SWIN, **changes})


BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def filled(objective: torch.nn.Module, dtype: torch.dtype = torch.float64) -> Any:
    """Every parameter different from its initial value."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return objective.to(dtype).eval()


def check_close(found: Tensor, expected: Tensor, name: str = "") -> None:
    assert (found - expected).abs().max() <= BOUNDS[expected.dtype] * expected.abs().max(), name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_vit_equals_transformers(dtype: torch.dtype) -> None:
    """ViTForMaskedImageModeling with the same weights, images and masks: loss, pixels and gradients."""
    from transformers import ViTConfig, ViTForMaskedImageModeling

    torch.manual_seed(0)
    encoder = create_encoder(**TINY_ENCODER, pos_embed="learned", global_pool="avg")
    ours = filled(SimMIM(encoder, mask_unit=8), dtype)
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        encoder_stride=8, layer_norm_eps=1e-6, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0,
    )  # fmt: skip
    theirs = ViTForMaskedImageModeling(config).to(dtype).eval()
    names = list(theirs.state_dict())
    theirs.load_state_dict(_of_transformers(names, ours.state_dict()))
    image = torch.randn(3, 3, 32, 32, dtype=dtype)
    mask = torch.stack([unit_mask((32, 32), 8, 8, 0.6) for _ in range(3)])
    expected = theirs(pixel_values=image, bool_masked_pos=mask.long())
    loss, _ = ours({"image": image, "mask": mask})
    check_close(ours.predict({"image": image, "mask": mask}), expected.reconstruction)
    count = mask.sum() * 64  # the published 1e-5 beside it only guards an empty mask
    whole = expected.loss * (count + 1e-5) / count
    check_close(loss, whole)
    loss.backward(), whole.backward()
    gradients = _of_transformers(names, {name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    found = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert found.keys() == dict(theirs.named_parameters()).keys()
    for name, gradient in found.items():
        # 0 for the keys' bias, which changes no attention: as exact as the other biases
        scale = found[name.replace("k_proj.bias", "q_proj.bias")].abs().max()
        assert (gradients[name] - gradient).abs().max() <= BOUNDS[dtype] * scale, name


def _of_transformers(names: list[str], own: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors under transformers' names."""
    prefix = "encoder.model."
    mapped = {
        "vit.embeddings.cls_token": own[prefix + "cls_token"],
        "vit.embeddings.mask_token": own["mask_token"],
        "vit.embeddings.position_embeddings": own[prefix + "pos_embed"],
        "vit.embeddings.patch_embeddings.projection.weight": own[prefix + "patch_embed.proj.weight"],
        "vit.embeddings.patch_embeddings.projection.bias": own[prefix + "patch_embed.proj.bias"],
        "vit.layernorm.weight": own[prefix + "norm.weight"],
        "vit.layernorm.bias": own[prefix + "norm.bias"],
        "decoder.0.weight": own["head.weight"][:, :, None, None],
        "decoder.0.bias": own["head.bias"],
    }
    return mapped | {name: _block_tensor(name, own, prefix) for name in names if name not in mapped}


def _block_tensor(name: str, own: dict[str, Tensor], prefix: str) -> Tensor:
    """A block's tensor of transformers from ours: q, k, v are one matrix here."""
    import re

    number = re.search(r"\.(\d+)\.", name)
    assert number, name
    block, kind = f"{prefix}blocks.{number[1]}.", name.rpartition(".")[2]
    for i, part in enumerate(("q", "k", "v")):
        if re.search(rf"\b({part}_proj|query|key|value)\b", name) and re.search(
            rf"\b({part}_proj|{('query', 'key', 'value')[i]})\b", name
        ):
            return own[f"{block}attn.qkv.{kind}"].chunk(3)[i]
    for pattern, target in (
        (r"o_proj|attention\.output\.dense|attention\.o_", "attn.proj"), (r"layernorm_before", "norm1"),
        (r"layernorm_after", "norm2"), (r"fc1|intermediate\.dense", "mlp.fc1"), (r"fc2|output\.dense", "mlp.fc2"),
    ):  # fmt: skip
        if re.search(pattern, name):
            return own[f"{block}{target}.{kind}"]
    raise AssertionError(name)


@pytest.mark.parametrize("changes", [{}, {"img_size": (32, 48)}, {"in_chans": 1}, {"drop_path_rate": 0.1}], ids=str)
def test_swin_equals_timm(changes: dict[str, Any]) -> None:
    encoder = filled(swin(**changes))
    image = torch.randn(2, encoder.in_chans, *encoder.img_size, dtype=torch.float64)
    tokens = encoder(image)
    check_close(tokens.patches, encoder.model.forward_features(image).flatten(1, 2))
    check_close(encoder.pool(tokens), encoder.model(image))
    assert tokens.prefix.shape == (2, 0, encoder.token_dim)
    assert encoder.patch_size == 4
    assert encoder.mask_stride == 2
    architecture, arguments = encoder.timm_config()
    other = timm.create_model(architecture, **arguments).double().eval()
    other.load_state_dict(encoder.model.state_dict())
    check_close(other(image), encoder.pool(tokens))
    again = create_encoder(**encoder.config())
    assert again.config() == encoder.config()


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_swin_with_masks_follows_the_formula(dtype: torch.dtype) -> None:
    """x * (1 - w) + token * w on the first patches (section 3.3), then timm's own stages; loss and gradients."""
    objective = filled(SimMIM(swin(), mask_unit=8), dtype)
    model = objective.encoder.model
    image = torch.randn(2, 3, 32, 32, dtype=dtype)
    mask = torch.stack([unit_mask((32, 32), 8, 2, 0.6) for _ in range(2)])
    embedded = model.patch_embed(image)
    w = mask.view(2, 16, 16, 1).to(dtype)
    tokens = model.norm(model.layers(embedded * (1 - w) + objective.mask_token.view(1, 1, 1, -1) * w))
    pixels = torch.nn.functional.pixel_shuffle(objective.head(tokens).permute(0, 3, 1, 2), 4)
    weight = mask.view(2, 1, 16, 16).repeat_interleave(2, 2).repeat_interleave(2, 3).to(dtype)
    expected = ((image - pixels).abs() * weight).sum() / weight.sum() / 3
    loss, _ = objective({"image": image, "mask": mask})
    check_close(loss, expected)
    check_close(objective.predict({"image": image, "mask": mask}), pixels)
    names, parameters = zip(*objective.named_parameters(), strict=True)
    gradients = (torch.autograd.grad(value, parameters) for value in (loss, expected))
    for name, ours, theirs in zip(names, *gradients, strict=True):
        check_close(ours, theirs, name)


def test_masks_are_units_of_the_published_count() -> None:
    """192 px, units of 32: ceil(0.6 x 36) = 22 of 36, each with equal chance, over 10,000 draws."""
    torch.manual_seed(0)
    draws = torch.stack([unit_mask((192, 192), 32, 4, 0.6) for _ in range(10_000)]).view(-1, 48, 48)
    units = draws.view(-1, 6, 8, 6, 8)
    assert (units == units[:, :, :1, :, :1]).all(), "a unit is masked as a whole"
    units = units[:, :, 0, :, 0]
    assert (units.flatten(1).sum(dim=1) == 22).all()
    shares = units.float().mean(dim=0)
    error = (22 / 36 * 14 / 36 / 10_000) ** 0.5
    assert (shares - 22 / 36).abs().max() < 5 * error
    assert masked_units(49, 0.6) == 30
    assert unit_mask((32, 32), 8, 8, 0.5).sum() == 8


def test_parameters_of_published_swins() -> None:
    """Swin-B 86.7 M and Swin-L 195.0 M without head (arXiv 2103.14030: 88 M and 197 M with it)."""
    with torch.device("meta"):
        for name, window, expected in (("base", 6, 86.7e6), ("large", 12, 195.0e6)):
            encoder = create_encoder(name=f"swin_{name}_patch4_window7_224", img_size=192, window_size=window)
            assert sum(p.numel() for p in encoder.parameters()) == pytest.approx(expected, rel=2e-3)


def test_weight_decay_spares_what_the_paper_spares() -> None:
    optimizer = build_optimizer(SimMIM(swin(), mask_unit=8), OptimSection())
    spared = optimizer.param_groups[1]["names"]
    assert "mask_token" in spared
    assert any(name.endswith("relative_position_bias_table") for name in spared)
    assert not any("bias_table" in name for name in optimizer.param_groups[0]["names"])


def test_its_own_schedules() -> None:
    """Warm-up from 2e-6 over 10 epochs, then x 0.1 at epoch 700 of 800 (batch 2048, base 1e-4 per 512)."""
    optim = OptimSection(
        batch_size=2048, epochs=800, base_lr=1e-4, lr_divisor=512, warmup_epochs=10, warmup_lr=2e-6,  # pyright: ignore
        schedule="multistep", milestones=[700],  # pyright: ignore
    )  # fmt: skip
    plan = Plan(optim, 1_281_152, 128, 16)
    per_epoch = 1_281_152 / 2048
    assert plan.learning_rate(0) == 2e-6
    assert plan.learning_rate(plan.warmup_steps // 2) == pytest.approx((2e-6 + 4e-4) / 2, rel=1e-2)
    assert plan.learning_rate(plan.warmup_steps) == plan.learning_rate(int(699.9 * per_epoch)) == 4e-4
    assert plan.learning_rate(int(700.1 * per_epoch)) == plan.learning_rate(plan.total_steps - 1) == pytest.approx(4e-5)
    with pytest.raises(ValueError, match="milestones belong to schedule=multistep"):
        OptimSection(schedule="multistep")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_unit": 12}, "mask_unit=12: should be a multiple of 8, the encoder's patches, and divide img_size"),
        ({"mask_unit": 32}, "1 of 1 units would be masked"),
        ({"mask_ratio": 1.0, "mask_unit": 8}, "16 of 16 units would be masked"),
    ],
)
def test_impossible_values_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SimMIM(create_encoder(**TINY_ENCODER), **changes)


def test_a_network_without_a_place_for_the_token_is_refused() -> None:
    with pytest.raises(ValueError, match="name='resnet18': has no place for a mask token; allowed: vit"):
        SimMIM(create_encoder(name="resnet18", img_size=32), mask_unit=8)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"img_size": 30},
            "img_size=30: its height 30 should be a multiple of 4, the stride of the last.*nearest: 32",
        ),
        ({"num_heads": [2]}, "should have a number for each of depths"),
        ({"num_heads": [5, 4]}, "stage 0 num_heads=5: should divide"),
        ({"name": "swin_tinny_patch4_window7_224"}, "did you mean 'swin_tiny_patch4_window7_224'"),
        ({"window_size": 0}, "window_size=0"),
    ],
)
def test_impossible_swins_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        swin(**changes)
