"""MAE against an independent implementation (transformers' ViTMAE) and the paper's formula, on the same weights.

The measure: largest absolute difference over the largest absolute value of the reference tensor. q, k and v count as
one tensor, since the gradient of a key bias is zero and has no scale of its own.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from ssl_vit.encoders.base import create_encoder
from ssl_vit.modules.patches import patchify
from ssl_vit.objectives.mae import MAE

transformers = pytest.importorskip("transformers")

REAL = {"embed_dim": 768, "num_heads": 12, "depth": 2, "decoder": (512, 2, 16), "img_size": 224, "patch_size": 16}
TINY = {"embed_dim": 64, "num_heads": 4, "depth": 3, "decoder": (32, 2, 2), "img_size": 48, "patch_size": 8}
FULL = {**REAL, "depth": 12, "decoder": (512, 8, 16)}


def difference(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


def pair(sizes: dict[str, Any], norm_pix_loss: bool, dtype: torch.dtype, in_chans: int = 3) -> tuple[MAE, Any]:
    """Our MAE and transformers' with our weights."""
    torch.manual_seed(0)
    width, depth, heads = sizes["decoder"]
    encoder = create_encoder(
        name="vit_base_patch16_224", img_size=sizes["img_size"], patch_size=sizes["patch_size"], in_chans=in_chans,
        embed_dim=sizes["embed_dim"], depth=sizes["depth"], num_heads=sizes["num_heads"],
    )  # fmt: skip
    ours = MAE(encoder, 0.75, norm_pix_loss, width, depth, heads).to(dtype)
    with torch.no_grad():
        for parameter in ours.parameters():
            if parameter.requires_grad and parameter.ndim == 1:  # biases and norms away from 0 and 1
                parameter.add_(0.1 * torch.randn_like(parameter))
    config = transformers.ViTMAEConfig(
        hidden_size=sizes["embed_dim"], num_hidden_layers=sizes["depth"], num_attention_heads=sizes["num_heads"],
        intermediate_size=4 * sizes["embed_dim"], decoder_hidden_size=width, decoder_num_hidden_layers=depth,
        decoder_num_attention_heads=heads, decoder_intermediate_size=4 * width, image_size=sizes["img_size"],
        patch_size=sizes["patch_size"], num_channels=in_chans, layer_norm_eps=1e-6, norm_pix_loss=norm_pix_loss,
        mask_ratio=0.75, attn_implementation="sdpa",
    )  # fmt: skip
    theirs = transformers.ViTMAEForPreTraining(config).to(dtype)
    missing, unexpected = theirs.load_state_dict(translate(ours.state_dict()), strict=True)
    assert not missing
    assert not unexpected
    return ours.eval(), theirs.eval()


BLOCK = {
    "norm1": "layernorm_before", "norm2": "layernorm_after", "attn.proj": "attention.o_proj",
    "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2",
}  # fmt: skip
WHOLE = {
    "encoder.model.cls_token": "vit.embeddings.cls_token",
    "encoder.model.pos_embed": "vit.embeddings.position_embeddings",
    "encoder.model.patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "encoder.model.norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}


def translate(state: dict[str, Tensor], join_qkv: bool = False) -> dict[str, Tensor]:
    """Names of our tensors in transformers' words."""
    renamed = {}
    for name, tensor in state.items():
        stem, _, leaf = name.rpartition(".")
        if name in WHOLE:
            renamed[WHOLE[name]] = tensor
        elif stem in WHOLE:
            renamed[f"{WHOLE[stem]}.{leaf}"] = tensor
        else:
            encoder, _, rest = name.partition("blocks.")
            number, _, inner = rest.partition(".")
            layer = f"{'vit.layers' if encoder.startswith('encoder') else 'decoder.decoder_layers'}.{number}"
            part, _, leaf = inner.rpartition(".")
            if part == "attn.qkv" and not join_qkv:
                for letter, piece in zip("qkv", tensor.chunk(3), strict=True):
                    renamed[f"{layer}.attention.{letter}_proj.{leaf}"] = piece
            elif part == "attn.qkv":
                renamed[f"{layer}.attention.qkv.{leaf}"] = tensor
            else:
                renamed[f"{layer}.{BLOCK[part]}.{leaf}"] = tensor
    return renamed


def joined_gradients(model: Any) -> dict[str, Tensor]:
    """Gradients of a transformers model with q, k and v as one tensor."""
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in [n for n in gradients if ".q_proj." in n]:
        parts = [gradients.pop(name.replace("q_proj", f"{letter}_proj")) for letter in "qkv"]
        gradients[name.replace("q_proj", "qkv")] = torch.cat(parts)
    return gradients


def same_mask(sizes: dict[str, Any], batch: int) -> tuple[Tensor, Tensor]:
    """A random mask, and the noise that makes transformers draw it."""
    count = (sizes["img_size"] // sizes["patch_size"]) ** 2
    noise = torch.rand(batch, count, generator=torch.Generator().manual_seed(7))
    keep = noise.argsort(dim=1)[:, : int(count * 0.25)]
    return torch.ones(batch, count, dtype=torch.bool).scatter_(1, keep, False), noise


def compare(
    sizes: dict[str, Any], norm_pix_loss: bool, dtype: torch.dtype, tolerance: float, in_chans: int = 3
) -> None:
    ours, theirs = pair(sizes, norm_pix_loss, dtype, in_chans)
    shape = (2, in_chans, sizes["img_size"], sizes["img_size"])
    image = torch.randn(shape, generator=torch.Generator().manual_seed(3), dtype=torch.float64).to(dtype)
    mask, noise = same_mask(sizes, 2)
    loss, _ = ours({"image": image, "mask": mask})
    reference = theirs(pixel_values=image, noise=noise)
    assert difference(loss, reference.loss) <= tolerance
    assert torch.equal(reference.mask.bool(), mask)

    keep = noise.argsort(dim=1)[:, : int((~mask).sum(dim=1)[0])]
    tokens = torch.cat(ours.encoder.forward_visible(image, keep), dim=1)
    assert difference(tokens, theirs.vit(image, noise=noise).last_hidden_state) <= tolerance
    assert difference(ours({"image": image, "mask": mask}, call="predict"), reference.logits) <= tolerance

    loss.backward()
    reference.loss.backward()
    gradients = translate({n: p.grad for n, p in ours.named_parameters() if p.grad is not None}, join_qkv=True)
    expected = joined_gradients(theirs)
    assert gradients.keys() == expected.keys()
    worst = {name: difference(gradients[name], expected[name]) for name in expected}
    assert max(worst.values()) <= tolerance, max(worst, key=lambda name: worst[name])


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_float64_at_real_widths(norm_pix_loss: bool) -> None:
    compare(REAL, norm_pix_loss, torch.float64, 1e-10)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_float32(norm_pix_loss: bool) -> None:
    compare(REAL, norm_pix_loss, torch.float32, 1e-5)


@pytest.mark.parametrize("in_chans", [1, 3, 4])
def test_other_channels(in_chans: int) -> None:
    compare(TINY, True, torch.float64, 1e-10, in_chans)


@pytest.mark.slow
@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_float64_at_full_depth(norm_pix_loss: bool) -> None:
    compare(FULL, norm_pix_loss, torch.float64, 1e-10)


@pytest.mark.parametrize("norm_pix_loss", [True, False])
def test_loss_is_the_papers_formula(norm_pix_loss: bool) -> None:
    """Mean over masked patches of the mean squared error of (normalised) pixels, written out."""
    ours, _ = pair(TINY, norm_pix_loss, torch.float64)
    image = torch.randn(3, 3, 48, 48, dtype=torch.float64)
    mask, _ = same_mask(TINY, 3)
    prediction = ours({"image": image, "mask": mask}, call="predict")
    total, count = 0.0, 0
    for b in range(3):
        for n in range(36):
            if not mask[b, n]:
                continue
            row, column = divmod(n, 6)
            patch = image[b, :, row * 8 : row * 8 + 8, column * 8 : column * 8 + 8]
            target = torch.stack([patch[c, i, j] for i in range(8) for j in range(8) for c in range(3)])
            if norm_pix_loss:
                mean = target.sum() / 192
                variance = ((target - mean) ** 2).sum() / 191
                target = (target - mean) / (variance + 1e-6) ** 0.5
            total += float(((prediction[b, n] - target) ** 2).sum() / 192)
            count += 1
    loss, _ = ours({"image": image, "mask": mask})
    assert float(loss) == pytest.approx(total / count, rel=1e-12)
    assert count == 3 * 27


def test_only_visible_pixels_reach_the_encoder() -> None:
    ours, _ = pair(TINY, True, torch.float64)
    image = torch.randn(2, 3, 48, 48, dtype=torch.float64)
    mask, _ = same_mask(TINY, 2)
    changed = patchify(image, 8)
    changed[mask] += 100.0
    from ssl_vit.modules.patches import unpatchify

    other = unpatchify(changed, 8, (6, 6))
    first, second = (ours({"image": x, "mask": mask}, call="predict") for x in (image, other))
    assert torch.equal(first, second)
