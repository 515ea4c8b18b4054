"""Files of weights: official layouts, wrapper prefixes, safety; every key is accounted for or named."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from ssl_vit.config import InputError
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder, fill_objective, load_state
from ssl_vit.objectives.mae import MAE

TINY: dict[str, Any] = {"name": "vit_tiny_patch16_224", "img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2}
DECODER = {"decoder_embed_dim": 32, "decoder_depth": 1, "decoder_num_heads": 2}


def mae(seed: int = 0, **config: Any) -> MAE:
    torch.manual_seed(seed)
    return MAE(create_encoder(**{**TINY, **config}), **DECODER)


def official(objective: MAE) -> dict[str, torch.Tensor]:
    """The layout of the official pretraining files: encoder and decoder side by side, as timm names them."""
    return {name.removeprefix("encoder.model."): t.clone() for name, t in objective.state_dict().items()}


def encoder_only(objective: MAE) -> dict[str, torch.Tensor]:
    return {n: t for n, t in official(objective).items() if not n.startswith(("decoder", "mask_token"))}


def equal(first: torch.nn.Module, second: torch.nn.Module) -> bool:
    state, other = first.state_dict(), second.state_dict()
    return state.keys() == other.keys() and all(torch.equal(state[name], other[name]) for name in state)


@pytest.mark.parametrize("wrap", ["plain", "model", "namespace", "ddp", "compiled", "nested", "ours"])
@pytest.mark.parametrize("full", [True, False])
def test_encoder_init_from_any_layout(tmp_path: Path, wrap: str, full: bool) -> None:
    source, target = mae(1), mae(2)
    state = official(source) if full else encoder_only(source)
    content: Any = state
    if wrap == "model":
        content = {"model": state}
    elif wrap == "namespace":
        content = {"model": state, "args": argparse.Namespace(lr=1e-3), "epoch": 3}
    elif wrap == "ddp":
        content = {"state_dict": {f"module.{n}": t for n, t in state.items()}}
    elif wrap == "compiled":
        content = {f"_orig_mod.{n}": t for n, t in state.items()}
    elif wrap == "nested":
        content = {f"module._orig_mod.{n}": t for n, t in state.items()}
    elif wrap == "ours":
        content = {f"encoder.model.{n}" if n in encoder_only(source) else n: t for n, t in state.items()}
    torch.save(content, tmp_path / "weights.pth")
    report = fill_encoder(target.encoder, tmp_path / "weights.pth")
    assert equal(source.encoder, target.encoder)
    count = len(target.encoder.model.state_dict())
    assert f"{count}/{count} tensors" in report
    assert ("decoder_blocks (12)" in report and "mask_token (1)" in report) is full


def test_objective_init_needs_the_whole_file(tmp_path: Path) -> None:
    source, target = mae(1), mae(2)
    torch.save({"model": official(source), "args": argparse.Namespace()}, tmp_path / "full.pth")
    fill_objective(target, tmp_path / "full.pth")
    assert equal(source, target)
    save_file(encoder_only(source), tmp_path / "encoder.safetensors")
    before = mae(2)
    with pytest.raises(InputError, match=r"encoder-only file .*use encoder\.init="):
        fill_objective(before, tmp_path / "encoder.safetensors")
    assert equal(before, mae(2)), "nothing was loaded"


def test_partial_files_are_errors_that_name_the_keys(tmp_path: Path) -> None:
    source = mae(1)
    state = encoder_only(source)
    del state["blocks.1.attn.qkv.weight"]
    save_file(state, tmp_path / "missing.safetensors")
    with pytest.raises(InputError, match=r"missing: blocks\.1\.attn\.qkv\.weight"):
        fill_encoder(source.encoder, tmp_path / "missing.safetensors")
    save_file({**encoder_only(source), "blocks.0.attn.rel_pos": torch.zeros(2)}, tmp_path / "more.safetensors")
    with pytest.raises(InputError, match=r"unexpected: blocks\.0\.attn\.rel_pos"):
        fill_encoder(source.encoder, tmp_path / "more.safetensors")
    save_file(encoder_only(source), tmp_path / "rgb.safetensors")
    with pytest.raises(
        InputError, match=r"of another shape: patch_embed\.proj\.weight \(48, 3, 8, 8\), here \(48, 1, 8, 8\)"
    ):
        fill_encoder(mae(1, in_chans=1).encoder, tmp_path / "rgb.safetensors")
    full = official(source)
    del full["decoder_pred.bias"]
    save_file(full, tmp_path / "full.safetensors")
    with pytest.raises(InputError, match=r"missing: decoder_pred\.bias"):
        fill_objective(source, tmp_path / "full.safetensors")


def test_files_that_hold_no_encoder(tmp_path: Path) -> None:
    encoder = mae().encoder
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "cnn.safetensors")
    with pytest.raises(InputError, match=r"holds no ViT encoder.*conv1"):
        fill_encoder(encoder, tmp_path / "cnn.safetensors")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(InputError, match="holds no named tensors"):
        load_state(tmp_path / "list.pth")
    (tmp_path / "junk.pth").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_state(tmp_path / "junk.pth")
    (tmp_path / "junk.safetensors").write_bytes(b"<!DOCTYPE html>")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_state(tmp_path / "junk.safetensors")
    with pytest.raises(InputError, match="no such file or folder"):
        load_state(tmp_path / "nowhere.pth")
    with pytest.raises(InputError, match="holds no weights"):
        load_state(tmp_path)


class Payload:
    """Runs code when it is unpickled."""

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return Path.touch, (Path("/tmp/ssl_vit_was_here"),)  # pyright: ignore[reportReturnType]


def test_code_in_a_file_is_not_run(tmp_path: Path) -> None:
    torch.save({"model": encoder_only(mae()), "extra": Payload()}, tmp_path / "evil.pth")
    with pytest.raises(InputError, match="cannot be read as weights"):
        load_state(tmp_path / "evil.pth")
    assert not Path("/tmp/ssl_vit_was_here").exists()


@pytest.mark.parametrize("size", [[48, 48], [32, 64], [16, 64]])
def test_learned_positions_are_resized(tmp_path: Path, size: list[int]) -> None:
    """B75: also where the count of tokens is equal and the aspect is not, if the file states its grid."""
    from timm.layers.pos_embed import resample_abs_pos_embed

    from ssl_vit.export.timm_folder import export_timm

    source, target = mae(1, pos_embed="learned"), mae(2, pos_embed="learned", img_size=size)
    mean = (0.5,) * 3
    export_timm(source.encoder, tmp_path / "e", mean=mean, std=mean, crop_pct=1.0, interpolation="bicubic", metadata={})
    report = fill_encoder(target.encoder, tmp_path / "e")
    expected = resample_abs_pos_embed(source.encoder.model.pos_embed, [size[0] // 8, size[1] // 8], [4, 4], 1)
    assert torch.equal(target.encoder.model.pos_embed, expected)
    assert "position table resized from (4, 4)" in report


def test_fixed_positions_are_computed_anew(tmp_path: Path) -> None:
    save_file(encoder_only(mae(1)), tmp_path / "w.safetensors")
    target = mae(2, img_size=48)
    table = target.encoder.model.pos_embed.clone()
    assert "fixed position table computed for (6, 6)" in fill_encoder(target.encoder, tmp_path / "w.safetensors")
    assert torch.equal(target.encoder.model.pos_embed, table)


def test_a_bare_file_says_nothing_of_itself(tmp_path: Path) -> None:
    save_file(encoder_only(mae(1)), tmp_path / "w.safetensors")
    assert encoder_config(tmp_path / "w.safetensors") == {}
