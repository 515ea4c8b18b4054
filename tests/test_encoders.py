"""Encoders: shapes, patch dropping, sizes, refusals, recomputed activations."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

import pytest
import timm
import torch

from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.positions import sincos2d_table

TINY: dict[str, Any] = {"name": "vit_tiny_patch16", "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}
HYBRID: dict[str, Any] = {"name": "vit_tiny_r_s16_p8", "patch_size": None, "feature_patch_size": 2}


def tiny(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    return create_encoder(**{key: value for key, value in {**TINY, **changes}.items() if value is not None})


VARIANTS: list[dict[str, Any]] = [
    {},
    {"img_size": (16, 40), "in_chans": 1},
    {"in_chans": 4, "class_token": False, "global_pool": "avg"},
    {"pos_embed": "learned", "global_pool": "avg"},
    {"name": "vit_small_patch14_reg4_dinov2"},
    {"name": "vit_base_patch16_clip_224"},
    {"pos_embed": "learned2d", "img_size": (16, 40)},
    {"pos_embed": "none"},
    {"name": "deit_tiny_distilled_patch16_224", "pos_embed": "learned"},
    {"name": "deit_small_distilled_patch16"},
    HYBRID,
    {**HYBRID, "img_size": (16, 40), "in_chans": 1, "pos_embed": "sincos2d", "global_pool": "avg"},
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_shapes_and_equal_paths(changes: dict[str, Any]) -> None:
    encoder = tiny(**changes).double().eval()
    h, w = encoder.grid_size
    assert (h * 8, w * 8) == encoder.img_size
    image = torch.randn(3, encoder.in_chans, *encoder.img_size, dtype=torch.float64)
    plain = encoder(image)
    assert plain.prefix.shape == (3, encoder.num_prefix_tokens, 64)
    assert plain.patches.shape == (3, h * w, encoder.token_dim)
    assert encoder.pool(plain).shape == (3, encoder.embed_dim)
    timm_tokens = encoder.model.forward_features(image)
    nothing, token = torch.zeros(3, h * w, dtype=torch.bool), torch.ones(1, 1, 64, dtype=torch.float64)
    for tokens in (plain, encoder(image, nothing, token), encoder.forward_visible(image, torch.arange(h * w)[None])):
        torch.testing.assert_close(torch.cat(list(tokens), dim=1), timm_tokens, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, HYBRID], ids=["plain", "hybrid"])
def test_forward_visible_ignores_what_is_dropped_and_follows_the_order(changes: dict[str, Any]) -> None:
    encoder = tiny(**changes).double()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    keep = torch.tensor([[3, 0, 9], [15, 7, 2]])
    tokens = encoder.forward_visible(image, keep)
    changed = torch.full_like(image, 9.0)
    for row, indices in enumerate(keep.tolist()):
        for n in indices:
            box = (slice(n // 4 * 8, n // 4 * 8 + 8), slice(n % 4 * 8, n % 4 * 8 + 8))
            changed[row, :, box[0], box[1]] = image[row, :, box[0], box[1]]
    torch.testing.assert_close(encoder.forward_visible(changed, keep), tokens, rtol=0, atol=0)
    flipped = encoder.forward_visible(image, keep.flip(1))
    torch.testing.assert_close(flipped.patches.flip(1), tokens.patches, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("changes", [{}, HYBRID], ids=["plain", "hybrid"])
def test_masked_patches_do_not_matter_but_the_mask_token_does(changes: dict[str, Any]) -> None:
    encoder = tiny(**changes)
    image, mask = torch.randn(2, 3, 32, 32), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, 0] = True
    token = torch.randn(1, 1, 64, requires_grad=True)
    changed = image.clone()
    changed[:, :, :8, :8] = 5.0
    torch.testing.assert_close(encoder(image, mask, token), encoder(changed, mask, token), rtol=0, atol=0)
    encoder(image, mask, token).patches.sum().backward()
    assert token.grad is not None
    assert token.grad.abs().max() > 0


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_config_builds_the_same_encoder(changes: dict[str, Any]) -> None:
    encoder = tiny(**changes, drop_path_rate=0.1)
    again = create_encoder(**json.loads(json.dumps(encoder.config())))
    assert again.config() == encoder.config()
    again.load_state_dict(encoder.state_dict())


def test_names_and_heads() -> None:
    assert tiny(name="vit_base_patch16").name == "vit_base_patch16_224"
    assert tiny(embed_dim=192).config()["num_heads"] == 3
    assert tiny(embed_dim=96).config()["num_heads"] == 2
    with torch.device("meta"):
        huge = create_encoder(name="vit_huge_patch14").config()
    assert (huge["patch_size"], huge["embed_dim"], huge["depth"], huge["num_heads"]) == (14, 1280, 32, 16)


def test_published_hybrids() -> None:
    """Parameters without a classifier, in millions, and the pixels of a patch."""
    expected = {
        "vit_tiny_r_s16_p8": (6.1, 32),
        "vit_small_r26_s32": (36.0, 32),
        "vit_base_r50_s16": (97.9, 16),
        "vit_large_r50_s32": (328.0, 32),
    }
    for name, (millions, patch) in expected.items():
        with torch.device("meta"):
            encoder = create_encoder(name=name)
            whole = timm.create_model(f"{name}_224", num_classes=0)
        count = sum(p.numel() for p in encoder.parameters())
        assert count == sum(p.numel() for p in whole.parameters())
        assert count / 1e6 == pytest.approx(millions, rel=0.02), name
        assert encoder.patch_size == patch, name
    with pytest.raises(ValueError, match=r"img_size=100: its height 100 should be a multiple of 32.*nearest: 96"):
        create_encoder(name="vit_small_r26_s32", img_size=100)
    with pytest.raises(ValueError, match=r"allowed: .*vit_base_r50_s16_224"):
        create_encoder(name="vit_base_r50_s17")


def test_fixed_table_is_not_trained_and_learned_is() -> None:
    encoder = tiny()
    torch.testing.assert_close(encoder.model.pos_embed.data, sincos2d_table((4, 4), 64, 1), rtol=0, atol=0)
    assert not encoder.model.pos_embed.requires_grad
    assert tiny(pos_embed="learned").model.pos_embed.requires_grad


def test_learned_rows_and_columns_stay_what_they_are() -> None:
    """ViT, D.4: half of a patch's position is its column's, half its row's; the table an export holds is the same."""
    encoder = tiny(pos_embed="learned2d", img_size=(16, 40)).double()
    table = encoder.model.pos_embed  # (1, 1 + 2 * 5, 64)
    torch.testing.assert_close(encoder.positions(), table, rtol=1e-12, atol=1e-12)
    before = table.detach().clone()
    optimizer = torch.optim.AdamW([p for p in encoder.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        encoder(torch.randn(2, 3, 16, 40, dtype=torch.float64)).patches.square().sum().backward()
        optimizer.step()
    assert (table - before).abs().mean() > 0.05
    torch.testing.assert_close(encoder.positions(), table, rtol=1e-10, atol=1e-10)

    with torch.no_grad():
        table.normal_()
    rows = table[0, 1:].unflatten(0, (2, 5))
    expected = [table[0, 0]]
    for row in range(2):
        for column in range(5):
            x, y = rows[:, column, :32].mean(dim=0), rows[row, :, 32:].mean(dim=0)
            expected.append(torch.cat([x, y]))
    torch.testing.assert_close(encoder.positions()[0], torch.stack(expected), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "vit_bsae_patch16_224"}, "did you mean 'vit_base_patch16"),
        ({"name": "resmlp_12_224"}, "no encoder is built from 'resmlp_12_224'"),
        ({"img_size": 100}, "img_size=100: its height 100.*patch_size=8; nearest: 96"),
        ({"img_size": (32, 20)}, "its width 20"),
        ({"img_size": 4}, "nearest: 8"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"num_heads": 3}, "num_heads=3: should divide embed_dim=64; nearest: 2"),
        ({"embed_dim": 66, "num_heads": 1}, "embed_dim=66.*multiples of 4; nearest: 64"),
        ({"global_pool": "tokn", "class_token": True}, r"global_pool='tokn'.*did you mean 'token'"),
        ({"class_token": False}, "allowed without a class token: avg"),
        ({"pos_embed": "rope"}, "pos_embed='rope': allowed: sincos2d, learned, learned2d, none"),
        (
            {"name": "deit_tiny_distilled_patch16_224", "global_pool": "avg"},
            r"global_pool='avg'.*allowed with deit_tiny",
        ),
        ({"pos_embed": "learned2d", "embed_dim": 65, "num_heads": 1}, "embed_dim=65: allowed .*even"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1\.0"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**changes)


@pytest.mark.parametrize("shape", [(1, 3, 32, 40), (1, 1, 32, 32)])
def test_an_image_that_does_not_fit_is_named(shape: tuple[int, ...]) -> None:
    encoder = tiny()
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\)"):
        encoder(torch.zeros(shape))
    with pytest.raises(ValueError, match=r"takes \(B, 3, 32, 32\)"):
        encoder.forward_visible(torch.zeros(shape), torch.zeros(1, 1, dtype=torch.int64))


@pytest.mark.parametrize("visible", [True, False])
def test_checkpointing_keeps_less_and_changes_nothing(visible: bool) -> None:
    def run(grad_checkpointing: bool) -> tuple[int, list[torch.Tensor]]:
        encoder = tiny(depth=4, drop_path_rate=0.5, grad_checkpointing=grad_checkpointing)
        parameters = {id(p) for p in encoder.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            if id(tensor) not in parameters:
                kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        torch.manual_seed(1)
        image = torch.randn(8, 3, 32, 32)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            keep = torch.arange(16).expand(8, -1)
            tokens = encoder.forward_visible(image, keep) if visible else encoder(image)
        size = sum(kept.values())
        tokens.patches.square().mean().backward()
        return size, [p.grad for p in encoder.parameters() if p.grad is not None]

    (plain_size, plain), (size, gradients) = run(False), run(True)
    torch.testing.assert_close(gradients, plain, rtol=0, atol=0)
    assert size < plain_size / 3


def test_importing_is_quick() -> None:
    """Names and --help must not wait for timm."""
    code = "import sys, ssl_vit.objectives.mae, ssl_vit.encoders.vit; print('timm' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "False"


@pytest.mark.parametrize("family", ["vit", "beit", "hybrid", "swin", "resnet"])
def test_intermediate_tokens_are_timms(family: str) -> None:
    """Behind each stage the tokens equal timm's own forward_intermediates; the last are the encoder's output."""
    from test_finetune import FAMILIES as TINY

    torch.manual_seed(0)
    encoder = create_encoder(**TINY[family]).eval()
    image = torch.randn(2, encoder.in_chans, *encoder.img_size)
    count = len(encoder.stages)
    found = encoder.intermediates(image, range(1, count + 1))
    options = {"return_prefix_tokens": True} if encoder.num_prefix_tokens else {}
    expected = encoder.model.forward_intermediates(image, norm=True, intermediates_only=True, **options)[-count:]
    for ours, theirs in zip(found, expected, strict=True):
        patches, prefix = theirs if encoder.num_prefix_tokens else (theirs, None)
        torch.testing.assert_close(ours.patches, patches.flatten(2).transpose(1, 2), rtol=1e-5, atol=1e-5)
        if prefix is not None:
            torch.testing.assert_close(ours.prefix, prefix, rtol=1e-5, atol=1e-5)
    last, again = encoder(image), encoder.intermediates(image, [-1])[0]
    assert torch.equal(last.patches, again.patches)
    assert torch.equal(last.prefix, again.prefix)
    assert not any(stage._forward_hooks for stage in encoder.stages), "nothing is left behind"
    with pytest.raises(ValueError, match=rf"stage {count + 1}: allowed for .*: 1 to {count}"):
        encoder.intermediates(image, [count + 1])
