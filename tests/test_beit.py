"""BEiT: encoder, relative positions, block masks, views, and the loss against independent implementations."""

from __future__ import annotations

import json
import math
import pickle
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import (
    TINY_BEIT,
    TINY_BEIT_ENCODER,
    TINY_ENCODER,
    TINY_SWIN,
    run_python,
    tiny_recipe,
    tokenizer_file,
)
from PIL import Image
from torch import Tensor, nn

from ssl_vit.config import InputError, check
from ssl_vit.data.cropping import resize
from ssl_vit.data.masking import block_mask
from ssl_vit.data.views import BlockMaskedPair, seed_generators
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.beit import BEiT as BEiTEncoder
from ssl_vit.encoders.relative_positions import resized_table
from ssl_vit.encoders.weights import encoder_config, fill_encoder
from ssl_vit.export.timm_folder import export_timm
from ssl_vit.modules.tokenizer import TokenizerFile
from ssl_vit.objectives.beit import BEiT
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.metrics import read_metrics

BOUNDS = {torch.float64: 1e-10, torch.float32: 1e-5}
DRAWS = 10_000


def tiny_beit(encoder: dict[str, Any] | None = None, **changes: Any) -> BEiT:
    torch.manual_seed(0)
    built = create_encoder(**{**TINY_BEIT_ENCODER, **(encoder or {})})
    return BEiT(built, **{**TINY_BEIT, "tokenizer": TokenizerFile(**tokenizer_file()), **changes})


def stir(module: nn.Module) -> None:
    """No parameter stays at a start that hides it: zero tables and biases, equal layer scales."""
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.ndim == 1 or not parameter.any():
                parameter += 0.1 * torch.randn_like(parameter)


def make_batch(objective: BEiT, count: int = 3, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    view = objective.view
    masks = [block_mask(view.grid_size, view.num_masked, view.min_block, exact=view.exact) for _ in range(count)]
    return {
        "image": torch.randn(count, 3, *objective.encoder.img_size, dtype=dtype),
        "target_image": torch.randint(0, 256, (count, 3, *view.target_size), dtype=torch.uint8),
        "mask": torch.stack(masks),
    }


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found - expected).detach().abs().max() / expected.detach().abs().max())


# ----------------------------------------------------------------------------------------------- encoder


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rel_pos": "layer", "global_pool": "token"},
        {"rel_pos": "none", "abs_pos": True, "layer_scale": 0.0},
        {"img_size": (16, 40), "in_chans": 1, "mlp_ratio": 2.0},
        {"name": "beitv2_base_patch16_224", "drop_path_rate": 0.1},
    ],
    ids=str,
)
def test_encoder_is_timms(changes: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(**{**TINY_BEIT_ENCODER, **changes})
    stir(encoder)
    encoder = encoder.double().eval()
    h, w = encoder.grid_size
    image = torch.randn(2, encoder.in_chans, *encoder.img_size, dtype=torch.float64)
    tokens = encoder(image)
    assert tokens.prefix.shape == (2, 1, 48)
    assert tokens.patches.shape == (2, h * w, 48)
    torch.testing.assert_close(torch.cat(list(tokens), dim=1), encoder.model.forward_features(image))
    torch.testing.assert_close(encoder.pool(tokens), encoder.model(image))
    nothing, token = torch.zeros(2, h * w, dtype=torch.bool), torch.ones(1, 1, 48, dtype=torch.float64)
    torch.testing.assert_close(encoder(image, nothing, token), tokens)
    again = create_encoder(**json.loads(json.dumps(encoder.config())))
    assert again.config() == encoder.config()
    again.load_state_dict(encoder.state_dict())
    facts: dict[str, Any] = {"mean": [0.5] * encoder.in_chans, "std": [0.5] * encoder.in_chans}
    found = export_timm(encoder, tmp_path / "encoder", **facts, crop_pct=1.0, interpolation="bicubic", metadata={})
    assert found.difference <= 1e-5
    again = create_encoder(**{**TINY_BEIT_ENCODER, **changes})
    fill_encoder(again, tmp_path / "encoder")
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    torch.testing.assert_close(again.eval().pool(again(image.float())), model(image.float()))


@pytest.mark.parametrize(
    ("name", "millions"),
    [("beit_base_patch16_224", 86), ("beitv2_base_patch16_224", 86), ("beit_large_patch16_224", 304)],
)
def test_published_sizes_on_the_meta_device(name: str, millions: int) -> None:
    with torch.device("meta"):
        encoder = create_encoder(name=name)
    assert sum(p.numel() for p in encoder.parameters()) / 1e6 == pytest.approx(millions, rel=0.005)
    assert encoder.model.rel_pos_bias.relative_position_bias_table.shape == (27 * 27 + 3, encoder.embed_dim // 64)
    assert encoder.grid_size == (14, 14)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"name": "beit_bsae_patch16_224"}, "did you mean 'beit_base_patch16_224'"),
        ({"rel_pos": "layers"}, r"rel_pos='layers'.*did you mean 'layer'"),
        ({"img_size": 30}, r"img_size=30: its height 30.*nearest: 32"),
        ({"layer_scale": -1.0}, r"layer_scale=-1\.0"),
        ({"drop_path_rate": 1.0}, r"drop_path_rate=1\.0"),
        ({"num_heads": 5}, "num_heads=5: should divide embed_dim=48"),
        ({"global_pool": "max"}, "global_pool='max'"),
    ],
)
def test_mistakes_of_the_encoder_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        create_encoder(**{**TINY_BEIT_ENCODER, **changes})


# ----------------------------------------------------------------------------------------------- relative positions


def resized_by_hand(table: np.ndarray, source: int, target: int) -> np.ndarray:
    """The released procedure, restated: geometric distances by bisection, a cubic spline along each axis."""
    from scipy.interpolate import make_interp_spline

    src, dst = 2 * source - 1, 2 * target - 1
    left, right = 1.01, 1.5
    while right - left > 1e-6:
        q = (left + right) / 2
        if 1 * (1 - q ** (src // 2)) / (1 - q) > dst // 2:
            right = q
        else:
            left = q
    distances, current = [], 1.0
    q = (left + right) / 2
    for i in range(src // 2):
        distances.append(current)
        current += q ** (i + 1)
    old = np.array([-d for d in reversed(distances)] + [0.0, *distances])
    new = np.arange(-(dst // 2), dst // 2 + 1).clip(old[0], old[-1])
    planes = []
    for head in range(table.shape[1]):
        plane = table[:-3, head].reshape(src, src)
        rows = make_interp_spline(old, plane, k=3, axis=0)(new)
        planes.append(make_interp_spline(old, rows, k=3, axis=1)(new).ravel())
    return np.concatenate([np.stack(planes, axis=1), table[-3:]])


@pytest.mark.parametrize(("source", "target"), [(14, 24), (14, 32), (4, 7), (14, 10)])
def test_tables_are_resized_as_released(source: int, target: int) -> None:
    torch.manual_seed(0)
    table = torch.randn((2 * source - 1) ** 2 + 3, 3, dtype=torch.float64)
    found = resized_table(table, (source, source), (target, target))
    expected = torch.from_numpy(resized_by_hand(table.numpy(), source, target))
    assert found.shape == ((2 * target - 1) ** 2 + 3, 3)
    assert relative(found, expected) < 1e-10


def test_a_resized_table_keeps_near_relations_and_class_token() -> None:
    table = torch.randn(27 * 27 + 3, 2)
    found = resized_table(table, (14, 14), (24, 16))
    old, new = table[:-3].reshape(27, 27, 2), found[:-3].reshape(47, 31, 2)
    torch.testing.assert_close(new[22:25, 14:17], old[12:15, 12:15], atol=1e-5, rtol=0)
    assert torch.equal(found[-3:], table[-3:])


def test_shared_positions_are_copied_for_each_block_and_resized(tmp_path: Path) -> None:
    torch.manual_seed(0)
    shared = create_encoder(**TINY_BEIT_ENCODER)
    stir(shared)
    facts: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    export_timm(shared, tmp_path / "encoder", **facts, metadata={})
    same = create_encoder(**{**TINY_BEIT_ENCODER, "rel_pos": "layer"})
    report = str(fill_encoder(same, tmp_path / "encoder"))
    assert "shared relative positions copied for each block" in report
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(same(image), shared(image))
    tables = [block.attn.relative_position_bias_table for block in same.model.blocks]
    assert tables[0] is not tables[1], "each block trains its own"

    larger = create_encoder(**{**TINY_BEIT_ENCODER, "rel_pos": "layer", "img_size": (48, 32)})
    report = str(fill_encoder(larger, tmp_path / "encoder"))
    assert "relative positions: 2 tables resized, 4x4 to 6x4 patches" in report
    expected = resized_table(shared.model.rel_pos_bias.relative_position_bias_table.detach(), (4, 4), (6, 4))
    for block in larger.model.blocks:
        torch.testing.assert_close(block.attn.relative_position_bias_table.detach(), expected)

    official = dict(shared.model.state_dict()) | {
        "rel_pos_bias.relative_position_index": torch.zeros(17, 17, dtype=torch.int64),
        "mask_token": torch.zeros(1, 1, 48),
        "lm_head.weight": torch.zeros(9, 48),
        "cls_pt_layers.0.norm1.weight": torch.zeros(48),
    }
    torch.save({"model": official}, tmp_path / "official.pth")
    again = create_encoder(**TINY_BEIT_ENCODER)
    report = str(fill_encoder(again, tmp_path / "official.pth"))
    assert "ignored: mask_token, lm_head, cls_pt_layers" in report
    torch.testing.assert_close(again(image), shared(image))
    apart = create_encoder(**{**TINY_BEIT_ENCODER, "rel_pos": "layer"})
    export_timm(apart, tmp_path / "apart", **facts, metadata={})
    with pytest.raises(InputError, match=r"missing in the file: rel_pos_bias\.relative_position_bias_table"):
        fill_encoder(create_encoder(**TINY_BEIT_ENCODER), tmp_path / "apart")


def test_a_timm_folder_of_others_is_built_and_filled(tmp_path: Path) -> None:
    """Published BEiT folders: a table for each block, the norm after pooling."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    for number, positions in enumerate(({}, {"use_rel_pos_bias": False, "use_shared_rel_pos_bias": True})):
        model = timm.create_model("beit_base_patch16_224", **sizes, **positions, num_classes=5).eval()
        stir(model)
        folder = tmp_path / str(number)
        timm.models.save_for_hf(model, str(folder), model_args={**sizes, **positions}, safe_serialization=True)
        stated = encoder_config(folder)
        assert stated["rel_pos"] == ("shared" if positions else "layer")
        encoder = create_encoder(**stated)
        fill_encoder(encoder, folder)
        image = torch.randn(2, 3, 32, 32)
        x = torch.cat([model.cls_token.expand(2, -1, -1), model.patch_embed(image)], dim=1)
        bias = model.rel_pos_bias() if positions else None
        for block in model.blocks:
            x = block(x, shared_rel_pos_bias=bias)
        tokens = encoder.eval()(image)
        torch.testing.assert_close(torch.cat(list(tokens), dim=1), x)
        torch.testing.assert_close(encoder.pool(tokens), model.forward_head(x, pre_logits=True))


# ----------------------------------------------------------------------------------------------- masks and views


class Released:
    """The released mask generator (v1), restated from its description; ``exact`` adds v2's filling up."""

    def __init__(self, size: int, wanted: int, smallest: int, aspect: float = 0.3, exact: bool = False) -> None:
        self.size, self.wanted, self.smallest, self.exact = size, wanted, smallest, exact
        self.logs = (math.log(aspect), math.log(1 / aspect))

    def one_block(self, mask: np.ndarray, room: int) -> int:
        for _ in range(10):
            area = random.uniform(self.smallest, room)
            ratio = math.exp(random.uniform(*self.logs))
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w < self.size and h < self.size:
                top, left = random.randint(0, self.size - h), random.randint(0, self.size - w)
                new = int((mask[top : top + h, left : left + w] == 0).sum())
                if 0 < new <= room:
                    mask[top : top + h, left : left + w] = 1
                    return new
        return 0

    def __call__(self) -> np.ndarray:
        mask, count = np.zeros((self.size, self.size), dtype=int), 0
        while count < self.wanted:
            new = self.one_block(mask, self.wanted - count)
            if not new:
                break
            count += new
        return mask


def test_masks_are_the_released_generators_draw_for_draw() -> None:
    released = Released(14, 75, 16)
    for seed in range(300):
        random.seed(seed)
        expected = released()
        random.seed(seed)
        found = block_mask((14, 14), 75, 16, exact=False)
        assert np.array_equal(found.view(14, 14).numpy(), expected.astype(bool)), seed


def test_counts_and_shapes_over_many_draws() -> None:
    """v1: at most 75 of 196, seldom fewer; v2: exactly 75; masks are blocks, spread over the whole grid."""
    random.seed(0)
    v1 = torch.stack([block_mask((14, 14), 75, 16, exact=False) for _ in range(DRAWS)])
    v2 = torch.stack([block_mask((14, 14), 75, 16) for _ in range(DRAWS)])
    counts = v1.sum(dim=1)
    assert counts.max() == 75
    assert (v2.sum(dim=1) == 75).all()
    assert counts.min() > 75 - 16, "what is left when no block of 16 fits"
    assert 72 < counts.float().mean() < 75
    assert (counts < 75).any()
    for masks in (v1, v2):
        grid = masks.view(-1, 14, 14).float()
        assert grid.mean(dim=0).min() > 0, "every patch is masked at times"
        symmetric = grid.mean(dim=0)
        torch.testing.assert_close(symmetric, symmetric.flip(0), atol=0.03, rtol=0)
        torch.testing.assert_close(symmetric, symmetric.flip(1), atol=0.03, rtol=0)
        torch.testing.assert_close(symmetric, symmetric.T, atol=0.03, rtol=0)
        pairs = (grid[:, 1:] * grid[:, :-1]).sum((1, 2)) / grid.sum((1, 2))
        assert pairs.mean() > 0.7, "neighbours are masked together; 0.36 for masks without blocks"


def test_masks_are_distributed_as_lightlys() -> None:
    """lightly's generator has the same blocks (DINOv2's); compare counts and where patches are masked."""
    utils = pytest.importorskip("lightly.models.utils")
    random.seed(0)
    theirs = torch.stack([utils.random_block_mask_image((14, 14), 75, min_num_masks_per_block=16) for _ in range(4000)])
    ours = torch.stack([block_mask((14, 14), 75, 16, exact=False).view(14, 14) for _ in range(4000)])
    # standard errors: 0.0077 of a patch's share, about 0.06 of the mean count
    torch.testing.assert_close(ours.float().mean(0), theirs.float().mean(0), atol=5 * 0.0077 * 2**0.5, rtol=0)
    counts = [masks.flatten(1).sum(1).double() for masks in (ours, theirs)]
    error = math.hypot(*(float(c.std()) / 4000**0.5 for c in counts))
    assert abs(float(counts[0].mean() - counts[1].mean())) < 5 * error


def test_small_grids_and_bounds() -> None:
    random.seed(0)
    for _ in range(500):
        assert block_mask((4, 4), 6, 2).sum() == 6
        assert block_mask((2, 2), 3, 1).sum() == 3
        assert block_mask((14, 14), 75, 16, max_block=20).sum() == 75


def pair_view(**changes: Any) -> BlockMaskedPair:
    arguments: dict[str, Any] = {
        "img_size": (64, 64), "crop_scale": (0.08, 1.0), "crop_ratio": (0.75, 4 / 3), "flip": 0.5,
        "interpolation": "bicubic", "target_size": (32, 32), "target_interpolation": "lanczos", "color_jitter": 0.0,
        "grid_size": (4, 4), "num_masked": 6, "min_block": 2, "max_block": None, "exact": True,
    }  # fmt: skip
    return BlockMaskedPair(**{**arguments, **changes})


def test_both_pictures_show_the_same_crop_and_flip() -> None:
    """A smooth picture, red to the right and green downwards: both views agree everywhere, with and without jitter."""
    x, y = torch.meshgrid(torch.linspace(0, 255, 90), torch.linspace(0, 255, 70), indexing="xy")
    image = torch.stack([x, y, (x + y) / 2]).to(torch.uint8)
    for jitter in (0.0, 0.4):
        flips = set()
        view = pickle.loads(pickle.dumps(pair_view(color_jitter=jitter)))
        for seed in range(30):
            seed_generators(seed)
            sample = view({"image": image, "label": 0})
            assert sample["image"].shape == (3, 64, 64)
            assert sample["target_image"].shape == (3, 32, 32)
            assert sample["target_image"].dtype == torch.uint8
            assert sample["mask"].sum() == 6
            big = resize(sample["image"], (32, 32), "bilinear").float()
            assert (big - sample["target_image"].float()).abs().max() < 14
            flips.add(bool(big[0, 0, 0] > big[0, 0, -1]))
        assert flips == {True, False}
    seed_generators(1)
    first = pair_view(target_size=(64, 64), target_interpolation="bicubic")({"image": image, "label": 0})
    assert torch.equal(first["image"], first["target_image"]), "v2: the same picture"


def test_lanczos_is_pillows() -> None:
    image = torch.randint(0, 256, (3, 41, 60), dtype=torch.uint8)
    expected = Image.fromarray(image.permute(1, 2, 0).numpy()).resize((20, 16), Image.Resampling.LANCZOS)
    assert torch.equal(resize(image, (16, 20), "lanczos"), torch.from_numpy(np.array(expected)).permute(2, 0, 1))


# ----------------------------------------------------------------------------------------------- objective


def rename(state: dict[str, Tensor], depth: int) -> dict[str, Tensor]:
    """Our names to transformers'; q, k and v are three tensors there, k without bias."""
    renamed = {}
    for name, tensor in state.items():
        for ours, theirs in (
            (r"^encoder\.model\.blocks\.", "beit.layers."),
            (r"^encoder\.model\.cls_token", "beit.embeddings.cls_token"),
            (r"^mask_token", "beit.embeddings.mask_token"),
            (r"^encoder\.model\.patch_embed\.proj", "beit.embeddings.patch_embeddings.projection"),
            (r"^encoder\.model\.rel_pos_bias", "beit.shared_position_bias"),
            (r"^encoder\.model\.norm\.", "layernorm."),
            (r"^head\.", "lm_head."),
            (r"\.norm1\.", ".layernorm_before."),
            (r"\.norm2\.", ".layernorm_after."),
            (r"\.gamma_", ".lambda_"),
            (r"\.attn\.proj\.", ".attention.o_proj."),
            (r"\.attn\.([qv])_bias", r".attention.\1_proj.bias"),
        ):
            name = re.sub(ours, theirs, name)
        if name.startswith("tokenizer."):
            continue
        if ".attn.qkv." in name:
            for letter, part in zip("qkv", tensor.chunk(3), strict=True):
                renamed[name.replace(".attn.qkv.", f".attention.{letter}_proj.")] = part
        else:
            renamed[name] = tensor
    return renamed


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("varying_count", [True, False])
def test_loss_and_gradients_equal_transformers(dtype: torch.dtype, varying_count: bool) -> None:
    """BeitForMaskedImageModeling at ViT-B widths on 14 x 14 patches, same weights, pictures, masks and codes."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    encoder = create_encoder(name="beit_base_patch16_224", depth=2, layer_scale=0.1)
    objective = BEiT(encoder, TokenizerFile(**tokenizer_file(224, 16)), varying_count=varying_count).to(dtype)
    stir(objective.encoder)
    config = transformers.BeitConfig(
        vocab_size=32, num_hidden_layers=2, use_mask_token=True, use_shared_relative_position_bias=True,
        layer_norm_eps=1e-6, drop_path_rate=0.0, attn_implementation="sdpa",
    )  # fmt: skip
    reference = transformers.BeitForMaskedImageModeling(config).to(dtype)
    missing = reference.load_state_dict(rename(objective.state_dict(), 2), strict=False)
    assert not missing.unexpected_keys
    assert all("relative_position_index" in name for name in missing.missing_keys)
    random.seed(1)
    batch = make_batch(objective, 2, dtype)
    codes = objective.tokenizer.tokens(batch["target_image"])
    loss, metrics = objective(batch)
    found = reference(batch["image"], bool_masked_pos=batch["mask"], labels=codes[batch["mask"]])
    assert relative(loss, found.loss) < BOUNDS[dtype]
    right = found.logits.argmax(-1) == codes
    assert float(metrics["accuracy"]) == pytest.approx(float(right[batch["mask"]].float().mean()))
    count = torch.bincount(codes[batch["mask"]])
    assert float(metrics["commonest"]) == pytest.approx(float(count.max() / count.sum()))
    predicted = objective(batch, call="predict")
    assert torch.equal(predicted["codes"], codes)
    assert torch.equal(predicted["masked_accuracy"], (right & batch["mask"]).sum(1) / batch["mask"].sum(1))
    loss.backward()
    found.loss.backward()
    expected = {name: p.grad for name, p in reference.named_parameters()}
    ours = {name: p.grad for name, p in objective.named_parameters() if p.grad is not None}
    for name, gradient in rename(ours, 2).items():
        theirs = expected[name]
        assert theirs is not None, name
        assert relative(gradient, theirs) < 10 * BOUNDS[dtype], name


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_second_path_is_the_papers_formula(dtype: torch.dtype) -> None:
    """Literal: block by block with the shared table, early patches with the last class token, two blocks, one norm."""
    objective = tiny_beit({"depth": 4}, early_layer=2).to(dtype)
    stir(objective.encoder)
    stir(objective.cls_blocks)
    batch = make_batch(objective, 3, dtype)
    loss, metrics = objective(batch)
    model, mask = objective.encoder.model, batch["mask"]
    bias = model.rel_pos_bias()
    x = model.patch_embed(batch["image"])
    x = x * (~mask[..., None]) + objective.mask_token * mask[..., None]
    x = torch.cat([model.cls_token.expand(3, -1, -1), x], dim=1)
    early = x
    for number, block in enumerate(model.blocks):
        x = block(x, shared_rel_pos_bias=bias)
        if number + 1 == 2:
            early = x
    second = torch.cat([x[:, [0]], early[:, 1:]], dim=1)
    for block in objective.cls_blocks:
        second = block(second, shared_rel_pos_bias=bias)
    codes = objective.tokenizer.tokens(batch["target_image"])[mask]
    expected = torch.zeros((), dtype=dtype)
    for hidden in (x, second):
        log_p = objective.head(model.norm(hidden)[:, 1:][mask]).log_softmax(-1)
        expected = expected - log_p[torch.arange(len(codes)), codes].mean()
    assert relative(loss, expected) < BOUNDS[dtype]
    assert set(metrics) == {"accuracy", "cls_accuracy", "commonest"}
    trained = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    assert trained.keys() == {name for name, _ in objective.named_parameters() if not name.startswith("tokenizer.")}
    gradients = (torch.autograd.grad(value, list(trained.values())) for value in (loss, expected))
    for name, ours, theirs in zip(trained, *gradients, strict=True):
        assert ours.abs().sum() > 0, name
        assert relative(ours, theirs) < 10 * BOUNDS[dtype], name


def test_masked_pixels_do_not_matter() -> None:
    objective = tiny_beit(early_layer=1)
    batch = make_batch(objective)
    changed = batch["image"].clone()
    for row, mask in enumerate(batch["mask"]):
        for n in mask.nonzero().flatten().tolist():
            changed[row, :, n // 4 * 8 : n // 4 * 8 + 8, n % 4 * 8 : n % 4 * 8 + 8] = 7.0
    assert torch.equal(objective(batch)[0], objective({**batch, "image": changed})[0])


def test_initialisation_is_the_released_one() -> None:
    """Normal of 0.02 cut at one standard deviation; residuals of block l over the root of 2 l; the rest in place."""
    torch.manual_seed(0)
    encoder = create_encoder(name="beitv2_base_patch16_224", depth=3, layer_scale=0.1)
    objective = BEiT(encoder, TokenizerFile(**tokenizer_file(224, 16)), early_layer=2)
    for name, parameter in objective.named_parameters():
        if name.startswith(("tokenizer.", "cls_blocks.")):
            continue
        if name.endswith((".bias", "_bias", "relative_position_bias_table")):
            assert not parameter.any(), name
        elif "gamma" in name:
            assert (parameter == 0.1).all(), name
        elif "norm" in name:
            assert (parameter == 1).all(), name
        else:
            block = re.search(r"blocks\.(\d+)\.(attn\.proj|mlp\.fc2)", name)
            bound = 0.02 / (math.sqrt(2 * (int(block[1]) + 1)) if block else 1)
            assert parameter.abs().max() <= bound * (1 + 1e-6), name
            # standard deviation of a normal cut at one of its own
            assert parameter.std().item() == pytest.approx(bound * 0.5396, rel=0.1), name
    assert [block.gamma_1[0].item() for block in objective.cls_blocks] == pytest.approx([0.1, 0.1])
    for number, block in enumerate(objective.cls_blocks):
        bound = 768**-0.5 / math.sqrt(2 * (2 + number + 1))
        assert bound * 0.99 < block.attn.proj.weight.abs().max() <= bound * (1 + 1e-6)
    loss, _ = objective(make_batch(objective, 1))
    assert loss.item() == pytest.approx(2 * math.log(32), rel=0.1), "two paths that know nothing yet"


def test_names_of_the_decayed_group() -> None:
    objective = tiny_beit({"abs_pos": True}, early_layer=1)
    exempt = objective.no_weight_decay()
    assert exempt == {"encoder.model.cls_token", "encoder.model.pos_embed"}
    trainable = {name: p for name, p in objective.named_parameters() if p.requires_grad}
    decayed = {n for n, p in trainable.items() if p.ndim > 1 and not n.endswith(".bias") and n not in exempt}
    assert "mask_token" in decayed
    assert "encoder.model.rel_pos_bias.relative_position_bias_table" in decayed
    assert tiny_beit().no_weight_decay() == {"encoder.model.cls_token"}


def test_a_plain_vit_will_do_without_the_second_path() -> None:
    encoder = create_encoder(**TINY_ENCODER)
    arguments: dict[str, Any] = {**TINY_BEIT, "tokenizer": TokenizerFile(**tokenizer_file())}
    loss, _ = BEiT(encoder, **arguments)(make_batch(tiny_beit()))
    assert loss.isfinite()
    with pytest.raises(ValueError, match=r"early_layer=1: needs a beit_\* or beitv2_\* encoder"):
        BEiT(encoder, **arguments, early_layer=1)
    for other in (TINY_SWIN, {"name": "resnet18", "img_size": 32}):
        with pytest.raises(ValueError, match=r"one code for each masked patch.*allowed: beit_\*, beitv2_\*, vit_\*"):
            BEiT(create_encoder(**other), **arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"tokenizer": TokenizerFile()}, r"tokenizer\.path: is required"),
        ({"num_masked": 16}, "num_masked=16: allowed: 1 to 15 of 16"),
        ({"min_block": 7}, "min_block=7: allowed: 1 to num_masked=6"),
        ({"max_block": 1}, "max_block=1: allowed: null"),
        ({"early_layer": 2}, "early_layer=2: allowed: 1 to 1 for 2 blocks"),
        ({"color_jitter": -0.1}, r"color_jitter=-0\.1"),
        ({"target_size": 64}, r"target_size=\[64, 64\]: this tokenizer \(dvae\) takes pictures of 32 x 32"),
        ({"tokenizer": TokenizerFile(**tokenizer_file(64, 8))}, r"gives 8x8 codes.*4x4 patches"),
        ({"tokenizer": TokenizerFile(**tokenizer_file(32, 8, 1))}, r"with 1 channels.*in_chans=3"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny_beit(**arguments)


def test_autocast_keeps_the_loss_in_float32() -> None:
    objective = tiny_beit(early_layer=1)
    batch = make_batch(objective)
    with torch.autocast("cpu", torch.bfloat16):
        loss, _ = objective(batch)
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(objective(batch)[0].item(), rel=0.02)


def test_only_varying_counts_loosen_exactness() -> None:
    assert tiny_beit().level_c == ("encoder.drop_path_rate",)
    assert tiny_beit(varying_count=True).level_c == ("encoder.drop_path_rate", "objective.varying_count")


def recipe_of(images: Path, folder: Path, **objective: Any) -> dict[str, Any]:
    chosen = {"name": "beit", **TINY_BEIT, "tokenizer": tokenizer_file(), "early_layer": 1, **objective}
    values = tiny_recipe(images, folder, objective=chosen, evals={"codebook": {"every": "6 steps"}, "decoded": {}})
    values["encoder"] = dict(TINY_BEIT_ENCODER)
    return values


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("beit") / "run"
    run(check_recipe(check(Recipe, recipe_of(images, folder))))
    return folder


def test_a_run_measures_masked_accuracy(trained: Path) -> None:
    result = json.loads((trained / "result.json").read_text())["evaluations"]
    initial, final = result["initial"], result["final"]
    assert {"codebook/commonest", "codebook/usage", "codebook/entropy"} <= final.keys()
    assert initial["codebook/masked_accuracy"] < 0.1 < 0.3 < final["codebook/masked_accuracy"], "32 codes, 12 steps"
    assert 0 < final["decoded/error"] < 1, "patches are nearer to the mean of their code than to that of all"
    assert len(list((trained / "pictures").glob("decoded_*.png"))) == 2
    assert (trained / "encoder" / "model.safetensors").is_file()


def test_a_resumed_run_is_bit_for_bit_the_same(trained: Path, images: Path, tmp_path: Path) -> None:
    values = recipe_of(images, tmp_path / "again")
    run(check_recipe(check(Recipe, values)), resume=str(trained / "checkpoints" / "step_00000008"))
    again, straight = (
        [(v["step"], v["loss"]) for v in read_metrics(f / "metrics.jsonl") if "loss" in v]
        for f in (tmp_path / "again", trained)
    )
    assert again == straight[8:]


def test_without_a_tokenizer_the_message_says_what_to_put_where(images: Path, tmp_path: Path) -> None:
    """B77."""
    done = run_python("pipelines/pretrain_beit.py", f"data.train=folder:{images}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    for part in ("tokenizer.path: is required", "pipelines/train_tokenizer.py", "dalle_encoder.safetensors"):
        assert part in message


def test_encoder_classes() -> None:
    assert isinstance(create_encoder(**TINY_BEIT_ENCODER), BEiTEncoder)
    with pytest.raises(ValueError, match="cannot drop patches"):
        create_encoder(**TINY_BEIT_ENCODER).forward_visible(
            torch.zeros(1, 3, 32, 32), torch.zeros(1, 1, dtype=torch.long)
        )
