"""Every door as a user starts it: documented commands, messages, exit codes, files left behind."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT, in_process, run_python, tiny_recipe
from omegaconf import OmegaConf

from ssl_vit.config import to_yaml

PIPELINES = sorted((ROOT / "pipelines").glob("*.py"))
DOORS = [file for file in PIPELINES if file.stem not in ("pack", "index", "verify", "export", "compare", "report")]
TINY_WORDS = [
    "encoder.img_size=32", "encoder.patch_size=8", "encoder.embed_dim=48", "encoder.depth=2", "encoder.num_heads=3",
    "objective.decoder_embed_dim=32", "objective.decoder_depth=1", "objective.decoder_num_heads=2",
    "optim.batch_size=16", "optim.epochs=2 steps", "optim.warmup_epochs=1 steps",
    "run.workers=0", "run.tensorboard=false", "data.crop_pct=1.0",
]  # fmt: skip


def status(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "status.json").read_text())


@pytest.mark.parametrize("file", PIPELINES, ids=lambda f: f.stem)
def test_help_lists_every_key(file: Path) -> None:
    done = in_process(file, "--help")
    assert done.returncode == 0, done.stderr
    assert "default" in done.stdout or file.stem == "report"
    if file in DOORS:
        keys = ["data.val  (", "run.dir  (", "encoder.img_size  ("]
        keys += ["embed.pool  ("] if file.stem == "embed" else ["evals.knn.temperature  (float; default 0.07)"]
        for key in keys:
            assert key in done.stdout
        described = [line for line in done.stdout.splitlines() if re.match(r"  [\w.]+  \(", line)]
        assert len(described) > 50 - 20 * (file.stem != "pretrain_mae")
        for line in described:
            key, _, text = line.strip().partition(")  ")
            assert text, f"no text: {key}"


@pytest.mark.parametrize("file", DOORS, ids=lambda f: f.stem)
def test_print_config_is_a_complete_recipe(file: Path, tmp_path: Path) -> None:
    words = [] if file.stem.startswith("pretrain") else ["encoder.name=vit_tiny_patch16_224"]
    done = in_process(file, "--print-config", *words)
    assert done.returncode == 0, done.stderr
    (tmp_path / "again.yaml").write_text(done.stdout)
    again = in_process(file, "--print-config", "--config", str(tmp_path / "again.yaml"))
    assert again.stdout == done.stdout


@pytest.fixture(scope="session")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run, started through accelerate from the pipelines' own folder."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    done = run_python(
        "-m", "accelerate.commands.launch", "pretrain_mae.py",
        f"data.train=folder:{images}", f"data.val=folder:{images}", f"run.dir={folder}", *TINY_WORDS,
        cwd=ROOT / "pipelines",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "no --config: " in done.stderr
    assert "mae_images.yaml" in done.stderr
    return folder


def test_pretraining_through_accelerate_leaves_the_whole_folder(trained: Path) -> None:
    for name in ("recipe.yaml", "environment.json", "train.log", "metrics.jsonl", "status.json", "result.json",
                 "README.md", "encoder/config.json", "encoder/model.safetensors", "checkpoints/latest"):  # fmt: skip
        assert (trained / name).is_file(), name
    assert {f.name for f in (trained / "pictures").iterdir()} == {"pictures_00000000.png", "pictures_00000002.png"}
    assert status(trained)["state"] == "finished"
    result = json.loads((trained / "result.json").read_text())
    assert {"knn/top1", "linear/top1", "linear/standard_error"} <= result["evaluations"]["final"].keys()
    assert result["evaluations"]["initial"].keys() == {"step", *result["evaluations"]["final"]}
    assert result["export_difference"] <= 1e-5
    card = (trained / "README.md").read_text()
    assert f'timm.create_model("local-dir:{trained / "encoder"}", pretrained=True)' in card
    assert f"-> {result['evaluations']['final']['knn/top1']:.4f} |" in card
    assert "mask_ratio: 0.75" in card


@pytest.mark.parametrize("name", ["linear_probe", "knn"])
@pytest.mark.parametrize("source", ["", "encoder", "checkpoints/step_00000002"])
def test_probes_on_a_run_an_export_and_a_checkpoint(
    trained: Path, images: Path, tmp_path: Path, name: str, source: str
) -> None:
    words = [f"encoder.init={trained / source}", f"data.train=folder:{images}", f"data.val=folder:{images}"]
    done = in_process(f"pipelines/{name}.py", *words, f"run.dir={tmp_path / 'probe'}", "run.workers=0")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "probe" / "result.json").read_text())["evaluations"]["final"]
    key = f"{'linear' if name == 'linear_probe' else 'knn'}/top1"
    expected = json.loads((trained / "result.json").read_text())["evaluations"]["final"][key]
    assert found[key] == expected, "the probe of the run's own evaluation"


def mistakes() -> list[tuple[list[str], list[str]]]:
    return [
        (["objective.mask_ratio=1.0"], ["objective: mask_ratio=1.0", "allowed", "0.75"]),
        (["objective.mask_ration=0.5"], ["objective.mask_ration=0.5", "did you mean 'mask_ratio'"]),
        (["encoder.img_size=30"], ["img_size=30", "multiple of patch_size=8", "nearest: 32"]),
        (["optim.batch_size=ten"], ["optim.batch_size='ten'", "integer"]),
        (["optim.batch_sise=10"], ["optim.batch_sise=10", "did you mean 'batch_size'"]),
        (["run.micro_batch_size=7"], ["optim.batch_size=16", "run.micro_batch_size=7", "nearest: 14"]),
        (["optim.warmup_epochs=3 steps"], ["optim.warmup_epochs=3 steps", "longer than the run of 2"]),
        (["optim.epochs=5 apples"], ["optim.epochs='5 apples'", "500 steps"]),
        (["evals.knnn={}"], ["knnn", "did you mean 'knn'"]),
        (["evals.knn.k=[0]"], ["evals.knn", "k=[0]"]),
        (["encoder.name=vit_tny_patch16_224"], ["vit_tny_patch16_224", "did you mean 'vit_tiny_patch16_224'"]),
        (["data.train=folder:/nowhere/at/all"], ["/nowhere/at/all"]),
        (["data.mean=[0.5]"], ["data.mean=[0.5]", "in_chans=3"]),
        (["evals.rank.every=0"], ["evals.rank.every=0", "above 0"]),
        (["run.save_every=0 steps"], ["run.save_every=0 steps", "above 0"]),
        (["run.dir=/proc/nowhere"], ["run.dir=/proc/nowhere", "cannot be written"]),
        (["data.weights=[1,2]"], ["2 weights for 1 sources"]),
        (["mixed_precision=fp8"], ["mixed_precision='fp8'", "'bf16', 'no' or 'auto'"]),
        (["encoder.init=/nowhere.pth"], ["/nowhere.pth", "no such file"]),
        (["objective.name=simmm"], ["objective.name='simmm'", "'mae'", "pipelines/pretrain_mae.py"]),
        (["objective.name=classification"], ["this pipeline trains 'mae'", "use pipelines/train_supervised.py"]),
        (["objective.name=deit"], ["use pipelines/train_deit.py"]),
        (["--config", "nowhere.yaml"], ["nowhere.yaml", "no such file"]),
        (["justaword"], ["'justaword'", "key=value"]),
        (["--resume", "nowhere"], ["--resume nowhere", "allowed: auto, never"]),
    ]


def test_mistakes_give_one_clear_message_and_exit_code_2(images: Path, tmp_path: Path) -> None:
    """In this process for speed; :func:`test_a_mistake_in_a_process_of_its_own` shows that a process ends the same."""
    for number, (words, parts) in enumerate(mistakes()):
        folder = tmp_path / str(number)
        given = [f"data.train=folder:{images}", f"run.dir={folder}", *TINY_WORDS, *words]
        done = in_process("pipelines/pretrain_mae.py", *given)
        message = done.stderr.strip().splitlines()[-1]
        assert done.returncode == 2, words
        for part in parts:
            assert part in message, f"{words}: {message}"
        assert "Traceback" not in done.stderr
        left = {f.name for f in folder.iterdir()} if folder.exists() else set()
        assert left <= {"status.json"}, f"{words}: half-written {left}"


def test_a_mistake_in_a_process_of_its_own(tmp_path: Path) -> None:
    done = run_python("pipelines/pretrain_mae.py", "optim.batch_sise=10", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: optim.batch_sise=10: unknown key (did you mean")
    left = status(tmp_path / "run")
    assert (left["state"], left["exit_code"]) == ("failed", 2)
    assert "batch_sise" in left["message"]


def test_a_refused_start_leaves_a_run_alone(trained: Path) -> None:
    before = status(trained)
    done = run_python("pipelines/pretrain_mae.py", "optim.batch_size=8", f"run.dir={trained}")
    assert done.returncode == 2
    assert "another recipe" in done.stderr
    assert status(trained) == before


def test_a_run_of_an_earlier_version_goes_on(trained: Path, images: Path) -> None:
    """Keys that its recipe does not have yet count as their defaults, and only those."""
    file = trained / "recipe.yaml"
    text = file.read_text()
    saved = OmegaConf.load(file)
    del saved.data.limit, saved.objective.flip, saved.encoder.drop_path_rate
    OmegaConf.save(saved, file)
    words = [f"data.train=folder:{images}", f"data.val=folder:{images}", f"run.dir={trained}", *TINY_WORDS]
    try:
        assert in_process("pipelines/pretrain_mae.py", *words).returncode == 0
        refused = in_process("pipelines/pretrain_mae.py", *words, "data.limit=20")
        assert refused.returncode == 2
        assert "data.limit (there None, now 20)" in refused.stderr
    finally:
        file.write_text(text)


def test_a_crash_is_recorded(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "run", optim__base_lr=1e30)
    (tmp_path / "r.yaml").write_text(to_yaml(values))
    done = run_python("pipelines/pretrain_mae.py", "--config", str(tmp_path / "r.yaml"))
    assert done.returncode == 1
    left = status(tmp_path / "run")
    assert left["state"] == "failed"
    assert "FloatingPointError" in left["message"]


def test_a_mismatched_torchvision_is_named_with_its_cure(tmp_path: Path) -> None:
    """B101."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(
        "raise RuntimeError('operator torchvision::nms does not exist')"
    )
    done = run_python(
        "pipelines/pretrain_mae.py", f"run.dir={tmp_path / 'run'}", env={"PYTHONPATH": str(tmp_path)}
    )  # fmt: skip
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    for part in ("torch 2", "torchvision 0", "do not match", "nms does not exist", "pip install -c constraints.txt"):
        assert part in message


def test_unlabelled_folder_gets_label_free_measures(images: Path, tmp_path: Path) -> None:
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(images.rglob("*.png"))):
        (flat / f"{i}.png").write_bytes(file.read_bytes())
    done = in_process(
        "pipelines/pretrain_mae.py", f"data.train=folder:{flat}", f"run.dir={tmp_path / 'run'}", *TINY_WORDS
    )
    assert done.returncode == 0, done.stderr
    final = json.loads((tmp_path / "run" / "result.json").read_text())["evaluations"]["final"]
    assert "rank/effective_rank" in final
    assert "knn/top1" not in final
    assert "label-free" in (tmp_path / "run" / "train.log").read_text()


def readme_commands() -> list[str]:
    """Every command in the code blocks of the documents."""
    found = []
    for name in (
        "README.md",
        "CONTRIBUTING.md",
        "BENCHMARKS.md",
        "docs/clusters.md",
        "docs/objectives.md",
        "docs/training.md",
        "docs/judging.md",
        "docs/data.md",
    ):
        text = (ROOT / name).read_text(encoding="utf-8")
        for block in re.findall(r"```bash\n(.*?)```", text, re.DOTALL):
            found += [line.split("#")[0].strip() for line in block.replace("\\\n", " ").splitlines() if line.strip()]
    return [line for line in found if line]


@pytest.mark.parametrize("command", readme_commands())
def test_documented_commands_are_real(command: str) -> None:
    """Scripts exist; pipelines accept the documented words (``--print-config`` stops before the work)."""
    words = shlex.split(command)
    while re.match(r"[A-Z_]+=", words[0]):
        words.pop(0)
    if words[0] == "sbatch":
        words = [word for word in words if not word.startswith("--nodes")]
    if words[0] in ("bash", "sbatch"):
        assert (ROOT / words[1]).is_file(), command
        return
    if words[0] in ("accelerate", "python"):
        script = next(word for word in words if word.endswith(".py"))
        assert (ROOT / script).is_file(), command
        configs = [word for word in words if word.startswith("configs/")]
        assert all((ROOT / config).is_file() for config in configs), command
        rest = words[words.index(script) + 1 :]
        if Path(script).stem == "plan":
            done = in_process(script, *rest)
            assert "memory of one GPU" in done.stdout, f"{command}: {done.stderr}"
        elif ROOT / script in DOORS:
            if "--watch" in rest:  # needs the run that it watches
                rest = rest[: rest.index("--watch")] + rest[rest.index("--watch") + 2 :] + ["encoder.init=runs/any"]
            options = [w if not w.startswith("encoder.init=") else "encoder.name=vit_tiny_patch16_224" for w in rest]
            done = in_process(script, "--print-config", *options)
            assert done.returncode == 0, f"{command}: {done.stderr}"
        elif Path(script).parent.name == "pipelines":
            assert in_process(script, "--help").returncode == 0
        else:
            assert run_python(script, "--help").returncode in (0, 1), "a script without arguments says how it is called"
        return
    assert words[0] in ("git", "cd", "ruff", "basedpyright", "tensorboard", "pytest", "source", "tar"), command
