"""Pictures of what an encoder does: attention maps, patch components, neighbours; and measures without labels."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_BEIT_ENCODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN, tiny_recipe
from PIL import Image
from test_trainer import train

from ssl_vit.config import InputError
from ssl_vit.data.loader import Pixels
from ssl_vit.data.sources import open_source
from ssl_vit.encoders.base import create_encoder
from ssl_vit.evaluation.attention import Attention, _Recorder, attention_maps, overlay, rollout
from ssl_vit.evaluation.base import Subject, Subset
from ssl_vit.evaluation.neighbours import Neighbours
from ssl_vit.evaluation.patch_pca import PatchPCA, component_colours
from ssl_vit.evaluation.rank import Rank, spectral_decay
from ssl_vit.objectives.base import Objective

ENCODERS: dict[str, dict[str, Any]] = {
    "vit": TINY_ENCODER,
    "deit": {**TINY_ENCODER, "name": "deit_tiny_distilled_patch16_224"},
    "hybrid": TINY_HYBRID,
    "no-class-token": {**TINY_ENCODER, "class_token": False, "global_pool": "avg"},
    "beit": TINY_BEIT_ENCODER,
    "beit-layer": {**TINY_BEIT_ENCODER, "rel_pos": "layer"},
}


def subject(encoder: dict[str, Any], images: Path) -> tuple[Subject, dict[str, np.ndarray]]:
    torch.manual_seed(0)
    objective = Objective(create_encoder(**encoder))
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    everything = Subset.all(open_source(f"folder:{images}"))
    pixels = Pixels((0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    judged = Subject(objective, objective.encoder.pool, (32, 32), pixels, torch.device("cpu"), everything)
    found: dict[str, np.ndarray] = {}
    judged.picture = lambda name, image: found.update({name: image})
    return judged, found


class Checked(_Recorder):
    """Compares each layer's output with its probabilities times its values."""

    def __init__(self) -> None:
        super().__init__()
        self.checks: list[torch.Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = super().__torch_function__(func, types, args, kwargs)
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.checks.append((self.maps[-1] @ args[2] - output).abs().max() / output.abs().max())
        return output


@pytest.mark.parametrize("encoder", ENCODERS)
def test_probabilities_times_values_are_the_layers_own_output(encoder: str) -> None:
    torch.manual_seed(0)
    model = create_encoder(**ENCODERS[encoder]).eval()
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad(), Checked() as recorder:
        tokens = model(image)
    assert len(recorder.maps) == 2
    count = model.num_prefix_tokens + 16
    for layer, difference in zip(recorder.maps, recorder.checks, strict=True):
        assert layer.shape == (3, 3, count, count)
        assert difference <= 1e-5
        torch.testing.assert_close(layer.sum(dim=-1), torch.ones(3, 3, count))
    torch.testing.assert_close(model(image), tokens, rtol=1e-4, atol=1e-5)


def test_attention_of_any_timm_vit_is_that_of_its_unfused_form() -> None:
    model = timm.create_model("vit_tiny_patch16_224", img_size=32, patch_size=8, num_classes=0).eval()
    image = torch.randn(2, 3, 32, 32)
    maps, _ = attention_maps(lambda: model(image), 2)
    seen: list[torch.Tensor] = []
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(lambda module, inputs, output: seen.append(output.detach()))
    model(image)
    for ours, theirs in zip(maps, seen, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_rollout_is_the_papers_product() -> None:
    maps = [torch.rand(2, 3, 5, 5, dtype=torch.float64).softmax(dim=-1) for _ in range(3)]
    expected = []
    for b in range(2):
        total = np.eye(5)
        for layer in maps:
            total = (0.5 * layer[b].mean(dim=0).numpy() + 0.5 * np.eye(5)) @ total
        expected.append(total)
    torch.testing.assert_close(rollout(maps), torch.from_numpy(np.stack(expected)))
    torch.testing.assert_close(rollout(maps).sum(dim=-1), torch.ones(2, 5, dtype=torch.float64))


@pytest.mark.parametrize("encoder", ENCODERS)
def test_sheets_of_every_encoder(encoder: str, images: Path) -> None:
    judged, found = subject(ENCODERS[encoder], images)
    assert Attention(count=2, layers=[0, -1])(judged) == {}
    side = 96 + 4
    assert found["attention"].shape == (2 * side + 4, (1 + 2 * 4 + 1) * side + 4, 3)
    assert PatchPCA(count=3)(judged).keys() == {"explained"}
    assert found["patch_pca"].shape == (3 * side + 4, 2 * side + 4, 3)
    assert Neighbours(count=4, k=5)(judged).keys() == {"similarity"}
    assert found["neighbours"].shape == (4 * side + 4, 6 * side + 4, 3)
    with pytest.raises(InputError, match=r"layers=\[7\]: allowed: -2 to 1"):
        Attention(layers=[7])(judged)


def test_attention_in_windows_is_refused_with_the_reason(images: Path) -> None:
    judged, _ = subject(TINY_SWIN, images)
    with pytest.raises(InputError, match="within windows"):
        Attention()(judged)
    judged, _ = subject({"name": "resnet18", "img_size": 32, "layers": [1, 1, 1, 1]}, images)
    with pytest.raises(InputError, match="within windows"):
        Attention()(judged)
    assert PatchPCA()(judged)


def test_overlays_are_bright_where_values_are_large() -> None:
    values = torch.zeros(1, 16)
    values[0, 5] = 1.0  # second row, second column
    shown = overlay(torch.full((1, 3, 32, 32), 128, dtype=torch.uint8), values)[0].float().sum(dim=0)
    row, column = divmod(int(shown.argmax()), 32)
    assert 8 <= row < 16
    assert 8 <= column < 16


def test_neighbours_are_the_nearest_and_never_the_image_itself(images: Path) -> None:
    judged, found = subject(TINY_ENCODER, images)
    measured = Neighbours(count=4, k=3)(judged)
    features, _ = judged.features("images")
    unit = torch.nn.functional.normalize(features, dim=1)
    similarity = unit @ unit.T
    similarity.fill_diagonal_(-2)
    values, nearest = similarity[[0, 18, 36, 54]].topk(3)
    assert measured["similarity"] == pytest.approx(values.mean().item())
    from ssl_vit.data.decode import decode
    from ssl_vit.data.reader import Reader

    reader = Reader(judged.images.index)
    for row, indices in enumerate(nearest.tolist()):
        for column, index in enumerate(indices, start=1):
            cell = found["neighbours"][4 + row * 100 : 100 + row * 100, 4 + column * 100 : 100 + column * 100]
            assert np.array_equal(cell[::3, ::3], decode(reader.read(index)).permute(1, 2, 0).numpy())


def test_colours_are_the_first_three_components() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q
    scores = torch.randn(4, 2500, 8, generator=generator) * torch.tensor([9.0, 5, 3, 0.1, 0.1, 0.1, 0.1, 0.1])
    colours, explained = component_colours(scores @ basis.T + 7)
    assert explained > 0.99
    assert 0 <= colours.min() <= colours.max() <= 1
    for c in range(3):
        inner = (colours[..., c] > 0) & (colours[..., c] < 1)
        pair = torch.stack([colours[..., c][inner], scores[..., c][inner]])
        assert torch.corrcoef(pair)[0, 1].abs() > 0.99


def test_alpha_of_a_power_law() -> None:
    ranks = torch.arange(1, 100, dtype=torch.float64)
    assert spectral_decay(3 * ranks**-1.3) == pytest.approx(1.3, abs=1e-9)
    assert spectral_decay(ranks[:12] ** -1.3) is None
    assert spectral_decay(torch.cat([ranks[:8] ** -1.0, torch.zeros(40, dtype=torch.float64)])) is None


def collapsed(features: torch.Tensor, judged: Subject, caplog: pytest.LogCaptureFixture) -> str:
    judged._features = {id(judged.images): (features, torch.zeros(len(features)))}
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="ssl_vit"):
        Rank()(judged)
    return caplog.text


def test_a_collapse_is_warned_of(images: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Features all alike, along a line, along a line around a mean, and in a few of many directions."""
    judged, _ = subject(TINY_ENCODER, images)
    mean, along = 10 * torch.randn(48), torch.randn(200, 1)
    alike = torch.ones(72, 48) + 1e-5 * torch.randn(72, 48)
    line = along * torch.randn(48)
    for features in (alike, line, line + mean, line + mean + 1e-3 * torch.randn(200, 48)):
        assert "collapse suspected" in collapsed(features, judged, caplog)
    few = torch.randn(900, 4) @ torch.randn(4, 800)
    assert "differ in 4.0 of 800 directions" in collapsed(few, judged, caplog)
    for features in (torch.randn(200, 48), torch.randn(200, 4) @ torch.randn(4, 48) + mean, torch.randn(3, 48)):
        assert not collapsed(features, judged, caplog)


@pytest.mark.parametrize("encoder", [*ENCODERS.values(), TINY_SWIN, {"name": "resnet18", "layers": [1, 1, 1, 1]}])
def test_an_encoder_as_it_begins_is_no_collapse(
    encoder: dict[str, Any], images: Path, caplog: pytest.LogCaptureFixture
) -> None:
    for spec in (f"folder:{images}", "builtin:digits-test"):
        torch.manual_seed(0)
        objective = Objective(create_encoder(**{**encoder, "img_size": 32})).eval()
        pixels = Pixels((0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
        shown = Subset.spread(open_source(spec), 200)
        judged = Subject(objective, objective.encoder.pool, (32, 32), pixels, torch.device("cpu"), shown)
        with caplog.at_level(logging.WARNING, logger="ssl_vit"):
            assert Rank()(judged)["alpha"] > 0
        assert not caplog.records


def test_a_run_leaves_its_sheets(images: Path, tmp_path: Path) -> None:
    evals = {"attention": {"count": 2}, "patch_pca": {"count": 2}, "neighbours": {"count": 2}, "rank": {}}
    folder = train(tiny_recipe(images, tmp_path / "run", evals=evals))
    assert "collapse" not in (folder / "train.log").read_text(encoding="utf-8")
    for name in ("attention", "patch_pca", "neighbours"):
        files = sorted(folder.rglob(f"*{name}*.png"))
        assert len(files) == 2, "at the start and at the end"
        with Image.open(files[0]) as picture:
            assert min(picture.size) > 96
