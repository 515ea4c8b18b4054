"""Every format of export.py: read again by others in a process without ssl_vit, and by us with nothing lost."""

from __future__ import annotations

import ast
import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import TINY_BEIT, TINY_BEIT_ENCODER, TINY_ENCODER, in_process, tiny_recipe, tokenizer_file
from safetensors.torch import load_file, save_file
from test_trainer import train
from torch import nn

from ssl_vit.build import build_objective, resolve_pixels
from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import fill_objective
from ssl_vit.export import readers
from ssl_vit.export.command import ExportOptions, export
from ssl_vit.export.reading import encoder_cases, reading
from ssl_vit.export.weights_file import export_file
from ssl_vit.objectives.beit import BEiT
from ssl_vit.recipe import DataSection, EvaluationRecipe, Recipe, check_recipe

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
DATA: dict[str, Any] = {"mean": MEAN, "std": STD, "crop_pct": 1.0, "interpolation": "bilinear"}
FORMATS = {
    "timm": ("out", "VisionTransformer of timm", "features, tokens"),
    "transformers": ("out", "ViTModel of transformers", "tokens"),
    "vit_mae": ("out", "ViTMAEForPreTraining of transformers", "predicted patches"),
    "onnx": ("out.onnx", "onnxruntime", "features, tokens"),
    "state_dict": ("out.safetensors", "VisionTransformer of timm", "features, tokens"),
    "official": ("out.safetensors", "VisionTransformer of timm", "features, tokens"),
}
PARTS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "norm1", "norm2")
PATCHES = {"cls_token", "mask_token", "patch_embed.proj.weight", "patch_embed.proj.bias", "norm.weight", "norm.bias"}
MAE_RELEASE = {
    *PATCHES, "pos_embed", "decoder_pos_embed", "decoder_embed.weight", "decoder_embed.bias", "decoder_norm.weight",
    "decoder_norm.bias", "decoder_pred.weight", "decoder_pred.bias",
    *(f"{block}.{part}.{kind}" for block in ("blocks.0", "blocks.1", "decoder_blocks.0") for part in PARTS
      for kind in ("weight", "bias")),
}  # fmt: skip
BEIT_BLOCK = (
    "gamma_1", "gamma_2", "norm1.weight", "norm1.bias", "attn.q_bias", "attn.v_bias", "attn.qkv.weight",
    "attn.proj.weight", "attn.proj.bias", "norm2.weight", "norm2.bias", "mlp.fc1.weight", "mlp.fc1.bias",
    "mlp.fc2.weight", "mlp.fc2.bias",
)  # fmt: skip
BEIT_RELEASE = {
    *PATCHES, "lm_head.weight", "lm_head.bias", "rel_pos_bias.relative_position_bias_table",
    "rel_pos_bias.relative_position_index", *(f"blocks.{i}.{name}" for i in range(2) for name in BEIT_BLOCK),
}  # fmt: skip


@pytest.fixture(scope="module")
def mine(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with constants and a pooling of its own."""
    recipe = tiny_recipe(
        images, tmp_path_factory.mktemp("formats") / "mine", encoder={**TINY_ENCODER, "global_pool": "avg"},
        evals={"knn": {}}, optim__epochs="2 steps", optim__warmup_epochs=0,
    )  # fmt: skip
    recipe["data"] |= DATA
    return train(recipe)


@pytest.mark.parametrize("kind", FORMATS)
def test_an_export_is_proven_where_ssl_vit_is_not(kind: str, mine: Path, tmp_path: Path) -> None:
    """B86. Difference, tensors and constants are said; the card has licence, data, recipe and results."""
    name, reader, outputs = FORMATS[kind]
    out = tmp_path / name
    done = in_process("pipelines/export.py", str(mine), str(out), f"format={kind}", "license=cc-by-4.0")
    assert done.returncode == 0, done.stderr
    assert re.search(rf"reloaded: as {reader} \S+ in a process without ssl_vit\n", done.stdout)
    found = re.search(r"largest difference: (\S+) of the largest value \((.*)\)\n", done.stdout)
    assert found is not None
    assert float(found[1]) <= 1e-5
    assert found[2] == outputs
    assert re.search(r"tensors: \d+ loaded, none missing, none unknown", done.stdout)
    assert ("; for the release's own code: " in done.stdout) == (kind == "official")
    stated = f"mean {MEAN}, std {STD}, interpolation bilinear, crop_pct 1.0, size [3, 32, 32]"
    assert f"preprocessing: {stated}\n" in done.stdout
    card = (out / "README.md" if out.is_dir() else tmp_path / f"{name}.md").read_text()
    assert "license: cc-by-4.0" in card.split("---")[1].splitlines()
    for fact in ("| train | folder:", "| interpolation | bilinear |", "mask_ratio: 0.75", "| knn/top1 |", found[1]):
        assert fact in card, fact
    code = re.findall(r"```python\n(.*?)```", card, re.DOTALL)[0]
    assert str(out.resolve()) in code
    if kind != "onnx":
        recipe = check_recipe(check(EvaluationRecipe, {"encoder": {"init": str(out)}}))
        assert recipe.encoder["global_pool"] == "avg"
        resolve_pixels(recipe.data, recipe.encoder)
        assert {key: getattr(recipe.data, key) for key in DATA} == DATA
    if kind == "official":
        assert load_file(out).keys() == MAE_RELEASE


def test_the_readers_know_nothing_of_us() -> None:
    names = [node for node in ast.walk(ast.parse(Path(readers.__file__).read_text())) if isinstance(node, ast.Import)]
    assert not [alias for node in names for alias in node.names if "ssl_vit" in alias.name]
    assert not re.search(r"^\s*from ssl_vit", Path(readers.__file__).read_text(), re.MULTILINE)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state, config: state["norm.bias"].add_(1), "its features as .* differ by"),
        (lambda state, config: state.pop("norm.bias"), r"misses \['norm\.bias'\]"),
        (lambda state, config: state.update(extra=torch.ones(1)), r"does not know \['extra'\]"),
        (lambda state, config: config["pretrained_cfg"].update(crop_pct=0.875), "finds the preprocessing"),
        (lambda state, config: config["pretrained_cfg"].update(mean=[0.5] * 3), "finds the preprocessing"),
    ],
)
def test_what_differs_is_refused(change: Any, message: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    encoder = create_encoder(**TINY_ENCODER).eval()
    export_file(encoder, tmp_path / "good.safetensors", DATA, {})
    state, (name, arguments) = load_file(tmp_path / "good.safetensors"), encoder.timm_config()
    config = {"architecture": name, "model_args": arguments, "pretrained_cfg": {**DATA, "input_size": [3, 32, 32]}}
    change(state, config)
    save_file(state, tmp_path / "bad.safetensors", metadata={"config": json.dumps(config)})
    with pytest.raises(RuntimeError, match=message):
        reading("state_dict", tmp_path / "bad.safetensors", encoder_cases(encoder), DATA)


def test_a_reader_that_fails_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "readers.py").write_text("raise OSError('no such format')\n")
    monkeypatch.setattr(readers, "__file__", str(tmp_path / "readers.py"))
    cases = {"image": torch.zeros(3, 3, 32, 32)}
    with pytest.raises(RuntimeError, match="cannot be loaded: OSError: no such format"):
        reading("timm", tmp_path, cases, DATA, fresh=True)


def test_names_and_licences_that_are_in_the_way(mine: Path, tmp_path: Path) -> None:
    (tmp_path / "out.onnx.md").write_text("somebody's")
    with pytest.raises(InputError, match=r"out\.onnx\.md: is there already"):
        export(mine, tmp_path / "out.onnx", ExportOptions(format="onnx"))
    with pytest.raises(InputError, match="license='my\\\\nown': should be the Hugging Face Hub's name of one"):
        export(mine, tmp_path / "out", ExportOptions(license="my\nown"))


# ------------------------------------------------------------------------------------------------ BEiT, whole


def beit_run(folder: Path, **changes: Any) -> BEiT:
    """A run's folder as far as an export reads it, with weights that are nobody's initial ones."""
    values = tiny_recipe(folder, folder, objective={"name": "beit", **TINY_BEIT, "tokenizer": tokenizer_file()})
    values["objective"] |= changes
    values["encoder"] = dict(TINY_BEIT_ENCODER)
    values["data"] |= DATA
    recipe = check_recipe(check(Recipe, values))
    objective: Any = build_objective(recipe)
    with torch.no_grad():
        for name, parameter in objective.named_parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if not name.startswith("tokenizer.") else 0)
    checkpoint = folder / "checkpoints" / "step_00000001"
    checkpoint.mkdir(parents=True)
    save_file(
        {name: tensor.contiguous() for name, tensor in objective.state_dict().items()},
        checkpoint / "objective.safetensors",
    )
    (folder / "checkpoints" / "latest").write_text("step_00000001\n")
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    return objective


@pytest.mark.parametrize("early_layer", [None, 1], ids=["v1", "v2"])
def test_a_whole_beit_goes_to_its_release_and_back(early_layer: int | None, tmp_path: Path) -> None:
    source, other = (beit_run(tmp_path / name, early_layer=early_layer) for name in ("source", "other"))
    file = tmp_path / "beit.safetensors"
    export(tmp_path / "source", file, ExportOptions(format="official"), fresh=False)
    second = {f"cls_pt_layers.{i}.{name}" for i in range(2) for name in BEIT_BLOCK} if early_layer else set()
    assert load_file(file).keys() == BEIT_RELEASE | second
    with torch.no_grad():
        next(other.tokenizer.parameters()).add_(1)  # the recipe's own, whatever was trained with
    kept = {name: tensor.clone() for name, tensor in other.tokenizer.state_dict().items()}
    data = DataSection()
    resolve_pixels(data, dict(TINY_BEIT_ENCODER), str(file))
    assert {key: getattr(data, key) for key in DATA} == DATA
    report = fill_objective(other, file)
    assert report.loaded == report.total == len(other.state_dict())
    for name, tensor in source.state_dict().items():
        expected = kept[name.removeprefix("tokenizer.")] if name.startswith("tokenizer.") else tensor
        assert torch.equal(other.state_dict()[name], expected), name


def test_a_whole_beit_of_transformers_fills_the_objective(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.BeitConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        use_shared_relative_position_bias=True, use_mask_token=True, vocab_size=32,
    )  # fmt: skip
    model = transformers.BeitForMaskedImageModeling(config)
    model.save_pretrained(tmp_path / "folder")
    objective = beit_run(tmp_path / "run")
    report = fill_objective(objective, tmp_path / "folder")
    assert report.loaded == report.total
    assert torch.equal(objective.head.weight, model.lm_head.weight)
    assert torch.equal(objective.mask_token, model.beit.embeddings.mask_token)


def test_whole_layouts_that_are_not_read_are_refused(tmp_path: Path) -> None:
    beit = beit_run(tmp_path / "run")
    encoder = {f"backbone.{name}": tensor for name, tensor in beit.encoder.model.state_dict().items()}
    torch.save({"teacher": {**encoder, "head.mlp.0.weight": torch.ones(2, 2)}}, tmp_path / "ibot.pth")
    with pytest.raises(
        InputError, match=r"a file of DINO or iBOT, whose heads are not read; give it as encoder\.init="
    ):
        fill_objective(beit, tmp_path / "ibot.pth")
    torch.save(beit.encoder.model.state_dict(), tmp_path / "encoder.pth")
    with pytest.raises(InputError, match=r"holds an encoder only, nothing of mask_token, head; give it"):
        fill_objective(beit, tmp_path / "encoder.pth")

    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.encoder, self.head, self.teacher = beit.encoder, nn.Linear(48, 3), nn.Linear(2, 2)

    deit = {**beit.encoder.model.state_dict(), "head.weight": torch.ones(3, 48), "head.bias": torch.ones(3)}
    torch.save({"model": deit}, tmp_path / "deit.pth")
    with pytest.raises(InputError, match=r"holds no teacher, as files of DeiT do not; give it as encoder\.init="):
        fill_objective(Student(), tmp_path / "deit.pth")


# ------------------------------------------------------------------------------------------------ bare files


@pytest.mark.parametrize(
    ("name", "mean"),
    [
        ("beit_base_patch16_224", [0.5, 0.5, 0.5]),
        ("beit_large_patch16", [0.5, 0.5, 0.5]),
        ("beitv2_base_patch16_224", [0.485, 0.456, 0.406]),
        ("vit_base_patch16_224", [0.485, 0.456, 0.406]),
        ("swin_tiny_patch4_window7_224", [0.485, 0.456, 0.406]),
    ],
)
def test_a_bare_file_gets_the_constants_of_its_release(
    name: str, mean: list[float], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """B86. BEiT was trained at 0.5, BEiT v2 and MAE at ImageNet's; what is assumed is said."""
    torch.save({}, tmp_path / "file.pth")
    data = DataSection(crop_pct=1.0)
    with caplog.at_level(logging.INFO):
        resolve_pixels(data, {"name": name, "init": str(tmp_path / "file.pth")})
    assert data.mean == mean
    assert data.crop_pct == 1.0
    assert "file.pth does not say how its images were prepared; assumed: data.mean=" in caplog.text
    assert "data.crop_pct=" not in caplog.text
    fresh = DataSection()
    resolve_pixels(fresh, {"name": name, "init": None})
    assert fresh.mean == [0.485, 0.456, 0.406], "without weights nothing has to be kept to"
