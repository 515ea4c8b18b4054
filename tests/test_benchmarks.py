"""Every benchmark script runs to its end and prints its figures, at the smallest size; what they say is not judged."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, TINY_ENCODER, write_images

RECIPES = ROOT / "configs" / "pretrain"
ENCODER = [f"encoder.{key}={value}" for key, value in TINY_ENCODER.items()]
WORDS = {
    "bench_end_to_end": ["--config", str(RECIPES / "mae_digits.yaml"), "steps=6", "run.workers=1"],
    "bench_loader": ["--data", "{data}/train", "--rounds=1", "--images=16", "--batch=4", "--out={out}/facts.json"],
    "bench_probe": [*ENCODER, "encoder.depth=4", "data.train=folder:{data}/train", "data.val=folder:{data}/test"],
    "bench_quality": ["{data}", "{out}", "steps=2", "seeds=1"],
    "bench_scale": ["only=one", "steps=4", "json={out}/facts.json"],
    "bench_step": [
        "sizes=tiny", "device=cpu", "batch=2", "precision=no", "rounds=2", "steps=1", "warmup=1",
        "json={out}/facts.json",
    ],
    "bench_step objectives": [
        "objectives=ibot_digits,classification_digits", "device=cpu", "batch=2", "rounds=2", "steps=1", "warmup=1",
        "json={out}/facts.json",
    ],
}  # fmt: skip
PRINTS = {
    "bench_end_to_end": "lost against the slower",
    "bench_loader": "| (a) ours |",
    "bench_probe": "times one probe",
    "bench_quality": "| ours, equal time |",
    "bench_scale": "one",
    "bench_step": "ours",
    "bench_step objectives": "| classification_digits | ours |",
}


def test_every_benchmark_is_here() -> None:
    assert {path.stem for path in (ROOT / "scripts").glob("bench_*.py")} == {name.split()[0] for name in WORDS}


@pytest.mark.slow
@pytest.mark.processes
@pytest.mark.parametrize("name", WORDS)
def test_the_benchmark_runs(name: str, tmp_path: Path) -> None:
    write_images(tmp_path / "train", classes=3, per_class=100)
    write_images(tmp_path / "test", classes=3, per_class=10)
    words = [word.format(data=tmp_path, out=tmp_path) for word in WORDS[name]]
    command = [sys.executable, str(ROOT / "scripts" / f"{name.split()[0]}.py"), *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert PRINTS[name] in done.stdout
    for file in tmp_path.glob("facts.json"):
        assert json.loads(file.read_text())
