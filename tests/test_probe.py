"""The published probes: each classifier as if alone, MAE's optimizer and crops restated, the door, what is refused."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from conftest import TINY_ENCODER, in_process, run_python, tiny_recipe
from test_finetune import FAMILIES
from test_trainer import train
from torch.nn import functional as F

from ssl_vit.build import build_objective
from ssl_vit.config import check
from ssl_vit.data.augment import AugmentSection, SupervisedView
from ssl_vit.encoders.base import create_encoder
from ssl_vit.export.timm_folder import export_timm
from ssl_vit.objectives.probe import Probe
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.training.optim import OptimSection, build_optimizer, set_schedule
from ssl_vit.training.strategies import Strategy


def probe(encoder: dict[str, Any] = TINY_ENCODER, **arguments: Any) -> Probe:
    torch.manual_seed(0)
    return Probe(create_encoder(**encoder), num_classes=3, **arguments)


def batch(objective: Probe, count: int = 6) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(count, objective.encoder.in_chans, *objective.encoder.img_size, generator=generator)
    return {"image": image, "label": torch.arange(count) % 3}


@pytest.mark.parametrize("batch_norm", [False, True])
def test_each_classifier_learns_as_if_alone(batch_norm: bool) -> None:
    """Loss and gradients of every classifier are those of its feature and a linear layer alone."""
    objective = probe(stages=None, pools=["token", "avg", "both"], batch_norm=batch_norm).train()
    views = batch(objective)
    loss, _ = objective(views)
    loss.backward()
    assert len(objective.heads) == 2 * 3
    expected = 0.0
    tokens = objective.encoder.intermediates(views["image"], [1, 2])
    for name, head in objective.heads.items():
        found = tokens[head.stages[0] - 1]
        parts = {"token": found.prefix[:, 0], "avg": found.patches.mean(dim=1)}
        feature = torch.cat([part for key, part in parts.items() if head.pool in (key, "both")], dim=1).detach()
        if batch_norm:
            feature = (feature - feature.mean(dim=0)) / (feature.var(dim=0, unbiased=False) + 1e-6).sqrt()
        weight = head.classifier.weight.detach().clone().requires_grad_(True)
        alone = F.cross_entropy(feature @ weight.T + head.classifier.bias.detach(), views["label"])
        (gradient,) = torch.autograd.grad(alone, weight)
        torch.testing.assert_close(head.classifier.weight.grad, gradient, rtol=1e-4, atol=1e-6, msg=name)
        expected += alone.item()
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert all(p.grad is None for p in objective.encoder.parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_every_encoder_is_probed_behind_every_stage(family: str) -> None:
    objective = probe(FAMILIES[family], stages=None, pools=["avg", "attentive"]).train()
    assert len(objective.heads) == 2 * len(objective.encoder.stages)
    objective(batch(objective))[0].backward()
    assert all(p.grad is not None for p in objective.heads.parameters())
    assert not objective.encoder.training, "no drop path and no batch statistics in what is frozen"
    assert objective.eval()(batch(objective), call="decide").shape == (6, len(objective.heads))


def test_what_dinov2_joins_and_what_beit_leaves_out() -> None:
    """Class tokens of two blocks and the mean of the last one's patches; tokens as they leave their block."""
    objective = probe(stages=[[1, 2]], pools=["tokens_avg"]).eval()
    image = batch(objective)["image"]
    first, last = objective.encoder.intermediates(image, [1, 2])
    feature = torch.cat([first.prefix[:, 0], last.prefix[:, 0], last.patches.mean(dim=1)], dim=1)
    (head,) = objective.heads.values()
    expected = head.classifier(feature).argmax(dim=1)
    assert torch.equal(objective(batch(objective), call="decide")[:, 0], expected)
    raw = probe(stages=None, pools=["both"], final_norm=False).eval()
    model, tokens = raw.encoder.model, []
    x = model.patch_embed(image)
    x = model._pos_embed(x)
    for block in model.blocks:
        x = block(x)
        tokens.append(x)
    found = raw.encoder.intermediates(image, [1, 2], norm=False)
    for ours, theirs in zip(found, tokens, strict=True):
        torch.testing.assert_close(torch.cat(list(ours), dim=1), theirs, rtol=1e-5, atol=1e-5)
    with pytest.raises(ValueError, match="final_norm=false: the encoder's own feature is behind its norm"):
        probe(final_norm=False)


@pytest.mark.parametrize("skipped", [0, 1], ids=["the first step", "a later step"])
@pytest.mark.parametrize("name", ["adamw", "sgd", "lars"])
def test_a_step_that_is_not_finite_leaves_no_trace(name: str, skipped: int) -> None:
    """Weights after two steps are those after three of which one had gradients that are no numbers."""

    def weights(gradients: list[float]) -> list[torch.Tensor]:
        objective = probe()
        optim = OptimSection.model_validate({"name": name, "base_lr": 0.1, "weight_decay": 0.01})
        accelerator: Any = SimpleNamespace(device=torch.device("cpu"), prepare=lambda module: module)
        strategy = Strategy(accelerator, objective, optim, accumulation=1)
        for value in gradients:
            torch.empty(1 << 20).fill_(float("nan"))  # what fresh memory may hold
            for parameter in objective.heads.parameters():
                parameter.grad = torch.full_like(parameter, value)
            assert strategy.step()[0] == (not math.isfinite(value))
        return [p.detach() for p in objective.parameters()]

    gradients = [0.5, -0.25]
    expected = weights(gradients)
    gradients.insert(skipped, float("nan"))
    assert all(torch.equal(one, other) for one, other in zip(weights(gradients), expected, strict=True))


def test_lars_is_maes() -> None:
    """MAE's LARS in its own words: matrices are adapted even without weight decay, one-dimensional parameters never."""
    optim = OptimSection(name="lars", batch_size=512, base_lr=0.1, lr_divisor=256, weight_decay=0.0, betas=(0.9, 0.95))
    objective = probe(batch_norm=True).double()
    optimizer = build_optimizer(objective, optim)
    expected = {n: p.detach().clone() for n, p in objective.named_parameters() if p.requires_grad}
    velocity = {n: torch.zeros_like(p) for n, p in expected.items()}
    for step in range(4):
        rate = 0.2 * (step + 1) / 4
        set_schedule(optimizer.param_groups, optim, rate, step / 4)
        generator = torch.Generator().manual_seed(step)
        for name, parameter in objective.named_parameters():
            if name not in expected:
                continue
            parameter.grad = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            update = parameter.grad.clone()
            if parameter.ndim > 1:
                update *= 0.001 * expected[name].norm() / update.norm()
            velocity[name] = 0.9 * velocity[name] + update
            expected[name] -= rate * velocity[name]
        optimizer.step()
    for name, parameter in objective.named_parameters():
        if name in expected:
            torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-7, atol=1e-9)


def test_learning_rates_are_factors() -> None:
    objective = probe(learning_rates=[0.1, 2.0])
    optim = OptimSection(name="sgd", betas=(0.0, 0.0), base_lr=0.5, lr_divisor=None, weight_decay=0.0)
    optimizer = build_optimizer(objective, optim)
    set_schedule(optimizer.param_groups, optim, 0.5, 0.0)
    before = {name: p.detach().clone() for name, p in objective.heads.named_parameters()}
    for parameter in objective.heads.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for name, parameter in objective.heads.named_parameters():
        factor = 0.1 if "lr0p1" in name else 2.0
        torch.testing.assert_close(before[name] - parameter, torch.full_like(parameter, 0.5 * factor))


def test_maes_crops_are_cut_to_the_image() -> None:
    """The crop restated: one draw of area and ratio, cut to the image; the other kind draws again."""
    image = torch.arange(12 * 60).view(1, 12, 60).float()
    view = SupervisedView(
        (8, 8), mean=(0.5,), std=(0.5,), **dict(AugmentSection(crop_scale=(0.5, 1.0), crop_retry=False))
    )
    widest = 0
    for seed in range(300):
        random.seed(seed)
        region, _ = view.region(image)
        random.seed(seed)
        area = 12 * 60 * random.uniform(0.5, 1.0)
        ratio = math.exp(random.uniform(math.log(3 / 4), math.log(4 / 3)))
        width, height = min(round(math.sqrt(area * ratio)), 60), min(round(math.sqrt(area / ratio)), 12)
        assert tuple(region.shape) == (1, height, width)
        assert height == 12, "so large a crop is always too high for this image"
        widest = max(widest, width)
    assert widest > 16, "the crop drawn again falls back to the largest that has the ratio: 12 x 16"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"stages": [3]}, r"stage 3: allowed for vit_tiny_patch16_224: 1 to 2, or -1 to -2"),
        ({"stages": [1], "pools": ["pool"]}, r"stages=\[1\] with pools=pool: the encoder's own feature is that of"),
        ({"pools": ["tokens"]}, r"allowed: some of pool, token, .*, attentive \(did you mean 'token'"),
        ({"learning_rates": [0.0]}, r"learning_rates=\[0.0\]: allowed: positive factors"),
        ({"stages": [[]]}, r"stages=\[\[\]\]: allowed: block numbers or lists of them"),
    ],
)  # fmt: skip
def test_impossible_probes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        probe(**arguments)
    with pytest.raises(ValueError, match="has no class token; allowed: pool, avg, attentive"):
        probe(FAMILIES["swin"], pools=["both"])


def test_the_door(images: Path, tmp_path: Path) -> None:
    """A published protocol runs through linear_probe.py on a run; other objectives are sent to their own door."""
    run = tiny_recipe(images, tmp_path / "run", objective={"name": "classification"}, evals={})
    (tmp_path / "run.yaml").write_text(json.dumps(run))
    train(run)
    words = [
        f"data.train=folder:{images}", f"data.val=folder:{images}", f"encoder.init={tmp_path / 'run'}",
        f"run.dir={tmp_path / 'probe'}", "run.workers=0", "run.tensorboard=false", "optim.batch_size=24",
        "optim.epochs=9 steps", "optim.warmup_epochs=1 steps", "mixed_precision=no", "evals.heads.every=null",
    ]  # fmt: skip
    done = run_python("pipelines/linear_probe.py", "--config", "configs/linear_probe/mae_in1k.yaml", *words)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "probe" / "result.json").read_text())
    assert result["heads"] == ["stage_2_token"]
    assert result["evaluations"]["final"]["heads/top1"] > 0.5, "chance is a third"
    assert "evals.accuracy" in in_process("pipelines/linear_probe.py", "--config", "configs/linear_probe/mae_in1k.yaml",
                                          *words, "evals.accuracy={}").stderr  # fmt: skip
    done = in_process("pipelines/linear_probe.py", "--config", str(tmp_path / "run.yaml"))
    assert done.returncode == 2
    assert "takes objective.name='probe' or no objective; use pipelines/train_supervised.py" in done.stderr
    done = in_process("pipelines/knn.py", "--config", "configs/linear_probe/mae_in1k.yaml", *words)
    assert done.returncode == 2
    assert "takes no objective: it only measures" in done.stderr


def test_an_untrained_probe_is_not_the_head_that_the_encoder_was_trained_with(images: Path, tmp_path: Path) -> None:
    """With the same seed, and so the same numbers, it would classify what it has not learned."""
    values = tiny_recipe(images, tmp_path, objective={"name": "classification", "num_classes": 3, "head_std": 0.01})
    trained = build_objective(check_recipe(check(Recipe, values)))
    half = (0.5, 0.5, 0.5)
    export_timm(
        trained.encoder, tmp_path / "encoder", mean=half, std=half, crop_pct=1.0, interpolation="bicubic", metadata={}
    )
    values["encoder"]["init"] = str(tmp_path / "encoder")
    values["objective"] = {"name": "probe", "num_classes": 3, "head_std": 0.01, "pools": ["token"], "stages": [-1]}
    objective = build_objective(check_recipe(check(Recipe, values)))
    assert isinstance(objective, Probe)
    (head,) = objective.heads.values()
    own, first = head.classifier.weight.detach(), trained.head.weight.detach()
    assert own.shape == first.shape
    assert F.cosine_similarity(own.flatten(), first.flatten(), dim=0).abs() < 0.3
