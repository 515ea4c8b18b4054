"""The Slurm script: its launch line, the ranks' environment, requeueing for exit code 75 and for nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, tiny_recipe

from ssl_vit.config import to_yaml

pytestmark = pytest.mark.processes

SCRIPT = ROOT / "scripts" / "slurm" / "pretrain.sbatch"


def program(folder: Path, name: str, text: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/bin/bash\n{text}\n")
    (folder / name).chmod(0o755)


def slurm(tmp_path: Path, *words: str, code: int = 0, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the script as the batch step of a job with two nodes, with stand-ins that record how they were called."""
    bin_folder = tmp_path / "bin"
    asked = f'if [ "$1" = show ]; then echo node7; echo node8; else echo "$@" >> {tmp_path}/asked; fi'
    program(bin_folder, "scontrol", asked)
    # srun runs the last task of the job and gives its exit code
    program(bin_folder, "srun", f'echo "$@" > {tmp_path}/srun; while [ "$1" != bash ]; do shift; done; '
            'SLURM_PROCID=15 SLURM_LOCALID=7 exec "$@"')  # fmt: skip
    program(bin_folder, "python", f'env > {tmp_path}/env; echo "$@" > {tmp_path}/python; exit {code}')
    environment = {
        **os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "SLURM_JOB_NUM_NODES": "2",
        "SLURM_NTASKS": "16", "SLURM_NTASKS_PER_NODE": "8", "SLURM_JOB_ID": "40123", "SLURM_JOB_NODELIST": "node[7-8]",
        **variables,
    }  # fmt: skip
    return subprocess.run(["bash", str(SCRIPT), *words], env=environment, capture_output=True, text=True, check=False)


def rank_environment(tmp_path: Path) -> dict[str, str]:
    return dict(line.split("=", 1) for line in (tmp_path / "env").read_text().splitlines() if "=" in line)


@pytest.mark.parametrize(("cores", "said"), [("12", " --cpus-per-task=12"), ("", "")])
def test_the_dry_run_prints_the_launch_line(tmp_path: Path, cores: str, said: str) -> None:
    words = ("pipelines/pretrain_mae.py", "run.dir=/shared/my runs")
    done = slurm(tmp_path, *words, DRY_RUN="1", SLURM_CPUS_PER_TASK=cores)
    assert done.returncode == 0, done.stderr
    first, line = done.stdout.splitlines()
    assert first == "MASTER_ADDR=node7 MASTER_PORT=20123 WORLD_SIZE=16 STRATEGY=ddp"
    assert line.startswith(f"srun --nodes=2 --ntasks=16{said} --kill-on-bad-exit=1 bash -c ")
    assert line.rstrip().endswith("rank pipelines/pretrain_mae.py run.dir=/shared/my\\ runs")
    assert not (tmp_path / "srun").exists()


@pytest.mark.parametrize(
    ("strategy", "expected"),
    [
        ("ddp", {}),
        ("zero2", {"ACCELERATE_USE_DEEPSPEED": "true",
                   "ACCELERATE_DEEPSPEED_CONFIG_FILE": "configs/deepspeed/zero2.json"}),
        ("fsdp2", {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}),
    ],
)  # fmt: skip
def test_ranks_find_each_other(strategy: str, expected: dict[str, str], tmp_path: Path) -> None:
    done = slurm(tmp_path, "pipelines/pretrain_mae.py", "seed=1", STRATEGY=strategy)
    assert done.returncode == 0, done.stderr
    found = rank_environment(tmp_path)
    expected = expected | {"RANK": "15", "LOCAL_RANK": "7", "WORLD_SIZE": "16", "LOCAL_WORLD_SIZE": "8",
                           "MASTER_ADDR": "node7", "MASTER_PORT": "20123"}  # fmt: skip
    assert {name: found.get(name) for name in expected} == expected
    assert (tmp_path / "python").read_text().split() == ["pipelines/pretrain_mae.py", "seed=1"]
    assert ("ACCELERATE_USE_DEEPSPEED" in found) == (strategy == "zero2")


@pytest.mark.parametrize("code", [0, 1, 2, 75, 137])
def test_only_a_preempted_run_is_queued_again(code: int, tmp_path: Path) -> None:
    done = slurm(tmp_path, "pipelines/pretrain_mae.py", code=code)
    assert done.returncode == code
    asked = (tmp_path / "asked").read_text() if (tmp_path / "asked").exists() else ""
    assert asked == ("requeue 40123\n" if code == 75 else "")


def test_signals_go_to_the_ranks() -> None:
    """``B:`` would send them to the batch shell, which knows nothing of them."""
    lines = [line for line in SCRIPT.read_text().splitlines() if line.startswith("#SBATCH --signal")]
    assert lines == ["#SBATCH --signal=USR1@180"]
    assert "#SBATCH --requeue" in SCRIPT.read_text()


def test_mistakes_are_refused(tmp_path: Path) -> None:
    for done in (slurm(tmp_path), slurm(tmp_path, "pipelines/pretrain_mae.py", STRATEGY="zero4")):
        assert done.returncode == 2
        assert done.stderr.startswith("error: ")


def test_a_rank_started_like_that_trains(images: Path, tmp_path: Path) -> None:
    """The environment of the script, with a real python: one task on one node."""
    (tmp_path / "r.yaml").write_text(to_yaml(tiny_recipe(images, tmp_path / "run", optim__epochs="4 steps")))
    bin_folder = tmp_path / "bin"
    program(bin_folder, "scontrol", "echo localhost")
    program(bin_folder, "srun", 'while [ "$1" != bash ]; do shift; done; SLURM_PROCID=0 SLURM_LOCALID=0 exec "$@"')
    environment = {
        **os.environ, "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_ID": str(os.getpid()),
        "PATH": os.pathsep.join([str(bin_folder), str(Path(sys.executable).parent), os.environ["PATH"]]),
    }  # fmt: skip
    words = [str(SCRIPT), str(ROOT / "pipelines" / "pretrain_mae.py"), "--config", str(tmp_path / "r.yaml")]
    done = subprocess.run(["bash", *words], env=environment, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "encoder" / "model.safetensors").is_file()
