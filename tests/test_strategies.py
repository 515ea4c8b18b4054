"""Two CPU processes under DDP, ZeRO-1/2/3 and FSDP2 are the same training as one (level b), and go on from each other.

One process group a strategy does all of its runs (tests/group.py).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ROOT, run_python, tiny_recipe, write_images
from group import train

from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.export.command import ExportOptions, export
from ssl_vit.objectives.base import Objective
from ssl_vit.objectives.mae import MAE
from ssl_vit.recipe import check_recipe
from ssl_vit.training.checkpoint import read_checkpoint
from ssl_vit.training.launch import Launch
from ssl_vit.training.metrics import read_metrics
from ssl_vit.training.optim import OptimSection

pytestmark = pytest.mark.processes

STRATEGIES = {
    "ddp": ("cpu_2", "MULTI_CPU, DDP"),
    "zero1": ("zero1", "DEEPSPEED, ZeRO-1"),
    "zero2": ("zero2", "DEEPSPEED, ZeRO-2"),
    "zero3": ("zero3", "DEEPSPEED, ZeRO-3"),
    "fsdp2": ("fsdp2", "MULTI_CPU, FSDP2"),
}
WHOLE = ("ddp", "zero1", "zero2")
STEPS, POISON = 20, [5, 9]
EMA = {"name": "ema_mae"}
EVALS = {"knn": {"k": [5]}, "linear": {}, "rank": {}}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """71 images: two processes get different numbers of them."""
    folder = write_images(tmp_path_factory.mktemp("uneven"), classes=3, per_class=24)
    (folder / "class_2" / "0023.png").unlink()
    for i in range(0, 24, 3):  # every third label of two classes is wrong: no accuracy is 1
        first, second = folder / "class_0" / f"{i:04d}.png", folder / "class_1" / f"{i:04d}.png"
        first.rename(folder / "swap")
        second.rename(first)
        (folder / "swap").rename(second)
    return folder


def job(data: Path, folder: Path, name: str, **changes: Any) -> dict[str, Any]:
    values = tiny_recipe(data, folder / name, evals=EVALS, optim__epochs=f"{STEPS} steps", optim__clip_grad=0.5)
    values["run"] |= {"micro_batch_size": 4, "save_every": "4 steps", "keep_last": 20, "log_samples": True}
    poison, resume = changes.pop("poison", []), changes.pop("resume", "auto")
    file = folder / f"{name}.yaml"
    file.write_text(to_yaml(values | changes))
    return {"recipe": str(file), "poison": poison, "resume": resume}


@pytest.fixture(scope="module")
def single(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same in one process."""
    folder = tmp_path_factory.mktemp("single")
    torch.set_num_threads(1)
    train(job(data, folder, "fresh"))
    train(job(data, folder, "poisoned", poison=POISON))
    train(job(data, folder, "ema", objective=EMA, poison=POISON))
    train(job(data, folder, "frozen", objective={"name": "frozen_mae"}))
    return folder


# ZeRO-1 is what ZeRO-2 does, and less
@pytest.fixture(
    scope="module",
    params=[pytest.param(s, marks=[pytest.mark.slow] if s in ("zero1", "zero2") else []) for s in STRATEGIES],
)
def group(
    request: pytest.FixtureRequest, data: Path, single: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, Path]:
    """The runs of one strategy: from the start, on from one process, and with losses that are not finite."""
    config, _ = STRATEGIES[request.param]
    folder = tmp_path_factory.mktemp(request.param)
    jobs = [
        job(data, folder, "fresh"),
        job(data, folder, "onwards", resume=str(single / "fresh" / "checkpoints" / "step_00000008")),
        job(data, folder, "poisoned", poison=POISON),
        job(data, folder, "frozen", objective={"name": "frozen_mae"}),
    ]
    if request.param in WHOLE:
        jobs.append(job(data, folder, "ema", objective=EMA, poison=POISON))
        path = single / "ema" / "checkpoints" / "step_00000008"
        jobs.append(job(data, folder, "ema_onwards", objective=EMA, poison=POISON, resume=str(path)))
    if request.param in ("ddp", "zero2"):
        jobs.append(job(data, folder, "bf16", mixed_precision="bf16"))
    (folder / "jobs.json").write_text(json.dumps(jobs))
    words = ["--config_file", f"configs/accelerate/{config}.yaml", "--num_processes", "2"]
    environment = {"DS_ACCELERATOR": "cpu"}
    if request.param == "zero3":  # else all of a tiny model stays whole
        deepspeed = json.loads((ROOT / "configs" / "deepspeed" / "zero3.json").read_text())
        deepspeed["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        (folder / "zero3.json").write_text(json.dumps(deepspeed))
        words += ["--deepspeed_config_file", str(folder / "zero3.json")]
    done = run_python("-m", "accelerate.commands.launch", *words, "tests/group.py", str(folder / "jobs.json"),
                      env=environment)  # fmt: skip
    assert done.returncode == 0, done.stderr[-6000:]
    return request.param, folder


def lines(folder: Path, training: bool) -> list[dict[str, Any]]:
    return [line for line in read_metrics(folder / "metrics.jsonl") if ("loss" in line) is training]


def losses(folder: Path) -> list[float]:
    return [line["loss"] for line in lines(folder, training=True)]


def samples(folder: Path) -> dict[int, list[str]]:
    """Sample names of each step, over all processes."""
    found: dict[int, list[str]] = {}
    for file in sorted((folder / "samples").glob("rank_*.jsonl")):
        for line in read_metrics(file):
            found.setdefault(line["step"], []).extend(line["samples"])
    return {step: sorted(names) for step, names in found.items()}


def test_losses_equal_those_of_one_process(group: tuple[str, Path], single: Path) -> None:
    """20 steps, accumulation 2, clipping; first from the start, then from step 8 of the single process."""
    name, folder = group
    assert STRATEGIES[name][1] in (folder / "fresh" / "train.log").read_text()
    facts = json.loads((folder / "fresh" / "environment.json").read_text())
    assert facts["num_processes"] == 2
    assert len(losses(folder / "fresh")) == STEPS
    assert losses(folder / "fresh") == pytest.approx(losses(single / "fresh"), rel=1e-5)
    assert losses(folder / "onwards") == pytest.approx(losses(single / "fresh")[8:], rel=1e-5)
    norms = [[line["grad_norm"] for line in lines(f / "fresh", training=True)] for f in (folder, single)]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)
    assert max(norms[1]) > 0.5, "clipping did something"


def test_one_process_goes_on_from_any_strategy(
    group: tuple[str, Path], single: Path, data: Path, tmp_path: Path
) -> None:
    """2 -> 1 process, after 1 -> 2: weights and optimizer state of every strategy are whole in its checkpoints."""
    _, folder = group
    back = job(data, tmp_path, "back", resume=str(folder / "onwards" / "checkpoints" / "step_00000012"))
    train(back)
    assert losses(tmp_path / "back") == pytest.approx(losses(single / "fresh")[12:], rel=1e-5)
    expected = samples(single / "fresh")
    assert {len(names) for names in expected.values()} == {16}
    for run, first in ((folder / "fresh", 1), (folder / "onwards", 9), (tmp_path / "back", 13)):
        assert samples(run) == {step: names for step, names in expected.items() if step >= first}


def test_what_each_process_holds(group: tuple[str, Path]) -> None:
    """All of it, or about half where the strategy says so: nothing runs in disguise."""
    name, folder = group
    parameters = 0.5 if name in ("zero3", "fsdp2") else 1.0
    moments = 1.0 if name == "ddp" else 0.5
    for rank in (0, 1):
        found = json.loads((folder / "fresh" / f"held_{rank}.json").read_text())
        assert found["parameters"] == pytest.approx(parameters, abs=0.05)
        assert found["moments"] == pytest.approx(moments, abs=0.05)


def test_every_process_ends_with_the_same_weights(group: tuple[str, Path]) -> None:
    _, folder = group
    for run in ("fresh", "onwards", "poisoned"):
        assert (folder / run / "weights_0.txt").read_text() == (folder / run / "weights_1.txt").read_text()


def test_checkpoints_hold_whole_tensors(group: tuple[str, Path], single: Path) -> None:
    """B62: nothing empty, all float32, the optimizer's state with the shapes of the parameters."""
    _, folder = group
    for step in (0, 20):
        here, there = (read_checkpoint(f / "fresh" / "checkpoints" / f"step_{step:08d}") for f in (folder, single))
        assert {k: (v.shape, v.dtype) for k, v in here.weights.items()} == {
            k: (v.shape, v.dtype) for k, v in there.weights.items()
        }
        assert here.optimizer.keys() == there.optimizer.keys()
        for name, values in there.optimizer.items():
            assert {k: v.shape for k, v in here.optimizer[name].items()} == {k: v.shape for k, v in values.items()}
    torch.testing.assert_close(here.optimizer, there.optimizer, rtol=1e-3, atol=1e-6)
    assert {float(values["step"]) for values in here.optimizer.values()} == {20.0}


def test_evaluations_count_each_sample_once(group: tuple[str, Path], single: Path) -> None:
    """71 images on two processes."""
    _, folder = group
    here, there = (lines(f / "fresh", training=False) for f in (folder, single))
    for key in ("knn/top1", "linear/top1"):
        assert here[0][key] == there[0][key] < 1, "the same start"
        assert here[-1][key] == pytest.approx(there[-1][key], abs=1 / 71)
    assert here[0]["rank/effective_rank"] == pytest.approx(there[0]["rank/effective_rank"], rel=1e-5)


def test_a_loss_on_one_process_is_skipped_by_all(group: tuple[str, Path], single: Path) -> None:
    _, folder = group
    found, expected = losses(folder / "poisoned"), losses(single / "poisoned")
    keep = [i for i in range(STEPS) if i + 1 not in POISON]
    assert [found[i] for i in keep] == pytest.approx([expected[i] for i in keep], rel=1e-5)
    assert [expected[i] for i in keep] != [losses(single / "fresh")[i] for i in keep]
    for run in (folder, single):
        named = read_metrics(run / "poisoned" / "bad_batches.jsonl")
        assert [line["step"] for line in named] == POISON
        assert sorted(named[0]["samples"]) == samples(single / "fresh")[POISON[0]]
        assert read_checkpoint(run / "poisoned" / "checkpoints" / "step_00000012").state["skipped"] == POISON
        assert lines(run / "poisoned", training=True)[-1]["skipped"] == 2


def test_a_teacher_and_a_centre_are_the_same_everywhere(group: tuple[str, Path], single: Path) -> None:
    """An EMA objective with two skipped steps: losses, teacher and centre of one process, also after a resume."""
    name, folder = group
    if name not in WHOLE:
        pytest.skip("refused: see test_an_ema_in_parts_is_refused")
    expected = losses(single / "ema")
    keep = [i for i in range(STEPS) if i + 1 not in POISON]
    assert [losses(folder / "ema")[i] for i in keep] == pytest.approx([expected[i] for i in keep], rel=1e-5)
    onwards = [loss for step, loss in enumerate(losses(folder / "ema_onwards"), start=9) if step not in POISON]
    assert onwards == pytest.approx([expected[i] for i in keep if i >= 8], rel=1e-5)
    for run in ("ema", "ema_onwards"):
        here, there = (
            read_checkpoint(f / "checkpoints" / "step_00000020").weights for f in (folder / run, single / "ema")
        )
        for key in ("centre", "teacher.model.blocks.0.mlp.fc1.weight", "teacher.model.patch_embed.proj.weight"):
            torch.testing.assert_close(here[key], there[key], rtol=1e-4, atol=1e-5)
        assert not torch.equal(here["teacher.model.blocks.0.mlp.fc1.weight"],
                               here["encoder.model.blocks.0.mlp.fc1.weight"])  # fmt: skip
        assert (folder / run / "weights_0.txt").read_text() == (folder / run / "weights_1.txt").read_text()


def test_a_frozen_teacher_under_every_strategy(group: tuple[str, Path], single: Path) -> None:
    """B64: the teacher stays as it was built, the losses are those of one process."""
    _, folder = group
    assert losses(folder / "frozen") == pytest.approx(losses(single / "frozen"), rel=1e-5)
    first, last = (read_checkpoint(folder / "frozen" / "checkpoints" / f"step_{s:08d}").weights for s in (0, 20))
    for name, tensor in first.items():
        fixed = name.startswith("teacher.") or name.endswith("pos_embed")
        assert torch.equal(tensor, last[name]) == fixed, name


def test_the_export_is_of_whole_weights(group: tuple[str, Path], single: Path) -> None:
    import timm

    _, folder = group
    image = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    features = [
        timm.create_model(f"local-dir:{f / 'fresh' / 'encoder'}", pretrained=True).eval()(image)
        for f in (folder, single)
    ]
    torch.testing.assert_close(features[0], features[1], rtol=1e-3, atol=1e-3)
    result = json.loads((folder / "fresh" / "result.json").read_text())
    assert result["export_difference"] <= 1e-5


def test_any_checkpoint_is_exported_and_judged(group: tuple[str, Path], data: Path, tmp_path: Path) -> None:
    """Consolidation: from the middle of a run of any strategy, in one process without a launcher."""
    from safetensors.torch import load_file

    from ssl_vit.recipe import EvaluationRecipe
    from ssl_vit.run import evaluate

    _, folder = group
    checkpoint = folder / "fresh" / "checkpoints" / "step_00000012"
    export(checkpoint, tmp_path / "encoder", ExportOptions())
    export(checkpoint, tmp_path / "encoder.safetensors", ExportOptions(format="state_dict"))
    weights = load_file(tmp_path / "encoder.safetensors")
    saved = read_checkpoint(checkpoint).weights
    assert {f"encoder.model.{name}" for name in weights} == {name for name in saved if name.startswith("encoder.")}
    assert all(torch.equal(tensor, saved[f"encoder.model.{name}"]) for name, tensor in weights.items())
    with pytest.raises(InputError, match="is there already"):
        export(checkpoint, tmp_path / "encoder", ExportOptions())
    last = folder / "fresh" / "checkpoints" / "step_00000020"
    values = {
        "encoder": {"init": str(last)}, "evals": {"knn": {"k": [5]}}, "mixed_precision": "no",
        "run": {"dir": str(tmp_path / "judged"), "tensorboard": False},
        "data": {"train": f"folder:{data}", "val": f"folder:{data}"},
    }  # fmt: skip
    evaluate(check_recipe(check(EvaluationRecipe, values)))
    found = json.loads((tmp_path / "judged" / "result.json").read_text())["evaluations"]["final"]["knn/top1"]
    assert found == pytest.approx(lines(folder / "fresh", training=False)[-1]["knn/top1"], abs=1 / 71)


def test_bf16_keeps_weights_in_full_precision(group: tuple[str, Path], single: Path) -> None:
    """Autocast under DeepSpeed too: float32 weights, losses near those of float32, not equal."""
    _, folder = group
    if not (folder / "bf16").exists():
        pytest.skip("one strategy of each library is enough")
    found, whole = losses(folder / "bf16"), losses(single / "fresh")
    assert found == pytest.approx(whole, rel=0.02)
    assert found != pytest.approx(whole, rel=1e-5)
    saved = read_checkpoint(folder / "bf16" / "checkpoints" / "step_00000020")
    assert {t.dtype for t in saved.weights.values()} == {torch.float32}


@pytest.mark.parametrize("file", sorted((ROOT / "configs" / "accelerate").glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_reads_every_configuration(file: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(file))
    assert f"`{file.name}`" in (ROOT / "README.md").read_text(), "one line in the README for each"
    deepspeed = getattr(config, "deepspeed_config", None) or {}
    assert bool(deepspeed) == file.stem.startswith("zero")
    if deepspeed:
        stage = json.loads((ROOT / deepspeed["deepspeed_config_file"]).read_text())["zero_optimization"]["stage"]
        assert file.stem == f"zero{stage}"


def launch(monkeypatch: pytest.MonkeyPatch, **variables: str) -> Launch:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    return Launch.asked_for()


def zero(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: Any) -> Launch:
    file = tmp_path / "ds.json"
    file.write_text(content if isinstance(content, str) else json.dumps(content))
    return launch(
        monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE=str(file), WORLD_SIZE="2"
    )


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_gets_the_recipes_numbers(stage: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """B61 and the clipping that DeepSpeed would do on its own."""
    found = launch(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", WORLD_SIZE="2",
                   ACCELERATE_DEEPSPEED_CONFIG_FILE=f"configs/deepspeed/zero{stage}.json")  # fmt: skip
    config = found.deepspeed_config("bf16", OptimSection(batch_size=64), micro_batch_size=8)
    assert found.stage == stage
    numbers = [config[k] for k in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps")]
    assert numbers == [64, 8, 4]
    assert config["gradient_clipping"] == 0.0
    assert config["torch_autocast"] == {"enabled": True, "dtype": "bfloat16"}
    assert config["bf16"] == {"enabled": False}
    clipped = found.deepspeed_config("no", OptimSection(batch_size=64, clip_grad=3.0), micro_batch_size=32)
    assert (clipped["gradient_clipping"], clipped["torch_autocast"]["enabled"]) == (3.0, False)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}, "gradient_clipping is 1.0, but the recipe"),
        ({"zero_optimization": {"stage": 2}, "train_batch_size": 128}, "train_batch_size is 128, but the recipe"),
        ({"zero_optimization": {"stage": 2}, "fp16": {"enabled": True}}, "fp16 is True"),
        ({"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}, "optimizer is the recipe's"),
        ({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}}, "offload_param is not supported"),
        ({"zero_optimization": {"stage": 5}}, "stage is 5; allowed: 1, 2, 3"),
        ({}, "stage is None"),
        ("{", "is not JSON"),
    ],
)
def test_conflicts_with_the_recipe_are_refused(
    content: Any, message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=message):
        zero(monkeypatch, tmp_path, content).deepspeed_config("no", OptimSection(batch_size=64), micro_batch_size=32)


def test_settings_that_would_be_dropped_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; allowed: configs/deepspeed"):
        launch(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_DEEPSPEED_CONFIG_FILE="ds.json")
    with pytest.raises(InputError, match="drops DeepSpeed without a word"):
        launch(monkeypatch, ACCELERATE_USE_DEEPSPEED="true", ACCELERATE_USE_CPU="true")
    monkeypatch.delenv("ACCELERATE_USE_CPU")
    with pytest.raises(InputError, match="both DeepSpeed and FSDP"):
        launch(monkeypatch, ACCELERATE_USE_FSDP="true")
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    with pytest.raises(InputError, match="fsdp_version: 1"):
        launch(monkeypatch, FSDP_VERSION="1")
    with pytest.raises(InputError, match="there is one process"):
        launch(monkeypatch, FSDP_VERSION="2")


class MovesWeights(Objective):
    def after_step(self, applied: torch.Tensor) -> None:
        """As an EMA teacher does."""


@pytest.mark.parametrize("launched", [Launch("zero", 2, stage=3), Launch("fsdp2", 2)], ids=["zero3", "fsdp2"])
def test_an_ema_in_parts_is_refused(launched: Launch) -> None:
    from conftest import TINY_DECODER, TINY_ENCODER

    from ssl_vit.encoders.base import create_encoder

    encoder = create_encoder(**TINY_ENCODER)
    with pytest.raises(InputError, match="changes weights after a step"):
        launched.check(MovesWeights(encoder))
    with pytest.raises(InputError, match="clip_mode=per_parameter: gradients are in parts"):
        launched.check(MAE(encoder, **TINY_DECODER), clip_mode="per_parameter")
    launched.check(MAE(encoder, **TINY_DECODER))
    for whole in (Launch("ddp", 8), Launch("zero", 2, stage=2)):
        whole.check(MovesWeights(encoder))


def test_sgd_in_parts_is_refused() -> None:
    from conftest import TINY_DECODER, TINY_ENCODER

    from ssl_vit.encoders.base import create_encoder

    objective = MAE(create_encoder(**TINY_ENCODER), **TINY_DECODER)
    with pytest.raises(InputError, match=r"optim\.name=sgd: torch has no fused SGD for the parts of FSDP2; use DDP or"):
        Launch("fsdp2", 2).check(objective, optimizer="sgd")
    Launch("zero", 2, stage=3).check(objective, optimizer="sgd")


def test_a_launcher_that_starts_fewer_processes_is_refused(data: Path, tmp_path: Path) -> None:
    """B47: ``accelerate launch --cpu --num_processes 2`` starts one."""
    made = job(data, tmp_path, "fewer")
    done = run_python("-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "pipelines/pretrain_mae.py",
                      "--config", made["recipe"])  # fmt: skip
    assert "asked for 2 processes but started 1" in done.stderr
    assert json.loads((tmp_path / "fewer" / "status.json").read_text())["exit_code"] == 2


@pytest.mark.slow
def test_a_broken_deepspeed_harms_only_those_who_ask_for_it(data: Path, tmp_path: Path) -> None:
    """B67: a package that raises on import."""
    (tmp_path / "fake" / "deepspeed").mkdir(parents=True)
    (tmp_path / "fake" / "deepspeed" / "__init__.py").write_text('raise RuntimeError("CUDA_HOME does not exist")\n')
    made = job(data, tmp_path, "plain")
    words = ["pipelines/pretrain_mae.py", "--config", made["recipe"]]
    environment = {"PYTHONPATH": str(tmp_path / "fake")}
    done = run_python(*words, env=environment)
    assert done.returncode == 0, done.stderr
    assert "CUDA_HOME" not in done.stderr
    words.append(f"run.dir={tmp_path / 'asked'}")
    asked = run_python(*words, env=environment | {"ACCELERATE_USE_DEEPSPEED": "true"})
    assert asked.returncode == 2
    assert "DeepSpeed was asked for, but deepspeed cannot be imported" in asked.stderr
