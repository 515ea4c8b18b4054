"""Encoders out of the files of others: transformers' folders, DINO's and iBOT's checkpoints, equal to their makers'."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from conftest import TINY_ENCODER, in_process
from transformers import (
    BeitConfig,
    BeitForMaskedImageModeling,
    BeitModel,
    DeiTConfig,
    DeiTForImageClassificationWithTeacher,
    SwinConfig,
    SwinModel,
    ViTConfig,
    ViTForImageClassification,
    ViTMAEConfig,
    ViTMAEForPreTraining,
    ViTModel,
)  # fmt: skip

from ssl_vit.config import InputError
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.transformers_layout import stated_pixels
from ssl_vit.encoders.weights import encoder_config, fill_encoder, fill_objective
from ssl_vit.objectives.mae import MAE

transformers.logging.set_verbosity_error()
SIZES: dict[str, Any] = {
    "hidden_size": 48, "num_hidden_layers": 2, "num_attention_heads": 3, "intermediate_size": 192, "image_size": 32,
    "patch_size": 8, "layer_norm_eps": 1e-6,
}  # fmt: skip
DECODER = {
    "decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 128, "norm_pix_loss": True,
}  # fmt: skip
RELATIVE = {"use_relative_position_bias": True}
SHARED = {"use_shared_relative_position_bias": True, "use_relative_position_bias": False}
SWIN = {"image_size": 32, "patch_size": 4, "embed_dim": 24, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}
MODELS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "vit": (ViTModel, ViTConfig, SIZES),
    "vit classifier": (ViTForImageClassification, ViTConfig, SIZES),
    "mae": (ViTMAEForPreTraining, ViTMAEConfig, SIZES | DECODER),
    "deit": (DeiTForImageClassificationWithTeacher, DeiTConfig, SIZES),
    "beit": (BeitModel, BeitConfig, SIZES | RELATIVE),
    "beit, token": (BeitModel, BeitConfig, SIZES | SHARED | {"use_mean_pooling": False}),
    "beit pretraining": (BeitForMaskedImageModeling, BeitConfig, SIZES | SHARED),
    "swin": (SwinModel, SwinConfig, SWIN),
}


def saved(kind: str, folder: Path) -> Any:
    """A model with random weights everywhere, as a folder."""
    cls, config, arguments = MODELS[kind]
    torch.manual_seed(0)
    model = cls(config(**arguments)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "position_embeddings" not in name and "decoder_pos_embed" not in name:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return model


def tokens_of(model: Any, image: torch.Tensor) -> torch.Tensor:
    """All tokens behind the final norm, as transformers computes them."""
    inner = next((getattr(model, name) for name in ("vit", "deit", "beit", "swin") if hasattr(model, name)), model)
    if isinstance(model, ViTMAEForPreTraining):
        inner.config.mask_ratio = 0.0  # its random order is put back
        count = (32 // 8) ** 2
        return inner(image, noise=torch.arange(count)[None].expand(len(image), -1).float()).last_hidden_state
    found = inner(image).last_hidden_state
    return model.layernorm(found) if isinstance(model, BeitForMaskedImageModeling) else found


@pytest.mark.parametrize("kind", MODELS)
def test_a_transformers_folder_fills_an_encoder(kind: str, tmp_path: Path) -> None:
    model = saved(kind, tmp_path / "folder")
    config = encoder_config(tmp_path / "folder")
    config.pop("data")
    torch.manual_seed(1)
    encoder = create_encoder(**config).eval()
    report = fill_encoder(encoder, tmp_path / "folder")
    assert report.loaded == report.total
    image = torch.randn(3, 3, 32, 32)
    with torch.no_grad():
        expected, tokens = tokens_of(model, image), encoder(image)
        found = torch.cat(list(tokens), dim=1)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
        if kind == "beit":  # the pooler is the norm behind the mean
            pooled = model(image).pooler_output
            torch.testing.assert_close(encoder.pool(tokens), pooled, rtol=1e-4, atol=1e-4)


def test_a_whole_mae_of_transformers_fills_the_objective(tmp_path: Path) -> None:
    model = saved("mae", tmp_path / "folder")
    encoder = create_encoder(**{k: v for k, v in encoder_config(tmp_path / "folder").items() if k != "data"})
    objective = MAE(encoder, decoder_embed_dim=32, decoder_depth=1, decoder_num_heads=2).eval()
    fill_objective(objective, tmp_path / "folder")
    image, noise = torch.randn(2, 3, 32, 32), torch.rand(2, 16)
    mask = noise.argsort(dim=1).argsort(dim=1) >= 4
    expected = model(image, noise=noise).loss.item()
    assert objective({"image": image, "mask": mask})[0].item() == pytest.approx(expected, rel=1e-4)


def test_preprocessing_is_that_of_the_folder(tmp_path: Path) -> None:
    saved("vit", tmp_path / "folder")
    stated = {"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6], "resample": 2, "size": {"height": 32}}
    (tmp_path / "folder" / "preprocessor_config.json").write_text(json.dumps(stated))
    data = encoder_config(tmp_path / "folder")["data"]
    assert data == {"mean": [0.1, 0.2, 0.3], "std": [0.4, 0.5, 0.6], "interpolation": "bilinear", "crop_pct": 1.0}


@pytest.mark.parametrize(
    ("stated", "crop_pct"),
    [
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, 0.875),
        ({"size": {"shortest_edge": 256}, "crop_size": {"height": 224, "width": 192}, "do_center_crop": True}, 0.75),
        ({"size": {"shortest_edge": 37}, "crop_size": 32, "crop_pct": 0.875, "do_center_crop": True}, 0.875),
        ({"size": {"shortest_edge": 64}, "crop_size": 32, "crop_pct": 0.875, "do_center_crop": True}, 0.5),
        ({"size": 256, "crop_size": 224, "do_center_crop": False}, 1.0),
        ({"size": 224}, 1.0),
    ],
)
def test_the_crop_of_an_image_processor(stated: dict[str, Any], crop_pct: float) -> None:
    """B86. ``crop_pct`` beside sizes is believed as far as it explains them."""
    assert stated_pixels(stated)["crop_pct"] == crop_pct


def test_an_architecture_that_is_not_ours_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "convnext", "architectures": ["ConvNextModel"]}))
    with pytest.raises(InputError, match=r"config\.json: cannot be built here: model_type='convnext': allowed: vit, "):
        encoder_config(tmp_path)


@pytest.mark.parametrize("method", ["dino", "ibot"])
def test_of_a_whole_checkpoint_the_teacher_is_taken(method: str, tmp_path: Path) -> None:
    """Both networks with their heads, as DINO and iBOT save them; iBOT's backbone also has a mask token."""
    torch.manual_seed(0)
    learned = {**TINY_ENCODER, "pos_embed": "learned"}
    teacher, student = create_encoder(**learned), create_encoder(**learned)

    def network(encoder: Any, prefix: str) -> dict[str, torch.Tensor]:
        state = {f"{prefix}backbone.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
        state |= {
            f"{prefix}head.mlp.0.weight": torch.randn(8, 48),
            f"{prefix}head.last_layer.weight_g": torch.ones(8, 1),
        }
        return state | ({f"{prefix}backbone.masked_embed": torch.zeros(1, 48)} if method == "ibot" else {})

    content = {"student": network(student, "module."), "teacher": network(teacher, ""), "epoch": 3, "optimizer": {}}
    torch.save(content, tmp_path / "checkpoint.pth")
    other = create_encoder(**learned)
    report = fill_encoder(other, tmp_path / "checkpoint.pth")
    assert report.loaded == report.total
    for name, tensor in other.model.state_dict().items():
        assert torch.equal(tensor, teacher.model.state_dict()[name]), name


def test_a_folder_of_transformers_is_probed_through_the_door(images: Path, tmp_path: Path) -> None:
    saved("beit", tmp_path / "folder")
    words = [
        f"encoder.init={tmp_path / 'folder'}",
        f"data.val=folder:{images}",
        "run.workers=0",
        f"run.dir={tmp_path / 'run'}",
    ]
    done = in_process("pipelines/knn.py", *words)
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]["final"]
    assert found["knn/top1"] > 0.9, "three colours, which random weights tell apart"


def test_swin_windows_of_another_size(tmp_path: Path) -> None:
    """Wider windows at a larger image: tables as timm itself resizes them, all else bit for bit."""
    import timm

    torch.manual_seed(0)
    arguments = {"embed_dim": 24, "depths": (1, 1), "num_heads": (2, 4), "patch_size": 4, "num_classes": 0}
    source = timm.create_model("swin_tiny_patch4_window7_224", img_size=32, window_size=4, **arguments)
    for name, parameter in source.named_parameters():
        torch.nn.init.normal_(parameter) if "relative" in name else None
    state = source.state_dict()
    released = {name.replace("layers.1.downsample", "layers.0.downsample"): tensor for name, tensor in state.items()}
    released["layers.0.blocks.0.attn.relative_position_index"] = torch.zeros(16, 16, dtype=torch.int64)
    torch.save({"model": released}, tmp_path / "swin.pth")
    encoder = create_encoder(
        name="swin_tiny_patch4_window7_224", img_size=64, window_size=8, first_patch_size=4, embed_dim=24,
        depths=[1, 1], num_heads=[2, 4],
    )  # fmt: skip
    report = fill_encoder(encoder, tmp_path / "swin.pth")
    assert report.loaded == report.total
    assert any("2 tables resized, windows of 4 to 8 tokens" in note for note in report.notes), report.notes
    expected = timm.create_model("swin_tiny_patch4_window7_224", img_size=64, window_size=8, **arguments)
    from timm.models.swin_transformer import checkpoint_filter_fn

    expected.load_state_dict(checkpoint_filter_fn(dict(state), expected))
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, expected.state_dict()[name]), name


@pytest.mark.parametrize(
    "name", ["vit_small_patch16_224.augreg_in1k", "beit_base_patch16_224", "swin_tiny_patch4_window7_224"]
)
def test_a_published_timm_model_by_its_name(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Architecture, preprocessing and weights; the network is not needed here, timm's weights being replaced."""
    import timm

    create, made = timm.create_model, []

    def offline(*words: Any, pretrained: bool = False, **options: Any) -> Any:
        model: Any = create(*words, **options)
        if pretrained:
            made.append(model)
        return model

    monkeypatch.setattr(timm, "create_model", offline)
    config = encoder_config(f"timm:{name}")
    stated = create(name).pretrained_cfg
    assert config.pop("data") == {key: stated[key] for key in ("mean", "std", "crop_pct", "interpolation")}
    encoder = create_encoder(**config).eval()
    report = fill_encoder(encoder, f"timm:{name}")
    assert report.loaded == report.total
    image = torch.randn(1, 3, 224, 224)
    with torch.no_grad():
        torch.testing.assert_close(encoder.pool(encoder(image)), made[0].eval()(image), rtol=1e-4, atol=1e-5)


def test_a_timm_name_without_weights_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def down(*words: Any, **options: Any) -> Any:
        raise ConnectionError("no route\nto host")

    encoder = create_encoder(**TINY_ENCODER)
    monkeypatch.setattr(timm, "create_model", down)
    with pytest.raises(
        InputError, match=r"^timm:vit_tny_patch16_224: no weights of timm \(ConnectionError: no route\)"
    ):
        fill_encoder(encoder, "timm:vit_tny_patch16_224")
    monkeypatch.undo()
    with pytest.raises(InputError, match=r"timm:no_such: no encoder is built from 'no_such'"):
        encoder_config("timm:no_such")
