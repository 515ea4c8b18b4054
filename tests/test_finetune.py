"""Fine-tuning: layer-wise rates as published and in effect, partial fine-tuning, the published head, whole runs."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY_BEIT_ENCODER, TINY_ENCODER, TINY_HYBRID, TINY_SWIN, in_process, tiny_recipe
from test_families import DEIT, TINY_DISTILLED, TINY_RESNET
from test_objectives import made
from test_trainer import losses, train

from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import fill_encoder
from ssl_vit.objectives.classification import Classification
from ssl_vit.training.optim import OptimSection, build_optimizer, layer_of, parameter_groups, set_schedule

FAMILIES = {
    "vit": TINY_ENCODER, "hybrid": TINY_HYBRID, "swin": TINY_SWIN, "beit": TINY_BEIT_ENCODER, "resnet": TINY_RESNET,
    "deit": TINY_DISTILLED,
}  # fmt: skip


def classifier(encoder: dict[str, Any], **arguments: Any) -> Classification:
    torch.manual_seed(0)
    return Classification(create_encoder(**encoder), num_classes=3, **arguments)


def published_layer(name: str, depths: list[int]) -> int:
    """Layer numbers in the words of the released fine-tuning code of MAE and BEiT (a list of one) and of SimMIM."""
    name = name.removeprefix("encoder.model.")
    last = sum(depths) + 1
    if name in ("cls_token", "dist_token", "pos_embed", "mask_token") or name.startswith("patch_embed"):
        return 0
    if name.startswith("blocks"):
        return int(name.split(".")[1]) + 1
    if found := re.match(r"layers\.(\d+)\.blocks\.(\d+)", name):
        return sum(depths[: int(found[1])]) + int(found[2]) + 1
    if found := re.match(r"layers\.(\d+)\.downsample", name):  # there a layer's end, in timm the next one's beginning
        return sum(depths[: int(found[1])])
    return last


@pytest.mark.parametrize("family", ["vit", "deit", "beit", "swin", "hybrid"])
def test_layers_are_numbered_as_published(family: str) -> None:
    encoder = FAMILIES[family]
    objective = classifier(encoder)
    depths = encoder.get("depths", [encoder.get("depth")])
    for name, _ in objective.named_parameters():
        assert layer_of(objective, name) == (published_layer(name, depths), sum(depths) + 1), name


@pytest.mark.parametrize("family", FAMILIES)
def test_layer_decay_takes_effect(family: str) -> None:
    """One step of plain SGD on gradients of ones: each parameter moves by its own share of the learning rate."""
    objective = classifier(FAMILIES[family], ema_decay=0.9)  # trained is a student
    optim = OptimSection(name="sgd", betas=(0.0, 0.0), weight_decay=0.0, base_lr=0.5, lr_divisor=None, layer_decay=0.6)
    optimizer = build_optimizer(objective, optim)
    set_schedule(optimizer.param_groups, optim, 0.1, 0.0)
    before = {name: p.detach().clone() for name, p in objective.named_parameters()}
    moving = [(name, p) for name, p in objective.named_parameters() if p.requires_grad]
    for _, parameter in moving:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    scales = set()
    for name, parameter in moving:
        layer, last = layer_of(objective, name)
        scales.add(layer)
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 0.1 * 0.6 ** (last - layer)))
    assert scales >= set(range(objective.encoder.num_layers)), "every layer has parameters"
    assert {name for name, _ in moving} == {n for group in optimizer.param_groups for n in group["names"]}


def test_without_layer_decay_there_are_two_groups() -> None:
    groups = parameter_groups(classifier(TINY_ENCODER), 0.05)
    assert [(group["decayed"], group["lr_scale"]) for group in groups] == [(True, 1.0), (False, 1.0)]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("blocks", [0, 1])
def test_only_the_last_blocks_are_tuned(family: str, blocks: int) -> None:
    objective = classifier(FAMILIES[family], tune_blocks=blocks).train()
    encoder = objective.encoder
    tuned = {n for n, p in encoder.named_parameters() if p.requires_grad}
    assert tuned == {n for n, _ in encoder.named_parameters() if encoder.layer_of(n) >= encoder.num_layers - blocks}
    modes = {n: m.training for n, m in encoder.named_modules() if n and n != "model" and list(m.parameters())}
    for name, module in encoder.named_modules():
        inner = {f"{name}.{n}" for n, _ in module.named_parameters()} if name not in ("", "model") else set()
        if inner and not inner & tuned:
            assert not modes[name], f"{name} does not learn, so it is in eval mode"
        if inner and inner <= tuned:
            assert modes[name], name
    image, label = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 0])
    objective({"image": image, "label": label})[0].backward()
    for name, parameter in encoder.named_parameters():
        assert (parameter.grad is not None) == (name in tuned), name
    with pytest.raises(ValueError, match=rf"tune_blocks=99: allowed: 0 to {encoder.num_layers - 1}"):
        classifier(FAMILIES[family], tune_blocks=99)


@pytest.mark.parametrize("family", ["vit", "beit"])
def test_the_norm_behind_the_mean_is_timms_and_starts_anew(family: str, tmp_path: Path) -> None:
    """MAE and BEiT fine-tune with a new norm on the mean of the patches; the pretrained one is left out."""
    torch.manual_seed(0)
    pretrained = create_encoder(**{**FAMILIES[family], "global_pool": "avg"})
    with torch.no_grad():
        for parameter in filter(lambda p: p.requires_grad, pretrained.parameters()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    torch.save(pretrained.model.state_dict(), tmp_path / "encoder.pt")
    encoder = create_encoder(**{**FAMILIES[family], "global_pool": "avg", "fc_norm": True}).eval()
    report = fill_encoder(encoder, tmp_path / "encoder.pt")
    assert report.notes == ("norm left out: fc_norm, behind the pooling, starts anew",)
    assert report.loaded == report.total - 2
    image = torch.randn(2, 3, 32, 32)
    tokens = encoder(image)
    expected = torch.nn.functional.layer_norm(tokens.patches.mean(dim=1), (48,), eps=1e-6)
    torch.testing.assert_close(encoder.pool(tokens), expected)
    torch.testing.assert_close(encoder.model(image), expected)
    torch.testing.assert_close(pretrained.eval().model.norm(tokens.patches), pretrained(image).patches)
    with pytest.raises(ValueError, match="fc_norm=True: allowed with global_pool='token': false"):
        create_encoder(**{**FAMILIES[family], "global_pool": "token", "fc_norm": True})


def finetune(images: Path, folder: Path, **encoder: Any) -> dict[str, Any]:
    values = tiny_recipe(images, folder, objective={"name": "classification", "head_std": 2e-5},
                         evals={"accuracy": {}}, optim__epochs="24 steps", optim__layer_decay=0.75)  # fmt: skip
    values["encoder"] = dict(encoder)
    values["optim"]["base_lr"] = 4e-3
    values["run"]["save_every"] = "12 steps"
    return values


def test_a_run_is_fine_tuned_at_another_size_and_resumes(images: Path, tmp_path: Path) -> None:
    """From a MAE run, 32 px to 48 x 32, with the published head; then the export of the result is timm's."""
    mae = train(tiny_recipe(images, tmp_path / "mae"))
    size = {"img_size": [48, 32], "global_pool": "avg", "fc_norm": True, "drop_path_rate": 0.1}
    folder = train(finetune(images, tmp_path / "tuned", init=str(mae), **size))
    result = json.loads((folder / "result.json").read_text())
    assert result["evaluations"]["final"]["accuracy/top1"] > 0.9
    assert result["export_difference"] <= 1e-5
    assert (
        timm.create_model(f"local-dir:{folder / 'encoder'}", pretrained=True)(torch.zeros(1, 3, 48, 32)).shape[1] == 48
    )
    values = finetune(images, tmp_path / "again", init=str(mae), **size)
    again = train(values, resume=str(folder / "checkpoints" / "step_00000012"))
    assert losses(again) == losses(folder)[12:]
    scratch = train(finetune(images, tmp_path / "scratch", **TINY_ENCODER))
    assert losses(scratch)[0] != losses(folder)[0]


def test_a_distilled_encoder_is_fine_tuned(images: Path, tmp_path: Path) -> None:
    """From a DeiT run with both of its tokens, whose mean is the feature; it starts where the other ended."""
    values = tiny_recipe(images, tmp_path / "deit", objective=made(DEIT, tmp_path / "deit"), evals={"rank": {}})
    values["encoder"] = dict(TINY_DISTILLED)
    deit = train(values)
    values = finetune(images, tmp_path / "tuned", init=str(deit))
    values["evals"]["rank"] = {}
    tuned = train(values)
    before, after = (json.loads((folder / "result.json").read_text())["evaluations"] for folder in (deit, tuned))
    assert after["initial"]["rank/effective_rank"] == pytest.approx(before["final"]["rank/effective_rank"], rel=1e-6)
    assert before["final"]["rank/effective_rank"] != before["initial"]["rank/effective_rank"]
    assert after["final"]["accuracy/top1"] > 0.9
    exported = timm.create_model(f"local-dir:{tuned / 'encoder'}", pretrained=True)
    assert exported.num_prefix_tokens == 2
    fresh = create_encoder(**TINY_DISTILLED).eval()
    report = fill_encoder(fresh, tuned)
    assert report.loaded == report.total
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(exported.eval()(image), fresh(image).prefix.mean(dim=1), rtol=1e-5, atol=1e-5)


def test_the_door(images: Path, tmp_path: Path) -> None:
    done = in_process("pipelines/finetune.py", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "encoder.name: is required" in done.stderr
    assert "encoder.init" in done.stderr
    words = [f"data.train=folder:{images}", f"data.val=folder:{images}", "encoder.name=vit_tiny_patch16_224"]
    words += ["encoder.img_size=32", "encoder.depth=1", "optim.epochs=2 steps", "optim.warmup_epochs=0"]
    done = in_process("pipelines/finetune.py", f"run.dir={tmp_path / 'run'}", *words)
    assert done.returncode == 0, done.stderr
    assert "accuracy/top1" in done.stderr
