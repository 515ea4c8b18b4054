"""The timm folder: equal features in plain timm and transformers, refusals, the card."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY_BEIT_ENCODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN
from timm.data.config import resolve_model_data_config

from ssl_vit.config import InputError
from ssl_vit.encoders.base import Encoder, create_encoder
from ssl_vit.encoders.weights import encoder_config, fill_encoder
from ssl_vit.export.card import write_card
from ssl_vit.export.reading import Reading
from ssl_vit.export.timm_folder import export_timm


def make_encoder(**changes: Any) -> Encoder:
    torch.manual_seed(0)
    arguments = {"name": "vit_tiny_patch16", "img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2}
    encoder = create_encoder(**(changes if "name" in changes else {**arguments, **changes}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    return encoder


def export(encoder: Encoder, folder: Path, **metadata: Any) -> Reading:
    chans = encoder.in_chans
    data: dict[str, Any] = {"mean": [0.25] * chans, "std": [0.5] * chans, "crop_pct": 0.9, "interpolation": "bilinear"}
    return export_timm(encoder, folder, **data, metadata=metadata)


VARIANTS: list[dict[str, Any]] = [
    {"drop_path_rate": 0.2},
    {"img_size": (16, 40), "in_chans": 1, "global_pool": "avg", "mlp_ratio": 2.0},
    {"in_chans": 4, "class_token": False, "global_pool": "avg", "pos_embed": "learned"},
    TINY_HYBRID,
    {**TINY_HYBRID, "img_size": (16, 40), "in_chans": 1, "global_pool": "avg"},
    TINY_SWIN,
    TINY_BEIT_ENCODER,
]


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_plain_timm_gives_the_same_features(changes: dict[str, Any], tmp_path: Path) -> None:
    encoder = make_encoder(**changes).train()
    assert export(encoder, tmp_path / "encoder", steps=3).difference <= 1e-5
    assert encoder.training
    model = timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True).eval()
    image = torch.randn(2, encoder.in_chans, *encoder.img_size)
    encoder.eval()
    torch.testing.assert_close(model(image), encoder.pool(encoder(image)))
    data = resolve_model_data_config(model)
    assert data["input_size"] == (encoder.in_chans, *encoder.img_size)
    assert set(data["mean"]) == {0.25}
    assert set(data["std"]) == {0.5}
    assert (data["crop_pct"], data["interpolation"]) == (0.9, "bilinear")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]
    assert json.loads((tmp_path / "encoder" / "config.json").read_text())["ssl_vit"]["steps"] == 3


@pytest.mark.parametrize("changes", VARIANTS, ids=str)
def test_the_folder_alone_builds_our_encoder(changes: dict[str, Any], tmp_path: Path) -> None:
    encoder = make_encoder(**changes).eval()
    export(encoder, tmp_path / "encoder")
    config = encoder_config(tmp_path)  # a run folder
    assert config["data"]["crop_pct"] == 0.9
    again = create_encoder(**config).eval()
    report = fill_encoder(again, tmp_path)
    assert report.loaded == report.total == len(encoder.model.state_dict())
    assert not report.notes
    image = torch.randn(2, encoder.in_chans, *encoder.img_size)
    torch.testing.assert_close(again(image), encoder(image), rtol=0, atol=0)


def test_transformers_loads_the_folder(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    encoder = make_encoder().eval()
    export(encoder, tmp_path / "encoder")
    model = transformers.AutoModel.from_pretrained(tmp_path / "encoder").eval()
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(model(image).pooler_output, encoder.pool(encoder(image)))


def test_what_is_not_whole_is_refused_and_the_old_folder_stays(tmp_path: Path) -> None:
    encoder = make_encoder()
    export(encoder, tmp_path / "encoder")
    before = (tmp_path / "encoder" / "model.safetensors").read_bytes()
    broken = make_encoder()
    broken.model.norm.bias.data[0] = float("nan")
    with pytest.raises(ValueError, match=r"not finite: norm\.bias"):
        export(broken, tmp_path / "encoder")
    partitioned = make_encoder()
    partitioned.model.norm.bias.data = torch.empty(0)
    with pytest.raises(ValueError, match=r"without elements.*norm\.bias"):
        export(partitioned, tmp_path / "encoder")
    data: dict[str, Any] = {"std": [1.0] * 3, "crop_pct": 1.0, "interpolation": "bicubic", "metadata": {}}
    with pytest.raises(ValueError, match=r"mean=\[0\.5\]: should have one number for each of in_chans=3"):
        export_timm(encoder, tmp_path / "encoder", mean=[0.5], **data)
    assert (tmp_path / "encoder" / "model.safetensors").read_bytes() == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["encoder"]


def test_an_export_with_other_features_is_refused(tmp_path: Path) -> None:
    encoder: Any = make_encoder()
    encoder.global_pool = "avg"  # the encoder now pools in a way that the export's arguments do not say
    with pytest.raises(RuntimeError, match=r"its features as VisionTransformer of timm .* differ by"):
        export(encoder, tmp_path / "encoder")
    assert not list(tmp_path.iterdir())


def test_no_licence_of_other_weights_is_claimed(tmp_path: Path) -> None:
    encoder = make_encoder()
    export(encoder, tmp_path / "plain")
    stated = json.loads((tmp_path / "plain" / "config.json").read_text())["pretrained_cfg"]
    assert not {"license", "url", "hf_hub_id", "tag", "origin_url"} & set(stated)
    export(encoder, tmp_path / "licensed", license="cc0-1.0")
    stated = json.loads((tmp_path / "licensed" / "config.json").read_text())["pretrained_cfg"]
    assert stated["license"] == "cc0-1.0"


def test_card(tmp_path: Path) -> None:
    encoder = make_encoder()
    facts = {
        "name": "mae digits",
        "license": "apache-2.0",
        "encoder": encoder.config(),
        "results": {"knn/top1": 0.81234, "linear/top1": 0.9},
        "recipe": "seed: 0\nobjective:\n  name: mae",
        "data": "digits | handwriting",
    }
    text = write_card(tmp_path, facts).read_text()
    assert text.startswith("---\nlibrary_name: timm")
    assert f'timm.create_model("local-dir:{tmp_path}", pretrained=True)' in text
    assert "| knn/top1 | 0.8123 |" in text
    assert text.index("## Encoder") < text.index("## Data") < text.index("## Recipe") < text.index("## Results")


def test_a_folder_is_pushed_only_when_asked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    from ssl_vit.export.command import ExportOptions, export
    from ssl_vit.export.timm_folder import export_timm

    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repository: str, **options: Any) -> None:
            calls.append(("create", (repository, options)))

        def upload_folder(self, repo_id: str, folder_path: Path) -> str:
            calls.append(("upload", (repo_id, sorted(file.name for file in Path(folder_path).iterdir()))))
            if repo_id == "me/refused":
                raise ConnectionError("401 you are nobody\nand more")
            return "commit"

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    source = tmp_path / "source"
    export_timm(
        create_encoder(**TINY_ENCODER).eval(), source, mean=(0.5,) * 3, std=(0.5,) * 3, crop_pct=1.0,
        interpolation="bicubic", metadata={},
    )  # fmt: skip
    export(source, tmp_path / "kept", ExportOptions(), fresh=False)
    assert not calls, "nothing is uploaded unless asked for"
    export(source, tmp_path / "pushed", ExportOptions(push="me/encoder"), fresh=False)
    assert [name for name, _ in calls] == ["create", "upload"]
    assert calls[0][1] == ("me/encoder", {"private": True, "exist_ok": True})
    assert {"config.json", "model.safetensors", "README.md"} <= set(calls[1][1][1])
    with pytest.raises(
        InputError, match=r"push=me/refused: not uploaded, ConnectionError: 401 you are nobody; .*is whole"
    ):
        export(source, tmp_path / "refused", ExportOptions(push="me/refused"), fresh=False)
    assert (tmp_path / "refused" / "model.safetensors").is_file()
    with pytest.raises(InputError, match=r"push=me/x: uploads folders; allowed with format=timm"):
        export(source, tmp_path / "x", ExportOptions(push="me/x", format="onnx"))
    with pytest.raises(InputError, match=r"push='x': should be OWNER/NAME"):
        export(source, tmp_path / "x", ExportOptions(push="x"))
