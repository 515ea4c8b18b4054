"""Encoders: equal to timm's own forward, masking and dropping are exact, impossible sizes are refused."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import nn

from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.positions import sincos2d_table
from ssl_vit.objectives.mae import MAE

TINY: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
VARIANTS = [
    {},
    {"pos_embed": "learned"},
    {"class_token": False, "global_pool": "avg"},
    {"global_pool": "avg"},
    {"in_chans": 4},
    {"in_chans": 1, "img_size": [32, 64]},
    {"mlp_ratio": 2.0, "num_heads": 6},
]


def tiny(**config: Any) -> Any:
    torch.manual_seed(0)
    return create_encoder(**{**TINY, **config}).double().eval()


def images_for(encoder: Any, count: int = 3) -> torch.Tensor:
    return torch.randn(count, encoder.in_chans, *encoder.img_size, dtype=torch.float64)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_nothing_masked_equals_timm(config: dict[str, Any]) -> None:
    encoder = tiny(**config)
    image = images_for(encoder)
    tokens = encoder(image)
    expected = encoder.model.forward_features(image)
    torch.testing.assert_close(torch.cat(tokens, dim=1), expected, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(encoder.pool(tokens), encoder.model(image), rtol=1e-10, atol=1e-10)
    assert tokens.prefix.shape[1] == encoder.num_prefix_tokens
    assert tokens.patches.shape == (3, encoder.grid_size[0] * encoder.grid_size[1], encoder.token_dim)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_all_patches_kept_equals_the_plain_call(config: dict[str, Any]) -> None:
    encoder = tiny(**config)
    image = images_for(encoder)
    count = encoder.grid_size[0] * encoder.grid_size[1]
    keep = torch.stack([torch.randperm(count) for _ in range(3)])
    plain, dropped = encoder(image), encoder.forward_visible(image, keep)
    torch.testing.assert_close(dropped.prefix, plain.prefix, rtol=1e-10, atol=1e-10)
    expected = plain.patches.gather(1, keep[..., None].expand(-1, -1, encoder.token_dim))
    torch.testing.assert_close(dropped.patches, expected, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("config", VARIANTS, ids=str)
def test_an_empty_mask_changes_nothing_and_a_mask_hides_pixels(config: dict[str, Any]) -> None:
    encoder = tiny(**config)
    image = images_for(encoder)
    count = encoder.grid_size[0] * encoder.grid_size[1]
    token = torch.randn(1, 1, encoder.token_dim, dtype=torch.float64)
    empty = torch.zeros(3, count, dtype=torch.bool)
    assert torch.equal(encoder(image, empty, token).patches, encoder(image).patches)
    everything = ~empty
    assert torch.equal(encoder(image, everything, token).patches, encoder(image * 7, everything, token).patches)


@pytest.mark.parametrize("call", ["forward", "forward_visible"])
def test_activation_checkpointing_changes_no_gradient(call: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        encoder = tiny(grad_checkpointing=checkpointing, drop_path_rate=0.2).train()
        image, keep = torch.ones(2, 3, 32, 32, dtype=torch.float64), torch.arange(5).expand(2, -1)
        torch.manual_seed(3)
        tokens = encoder(image) if call == "forward" else encoder.forward_visible(image, keep)
        tokens.patches.square().sum().backward()
        gradients.append({n: p.grad for n, p in encoder.named_parameters() if p.requires_grad})
    for name in gradients[0]:
        torch.testing.assert_close(gradients[0][name], gradients[1][name], rtol=1e-10, atol=1e-12)


def test_activation_checkpointing_saves_memory() -> None:
    kept = []
    for checkpointing in (False, True):
        encoder = tiny(grad_checkpointing=checkpointing, depth=6).train()
        total = 0

        def count(tensor: torch.Tensor) -> torch.Tensor:
            nonlocal total
            total += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(count, lambda tensor: tensor):
            encoder(images_for(encoder))
        kept.append(total)
    assert kept[1] < kept[0] / 3


def test_fixed_table_is_the_published_one() -> None:
    """Grid w first, float64 frequencies, zeros for the class token (MAE, RECIPES 2.5.2)."""
    table = sincos2d_table((2, 3), 8, 1)
    assert table.shape == (1, 7, 8)
    assert torch.equal(table[0, 0], torch.zeros(8))
    for row in range(2):
        for column in range(3):
            expected = []
            for position in (column, row):
                angles = [position / 10000 ** (i / 2) for i in range(2)]
                expected += [
                    *(torch.tensor(a).sin().item() for a in angles),
                    *(torch.tensor(a).cos().item() for a in angles),
                ]
            torch.testing.assert_close(table[0, 1 + row * 3 + column], torch.tensor(expected), rtol=1e-5, atol=1e-6)
    assert not tiny().model.pos_embed.requires_grad
    assert tiny(pos_embed="learned").model.pos_embed.requires_grad


def test_published_initialisation_of_mae() -> None:
    torch.manual_seed(0)
    mae = MAE(create_encoder(**{**TINY, "embed_dim": 192}), decoder_embed_dim=64, decoder_depth=1, decoder_num_heads=2)
    for name, module in mae.named_modules():
        if isinstance(module, nn.Linear | nn.Conv2d):
            weight = module.weight.detach().flatten(1)
            bound = (6 / (weight.shape[0] + weight.shape[1])) ** 0.5
            assert weight.abs().max() <= bound, name
            assert weight.std() == pytest.approx(bound / 3**0.5, rel=0.05), name
            if isinstance(module, nn.Linear):
                assert not module.bias.any(), name
        elif isinstance(module, nn.LayerNorm):
            assert module.eps == 1e-6, name
            assert (module.weight == 1).all()
            assert not module.bias.any()
    assert mae.mask_token.detach().std() == pytest.approx(0.02, rel=0.5)
    assert mae.encoder.model.cls_token.detach().std() == pytest.approx(0.02, rel=0.5)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "vit_tiny_patch16_225"}, "did you mean"),
        ({"name": "resnet50"}, "allowed: timm names vit_"),
        ({"img_size": 30}, r"img_size=30.*multiple of patch_size=8; nearest: 32"),
        ({"num_heads": 5}, r"num_heads=5: should divide embed_dim=48; nearest: 4"),
        ({"depth": 0}, "depth=0"),
        ({"class_token": False}, "needs class_token=true"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1\.0"),
        ({"pos_embed": "lerned"}, "did you mean 'learned'"),
    ],
)
def test_impossible_encoders_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_encoder(**{**TINY, **config})


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\)"):
        tiny()(torch.zeros(1, 3, 64, 64, dtype=torch.float64))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mask_ratio": 1.0}, r"mask_ratio=1\.0.*between 0 and 1"),
        ({"mask_ratio": 0.0}, r"mask_ratio=0\.0"),
        ({"mask_ratio": 0.99}, r"0 of 16 patches"),
        ({"decoder_embed_dim": 30}, r"decoder_embed_dim=30.*nearest: 32"),
        ({"decoder_depth": 0}, "decoder_depth=0"),
    ],
)
def test_impossible_objectives_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        MAE(create_encoder(**TINY), **arguments)


def test_names_without_a_size_and_config_round_trip() -> None:
    encoder = tiny(name="vit_tiny_patch16", in_chans=4, global_pool="avg")
    assert encoder.name == "vit_tiny_patch16_224"
    again = create_encoder(**encoder.config())
    assert again.config() == encoder.config()
    assert {k: v.shape for k, v in again.state_dict().items()} == {k: v.shape for k, v in encoder.state_dict().items()}
    architecture, arguments = encoder.timm_config()
    timm.create_model(architecture, **arguments).load_state_dict(encoder.model.state_dict())


def test_mae_overfits_and_its_picture_shows_it() -> None:
    """B71: reconstructions undo norm_pix and look like the input, with and without it."""
    generator = torch.Generator().manual_seed(0)
    image = torch.nn.functional.interpolate(torch.randn(2, 3, 4, 4, generator=generator), (32, 32), mode="bilinear")
    for norm_pix_loss in (True, False):
        torch.manual_seed(0)
        mae = MAE(
            create_encoder(**TINY), 0.75, norm_pix_loss, decoder_embed_dim=64, decoder_depth=2, decoder_num_heads=2
        )
        mask = torch.ones(2, 16, dtype=torch.bool)
        mask[:, [0, 5, 10, 15]] = False
        optimizer = torch.optim.AdamW(mae.parameters(), lr=2e-3)
        for _ in range(150):
            optimizer.zero_grad()
            mae({"image": image, "mask": mask})[0].backward()
            optimizer.step()
        with torch.no_grad():
            drawn = mae({"image": image, "mask": mask}, call="pictures")
        error = (drawn["reconstruction"] - image).square().mean() / image.var()
        assert error < 0.05, f"norm_pix_loss={norm_pix_loss}: {error}"
        visible = drawn["masked"] != 0
        assert torch.equal(drawn["reconstruction"][visible], image[visible])
        assert torch.equal(drawn["original"], image)
