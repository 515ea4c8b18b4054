"""What goes wrong silently between a run and its use: prefixes, pooling, constants, sizes, formats, sets."""

from __future__ import annotations

import functools
import io
import json
import logging
import re
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from conftest import TINY_ENCODER, in_process, tiny_recipe, write_images
from PIL import Image
from safetensors.torch import load_file, save_file
from test_evaluation import PIXELS, subject
from test_trainer import losses, train

from ssl_vit import build
from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.encoders.base import create_encoder
from ssl_vit.encoders.weights import fill_encoder, fill_objective
from ssl_vit.evaluation.base import Subject
from ssl_vit.evaluation.knn import KNN
from ssl_vit.evaluation.sweep import Sweep
from ssl_vit.export.command import ExportOptions, export
from ssl_vit.objectives.base import Objective
from ssl_vit.objectives.classification import Classification
from ssl_vit.objectives.mae import MAE
from ssl_vit.recipe import DataSection, EvaluationRecipe, Recipe, check_recipe
from ssl_vit.run import evaluate, run
from ssl_vit.splits import open_sets, resolve_classes
from ssl_vit.training.checkpoint import read_checkpoint


def judged(init: Path, images: Path, folder: Path, **values: Any) -> dict[str, float]:
    recipe = {
        "encoder": {"init": str(init)}, "data": {"val": f"folder:{images}"}, "evals": {"knn": {}},
        "run": {"dir": str(folder), "workers": 0, "tensorboard": False}, **values,
    }  # fmt: skip
    evaluate(check_recipe(check(EvaluationRecipe, recipe)))
    return json.loads((folder / "result.json").read_text())["evaluations"]["final"]


@pytest.fixture(scope="module")
def mine(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with constants of its own."""
    folder = tmp_path_factory.mktemp("mine") / "run"
    values = tiny_recipe(images, folder, evals={"knn": {}})
    values["data"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    run(check_recipe(check(Recipe, values)))
    return folder


@pytest.mark.parametrize(
    "prefix", ["encoder.", "module._orig_mod.", "_orig_mod.module.backbone.", "teacher.", "net.vit."]
)
def test_a_prefix_is_mapped_or_refused_never_ignored(prefix: str, mine: Path, images: Path, tmp_path: Path) -> None:
    """Known prefixes give the same figures; with an unknown one nothing is measured."""
    source = tmp_path / "folder"
    source.mkdir()
    state = load_file(mine / "encoder" / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in state.items()}, source / "model.safetensors")
    (source / "config.json").write_text((mine / "encoder" / "config.json").read_text())
    if prefix in ("teacher.", "net.vit."):
        with pytest.raises(InputError, match=r"no encoder tensor matches"):
            judged(source, images, tmp_path / "run")
        assert not (tmp_path / "run" / "result.json").exists()
    else:
        found = judged(source, images, tmp_path / "run")["knn/top1"]
        assert found == judged(mine, images, tmp_path / "own")["knn/top1"]


@pytest.mark.parametrize("prefix", ["encoder.", "net.vit."])
def test_every_use_of_a_renamed_file_is_as_before_or_refused(
    prefix: str, mine: Path, images: Path, tmp_path: Path
) -> None:
    """B82: probe, fine-tuning and export of the run's weights with a prefix before every name; kNN is above."""
    source = tmp_path / "renamed"
    source.mkdir()
    state = load_file(mine / "encoder" / "model.safetensors")
    save_file({prefix + name: tensor for name, tensor in state.items()}, source / "model.safetensors")
    (source / "config.json").write_text((mine / "encoder" / "config.json").read_text())

    def trained(name: str, init: Path) -> list[tuple[int, float]]:
        values = tiny_recipe(images, tmp_path / f"{name}_{init.name}", optim__epochs="3 steps")
        return losses(train({**values, "objective": {"name": name}, "encoder": {"init": str(init)}}))

    if prefix == "encoder.":
        for name in ("probe", "classification"):
            assert trained(name, source) == trained(name, mine)
        export(source, tmp_path / "exported", ExportOptions(), fresh=False)
        exported = load_file(tmp_path / "exported" / "model.safetensors")
        assert exported.keys() == state.keys()
        assert all(torch.equal(exported[name], state[name]) for name in state)
        return
    for use in (
        lambda: trained("probe", source), lambda: trained("classification", source),
        lambda: export(source, tmp_path / "exported", ExportOptions(), fresh=False),
    ):  # fmt: skip
        with pytest.raises(InputError, match="no encoder tensor matches"):
            use()
    assert {path.name for path in tmp_path.iterdir()} == {"renamed"}, "nothing was begun"


class Inside(torch.nn.Module):
    """Holds a part under the name that DistributedDataParallel gives it."""

    def __init__(self, part: torch.nn.Module) -> None:
        super().__init__()
        self.module = part


@pytest.mark.parametrize(
    "wrap",
    [torch.compile, Inside, lambda part: torch.compile(Inside(part)), lambda part: Inside(torch.compile(part))],
    ids=["compile", "DDP", "compile of DDP", "DDP of compile"],
)
@pytest.mark.parametrize("blocks", [False, True], ids=["whole", "blocks compiled"])
def test_names_of_any_nesting_of_wrappers(wrap: Any, blocks: bool, tmp_path: Path) -> None:
    """B83: what others save of a wrapped objective fills an encoder and goes on as an objective.

    What is saved here has clean names under every wrapper: test_compiled_blocks_train_the_same and test_strategies.py,
    whose runs also go on from one another.
    """
    recipes = (tiny_recipe(tmp_path, tmp_path / "run", seed=seed) for seed in (1, 2))
    source, other = (build.build_objective(check_recipe(check(Recipe, recipe))) for recipe in recipes)
    clean = {name: tensor.clone() for name, tensor in source.state_dict().items()}
    if blocks:
        inner: Any = source.encoder.model
        inner.blocks = torch.nn.Sequential(*(wrap(block) for block in inner.blocks))
    names = wrap(source).state_dict()
    assert names.keys().isdisjoint(clean)
    torch.save({"model": names}, tmp_path / "wrapped.pt")
    fill_objective(other, tmp_path / "wrapped.pt")
    assert all(torch.equal(tensor, clean[name]) for name, tensor in other.state_dict().items())
    encoder = create_encoder(**TINY_ENCODER)
    fill_encoder(encoder, tmp_path / "wrapped.pt")
    filled = {f"encoder.model.{name}": tensor for name, tensor in encoder.model.state_dict().items()}
    assert all(torch.equal(tensor, clean[name]) for name, tensor in filled.items())


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_a_probe_has_the_pretrained_weights_and_trains_the_rest(
    pool: str, mine: Path, images: Path, tmp_path: Path
) -> None:
    """B84: pretrained with a class token, probed on it and on the mean; a new norm that nothing trains is refused."""
    values = tiny_recipe(images, tmp_path, objective={"name": "probe", "pools": [pool], "num_classes": 3})
    values["encoder"] = {"init": str(mine), "global_pool": pool}
    probe = build.build_objective(check_recipe(check(Recipe, values)))
    state = load_file(mine / "encoder" / "model.safetensors")
    frozen = {name: p for name, p in probe.named_parameters() if not p.requires_grad}
    assert frozen.keys() == {f"encoder.model.{name}" for name in state}
    assert all(torch.equal(p, state[name.removeprefix("encoder.model.")]) for name, p in frozen.items())
    trained = {name.split(".")[0] for name, p in probe.named_parameters() if p.requires_grad}
    assert trained == {"heads"}
    new = {"init": str(mine), "global_pool": "avg", "fc_norm": True}
    with pytest.raises(InputError, match=r"encoder\.fc_norm=true: .*has no norm behind the pooling.*allowed: false"):
        build.build_objective(check_recipe(check(Recipe, values | {"encoder": new})))
    with pytest.raises(InputError, match=r"encoder\.fc_norm=true: .*nothing here trains a new one"):
        judged(mine, images, tmp_path / "run", encoder=new)
    values = tiny_recipe(images, tmp_path, objective={"name": "classification", "num_classes": 3, "ema_decay": 0.9})
    assert build.build_objective(check_recipe(check(Recipe, values | {"encoder": new})))


def test_both_poolings_are_offered_and_nothing_new_stands_between(images: Path) -> None:
    """B84: pretrained with its class token, an encoder is probed on tokens and means behind one pretrained norm."""
    one = subject(images)
    encoder = one.objective.encoder
    tokens = encoder(torch.randn(2, 3, 32, 32))
    assert not hasattr(encoder.model.fc_norm, "weight"), "nothing new between pretraining and probe"
    for pool, feature in (("token", tokens.prefix[:, 0]), ("avg", tokens.patches.mean(dim=1))):
        assert feature.shape == (2, 48), pool
    results = {pool: Sweep(last_blocks=[1], pools=[pool], learning_rates=[0.1])(one) for pool in ("token", "avg")}
    assert results["token"]["token"] == results["avg"]["avg"] == 1
    assert results["token"]["avg"] == results["avg"]["token"] == 0


def test_constants_travel_and_overriding_them_warns(
    mine: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The probe of a run, without flags, uses the run's mean, std and filter; so do its exports."""
    judged(mine, images, tmp_path / "probe")
    used = json.loads(json.dumps(check_recipe_of(tmp_path / "probe")))
    assert used["mean"] == [0.4, 0.5, 0.6]
    assert used["interpolation"] == "bilinear"
    config = json.loads((mine / "encoder" / "config.json").read_text())["pretrained_cfg"]
    assert (config["mean"], config["std"]) == ([0.4, 0.5, 0.6], [0.2, 0.3, 0.4])
    export(mine, tmp_path / "hf", ExportOptions(format="transformers"), fresh=False)
    processor = json.loads((tmp_path / "hf" / "preprocessor_config.json").read_text())
    assert processor["image_mean"] == [0.4, 0.5, 0.6]
    assert processor["image_std"] == [0.2, 0.3, 0.4]
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "library_name: transformers" in card
    assert f'AutoModel.from_pretrained("{tmp_path / "hf"}"' in card
    assert "create_model" not in card
    assert "knn/top1" in card, "results, data and recipe are those of the run's own card"
    caplog.clear()
    judged(mine, images, tmp_path / "other", data={"val": f"folder:{images}", "mean": [0.5] * 3})
    assert "data.mean=[0.5, 0.5, 0.5] overrides [0.4, 0.5, 0.6]" in caplog.text


def check_recipe_of(folder: Path) -> dict[str, Any]:
    from omegaconf import OmegaConf

    recipe: Any = OmegaConf.to_container(OmegaConf.load(folder / "recipe.yaml"))
    return recipe["data"]


def test_neighbours_of_a_dozen_images(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Twelve images, scored on themselves: k is cut with a note, and no image is its own neighbour."""
    folder = write_images(tmp_path / "images", classes=3, per_class=4)
    torch.manual_seed(0)
    objective = Objective(create_encoder(**TINY_ENCODER)).eval()
    sets = open_sets(DataSection(train=f"folder:{folder}", val=f"folder:{folder}"))
    one = Subject(
        objective, objective.encoder.pool, (32, 32), PIXELS, torch.device("cpu"), sets.images, sets.probe, sets.val
    )
    found = KNN(k=[1, 10, 20, 200])(one)
    assert "k is cut to the 11 images" in caplog.text
    assert {"top1_k1", "top1_k10", "top1_k11"} <= set(found)
    assert not {"top1_k20", "top1_k200"} & set(found)
    features, labels = one.features("val")
    normal = torch.nn.functional.normalize(features, dim=1)
    similarity = (normal @ normal.T).fill_diagonal_(-1)
    assert found["top1_k1"] == (labels[similarity.argmax(dim=1)] == labels).double().mean().item()


def test_a_part_of_the_scored_images_that_votes_does_not_vote_for_itself(tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, per_class=8)
    torch.manual_seed(0)
    objective = Objective(create_encoder(**TINY_ENCODER)).eval()
    spec = f"folder:{folder}"
    sets = open_sets(DataSection(probe=spec, val=spec, probe_images=9))
    one = Subject(
        objective, objective.encoder.pool, (32, 32), PIXELS, torch.device("cpu"), sets.images, sets.probe, sets.val
    )
    found = KNN(k=[1])(one)["top1_k1"]
    bank, bank_labels = one.features("probe")
    queries, labels = one.features("val")
    similarity = torch.nn.functional.normalize(queries, dim=1) @ torch.nn.functional.normalize(bank, dim=1).T
    similarity[similarity > 1 - 1e-5] = -1
    assert found == (bank_labels[similarity.argmax(dim=1)] == labels).double().mean().item() < 1


def test_a_linear_probe_of_an_image_a_class_gives_a_figure(mine: Path, tmp_path: Path) -> None:
    folder = write_images(tmp_path / "images", classes=3, per_class=1)
    spec, evals = f"folder:{folder}", {"linear": {}, "few_shot": {"shots": [1], "draws": 2}}
    found = judged(mine, folder, tmp_path / "run", data={"probe": spec, "val": spec}, evals=evals)
    assert found["linear/top1"] == found["few_shot/top1"] == 1, "trained on what is scored"
    designs = json.loads((tmp_path / "run" / "result.json").read_text())["designs"]
    assert designs == {"linear": {"fit": 3, "selection": 0}, "few_shot": {"seeds": [0, 1]}}


def test_pictures_of_a_run_are_of_its_whole_objective(mine: Path, images: Path, tmp_path: Path) -> None:
    """The decoder of the checkpoint draws them, as in a run that begins with all of it."""
    values = tiny_recipe(images, tmp_path / "whole", objective__init=str(mine), evals={"pictures": {}})
    values["data"] |= {"mean": [0.4, 0.5, 0.6], "std": [0.2, 0.3, 0.4], "interpolation": "bilinear"}
    values["optim"] |= {"epochs": "1 steps", "warmup_epochs": 0}
    train(values)
    sheets = [tmp_path / "whole"]
    for source in ("", "checkpoints/step_00000012"):
        sheets.append(tmp_path / f"of_{source[:11]}")
        done = in_process(
            "pipelines/evaluate.py", f"encoder.init={mine / source}", f"data.train=folder:{images}",
            "evals.pictures={}", f"run.dir={sheets[-1]}", "run.workers=0", "mixed_precision=no",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    whole, *others = [np.array(Image.open(folder / "pictures" / "pictures_00000000.png")) for folder in sheets]
    for other in others:
        assert np.array_equal(other, whole)


@pytest.mark.parametrize("name", ["pictures", "decoded", "accuracy", "heads"])
def test_an_encoder_alone_is_not_asked_for_more(name: str, mine: Path, images: Path, tmp_path: Path) -> None:
    """A timm name, an export, and a run of another objective: one sentence, nothing left behind."""
    words = [f"data.val=folder:{images}", f"evals.{name}={{}}", f"run.dir={tmp_path / 'run'}", "run.workers=0"]
    sources = {
        "encoder.name=vit_tiny_patch16_224": "in an encoder alone; give a run or a checkpoint of it as encoder.init",
        f"encoder.init={mine / 'encoder'}": "in an encoder alone",
        **({f"encoder.init={mine}": "in MAE; leave it out"} if name == "heads" else {}),
    }
    for source, reason in sources.items():
        done = in_process("pipelines/evaluate.py", source, *words)
        assert done.returncode == 2, done.stderr
        assert f"error: evals.{name}: asks for " in done.stderr
        assert reason in done.stderr
        assert not (tmp_path / "run" / "result.json").exists()


def test_only_the_encoder_computes_in_bf16(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under bf16 what is made of the features is computed in float32: near-equal features keep their order."""
    inside: list[torch.dtype] = []
    outside: list[tuple[bool, torch.dtype]] = []

    def watched(encoder: torch.nn.Module) -> None:
        encoder.model.blocks[0].mlp.fc1.register_forward_hook(  # pyright: ignore
            lambda module, given, made: inside.append(made.dtype)
        )

    built = build.build_frozen

    def frozen(recipe: EvaluationRecipe) -> Objective:
        objective = built(recipe)
        watched(objective.encoder)
        return objective

    def spy(self: KNN, subject: Subject) -> dict[str, float]:
        features, _ = subject.features("val")
        outside.append((torch.is_autocast_enabled("cpu"), (features @ features.T).dtype))
        return {"top1": 0.0}

    monkeypatch.setattr(build, "build_frozen", frozen)
    monkeypatch.setattr(KNN, "__call__", spy)
    encoder = dict(TINY_ENCODER)
    values = {
        "encoder": encoder, "data": {"val": f"folder:{images}"}, "evals": {"knn": {}}, "mixed_precision": "bf16",
        "run": {"dir": str(tmp_path / "run"), "workers": 0, "tensorboard": False},
    }  # fmt: skip
    evaluate(check_recipe(check(EvaluationRecipe, values)))
    assert set(inside) == {torch.bfloat16}
    assert outside == [(False, torch.float32)]


def test_a_chain_of_fine_tunings(mine: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """B88: three classes at 32 px, then five at 48 from what that left; timm takes the export at a third size.

    As ``encoder.init`` a classifier loses its head, which is said; as ``objective.init`` it keeps it, also at 64 px.
    """
    five = write_images(tmp_path / "five", classes=5, per_class=4)
    caplog.set_level(logging.INFO, logger="ssl_vit")

    def tune(
        folder: str, data: Path, objective: dict[str, Any], encoder: dict[str, Any], **constants: Any
    ) -> dict[str, Any]:
        values = tiny_recipe(data, tmp_path / folder, evals={"accuracy": {}}, encoder=encoder)
        values["data"] |= constants
        run(check_recipe(check(Recipe, {**values, "objective": {"name": "classification", **objective}})))
        return json.loads((tmp_path / folder / "result.json").read_text())

    tune("three", images, {}, {"init": str(mine), "img_size": 32})
    caplog.clear()
    checkpoint = tmp_path / "three" / "checkpoints" / "step_00000012"
    result = tune("five_classes", five, {}, {"init": str(checkpoint), "img_size": 48})
    assert "objective.num_classes: 5, the classes of data.train" in caplog.text
    assert re.search(r"encoder\.init: .*: (\d+)/\1 tensors loaded; ignored: head; pos_embed", caplog.text)
    saved = read_checkpoint(tmp_path / "five_classes" / "checkpoints" / "step_00000012").weights
    assert read_checkpoint(checkpoint).weights["head.weight"].shape == (3, 48)
    assert saved["head.weight"].shape == (5, 48)
    assert result["evaluations"]["initial"]["accuracy/top1"] < 0.5 < result["evaluations"]["final"]["accuracy/top1"]
    found = judged(tmp_path / "five_classes", five, tmp_path / "judged", evals={"accuracy": {}})
    assert found["accuracy/top1"] == result["evaluations"]["final"]["accuracy/top1"], "the head of the run counts"
    assert result["data"]["val"]["classes"] == 5
    released = {name.removeprefix("encoder.model."): tensor for name, tensor in saved.items()}
    torch.save({"model": released}, tmp_path / "released.pth")
    settings = json.loads((tmp_path / "five_classes" / "encoder" / "config.json").read_text())["pretrained_cfg"]
    told = {"released.pth": {key: settings[key] for key in ("mean", "std")}}  # a run says what it was trained with
    large = {**TINY_ENCODER, "img_size": 64}
    kept = [
        tune(f"again_{init}", five, {"init": str(tmp_path / init)}, large, **told.get(init, {}))["evaluations"]
        for init in ("five_classes", "released.pth")
    ]
    assert kept[0]["initial"]["accuracy/top1"] == kept[1]["initial"]["accuracy/top1"] > 0.5
    with pytest.raises(InputError, match=r"objective\.init=.*head\.weight \[5, 48\] in the file, \[3, 48\] here"):
        tune("other", images, {"init": str(tmp_path / "five_classes")}, {**TINY_ENCODER, "img_size": 48})
    model = timm.create_model(f"local-dir:{tmp_path / 'five_classes' / 'encoder'}", pretrained=True, img_size=64)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 48)


def test_a_fine_tuning_that_stays_broken_names_what_can_be_used(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B89: losses are infinite from step 15 on; exit code 1, and the message names the best checkpoint, which loads."""
    now, loss = {"step": 0}, Classification.loss

    def before_step(self: Classification, progress: Any) -> None:
        now["step"] = progress.step + 1

    def broken(self: Classification, batch: dict[str, Any]) -> Any:
        value, metrics = loss(self, batch)
        return value * (float("inf") if now["step"] >= 15 else 1.0), metrics

    monkeypatch.setattr(Classification, "before_step", before_step)
    monkeypatch.setattr(Classification, "loss", broken)
    values = tiny_recipe(images, tmp_path / "run", objective={"name": "classification"}, optim__max_skips=3,
                         optim__epochs="40 steps", evals={"accuracy": {"every": "2 steps"}})  # fmt: skip
    values["run"] |= {"keep_best": "accuracy/top1", "keep_last": 1}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    with pytest.raises(FloatingPointError) as stopped:  # uncaught, so a process ends with 1
        in_process("pipelines/finetune.py", "--config", str(tmp_path / "recipe.yaml"))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 1)
    assert str(stopped.value) in status["message"]
    named = re.search(r"also after going back to a checkpoint; (\S+) can be used; ", str(stopped.value))
    assert named is not None
    best = read_checkpoint(Path(named[1])).state["best"]
    assert named[1].endswith(f"step_{best['step']:08d}")
    assert best["step"] <= 14
    assert judged(Path(named[1]), images, tmp_path / "judged")["knn/top1"] > 0.9


def test_every_file_opens_without_unpickling_code(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B90: settings hold tuples, the best figure is a number of numpy; files hold tensors and text.

    Of others' files a Namespace beside the tensors is left aside (test_weights.py), anything else is refused by name.
    """
    monkeypatch.setattr(KNN, "__call__", lambda self, subject: {"top1": np.float64(0.5)})
    values = tiny_recipe(images, tmp_path / "run", evals={"knn": {"every": "4 steps"}})
    values["optim"] |= {"betas": (0.9, 0.95)}
    values["run"] |= {"keep_best": "knn/top1"}
    run(check_recipe(check(Recipe, values)))
    opened = {".safetensors": load_file, ".json": lambda file: json.loads(file.read_text()),
              ".jsonl": lambda file: [json.loads(line) for line in file.read_text().splitlines()],
              ".pt": lambda file: torch.load(file, weights_only=True)}  # fmt: skip
    files = [file for file in (tmp_path / "run").rglob("*") if file.is_file()]
    assert all(opened[file.suffix](file) for file in files if file.suffix in opened)
    assert {file.suffix for file in files} == {*opened, "", ".yaml", ".log", ".md", ".html"}
    assert {file.name for file in files if not file.suffix} == {"latest", ".lock"}
    state = json.loads((tmp_path / "run" / "checkpoints" / "step_00000012" / "state.json").read_text())
    assert state["best"] == {"name": "knn/top1", "value": 0.5, "step": 0}
    state = {"model": load_file(tmp_path / "run" / "encoder" / "model.safetensors")}
    for name, value in (("numpy", np.float64(0.5)), ("path", tmp_path)):
        file = tmp_path / f"{name}.pth"
        torch.save({**state, "best": value}, file)
        with pytest.raises(
            InputError, match=rf"{name}\.pth: refused, it holds more than tensors \(\S+\); .*state dict"
        ):
            judged(file, images, tmp_path / name, encoder={**TINY_ENCODER, "init": str(file)})


def test_tensors_that_are_one_are_saved_and_stay_one(
    images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B92: a head with two names, saved before the first step, goes on from there as in a run without a stop."""
    init = MAE.__init__

    @functools.wraps(init)
    def tied(self: MAE, *args: Any, **arguments: Any) -> None:
        init(self, *args, **arguments)
        self.teacher_pred = self.decoder_pred

    monkeypatch.setattr(MAE, "__init__", tied)
    values = tiny_recipe(images, tmp_path / "straight", optim__epochs="8 steps", run__keep_last=9)
    straight = train(values)
    first, last = (straight / "checkpoints" / f"step_{step:08d}" for step in (0, 8))
    for folder in (first, last):
        saved = read_checkpoint(folder).weights
        assert torch.equal(saved["decoder_pred.weight"], saved["teacher_pred.weight"])
    values["run"]["dir"] = str(tmp_path / "again")
    again = train(values, resume=str(first))
    assert losses(again) == losses(straight)
    other = build.build_objective(check_recipe(check(Recipe, values)))
    fill_objective(other, last)
    assert other.get_parameter("decoder_pred.weight") is other.get_submodule("teacher_pred").weight
    weights = read_checkpoint(last).weights
    assert all(torch.equal(tensor, weights[name]) for name, tensor in other.state_dict().items())


def test_positions_of_a_transformers_export_at_two_sizes(tmp_path: Path) -> None:
    """At its own size interpolation changes nothing; at another it is what this package and timm make of the table."""
    from transformers import AutoModel

    from ssl_vit.encoders.weights import fill_encoder
    from ssl_vit.export.transformers_folder import export_transformers

    torch.manual_seed(0)
    encoder = create_encoder(**{**TINY_ENCODER, "img_size": 64, "pos_embed": "learned"}).eval()
    with torch.no_grad():  # smooth, as learned tables are
        encoder.model.pos_embed.copy_(create_encoder(**{**TINY_ENCODER, "img_size": 64}).model.pos_embed)
    data = {"mean": (0.5,) * 3, "std": (0.5,) * 3, "crop_pct": 1.0, "interpolation": "bicubic"}
    export_transformers(encoder, tmp_path / "hf", data)
    loaded = AutoModel.from_pretrained(tmp_path / "hf", add_pooling_layer=False).eval()
    image = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        plain = loaded(image).last_hidden_state
        assert torch.equal(plain, loaded(image, interpolate_pos_encoding=True).last_hidden_state)
        # the table of the patches, without the class token's row, at the places of the patches: no row is off by one
        table = loaded.embeddings.interpolate_pos_encoding(torch.zeros(1, 145, 48), 96, 96)
        grid = encoder.model.pos_embed[:, 1:].unflatten(1, (8, 8)).permute(0, 3, 1, 2)
        expected = torch.nn.functional.interpolate(grid, (12, 12), mode="bicubic", align_corners=False)
        torch.testing.assert_close(table[:, 1:], expected.flatten(2).transpose(1, 2))
        assert torch.equal(table[:, :1], encoder.model.pos_embed[:, :1])
        larger = create_encoder(**{**TINY_ENCODER, "img_size": 96, "pos_embed": "learned"}).eval()
        fill_encoder(larger, tmp_path / "hf")
    # ours is timm's, whose cubic has another sharpness (-0.5, theirs -0.75): near, and nearest at the same place
    distance = torch.cdist(table[0, 1:], larger.model.pos_embed[0, 1:])
    assert (distance.argmin(dim=1) == torch.arange(144)).all()
    assert (table - larger.model.pos_embed).detach().abs().max().item() < 0.1


def test_figures_that_are_none_stop_with_the_image_named(images: Path) -> None:
    one = subject(images)
    with torch.no_grad():
        one.objective.encoder.model.norm.weight[0] = float("nan")
    with pytest.raises(
        InputError, match=r"of 57 images is not finite, first of shard-000000\.tar: key .*weights or its"
    ):
        KNN()(one)


def nameless(path: Path, labels: list[int]) -> Path:
    """A shard as others make them: labels, and no class names."""
    picture = io.BytesIO()
    Image.new("RGB", (32, 32)).save(picture, "png")
    with tarfile.open(path, "w") as tar:
        for i, label in enumerate(labels):
            for suffix, data in (("png", picture.getvalue()), ("cls", str(label).encode())):
                member = tarfile.TarInfo(f"{i}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return path


def bad_sets(root: Path) -> list[tuple[dict[str, Any], str]]:
    three, two = (
        write_images(root / "three", classes=3, per_class=3),
        write_images(root / "two", classes=2, per_class=3),
    )
    one = nameless(root / "one.tar", [4, 4, 4])
    first, others = nameless(root / "first.tar", [0, 1, 2] * 3), nameless(root / "others.tar", [2, 3, 4, 5])
    some = nameless(root / "some.tar", [0, 1, 0, 1])
    flat = root / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(three.rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    other = write_images(root / "other", classes=2, per_class=3)
    (other / "class_0").rename(other / "zebra")
    return [
        ({"val": flat}, r"data\.val=folder:.*flat: has no labels; give class folders"),
        ({"val": one}, r"data\.val=.*all 3 images are of one class; evaluations need two or more"),
        ({"val": two, "probe": three}, r"data\.probe=.*has classes that data\.val lacks: class_2"),
        ({"val": three, "probe": two}, r"data\.probe=.*lacks classes of data\.val: class_2"),
        ({"val": three, "probe": flat}, r"data\.probe=.*has no labels"),
        ({"val": two, "probe": other}, r"lacks classes of data\.val: class_0; has classes .*: zebra"),
        ({"val": others, "probe": first}, r"data\.probe=.*lacks classes of data\.val: 3, 4, 5; has .*lacks: 0, 1"),
        ({"val": others, "probe": one}, r"data\.probe=.*lacks classes of data\.val: 2, 3, 5"),
        ({"val": some, "probe": first}, r"data\.probe=.*has classes that data\.val lacks: 2"),
        ({"val": three, "probe": first}, r"data\.probe=.*lacks class names, data\.val has them"),
        (
            {"val": first, "probe": nameless(root / "rare.tar", [0] * 90 + [1, 2]), "probe_images": 3},
            r"data\.probe: all 3 images that evaluations train on are of one class",
        ),
    ]


def test_bad_sets_are_one_clear_sentence(tmp_path: Path) -> None:
    for data, message in bad_sets(tmp_path):
        with pytest.raises(InputError, match=message) as error:
            open_sets(data_section(data))
        assert "\n" not in str(error.value)


def data_section(data: dict[str, Any]) -> DataSection:
    return DataSection.model_validate(
        {k: v if isinstance(v, int) else str(v) if v.suffix else f"folder:{v}" for k, v in data.items()}
    )


def test_without_class_names_the_labels_are_compared(tmp_path: Path) -> None:
    """Other labels in data.train mean a split of data.val, and an objective that learns them is refused."""
    known = nameless(tmp_path / "known.tar", [0, 1, 2] * 5)
    val = nameless(tmp_path / "val.tar", [2, 3, 4, 5] * 5)
    again = nameless(tmp_path / "again.tar", [2, 1, 0, 1])
    rule = open_sets(data_section({"train": known, "val": val})).rule
    assert "since data.train lacks classes of data.val: 3, 4, 5; has classes that data.val lacks: 0, 1" in rule
    assert open_sets(data_section({"train": known, "val": again})).rule.startswith("probes train on data.train")

    def resolve(train: list[Path], scored: Path) -> Any:
        values = tiny_recipe(tmp_path, tmp_path / "run", objective={"name": "classification"}, evals={"accuracy": {}})
        values["data"] |= {"train": [str(path) for path in train], "val": str(scored)}
        recipe = check_recipe(check(Recipe, values))
        resolve_classes(recipe)
        return recipe.objective["num_classes"]

    with pytest.raises(InputError, match=r"data\.val=.*val\.tar: lacks classes of data\.train: 0, 1; has .*: 3, 4, 5"):
        resolve([known], val)
    assert resolve([nameless(tmp_path / "part.tar", [0, 2]), again], known) == 3, "sources complete each other"


def test_other_classes_in_train_are_said_with_the_rule(tmp_path: Path) -> None:
    three, two = write_images(tmp_path / "3", classes=3, per_class=5), write_images(tmp_path / "2", per_class=5)
    rule = open_sets(DataSection(train=f"folder:{three}", val=f"folder:{two}")).rule
    assert "80 % of data.val" in rule
    assert "since data.train has classes that data.val lacks: class_2" in rule


@pytest.mark.parametrize("kind", ["optimizer", "picture", "json", "tokenizer", "array"])
def test_files_of_another_kind_are_refused_in_one_line(kind: str, mine: Path, tmp_path: Path) -> None:
    checkpoint = next((mine / "checkpoints").glob("step_*"))
    files = {
        "optimizer": checkpoint / "optimizer.pt", "picture": tmp_path / "a.png", "json": mine / "result.json",
        "tokenizer": tmp_path / "tokenizer", "array": tmp_path / "a.npy",
    }  # fmt: skip
    write_images(tmp_path / "some", classes=1, per_class=1)
    files["picture"].write_bytes(next((tmp_path / "some").rglob("*.png")).read_bytes())
    np.save(files["array"], np.zeros(3))
    files["tokenizer"].mkdir()
    (files["tokenizer"] / "tokenizer.json").write_text("{}")
    done = in_process(
        "pipelines/knn.py", f"encoder.init={files[kind]}", "encoder.name=vit_tiny_patch16_224",
        "data.val=builtin:digits-test", f"run.dir={tmp_path / 'run'}",
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: ")]) == 1
    assert str(files[kind]) in done.stderr
    assert not (tmp_path / "run" / "result.json").exists()


def test_one_value_of_each_step_in_tensorboard_after_a_resume(images: Path, tmp_path: Path) -> None:
    """A run of 9 steps, cut back to its checkpoint and finished: nine values, steps strictly rising."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    values = tiny_recipe(images, tmp_path / "run", evals={})
    values["optim"]["epochs"], values["run"]["save_every"] = "9 steps", "4 steps"
    values["run"] |= {"tensorboard": True, "log_every": 1, "keep_last": 9}
    train(values)
    newest = sorted((tmp_path / "run" / "checkpoints").glob("step_*"))[-1]
    for file in newest.iterdir():
        file.unlink()
    newest.rmdir()
    (tmp_path / "run" / "status.json").write_text('{"state": "running"}')
    train(values)
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, 10))
