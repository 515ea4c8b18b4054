"""Supervised training: losses and mixed targets against the formulas, EMA, labels, ResNets, accuracy."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_ENCODER, run_python, tiny_recipe, write_images
from torch.nn import functional as F
from transformers_names import of_transformers

from ssl_vit.build import build_objective
from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.data.loader import Pixels
from ssl_vit.data.views import seed_generators
from ssl_vit.encoders.base import create_encoder
from ssl_vit.evaluation.accuracy import Accuracy
from ssl_vit.evaluation.base import Subject
from ssl_vit.modules.supervised import Mixer, MixSection, soft_loss
from ssl_vit.objectives.base import Objective, Progress
from ssl_vit.objectives.classification import Classification
from ssl_vit.recipe import DataSection, Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.splits import open_sets, resolve_classes
from ssl_vit.training.metrics import read_metrics

TINY_RESNET = {"name": "resnet18", "img_size": 32, "channels": (8, 16, 16, 24), "layers": (1, 1, 1, 1)}


def tiny(encoder: dict[str, Any] = TINY_ENCODER, **arguments: Any) -> Classification:
    torch.manual_seed(0)
    return Classification(create_encoder(**encoder), **{"num_classes": 5, **arguments})


def batch(size: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype)
    return {"image": image, "label": torch.randint(5, (size,), generator=generator)}


# ------------------------------------------------------------------------------------------ forward and losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize(("position", "pool"), [("learned", "token"), ("sincos2d", "avg"), ("learned2d", "token")])
def test_forward_and_gradients_equal_timms_classifier(dtype: torch.dtype, position: str, pool: str) -> None:
    objective = tiny({**TINY_ENCODER, "pos_embed": position, "global_pool": pool}).to(dtype)
    name, arguments = objective.encoder.timm_config()
    reference = timm.create_model(name, **{**arguments, "num_classes": 5}).to(dtype)
    reference.load_state_dict(
        {**objective.encoder.model.state_dict(), "head.weight": objective.head.weight, "head.bias": objective.head.bias}  # pyright: ignore[reportArgumentType]
    )
    data = batch(dtype=dtype)
    loss, _ = objective(data)
    expected = F.cross_entropy(reference(data["image"]), data["label"], label_smoothing=0.1)
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    loss.backward(), expected.backward()
    theirs = dict(reference.named_parameters())
    for ours, parameter in objective.encoder.model.named_parameters():
        if not parameter.requires_grad or (ours == "pos_embed" and position == "learned2d"):
            continue
        wanted = theirs[ours].grad
        assert wanted is not None
        torch.testing.assert_close(parameter.grad, wanted, rtol=0, atol=tolerance * wanted.abs().max().item())


def test_vit_equals_transformers_on_the_same_weights() -> None:
    from transformers import ViTConfig, ViTForImageClassification

    objective = tiny({**TINY_ENCODER, "pos_embed": "learned"}).double().eval()
    config = ViTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        num_labels=5, layer_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    reference = ViTForImageClassification(config).double().eval()
    heads: dict[str, torch.nn.Module] = {"classifier": objective.head}
    own = objective.encoder.model.state_dict()
    reference.load_state_dict({name: of_transformers(name, own, heads) for name in reference.state_dict()})
    data = batch(dtype=torch.float64)
    expected = reference(pixel_values=data["image"]).logits
    torch.testing.assert_close(
        objective(data, call="predict"), expected, rtol=0, atol=1e-10 * expected.abs().max().item()
    )


def test_losses_are_the_published_formulas() -> None:
    logits = torch.randn(4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = torch.tensor([[0.7, 0.3, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0.5, 0, 0.5, 0], [0, 0, 0, 0, 1]]).double()
    probability, sigmoid = logits.exp() / logits.exp().sum(dim=1, keepdim=True), 1 / (1 + (-logits).exp())
    binary = -(target * sigmoid.log() + (1 - target) * (1 - sigmoid).log())
    hot = (target > 0).double()
    wholly = -(hot * sigmoid.log() + (1 - hot) * (1 - sigmoid).log())
    expected = {
        "ce": -(target * probability.log()).sum() / 4,
        "sigmoid": binary.sum() / 4,
        "bce": wholly.sum() / 20,
    }
    for kind, value in expected.items():
        torch.testing.assert_close(soft_loss(logits, target, kind), value, rtol=1e-10, atol=0)  # pyright: ignore[reportArgumentType]
    assert soft_loss(logits.bfloat16(), target, "ce").dtype == torch.float32


# ------------------------------------------------------------------------------------------ Mixup and CutMix


def beta_mixed(seed: int, mixup: float) -> float:
    """The lambda that the published Mixup draws first from the seeded generator: switch, then beta."""
    seed_generators(seed)
    np.random.rand()
    return float(np.random.beta(mixup, mixup))


def test_mixup_mixes_images_and_targets_by_one_lambda() -> None:
    mixer, data = Mixer(MixSection(mixup=0.8), 5, 0.1), batch()
    before = data["image"].clone()
    for seed in range(20):
        lam = beta_mixed(seed, 0.8)
        seed_generators(seed)
        image, target = mixer(data["image"], data["label"], training=True)
        hot = F.one_hot(data["label"], 5) * 0.9 + 0.1 / 5
        torch.testing.assert_close(image, before * lam + before.flip(0) * (1 - lam))
        torch.testing.assert_close(target, (hot * lam + hot.flip(0) * (1 - lam)).float())
        assert torch.equal(data["image"], before), "the batch itself is left as it is"


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
def test_cutmix_targets_are_the_shares_of_pixels(mode: Any) -> None:
    mixer, data = Mixer(MixSection(cutmix=1.0, mode=mode), 5, 0.0), batch()
    seen = set()
    for seed in range(20):
        seed_generators(seed)
        image, target = mixer(data["image"], data["label"], training=True)
        own, other = data["image"], data["image"].flip(0)
        kept = (image == own).all(dim=1).double().mean(dim=(1, 2))  # (B,)
        assert ((image == own) | (image == other)).all()
        hot = F.one_hot(data["label"], 5).double()
        expected = hot * kept[:, None] + hot.flip(0) * (1 - kept[:, None])
        torch.testing.assert_close(target.double(), expected, atol=1e-6, rtol=0)
        seen.add(len({round(value, 6) for value in kept.tolist()}))
    assert max(seen) <= {"batch": 1, "pair": 3, "elem": 6}[mode]
    assert max(seen) == {"batch": 1, "pair": 3, "elem": 6}[mode]


def test_nothing_is_mixed_outside_training_and_odd_batches_are_refused() -> None:
    objective = tiny(mix=MixSection(mixup=0.8, cutmix=1.0))
    data = batch()
    plain = tiny()(data)[0]
    assert torch.equal(objective.eval()(data)[0], plain)
    assert not torch.equal(objective.train()(data)[0], plain)
    with pytest.raises(InputError, match="micro-batch of 5 images"):
        objective(batch(5))
    assert {"objective.mix.mixup", "objective.mix.cutmix"} <= set(objective.level_c)


# ------------------------------------------------------------------------------------------ average of the weights


def test_the_average_is_what_is_judged_and_a_skipped_step_leaves_it() -> None:
    objective = tiny(ema_decay=0.9)
    assert torch.equal(objective(batch(), call="predict"), tiny()(batch(), call="predict")), "both start as one"
    student = [*objective.student.named_parameters(), *objective.student_head.named_parameters()]
    average = [*objective.encoder.parameters(), *objective.head.parameters()]
    assert not any(p.requires_grad for p in average)
    optimizer = torch.optim.SGD([p for _, p in student if p.requires_grad], lr=0.5)
    objective.train()
    assert not objective.encoder.training
    expected = [p.detach().clone() for p in average]
    for step, applied in enumerate((1.0, 0.0, 1.0)):
        objective.before_step(Progress(step, 3, 0.0, 1.0, step / 3))
        objective(batch())[0].backward()
        if applied:
            optimizer.step()
        optimizer.zero_grad()
        objective.after_step(torch.tensor(applied))
        if applied:
            expected = [0.9 * e + 0.1 * p.detach() for e, (_, p) in zip(expected, student, strict=True)]
        for found, wanted in zip(average, expected, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-7)
    assert type(objective).after_step is Objective.after_step, "without an average nothing follows a step"
    trained = {f"student.{name}" for name in objective.encoder.no_weight_decay()}
    assert trained <= objective.no_weight_decay()


def test_the_student_starts_from_encoder_init(images: Path, tmp_path: Path) -> None:
    source = create_encoder(**TINY_ENCODER)
    torch.save(source.model.state_dict(), tmp_path / "encoder.pth")
    values = tiny_recipe(images, tmp_path, objective={"name": "classification", "num_classes": 3, "ema_decay": 0.99})
    values["encoder"]["init"] = str(tmp_path / "encoder.pth")
    objective = build_objective(check_recipe(check(Recipe, values)))
    assert isinstance(objective, Classification)
    for part in (objective.encoder, objective.student):
        torch.testing.assert_close(part.model.state_dict(), source.model.state_dict(), rtol=0, atol=0)


# ------------------------------------------------------------------------------------------ classes


def supervised(images: Path, folder: Path, **overrides: Any) -> Recipe:
    values = tiny_recipe(images, folder, objective={"name": "classification"}, evals={"accuracy": {}})
    for key, value in overrides.items():
        section, _, name = key.partition("__")
        values[section][name] = value
    return check_recipe(check(Recipe, values))


def test_the_data_decides_the_number_of_classes(images: Path, tmp_path: Path) -> None:
    recipe = supervised(images, tmp_path)
    resolve_classes(recipe)
    assert recipe.objective["num_classes"] == 3
    assert build_objective(recipe)({"image": torch.zeros(2, 3, 32, 32)}, call="predict").shape == (2, 3)


def test_unlabelled_partly_labelled_and_other_classes_are_refused(images: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"72 of 72 images have no label.*class folders"):
        resolve_classes(supervised(images, tmp_path, data__labels="none"))
    other = write_images(tmp_path / "other", classes=2, per_class=2)
    with pytest.raises(InputError, match=r"data\.val=.*(lacks|has) class"):
        resolve_classes(supervised(images, tmp_path, data__val=f"folder:{other}"))
    with pytest.raises(InputError, match=r"data\.train=.*(lacks|has) class"):
        resolve_classes(supervised(images, tmp_path, data__train=[f"folder:{images}", f"folder:{other}"]))
    with pytest.raises(InputError, match=r"objective\.num_classes=2: data\.train has 3"):
        resolve_classes(supervised(images, tmp_path, objective__num_classes=2))
    values = tiny_recipe(images, tmp_path, evals={"accuracy": {}})
    with pytest.raises(InputError, match=r"evals\.accuracy: objective\.name='mae' predicts no classes"):
        resolve_classes(check_recipe(check(Recipe, values)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_classes": 1}, "num_classes=1"),
        ({"num_classes": None}, "null in a recipe|those of data.train"),
        ({"label_smoothing": 1.0}, r"label_smoothing=1\.0"),
        ({"loss": "bce"}, r"label_smoothing=0\.1: allowed with loss='bce': 0"),
        ({"ema_decay": 1.0}, r"ema_decay=1\.0"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(**arguments)


# ------------------------------------------------------------------------------------------ runs


def test_a_run_learns_resumes_and_scores(images: Path, tmp_path: Path) -> None:
    """Mixup, an average of the weights and repeats; the accuracy of the classes of colours rises."""
    changes = {
        "objective__ema_decay": 0.5, "objective__mix": {"mixup": 0.2}, "data__repeats": 2, "optim__epochs": "40 steps",
        "optim__base_lr": 3e-3, "run__save_every": "20 steps",
    }  # fmt: skip
    run(supervised(images, tmp_path / "run", **changes))
    result = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]
    assert result["final"]["accuracy/top1"] > 0.9
    assert result["final"]["accuracy/top1"] > result["initial"]["accuracy/top1"]
    whole = read_metrics(tmp_path / "run" / "metrics.jsonl")
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_00000040")
    (tmp_path / "run" / "checkpoints" / "latest").write_text("step_00000020\n")
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "run" / "result.json").unlink()
    run(supervised(images, tmp_path / "run", **changes))
    again = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in whole if "loss" in line]


@pytest.mark.processes
def test_two_processes_train_and_score_like_one(images: Path, tmp_path: Path) -> None:
    """Level (b) without mixing, and every one of 71 images is scored once."""
    val = tmp_path / "val"
    shutil.copytree(images, val)
    next(iter(sorted(val.rglob("*.png")))).unlink()
    lines = {}
    for name in ("one", "two"):
        changes = {"data__val": f"folder:{val}", "run__micro_batch_size": 4, "objective__ema_decay": 0.5}
        recipe = supervised(images, tmp_path / name, **changes)
        if name == "one":
            run(recipe)
        else:
            (tmp_path / "r.yaml").write_text(to_yaml(recipe))
            words = ["-m", "torch.distributed.run", "--nproc_per_node", "2", "pipelines/train_supervised.py"]
            done = run_python(*words, "--config", str(tmp_path / "r.yaml"), env={"ACCELERATE_USE_CPU": "true"})
            assert done.returncode == 0, done.stderr
        lines[name] = read_metrics(tmp_path / name / "metrics.jsonl")
    one, two = ([line["loss"] for line in lines[name] if "loss" in line] for name in ("one", "two"))
    assert two == pytest.approx(one, rel=1e-5)
    assert lines["one"][0]["accuracy/top1"] == lines["two"][0]["accuracy/top1"]
    assert (lines["two"][0]["accuracy/top1"] * 71) == pytest.approx(round(lines["two"][0]["accuracy/top1"] * 71))


def test_a_resnet_trains_exports_and_is_measured(images: Path, tmp_path: Path) -> None:
    recipe = supervised(images, tmp_path / "run", optim__epochs="30 steps", optim__base_lr=3e-3)
    recipe = check_recipe(
        recipe.model_copy(update={"encoder": dict(TINY_RESNET), "evals": {"accuracy": {}, "knn": {}}})
    )
    run(recipe)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["evaluations"]["final"]["accuracy/top1"] > 0.9
    assert result["export_difference"] <= 1e-5
    again = supervised(images, tmp_path / "again")
    again.encoder = {"init": str(tmp_path / "run")}
    again.objective["num_classes"] = 3
    filled = build_objective(check_recipe(again))
    exported = timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True).eval()
    image = torch.randn(2, 3, 32, 32)
    filled.eval()
    torch.testing.assert_close(filled.encoder.pool(filled.encoder(image)), exported(image), rtol=1e-5, atol=1e-5)


def test_a_resnet_is_timms_and_masks_nothing() -> None:
    encoder = create_encoder(**TINY_RESNET).double().eval()
    image = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    torch.testing.assert_close(encoder.pool(encoder(image)), encoder.model(image), rtol=1e-10, atol=1e-12)
    assert create_encoder(**json.loads(json.dumps(encoder.config()))).config() == encoder.config()
    with pytest.raises(ValueError, match="masks nothing"):
        encoder(image, torch.zeros(2, 1, dtype=torch.bool), torch.zeros(1, 1, 24))
    with pytest.raises(ValueError, match=r"channels\[1\]=0"):
        create_encoder(**{**TINY_RESNET, "channels": (8, 0, 8, 8)})
    with pytest.raises(ValueError, match="did you mean 'resnet18'"):
        create_encoder(name="resnet81")
    assert "encoder.name" in tiny(TINY_RESNET).level_c, "images of a micro-batch share their statistics"
    assert "encoder.name" not in tiny().level_c


# ------------------------------------------------------------------------------------------ accuracy


def subject_with(logits: torch.Tensor, images: Path, call: str = "predict") -> Subject:
    """A subject whose objective answers with fixed logits, in the order of the set."""

    class Fixed(Objective):
        def __init__(self) -> None:
            super().__init__(create_encoder(**TINY_ENCODER))
            self.seen = 0

        def predict(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
            rows = logits[self.seen : self.seen + len(batch["image"])]
            self.seen += len(rows)
            return rows

    sets = open_sets(DataSection(val=f"folder:{images}"))
    objective = Fixed() if call == "predict" else Objective(create_encoder(**TINY_ENCODER))
    pixels = Pixels((0.5,) * 3, (0.5,) * 3, crop_pct=1.0)
    return Subject(
        objective, objective.encoder.pool, (32, 32), pixels, torch.device("cpu"), sets.images, sets.probe,
        sets.images if sets.val is None else sets.val, batch_size=7,
    )  # fmt: skip


def test_accuracy_counts_each_image_once(images: Path) -> None:
    logits = torch.randn(72, 8, generator=torch.Generator().manual_seed(0))
    subject = subject_with(logits, images)
    labels = torch.from_numpy(subject.subset("val").labels.copy())[: len(logits)]
    logits = logits[: len(labels)]
    found = Accuracy()(subject)
    order = logits.argsort(dim=1, descending=True)
    assert found["top1"] == pytest.approx((order[:, 0] == labels).double().mean().item())
    assert found["standard_error"] == pytest.approx((found["top1"] * (1 - found["top1"]) / len(labels)) ** 0.5)
    assert "top5" not in found, "three classes"


def test_accuracy_refuses_what_predicts_no_classes(images: Path) -> None:
    with pytest.raises(InputError, match="accuracy: call='predict': Objective has no such call"):
        Accuracy()(subject_with(torch.zeros(72, 3), images, call="none"))
    with pytest.raises(InputError, match="at least 3 classes"):
        Accuracy()(subject_with(torch.zeros(72, 2), images))


# ------------------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize(
    ("name", "millions"),
    [
        ("vit_base_patch16", 86.6), ("vit_large_patch16", 304.3), ("vit_huge_patch14", 632.0),
        ("vit_base_patch8", 86.6), ("vit_base_patch32", 88.2), ("vit_small_patch16", 22.1),
    ],
)  # fmt: skip
def test_published_parameter_counts(name: str, millions: float) -> None:
    """timm's and the papers' numbers for 1,000 classes: B 86 M, L 304 M, H 632 M."""
    with torch.device("meta"):
        objective = Classification(create_encoder(name=name, pos_embed="learned"), num_classes=1000)
    assert sum(p.numel() for p in objective.parameters()) / 1e6 == pytest.approx(millions, abs=0.1)
