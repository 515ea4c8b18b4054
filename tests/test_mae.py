"""MAE's behaviour: initialisation, groups, gradients, pictures, sizes, refusals."""

from __future__ import annotations

import copy
import math
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.modules.patches import patchify, split_mask, unpatchify
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.objectives.mae import MAE


def tiny_encoder(**changes: Any) -> Encoder:
    arguments = {"name": "vit_tiny_patch16", "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}
    return create_encoder(**{**arguments, **changes})


def tiny_mae(encoder: dict[str, Any] | None = None, **changes: Any) -> MAE:
    torch.manual_seed(0)
    arguments = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}
    return MAE(tiny_encoder(**(encoder or {})), **{**arguments, **changes})


def make_batch(mae: MAE, batch_size: int = 3) -> dict[str, Tensor]:
    h, w = mae.encoder.grid_size
    masks = [torch.randperm(h * w) >= mae.num_visible for _ in range(batch_size)]
    return {"image": torch.randn(batch_size, mae.encoder.in_chans, *mae.encoder.img_size), "mask": torch.stack(masks)}


VARIANTS: list[dict[str, Any]] = [
    {},
    {"in_chans": 1},
    {"in_chans": 4, "img_size": (16, 48)},
    {"class_token": False, "global_pool": "avg"},
    {"name": "vit_small_patch14_reg4_dinov2"},
    {"pos_embed": "learned", "drop_path_rate": 0.1, "grad_checkpointing": True},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_every_trainable_parameter_gets_a_gradient(changes: dict[str, Any]) -> None:
    mae = tiny_mae(changes, decoder_depth=2)
    batch = make_batch(mae)
    loss, metrics = mae(batch)
    loss.backward()
    assert loss.isfinite()
    assert all(not value.requires_grad and not value.ndim for value in metrics.values())
    without = {name for name, p in mae.named_parameters() if p.requires_grad and p.grad is None}
    assert not without
    frozen = {name for name, p in mae.named_parameters() if not p.requires_grad}
    fixed = {"encoder.model.pos_embed"} if changes.get("pos_embed") != "learned" else set()
    assert frozen == {"decoder_pos_embed"} | fixed
    assert {name: value.shape for name, value in mae(batch, call="pictures").items()} == dict.fromkeys(
        ("original", "masked", "reconstruction", "raw"), batch["image"].shape
    )


def test_initialisation_is_the_published_one() -> None:
    torch.manual_seed(0)
    mae = MAE(create_encoder(name="vit_base_patch16", depth=2), decoder_depth=2)
    for name, module in mae.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.flatten(1)
            bound = math.sqrt(6 / sum(weight.shape))
            assert 0.99 * bound < weight.abs().max() <= bound, name
            assert weight.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.02), name
        if isinstance(module, nn.Linear):
            assert not module.bias.any(), name
        if isinstance(module, nn.LayerNorm):
            assert (module.weight == 1).all(), name
            assert not module.bias.any(), name
            assert module.eps == 1e-6, name
    for token in (mae.encoder.model.cls_token, mae.mask_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)
    loss, _ = mae(make_batch(mae, 2))
    assert 1 < loss.item() < 2.5  # normalised targets have variance 1, predictions are of order 1


def test_names_of_the_decayed_group() -> None:
    """RECIPE of the published run: biases and 1-D parameters are exempt; both tokens, being 3-D, are decayed."""
    mae = tiny_mae({"depth": 1})
    assert mae.no_weight_decay() == set()
    decayed = {name for name, p in mae.named_parameters() if p.requires_grad and p.ndim > 1}
    block = {"attn.qkv.weight", "attn.proj.weight", "mlp.fc1.weight", "mlp.fc2.weight"}
    assert decayed == {
        "encoder.model.cls_token",
        "encoder.model.patch_embed.proj.weight",
        *(f"encoder.model.blocks.0.{name}" for name in block),
        "decoder_embed.weight",
        "mask_token",
        *(f"decoder_blocks.0.{name}" for name in block),
        "decoder_pred.weight",
    }
    assert not [name for name in decayed if name.endswith(".bias")]


@pytest.mark.parametrize(
    ("name", "encoder_millions", "decoder_width"),
    [("vit_base_patch16", 86, 768), ("vit_large_patch16", 304, 1024), ("vit_huge_patch14", 632, 1280)],
)
def test_published_sizes_on_the_meta_device(name: str, encoder_millions: int, decoder_width: int) -> None:
    with torch.device("meta"):
        mae = MAE(create_encoder(name=name, drop_path_rate=0.1))
    count = sum(p.numel() for p in mae.encoder.parameters()) / 1e6
    assert count == pytest.approx(encoder_millions, rel=0.004)
    assert len(mae.decoder_blocks) == 8
    assert mae.decoder_embed.weight.shape == (512, decoder_width)
    assert mae.num_visible == (64 if "14" in name else 49)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_pictures_paste_visible_patches_and_undo_the_normalisation(norm_pix_loss: bool) -> None:
    """B71."""
    mae = tiny_mae(norm_pix_loss=norm_pix_loss)
    batch = make_batch(mae)
    patches = patchify(batch["image"], 8)
    target = (patches - patches.mean(-1, keepdim=True)) / (patches.var(-1, keepdim=True) + 1e-6).sqrt()
    mae.predict = lambda batch: target if norm_pix_loss else patches  # a perfect prediction
    pictures = mae(batch, call="pictures")
    for name in ("original", "reconstruction", "raw"):
        torch.testing.assert_close(pictures[name], batch["image"])
    masked = patchify(pictures["masked"], 8)
    assert not masked[batch["mask"]].any()
    torch.testing.assert_close(masked[~batch["mask"]], patches[~batch["mask"]])
    mae.predict = lambda batch: torch.zeros_like(patches)
    visible = patchify(mae(batch, call="pictures")["reconstruction"], 8)[~batch["mask"]]
    torch.testing.assert_close(visible, patches[~batch["mask"]])


def test_the_loss_sees_masked_patches_only() -> None:
    mae = tiny_mae()
    batch = make_batch(mae)
    prediction = mae(batch, call="predict")
    rows = patchify(batch["image"], 8)
    target = (rows - rows.mean(-1, keepdim=True)) / (rows.var(-1, keepdim=True) + 1e-6).sqrt()
    expected = (prediction - target).square().mean(-1)[batch["mask"]].mean()
    torch.testing.assert_close(mae(batch)[0], expected)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_overfitting_shows_in_the_picture(norm_pix_loss: bool) -> None:
    """B71: Reconstructions look like the input, with and without normalised pixels."""
    mae = tiny_mae(norm_pix_loss=norm_pix_loss, decoder_embed_dim=64, decoder_depth=2)
    image = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4), (32, 32), mode="bilinear")
    mask = torch.ones(2, 16, dtype=torch.bool)
    mask[:, [0, 5, 10, 15]] = False
    optimizer = torch.optim.AdamW(mae.parameters(), lr=2e-3)
    for _ in range(150):
        optimizer.zero_grad()
        mae({"image": image, "mask": mask})[0].backward()
        optimizer.step()
    with torch.no_grad():
        picture = mae({"image": image, "mask": mask}, call="pictures")["reconstruction"]
    assert (picture - image).square().mean() < 0.05 * image.var()


def test_autocast_keeps_the_loss_in_float32() -> None:
    mae = tiny_mae()
    batch = make_batch(mae)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = mae(batch)
        pictures = mae(batch, call="pictures")
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(mae(batch)[0].item(), rel=0.02)
    assert all(value.dtype == torch.float32 for value in pictures.values())


def test_checkpointing_changes_no_gradient() -> None:
    def gradients(grad_checkpointing: bool) -> list[Tensor]:
        mae = tiny_mae({"grad_checkpointing": grad_checkpointing, "drop_path_rate": 0.5}, decoder_depth=2)
        torch.manual_seed(1)
        mae(make_batch(mae))[0].backward()
        return [p.grad for p in mae.parameters() if p.grad is not None]

    torch.testing.assert_close(gradients(True), gradients(False), rtol=0, atol=0)


def test_split_mask_and_patchify() -> None:
    mask = torch.stack([torch.randperm(12) >= 5 for _ in range(4)])
    keep, masked = split_mask(mask, 5)
    assert torch.equal(keep, (~mask).nonzero()[:, 1].view(4, 5))
    assert torch.equal(masked, mask.nonzero()[:, 1].view(4, 7))
    with pytest.raises(ValueError, match=r"\[5\] of 12 patches are visible; allowed: 4"):
        split_mask(mask, 4)
    image = torch.randn(2, 4, 16, 24)
    assert torch.equal(unpatchify(patchify(image, 8), 8, (2, 3)), image)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0\.0"),
        ({"decoder_num_heads": 3}, "decoder_num_heads=3: should divide decoder_embed_dim=32; nearest: 2"),
        ({"mask_ratio": 0.99}, "0 of 16 patches would be visible"),
        ({"decoder_embed_dim": 30, "decoder_num_heads": 16}, "decoder_embed_dim=30.*multiples of 4; nearest: 32"),
        ({"decoder_embed_dim": 0}, "decoder_embed_dim=0"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_mae(**arguments)


def test_an_encoder_that_cannot_drop_patches_is_refused() -> None:
    encoder = tiny_encoder()
    encoder.drops_patches = False
    with pytest.raises(ValueError, match=r"encoder\.name='vit_tiny_patch16_224': MAE drops patches"):
        MAE(encoder)


def test_calls_go_through_one_door() -> None:
    mae = tiny_mae()
    batch = make_batch(mae)
    torch.testing.assert_close(mae(batch, call="encode"), mae.encoder(batch["image"]))
    with pytest.raises(ValueError, match=r"call='encod': MAE has no such call \(did you mean 'encode'\?\)"):
        mae(batch, call="encod")
    only_encoder = Objective(tiny_encoder())
    assert only_encoder(batch, call="encode").patches.shape == (3, 16, 64)
    with pytest.raises(ValueError, match=r"Objective has no such call.*allowed: encode"):
        only_encoder(batch)
    with pytest.raises(ValueError, match="measured, not trained"):
        only_encoder.views((32, 32))
    only_encoder.before_step(Progress(0, 1, 0.0, 1.0, 0.0))
    only_encoder.after_step(torch.ones(()))


def test_frozen_parts_stay_frozen() -> None:
    objective = Objective(tiny_encoder())
    objective.freeze(objective.encoder)
    again = copy.deepcopy(objective)
    for part in (objective.train(), again.train()):
        assert part.training
        assert not part.encoder.training
        assert not any(p.requires_grad for p in part.parameters())
    assert again._frozen[0] is again.encoder


def test_views_fit_the_encoder_and_travel_to_workers() -> None:
    mae = tiny_mae({"img_size": (16, 48)})
    view = pickle.loads(pickle.dumps(mae.views(mae.encoder.img_size)))
    sample = view({"image": torch.randint(0, 256, (3, 60, 70), dtype=torch.uint8), "label": 0})
    assert sample["image"].shape == (3, 16, 48)
    assert sample["mask"].shape == (12,)
    assert (~sample["mask"]).sum() == mae.num_visible
