"""MAE against transformers' ViTMAE and against the paper's formulas, at real widths."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.positions import sincos2d_table
from ssl_vit.export.transformers_names import transformers_names
from ssl_vit.objectives.mae import MAE

transformers = pytest.importorskip("transformers")

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value of the expected tensor."""
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def make_pair(
    depth: int, decoder_depth: int, norm_pix_loss: bool, dtype: torch.dtype, in_chans: int = 3
) -> tuple[MAE, Any]:
    """Our MAE (ViT-B widths) and the reference with the same weights, biases and norms not at their start."""
    torch.manual_seed(0)
    encoder = create_encoder(name="vit_base_patch16_224", depth=depth, in_chans=in_chans)
    mae = MAE(encoder, norm_pix_loss=norm_pix_loss, decoder_depth=decoder_depth).to(dtype)
    for parameter in mae.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.1 * torch.randn_like(parameter)
    config = transformers.ViTMAEConfig(
        num_hidden_layers=depth,
        decoder_num_hidden_layers=decoder_depth,
        layer_norm_eps=1e-6,
        num_channels=in_chans,
        norm_pix_loss=norm_pix_loss,
        attn_implementation="sdpa",
    )
    reference = transformers.ViTMAEForPreTraining(config).to(dtype)
    reference.load_state_dict(rename(mae.state_dict()))
    return mae, reference


def rename(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our names to the reference's; q, k and v are three tensors there."""
    return transformers_names({name.removeprefix("encoder.model."): t for name, t in state.items()}, "vit.")


def gradients(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in module.named_parameters() if p.grad is not None}


def join_qkv(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The reference's q, k, v as one tensor each, as gradients of single key biases are rounding noise."""
    joined = {name: tensor for name, tensor in state.items() if not re.search(r"\.[qkv]_proj\.", name)}
    for name in state:
        if ".q_proj." in name:
            joined[name.replace(".q_proj.", ".qkv.")] = torch.cat([state[name.replace(".q_", f".{c}_")] for c in "qkv"])
    return joined


def compare(
    depth: int, decoder_depth: int, norm_pix_loss: bool, dtype: torch.dtype, in_chans: int = 3
) -> dict[str, float]:
    mae, reference = make_pair(depth, decoder_depth, norm_pix_loss, dtype, in_chans)
    image, noise = torch.randn(2, in_chans, 224, 224, dtype=dtype), torch.rand(2, 196)
    mask = noise.argsort(dim=1).argsort(dim=1) >= 49
    loss, _ = mae({"image": image, "mask": mask})
    loss.backward()
    output = reference(image, noise=noise)
    output.loss.backward()
    assert torch.equal(output.mask.bool(), mask)
    expected = join_qkv(gradients(reference))
    found = join_qkv(rename(gradients(mae)))
    assert found.keys() == expected.keys()
    assert len(found) == len([p for p in mae.parameters() if p.requires_grad])
    result = {f"gradient of {name}": relative(found[name], expected[name]) for name in expected}
    result["loss"] = relative(loss.detach(), output.loss.detach())
    with torch.no_grad():
        latent = reference.vit(image, noise=noise).last_hidden_state
        keep = (~mask).nonzero()[:, 1].view(2, 49)
        tokens = mae.encoder.forward_visible(image, keep)
        ascending = noise.argsort(dim=1)[:, :49].argsort(dim=1)
        latent_patches = latent[:, 1:].gather(1, ascending[..., None].expand(-1, -1, latent.shape[-1]))
        result["encoder, class token"] = relative(tokens.prefix, latent[:, :1])
        result["encoder, patches"] = relative(tokens.patches, latent_patches)
        result["prediction"] = relative(mae({"image": image, "mask": mask}, call="predict"), output.logits)
    return result


def check(result: dict[str, float], dtype: torch.dtype) -> None:
    largest = max(result, key=lambda name: result[name])
    print(f"\n{dtype}: loss {result['loss']:.1e}; largest of {len(result)}: {result[largest]:.1e} ({largest})")
    assert result[largest] < BOUNDS[dtype], f"{largest}: {result[largest]}"


@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mae_equals_transformers(norm_pix_loss: bool, dtype: torch.dtype) -> None:
    check(compare(2, 2, norm_pix_loss, dtype), dtype)


@pytest.mark.parametrize("in_chans", [1, 4])
def test_other_channels(in_chans: int) -> None:
    check(compare(1, 1, True, torch.float64, in_chans), torch.float64)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_mae_equals_transformers_at_full_depth(norm_pix_loss: bool, dtype: torch.dtype) -> None:
    check(compare(12, 8, norm_pix_loss, dtype), dtype)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_papers_formula(norm_pix_loss: bool) -> None:
    """Section 3: squared error in pixel space, averaged over the pixels of masked patches only."""
    torch.manual_seed(0)
    encoder = create_encoder(name="vit_tiny_patch16", img_size=(32, 48), patch_size=8, embed_dim=64, depth=1)
    mae = MAE(encoder, norm_pix_loss=norm_pix_loss, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).double()
    image = torch.randn(2, 3, 32, 48, dtype=torch.float64)
    mask = torch.stack([torch.randperm(24) >= 6 for _ in range(2)])
    prediction = mae({"image": image, "mask": mask}, call="predict")
    total, count = 0.0, 0
    for b in range(2):
        for n in range(24):
            if not mask[b, n]:
                continue
            row, column = n // 6, n % 6
            pixels = [
                image[b, c, row * 8 + i, column * 8 + j].item() for i in range(8) for j in range(8) for c in range(3)
            ]
            if norm_pix_loss:
                mean = sum(pixels) / len(pixels)
                variance = sum((x - mean) ** 2 for x in pixels) / (len(pixels) - 1)
                pixels = [(x - mean) / (variance + 1e-6) ** 0.5 for x in pixels]
            errors = [(x - y) ** 2 for x, y in zip(pixels, prediction[b, n].tolist(), strict=True)]
            total, count = total + sum(errors) / len(errors), count + 1
    loss, _ = mae({"image": image, "mask": mask})
    assert loss.item() == pytest.approx(total / count, rel=1e-12)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_encoder_equals_timm(pool: str) -> None:
    """Forward, forward with nothing masked, forward_visible with all kept, against timm's own forward."""
    torch.manual_seed(0)
    encoder = create_encoder(name="vit_base_patch16_224", depth=2, global_pool=pool).double()
    architecture, arguments = encoder.timm_config()
    model: Any = timm.create_model(architecture, **arguments).double()
    model.load_state_dict(encoder.model.state_dict())
    image = torch.randn(2, 3, 224, 224, dtype=torch.float64)
    expected, pooled = model.forward_features(image), model(image)
    everything = torch.arange(196).expand(2, -1)
    nothing, token = torch.zeros(2, 196, dtype=torch.bool), torch.randn(1, 1, 768, dtype=torch.float64)
    calls: list[Callable[[], tuple[Tensor, Tensor]]] = [
        lambda: encoder(image),
        lambda: encoder(image, nothing, token),
        lambda: encoder.forward_visible(image, everything),
    ]
    for call in calls:
        tokens = call()
        assert relative(torch.cat(list(tokens), dim=1), expected) < 1e-10
        assert relative(encoder.pool(tokens), pooled) < 1e-10  # pyright: ignore[reportArgumentType]


@pytest.mark.parametrize(("grid", "dim"), [((14, 14), 768), ((2, 5), 8)])
def test_position_table_is_the_papers_formula(grid: tuple[int, int], dim: int) -> None:
    table = sincos2d_table(grid, dim, num_prefix_tokens=1)
    assert not table[0, 0].any()
    for n in (0, 1, grid[1], grid[0] * grid[1] - 1):
        y, x = divmod(n, grid[1])
        for k in range(dim // 4):
            angle = torch.tensor(10000.0, dtype=torch.float64) ** (-4 * k / dim)
            row = table[0, n + 1]
            expected = [(x * angle).sin(), (x * angle).cos(), (y * angle).sin(), (y * angle).cos()]
            found = [row[k], row[dim // 4 + k], row[dim // 2 + k], row[3 * dim // 4 + k]]
            assert torch.stack(found).double() == pytest.approx(torch.stack(expected), abs=1e-7)
