"""Runs side by side: the numbers are those of the runs, unfinished ones included; the files are whole."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import run_python, tiny_recipe
from PIL import Image
from test_trainer import train

from ssl_vit.compare import CompareOptions, compare, read_run, table
from ssl_vit.config import InputError


def test_a_table_of_runs(images: Path, tmp_path: Path) -> None:
    evals = {"knn": {"k": [5], "every": "8 steps"}, "linear": {}}
    first = train(tiny_recipe(images, tmp_path / "first", evals=evals))
    train(tiny_recipe(images, tmp_path / "second", evals={"knn": {"k": [5]}, "rank": {}}))
    done = run_python("pipelines/compare.py", str(first), str(tmp_path / "second"), f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert [cell.strip() for cell in lines[0].strip("|").split("|")][-2:] == ["knn/top1", "linear/top1"]
    assert (tmp_path / "out" / "compare.md").read_text().splitlines() == lines[:4]
    result = json.loads((first / "result.json").read_text())["evaluations"]
    expected = [result[when][f"{name}/top1"] for name in ("knn", "linear") for when in ("initial", "final")]
    for value in expected:
        assert f"{value:.4f}" in lines[2]
    assert lines[3].rstrip(" |").endswith("-"), "the second run measured no linear probe"
    record = read_run(first)
    assert (record.images, record.state, record.objective) == (12 * 16, "finished", "mae")
    assert [seen for seen, _ in record.measured] == [0, 128, 192]
    assert 0 < record.minutes < 1
    with Image.open(tmp_path / "out" / "compare.png") as picture:
        assert len(picture.convert("RGB").getcolors(1 << 20) or []) > 3

    status = json.loads((first / "status.json").read_text())
    (first / "status.json").write_text(json.dumps({**status, "state": "running"}))
    assert "first (running)" in table([read_run(first)], ["knn/top1"])


def test_any_number_can_be_a_column(tmp_path: Path) -> None:
    """Only accuracies have a standard error; what a run has not measured is a dash."""
    (tmp_path / "recipe.yaml").write_text("objective: {name: beit}\n")
    lines = [
        {"step": 0, "codebook/usage": 0.5, "knn/top1": 0.1, "knn/standard_error": 0.01},
        {"step": 3, "codebook/usage": 1.0, "knn/top1": 0.2, "knn/standard_error": 0.02},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    row = table([read_run(tmp_path)], ["codebook/usage", "codebook/cosine", "knn/top1"]).splitlines()[2]
    assert [cell.strip() for cell in row.strip("|").split("|")][-3:] == [
        "0.5000 -> 1.0000", "-", "0.1000 -> 0.2000 (± 0.0200)",
    ]  # fmt: skip


def test_what_cannot_be_compared_is_named(images: Path, tmp_path: Path) -> None:
    run = train(tiny_recipe(images, tmp_path / "run", evals={"knn": {"k": [5]}}))
    with pytest.raises(InputError, match=r"no run \(recipe\.yaml and metrics\.jsonl"):
        compare([images], CompareOptions())
    with pytest.raises(InputError, match=r"measures=lnear/top1: none was measured; these were: knn/top1"):
        compare([run], CompareOptions(measures="lnear/top1"))
    done = run_python("pipelines/compare.py")
    assert done.returncode == 2
    assert "0 words given, RUN... needed" in done.stderr
