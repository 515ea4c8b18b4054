"""Files of every layout: each key accounted for, wrappers stripped, positions resized, wrong kinds refused."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.positions import sincos2d_table
from ssl_vit.encoders.weights import encoder_config, fill_encoder, fill_objective, load_state
from ssl_vit.export.timm_folder import export_timm
from ssl_vit.objectives.mae import MAE


def make_encoder(seed: int = 0, **changes: Any) -> Encoder:
    torch.manual_seed(seed)
    arguments = {"name": "vit_tiny_patch16", "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}
    return create_encoder(**{**arguments, **changes})


def make_mae(seed: int = 0, **changes: Any) -> MAE:
    return MAE(make_encoder(seed, **changes), decoder_embed_dim=32, decoder_depth=2, decoder_num_heads=2)


def official(mae: MAE, whole: bool = True) -> dict[str, Tensor]:
    """A state dict as the published files have it."""
    state = {name.removeprefix("encoder.model."): tensor for name, tensor in mae.state_dict().items()}
    return state if whole else {name: state[name] for name in mae.encoder.model.state_dict()}


def same(encoder: Encoder, other: Encoder) -> bool:
    states = encoder.model.state_dict(), other.model.state_dict()
    return all(torch.equal(states[0][name], states[1][name]) for name in states[0])


@pytest.mark.parametrize("whole", [True, False])
@pytest.mark.parametrize("container", ["none", "model", "model beside Namespace"])
def test_official_file_fills_the_encoder(tmp_path: Path, whole: bool, container: str) -> None:
    source, encoder = make_mae(1), make_encoder(2)
    state: Any = official(source, whole)
    if container != "none":
        state = {"model": state}
    if "Namespace" in container:
        state |= {"args": argparse.Namespace(lr=0.1, betas=(0.9, 0.95)), "epoch": 3, "optimizer": {"state": {}}}
    torch.save(state, tmp_path / "mae.pth")
    report = fill_encoder(encoder, tmp_path / "mae.pth")
    assert same(encoder, source.encoder)
    assert report.loaded == report.total == len(encoder.model.state_dict())
    assert set(report.ignored) == ({"decoder*", "mask_token"} if whole else set())
    assert f"{report.total}/{report.total} tensors loaded" in str(report)


def test_official_file_fills_the_objective(tmp_path: Path) -> None:
    source, mae = make_mae(1), make_mae(2)
    torch.save({"model": official(source), "args": argparse.Namespace()}, tmp_path / "mae.pth")
    report = fill_objective(mae, tmp_path / "mae.pth")
    assert report.loaded == len(mae.state_dict())
    assert all(torch.equal(tensor, source.state_dict()[name]) for name, tensor in mae.state_dict().items())


@pytest.mark.parametrize("kind", ["encoder", "fine-tuned"])
def test_the_objective_refuses_files_without_decoder(tmp_path: Path, kind: str) -> None:
    """B73."""
    mae = make_mae(2)
    before = {name: tensor.clone() for name, tensor in mae.state_dict().items()}
    state = official(make_mae(1), whole=False)
    if kind == "fine-tuned":
        state |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    torch.save({"model": state}, tmp_path / "file.pth")
    word = "an encoder only" if kind == "encoder" else "a fine-tuned classifier"
    with pytest.raises(
        InputError, match=f"objective.init=.*holds {word}, nothing of mask_token, decoder.*encoder.init="
    ):
        fill_objective(mae, tmp_path / "file.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in mae.state_dict().items())


def test_our_own_checkpoint_fills_both(tmp_path: Path) -> None:
    source = make_mae(1)
    folder = tmp_path / "checkpoints" / "step_00000007"
    folder.mkdir(parents=True)
    save_file(source.state_dict(), folder / "objective.safetensors")
    (tmp_path / "checkpoints" / "latest").write_text("step_00000007\n")
    for path in (tmp_path, folder, folder / "objective.safetensors"):
        encoder, mae = make_encoder(2), make_mae(3)
        report = fill_encoder(encoder, path)
        assert same(encoder, source.encoder)
        assert set(report.ignored) == {"mask_token", "decoder*"}
        fill_objective(mae, path)
        assert torch.equal(mae.decoder_pred.weight, source.decoder_pred.weight)


@pytest.mark.parametrize(
    "prefix",
    [
        "encoder.",
        "backbone.",
        "module.",
        "_orig_mod.module.",
        "module._orig_mod.",
        "module.encoder.model._orig_mod.",
        "encoder.model.module.backbone.",
    ],
)
def test_prefixes_of_wrappers_in_any_nesting(tmp_path: Path, prefix: str) -> None:
    source, encoder = make_encoder(1), make_encoder(2)
    state = {prefix + name: tensor for name, tensor in source.model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "file.pth")
    fill_encoder(encoder, tmp_path / "file.pth")
    assert same(encoder, source)


def test_wrapper_names_inside(tmp_path: Path) -> None:
    source, encoder = make_encoder(1), make_encoder(2)
    state = {n.replace("blocks.0.", "blocks.0._orig_mod.module."): t for n, t in source.model.state_dict().items()}
    save_file(state, tmp_path / "file.safetensors")
    fill_encoder(encoder, tmp_path / "file.safetensors")
    assert same(encoder, source)


@pytest.mark.parametrize("edit", ["lost", "extra", "renamed", "nothing"])
def test_a_file_that_matches_in_part_or_not_at_all_is_an_error_with_the_keys(tmp_path: Path, edit: str) -> None:
    state = official(make_mae(1))
    if edit == "lost":
        del state["blocks.1.attn.qkv.weight"]
        message = r"29/30 tensors match; missing in the file: blocks\.1\.attn\.qkv\.weight"
    elif edit == "extra":
        state["blocks.2.norm1.weight"] = torch.zeros(64)
        message = r"30/30 tensors match; unknown here: blocks\.2\.norm1\.weight"
    elif edit == "renamed":
        state["dist_token"] = state.pop("cls_token")
        message = "missing in the file: cls_token; unknown here: dist_token"
    else:
        state = {f"student.{name}": tensor for name, tensor in state.items()}
        message = r"no encoder tensor matches.*its names: student\."
    torch.save(state, tmp_path / "file.pth")
    encoder = make_encoder(2)
    before = {name: tensor.clone() for name, tensor in encoder.model.state_dict().items()}
    with pytest.raises(InputError, match=message):
        fill_encoder(encoder, tmp_path / "file.pth")
    assert all(torch.equal(tensor, before[name]) for name, tensor in encoder.model.state_dict().items())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"in_chans": 4}, "in_chans=3 in the file, 4 here"),
        ({"patch_size": 16}, "patch_size=8 in the file, 16 here"),
        ({"embed_dim": 128}, "embed_dim=64 in the file, 128 here"),
        ({"mlp_ratio": 2.0}, "6 tensors have another shape"),
        ({"depth": 3}, r"30/42 tensors match; missing in the file: blocks\.2"),
    ],
)
def test_another_architecture_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    torch.save(official(make_mae(1), whole=False), tmp_path / "file.pth")
    with pytest.raises(InputError, match=message):
        fill_encoder(make_encoder(2, **changes), tmp_path / "file.pth")


def test_fine_tuned_file_with_fc_norm(tmp_path: Path) -> None:
    source = make_encoder(1)
    state = {name.replace("norm.", "fc_norm.") if name.startswith("norm.") else name: tensor
             for name, tensor in source.model.state_dict().items()}  # fmt: skip
    state |= {"head.weight": torch.zeros(10, 64), "head.bias": torch.zeros(10)}
    state["fc_norm.weight"] = torch.full((64,), 3.0)
    torch.save({"model": state}, tmp_path / "file.pth")
    encoder = make_encoder(2)
    report = fill_encoder(encoder, tmp_path / "file.pth")
    assert (encoder.model.norm.weight == 3).all()
    assert report.ignored == ("head",)
    assert "fc_norm used as the final norm" in report.notes[0]


# ------------------------------------------------------------------------------------------------ position tables


def test_fixed_table_of_another_grid_is_computed_anew(tmp_path: Path) -> None:
    """64x64 pixels to 96x96, 64x128, and 32x128 with as many patches as before."""
    torch.save(official(make_mae(1, img_size=64)), tmp_path / "file.pth")
    for size in ((96, 96), (64, 128), (32, 128)):
        encoder, mae = make_encoder(2, img_size=size), make_mae(2, img_size=size)
        grid = encoder.grid_size
        report = fill_encoder(encoder, tmp_path / "file.pth")
        assert report.notes == (f"pos_embed: fixed table computed anew, 8x8 to {grid[0]}x{grid[1]} patches",)
        assert torch.equal(encoder.model.pos_embed, sincos2d_table(grid, 64, 1))
        assert len(fill_objective(mae, tmp_path / "file.pth").notes) == 2
        assert torch.equal(mae.decoder_pos_embed, sincos2d_table(grid, 32, 1))


@pytest.mark.parametrize(
    "changes",
    [{}, {"class_token": False, "global_pool": "avg"}, {"name": "vit_small_patch14_reg4_dinov2"}],
    ids=str,
)
@pytest.mark.parametrize("size", [(96, 96), (64, 128), (32, 128)])
def test_learned_table_is_resized(tmp_path: Path, changes: dict[str, Any], size: tuple[int, int]) -> None:
    """B75."""
    source = make_encoder(1, img_size=64, pos_embed="learned", **changes)
    encoder = make_encoder(2, img_size=size, pos_embed="learned", **changes)
    torch.save(source.model.state_dict(), tmp_path / "file.pth")
    report = fill_encoder(encoder, tmp_path / "file.pth")
    grid = encoder.grid_size
    assert report.notes == (f"pos_embed: resized (bicubic), 8x8 to {grid[0]}x{grid[1]} patches",)
    old = source.model.pos_embed.detach()
    prefix = old.shape[1] - 64
    expected = F.interpolate(
        old[:, prefix:].reshape(1, 8, 8, 64).permute(0, 3, 1, 2), grid, mode="bicubic", antialias=True
    )
    found = encoder.model.pos_embed.detach()
    torch.testing.assert_close(found[:, prefix:], expected.flatten(2).transpose(1, 2))
    assert torch.equal(found[:, :prefix], old[:, :prefix])


def test_the_grid_beside_a_file_is_believed(tmp_path: Path) -> None:
    """A 2x8 grid has as many patches as a 4x4 one; config.json tells them apart."""
    source = make_encoder(1, img_size=(16, 64), pos_embed="learned")
    data: dict[str, Any] = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    export_timm(source, tmp_path / "encoder", **data, metadata={})
    square, wide = make_encoder(2, pos_embed="learned"), make_encoder(3, img_size=(16, 64), pos_embed="learned")
    for path in (tmp_path, tmp_path / "encoder", tmp_path / "encoder" / "model.safetensors"):
        assert "2x8 to 4x4" in fill_encoder(square, path).notes[0]
        assert not fill_encoder(wide, path).notes
        assert same(wide, source)


def test_a_learned_table_in_a_fixed_encoder_is_said(tmp_path: Path) -> None:
    source, encoder = make_encoder(1, pos_embed="learned"), make_encoder(2)
    torch.save(source.model.state_dict(), tmp_path / "file.pth")
    assert "taken from the file and not trained" in fill_encoder(encoder, tmp_path / "file.pth").notes[0]
    assert not encoder.model.pos_embed.requires_grad
    assert same(encoder, source)


# ------------------------------------------------------------------------------------------------ files and folders


class Payload:
    """Runs code when it is unpickled without care."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return Path.touch, (self.target,)


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": official(make_mae(1)), "extra": Payload(tmp_path / "was_here")}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"refused|cannot be read as weights"):
        load_state(tmp_path / "file.pth")
    assert not (tmp_path / "was_here").exists()


class Foreign:
    """A class that a safe reader does not know."""


def test_what_cannot_be_read_is_one_clear_line(tmp_path: Path) -> None:
    torch.save({"model": {"a": torch.zeros(1)}, "args": Foreign()}, tmp_path / "foreign.pth")
    (tmp_path / "text.pth").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    torch.save([torch.zeros(1)], tmp_path / "list.pth")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    (tmp_path / "folder").mkdir()
    for name, message in (
        ("foreign.pth", "refused, it holds more than tensors"),
        ("text.pth", "cannot be read as weights"),
        ("text.safetensors", "cannot be read as weights"),
        ("list.pth", "holds a list"),
        ("empty.pth", "holds no tensors by name; its keys: epoch"),
        ("folder", "holds no weights; allowed: a run folder"),
        ("absent.pth", "no such file"),
    ):
        with pytest.raises(InputError, match=message) as caught:
            load_state(tmp_path / name)
        assert "\n" not in str(caught.value)
        assert name in str(caught.value)


def test_timm_folder_of_others(tmp_path: Path) -> None:
    """As timm writes it for a classifier: learned positions, average pooling with fc_norm, a head."""
    arguments = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 2}
    model: Any = timm.create_model("vit_tiny_patch16_224", **arguments, global_pool="avg", num_classes=7, in_chans=1)
    timm.models.save_for_hf(model, str(tmp_path / "other"), safe_serialization=True, model_args=arguments)
    config = encoder_config(tmp_path / "other")
    assert config.pop("data")["interpolation"] == "bicubic"
    encoder = create_encoder(**config)
    assert (encoder.img_size, encoder.in_chans, config["global_pool"]) == ((32, 48), 1, "avg")
    report = fill_encoder(encoder, tmp_path / "other")
    assert report.ignored == ("head",)
    image = torch.randn(2, 1, 32, 48)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(image), pre_logits=True)
        found = encoder.eval().pool(encoder(image))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_encoder_config_of_a_run_without_export(tmp_path: Path) -> None:
    encoder = make_encoder(1)
    recipe = {"encoder": {**encoder.config(), "init": None}, "data": {"mean": [0.5] * 3, "crop_pct": None}}
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    checkpoint = tmp_path / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_file(encoder.state_dict(), checkpoint / "objective.safetensors")
    for path in (tmp_path, checkpoint, checkpoint / "objective.safetensors"):
        config = encoder_config(path)
        assert config["data"] == {"mean": [0.5] * 3}
        assert create_encoder(**config).config() == encoder.config()


def test_encoder_config_says_what_it_cannot_know(tmp_path: Path) -> None:
    torch.save({}, tmp_path / "file.pth")
    with pytest.raises(InputError, match=r"does not say which encoder it holds; give it as encoder\.name"):
        encoder_config(tmp_path / "file.pth")
    with pytest.raises(InputError, match="no such file or folder"):
        encoder_config(tmp_path / "absent")
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "densenet121", "pretrained_cfg": {}}))
    with pytest.raises(InputError, match="cannot be built here: no encoder is built from 'densenet121'"):
        encoder_config(tmp_path)
    arguments = {"architecture": "vit_tiny_patch16_224", "model_args": {"init_values": 1e-5}, "pretrained_cfg": {}}
    (tmp_path / "config.json").write_text(json.dumps(arguments))
    with pytest.raises(InputError, match="model_args has init_values"):
        encoder_config(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"not the config\.json of a timm folder"):
        encoder_config(tmp_path)


@pytest.mark.parametrize(
    ("tensor", "message"),
    [
        (torch.ones(0), "without elements, as placeholders of sharded weights are"),
        (torch.tensor(float("nan")), "not finite"),
    ],
)
def test_weights_that_are_no_numbers_are_refused(tensor: torch.Tensor, message: str, tmp_path: Path) -> None:
    """B62."""
    torch.save({"model": {"norm.weight": torch.ones(4), "norm.bias": tensor}}, tmp_path / "w.pth")
    with pytest.raises(InputError, match=rf"{message}.*norm\.bias"):
        load_state(tmp_path / "w.pth")
