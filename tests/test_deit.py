"""DeiT: both tokens, both losses, and teachers with their own normalisation, size and files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import TINY_ENCODER, in_process, tiny_recipe
from safetensors.torch import save_file
from torch.nn import functional as F
from transformers_names import of_transformers

from ssl_vit.config import check
from ssl_vit.encoders.base import create_encoder
from ssl_vit.modules.supervised import MixSection
from ssl_vit.modules.teacher import Teacher, TeacherSection
from ssl_vit.objectives.base import Progress
from ssl_vit.objectives.deit import DeiT
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.training.metrics import read_metrics

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
STUDENT = {**TINY_ENCODER, "name": "deit_tiny_distilled_patch16_224"}
TEACHER = {"name": "resnet10t", "img_size": 32}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A small timm CNN with a classifier of 5 classes, and statistics that are not those of its initialisation."""
    torch.manual_seed(7)
    model: Any = timm.create_model("resnet10t", num_classes=5)
    model.train()
    for _ in range(3):
        model(2 * torch.randn(8, 3, 32, 32) + 1)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pth"
    torch.save(model.state_dict(), path)
    return str(path)


def reference_teacher(weights: str) -> Any:
    model: Any = timm.create_model("resnet10t", num_classes=5)
    model.load_state_dict(torch.load(weights, weights_only=True))
    return model.eval()


def tiny(weights: str | None, encoder: dict[str, Any] = STUDENT, **arguments: Any) -> DeiT:
    torch.manual_seed(0)
    section = TeacherSection(weights=weights, **{**TEACHER, **arguments.pop("teacher", {})})
    defaults: dict[str, Any] = {"num_classes": 5, "mean": MEAN, "std": STD, "head_std": 0.5}
    return DeiT(create_encoder(**encoder), teacher=section, **{**defaults, **arguments})


def batch(size: int = 6, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(size, 3, 32, 32, generator=generator, dtype=dtype)
    return {"image": image, "label": torch.randint(5, (size,), generator=generator)}


def distilled_of_timm(objective: DeiT) -> Any:
    name, arguments = objective.encoder.timm_config()
    reference: Any = timm.create_model(name, **{**arguments, "num_classes": 5})
    heads = {f"{n}.{k}": v for n in ("head", "head_dist") for k, v in getattr(objective, n).state_dict().items()}
    reference.load_state_dict({**objective.encoder.model.state_dict(), **heads})
    reference.set_distilled_training(True)
    return reference


# ------------------------------------------------------------------------------------------ forward and losses


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
@pytest.mark.parametrize("distillation", ["hard", "soft"])
@pytest.mark.parametrize("position", ["learned", "sincos2d"])
def test_loss_and_gradients_equal_timms_student_under_the_published_formula(
    weights: str, dtype: torch.dtype, distillation: Any, position: str
) -> None:
    objective = tiny(weights, {**STUDENT, "pos_embed": position}, distillation=distillation, alpha=0.3, temperature=2.0)
    objective.to(dtype).train()
    data = batch(dtype=dtype)
    loss, metrics = objective(data)

    student, teacher = distilled_of_timm(objective).to(dtype).train(), reference_teacher(weights).to(dtype)
    logits, distilled = student(data["image"])
    mean, std = (torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1) for v in (MEAN, STD))
    own_mean, own_std = (
        torch.tensor(v, dtype=torch.float64).view(1, 3, 1, 1)
        for v in (teacher.pretrained_cfg["mean"], teacher.pretrained_cfg["std"])
    )
    pixels = data["image"].double() * std + mean
    with torch.no_grad():
        answer = teacher(((pixels - own_mean) / own_std).to(dtype))
    base = F.cross_entropy(logits, data["label"], label_smoothing=0.1)
    if distillation == "hard":
        kd = F.cross_entropy(distilled, answer.argmax(dim=1))
    else:
        p, q = (answer / 2).softmax(dim=1), (distilled / 2).softmax(dim=1)
        kd = (p * (p.log() - q.log())).sum() * 2.0 * 2.0 / distilled.numel()
    expected = base * 0.7 + kd * 0.3
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    torch.testing.assert_close(loss, expected, rtol=tolerance, atol=0)
    torch.testing.assert_close(metrics["distillation_loss"], kd.detach(), rtol=10 * tolerance, atol=0)
    loss.backward(), expected.backward()
    theirs = dict(student.named_parameters())
    for name, parameter in objective.named_parameters():
        other = theirs.get(name.removeprefix("encoder.model."))
        if parameter.requires_grad:
            assert other is not None
            assert other.grad is not None
            scale = other.grad.abs().max().item()
            torch.testing.assert_close(parameter.grad, other.grad, rtol=0, atol=tolerance * scale)
        else:
            assert parameter.grad is None, name


def test_both_heads_are_averaged_as_in_timm_and_transformers(weights: str) -> None:
    from transformers import DeiTConfig, DeiTForImageClassificationWithTeacher

    objective = tiny(weights, {**STUDENT, "pos_embed": "learned"}).double().eval()
    image = batch(dtype=torch.float64)["image"]
    found = objective({"image": image}, call="predict")
    tolerance = 1e-10 * found.abs().max().item()
    torch.testing.assert_close(found, distilled_of_timm(objective).double().eval()(image), rtol=0, atol=tolerance)
    config = DeiTConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=192, image_size=32, patch_size=8,
        num_labels=5, layer_norm_eps=1e-6, attn_implementation="sdpa",
    )  # fmt: skip
    reference = DeiTForImageClassificationWithTeacher(config).double().eval()
    heads = {"cls_classifier": objective.head, "distillation_classifier": objective.head_dist}
    own = objective.encoder.model.state_dict()
    reference.load_state_dict({name: of_transformers(name, own, heads) for name in reference.state_dict()})
    torch.testing.assert_close(found, reference(pixel_values=image).logits, rtol=0, atol=tolerance)


def test_the_teacher_sees_the_mixed_images_and_stays_as_it_is(weights: str) -> None:
    objective = tiny(weights, mix=MixSection(mixup=0.8, cutmix=1.0))
    seen: list[torch.Tensor] = []
    objective.teacher.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    students: list[torch.Tensor] = []
    objective.encoder.register_forward_pre_hook(lambda module, inputs: students.append(inputs[0]))
    before = {name: value.clone() for name, value in objective.teacher.state_dict().items()}
    objective.train()
    assert not objective.teacher.model.training
    optimizer = torch.optim.SGD([p for p in objective.parameters() if p.requires_grad], lr=0.1)
    data = batch()
    for step in range(3):
        objective.before_step(Progress(step, 3, 0.0, 1.0, step / 3))
        objective(data)[0].backward()
        optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(seen, students, strict=True))
    assert not any(torch.equal(image, data["image"]) for image in seen)
    for name, value in objective.teacher.state_dict().items():
        assert torch.equal(value, before[name]), f"{name}: weights and BatchNorm statistics rest"


# ------------------------------------------------------------------------------------------ teachers


def test_a_teacher_of_another_size_and_normalisation(weights: str) -> None:
    section = TeacherSection(weights=weights, name="resnet10t", img_size=48, mean=(0.1, 0.2, 0.3), std=(0.9, 0.8, 0.7))
    teacher = Teacher(section, 5, MEAN, STD).eval()
    pixels = torch.rand(4, 3, 32, 32)
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / torch.tensor([0.9, 0.8, 0.7]).view(3, 1, 1)
    resized = F.interpolate(theirs, (48, 48), mode="bicubic", antialias=True)
    torch.testing.assert_close(teacher(ours), reference_teacher(weights)(resized), rtol=1e-4, atol=1e-4)


def test_teachers_from_vits_timm_folders_and_safetensors(tmp_path: Path) -> None:
    arguments: dict[str, Any] = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    torch.manual_seed(3)
    model: Any = timm.create_model("vit_tiny_patch16_224", num_classes=5, **arguments).eval()
    folder = tmp_path / "folder"
    folder.mkdir()
    save_file(model.state_dict(), folder / "model.safetensors")
    config = {
        "architecture": "vit_tiny_patch16_224",
        "model_args": arguments,
        "pretrained_cfg": {"mean": [0.1, 0.2, 0.3]},
    }
    (folder / "config.json").write_text(json.dumps(config))
    teacher = Teacher(TeacherSection(weights=str(folder)), 5, MEAN, STD).eval()
    assert teacher.img_size == (32, 32)
    own_std = torch.tensor(model.pretrained_cfg["std"]).view(3, 1, 1)
    pixels = torch.rand(2, 3, 32, 32)
    ours = (pixels - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    theirs = (pixels - torch.tensor([0.1, 0.2, 0.3]).view(3, 1, 1)) / own_std
    torch.testing.assert_close(teacher(ours), model(theirs), rtol=1e-4, atol=1e-4)


def saved(name: str, folder: Path) -> tuple[Any, TeacherSection]:
    """A timm model of 5 classes, and the section that takes it as teacher for pictures of 64 px."""
    torch.manual_seed(3)
    model: Any = timm.create_model(name, num_classes=5).eval()
    torch.save(model.state_dict(), folder / "teacher.pth")
    return model, TeacherSection(weights=str(folder / "teacher.pth"), name=name, img_size=64)


def test_a_vit_by_name_teaches_at_another_size(tmp_path: Path) -> None:
    """Its positions are resized as timm resizes those of published weights."""
    from timm.models.vision_transformer import checkpoint_filter_fn

    model, section = saved("vit_tiny_patch16_224", tmp_path)
    expected: Any = timm.create_model(section.name, num_classes=5, img_size=64).eval()
    expected.load_state_dict(checkpoint_filter_fn(model.state_dict(), expected))
    teacher = Teacher(section, 5, model.pretrained_cfg["mean"], model.pretrained_cfg["std"]).eval()
    image = torch.randn(2, 3, 64, 64)
    torch.testing.assert_close(teacher(image), expected(image), rtol=1e-4, atol=1e-4)


def test_a_teacher_of_one_size_is_refused_at_another(tmp_path: Path) -> None:
    _, section = saved("convit_tiny", tmp_path)
    with pytest.raises(ValueError, match=r"=\[64, 64\]: convit_tiny takes no images of this size .*for \[224, 224\]"):
        Teacher(section, 5, MEAN, STD)


@pytest.mark.parametrize(
    ("section", "classes", "message"),
    [
        ({}, 5, r"teacher\.weights=None: allowed: a run of pipelines/train_supervised.py"),
        ({"weights": "W", "name": "resnet10x"}, 5, "teacher.name='resnet10x': timm has no such model.*did you mean"),
        ({"weights": "W", "name": "resnet10t"}, 7, r"fc.weight is \[5, 512\] in the file, \[7, 512\] here"),
        ({"weights": "W", "name": "resnet18"}, 5, "does not fit resnet18.*conv1.weight is missing"),
        ({"weights": "W"}, 5, "does not say which encoder it holds"),
        ({"weights": "/nowhere.pth", "name": "resnet10t"}, 5, r"/nowhere\.pth: no such file"),
        ({"weights": "W", "name": "resnet10t", "mean": (0.5,)}, 5, r"teacher\.mean=\[0\.5\].*each of the 3 channels"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_had_are_named(weights: str, section: dict, classes: int, message: str) -> None:
    values = {key: weights if value == "W" else value for key, value in section.items()}
    with pytest.raises(ValueError, match=message):
        Teacher(TeacherSection(**values), classes, MEAN, STD)


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", "vit_small_patch14_reg4_dinov2", "resnet18"])
def test_a_student_without_two_prefix_tokens_is_refused(weights: str, name: str) -> None:
    """B78."""
    encoder = {"name": name, "img_size": 32} if name == "resnet18" else {**TINY_ENCODER, "name": name}
    with pytest.raises(ValueError, match=f"encoder.name='{name}': has . prefix tokens.*deit_"):
        tiny(weights, encoder)


def test_a_distilled_encoder_that_is_evaluated_returns_the_same_kind_of_output(weights: str) -> None:
    """B78: modes do not switch what comes out."""
    objective, data = tiny(weights), batch()
    for mode in (True, False):
        objective.train(mode)
        assert objective(data)[0].shape == ()
        assert objective(data, call="predict").shape == (6, 5)
    assert objective.encoder.pool(objective(data, call="encode")).shape == (6, 48)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1\.5"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"num_classes": 1}, "num_classes=1"),
    ],
)
def test_mistakes_are_named(weights: str, arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tiny(weights, **arguments)


# ------------------------------------------------------------------------------------------ runs


def test_a_student_of_our_own_teacher_from_training_to_probe(images: Path, tmp_path: Path) -> None:
    """Teacher by train_supervised, student by train_deit; its encoder exports and is probed; a resume is exact."""
    teacher = tiny_recipe(images, tmp_path / "teacher", objective={"name": "classification"}, evals={"accuracy": {}})
    teacher["encoder"] = {"name": "resnet18", "img_size": 40, "channels": [8, 16, 16, 24], "layers": [1, 1, 1, 1]}
    teacher["data"] |= {"mean": [0.3, 0.3, 0.3], "std": [0.3, 0.3, 0.3]}
    teacher["optim"] |= {"epochs": "30 steps", "base_lr": 3e-3}
    run(check_recipe(check(Recipe, teacher)))

    def student(folder: str) -> Recipe:
        objective = {"name": "deit", "teacher": {"weights": str(tmp_path / "teacher")}, "mix": {"mixup": 0.2}}
        values = tiny_recipe(images, tmp_path / folder, objective=objective, encoder=dict(STUDENT))
        values["evals"] = {"accuracy": {}, "linear": {}}
        values["optim"] |= {"epochs": "24 steps", "base_lr": 3e-3}
        values["run"]["save_every"] = "12 steps"
        return check_recipe(check(Recipe, values))

    run(student("student"))
    result = json.loads((tmp_path / "student" / "result.json").read_text())
    assert result["evaluations"]["final"]["accuracy/top1"] > 0.8
    assert result["export_difference"] <= 1e-5
    saved = timm.create_model(f"local-dir:{tmp_path / 'student' / 'encoder'}", pretrained=True)
    assert saved.num_prefix_tokens == 2

    import shutil

    whole = read_metrics(tmp_path / "student" / "metrics.jsonl")
    shutil.copytree(tmp_path / "student", tmp_path / "again")
    shutil.rmtree(tmp_path / "again" / "checkpoints" / "step_00000024")
    (tmp_path / "again" / "checkpoints" / "latest").write_text("step_00000012\n")
    for name in ("status.json", "result.json"):
        (tmp_path / "again" / name).unlink()
    run(student("again"))
    again = read_metrics(tmp_path / "again" / "metrics.jsonl")
    assert [line["loss"] for line in again if "loss" in line] == [line["loss"] for line in whole if "loss" in line]


@pytest.mark.parametrize(("name", "millions"), [("base", 87.3), ("small", 22.4), ("tiny", 5.9)])
def test_published_parameter_counts(name: str, millions: float) -> None:
    """timm's numbers of the distilled models with two heads of 1,000 classes."""
    with torch.device("meta"):
        encoder = create_encoder(name=f"deit_{name}_distilled_patch16_224", pos_embed="learned")
    heads = 2 * (encoder.embed_dim * 1000 + 1000)
    assert (sum(p.numel() for p in encoder.parameters()) + heads) / 1e6 == pytest.approx(millions, abs=0.1)


@pytest.mark.parametrize("kind", ["hard", "soft"])
def test_without_a_distillation_token_one_classifier_learns_from_both(weights: str, kind: str) -> None:
    """The usual distillation: labels and teacher on the same logits, for an encoder of any kind."""
    objective = tiny(weights, TINY_ENCODER, distillation_token=False, distillation=kind, label_smoothing=0.0).double()
    images = batch(dtype=torch.float64)
    logits = objective.head(objective.encoder.pool(objective.encoder(images["image"])))
    teacher = objective.teacher(images["image"])
    labels = F.cross_entropy(logits, images["label"])
    if kind == "hard":
        distilled = F.cross_entropy(logits, teacher.argmax(dim=1))
    else:
        student, whole = (each.div(3.0).softmax(dim=1) for each in (logits, teacher))
        distilled = (whole * (whole / student).log()).sum() * 9 / logits.numel()
    torch.testing.assert_close(objective(images)[0], 0.5 * labels + 0.5 * distilled, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(objective(images, call="predict"), logits)
    assert objective.head_dist is None


def test_fine_tuning_with_a_teacher_through_its_door(weights: str, images: Path, tmp_path: Path) -> None:
    teacher = tiny_recipe(images, tmp_path / "teacher", objective={"name": "classification"}, evals={})
    mae = tiny_recipe(images, tmp_path / "mae", evals={})
    for values in (teacher, mae):
        run(check_recipe(check(Recipe, values)))
    words = [
        f"encoder.init={tmp_path / 'mae'}", f"objective.teacher.weights={tmp_path / 'teacher'}",
        f"data.train=folder:{images}", f"data.val=folder:{images}", f"run.dir={tmp_path / 'run'}",
        "optim.epochs=3 steps", "optim.warmup_epochs=0", "optim.batch_size=16", "run.workers=0",
        "evals.accuracy.every=null",
    ]  # fmt: skip
    done = in_process("pipelines/finetune.py", "--config", "configs/finetune/distilled_images.yaml", *words)
    assert done.returncode == 0, done.stderr
    assert "accuracy/top1" in done.stderr
