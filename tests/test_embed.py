"""Features as files: every image once with its key and label, the same however often stopped, on any processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_ENCODER, run_python, write_images
from pyarrow import parquet
from test_evaluation import PIXELS

from ssl_vit.config import InputError, check
from ssl_vit.data.pack import pack
from ssl_vit.embed import embed
from ssl_vit.encoders.base import create_encoder
from ssl_vit.evaluation.base import Subject, Subset
from ssl_vit.evaluation.features import extract
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import DataSection, EmbeddingRecipe, check_recipe
from ssl_vit.splits import open_data


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("embed")
    write_images(folder / "images")
    pack(str(folder / "images"), folder / "shards", maxcount=12)
    return folder / "shards"


def recipe(shards: Path, run: Path, **embed_section: Any) -> EmbeddingRecipe:
    values = {
        "encoder": TINY_ENCODER, "mixed_precision": "no", "embed": embed_section,
        "run": {"dir": str(run), "workers": 0},
        "data": {"train": str(shards), "mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0},
    }  # fmt: skip
    return check_recipe(check(EmbeddingRecipe, values))


def rows(run: Path) -> dict[str, tuple[Any, list[float]]]:
    tables = [parquet.read_table(file) for file in sorted((run / "features").glob("*.parquet"))]
    found = [row for table in tables for row in table.to_pylist()]
    assert len({row["key"] for row in found}) == len(found), "every image once"
    return {row["key"]: (row["label"], row["feature"]) for row in found}


def test_features_are_those_of_evaluations(shards: Path, tmp_path: Path) -> None:
    embed(recipe(shards, tmp_path / "run"))
    index = open_data(DataSection(), str(shards))
    torch.manual_seed(0)
    objective = Objective(create_encoder(**TINY_ENCODER)).eval()
    everything = Subset.all(index)
    subject = Subject(objective, objective.encoder.pool, (32, 32), PIXELS, torch.device("cpu"), everything)
    expected, labels = extract(subject, everything)
    found = rows(tmp_path / "run")
    assert len(found) == len(expected) == len(index)
    for i, (key, (label, feature)) in enumerate(found.items()):
        assert key == index.key(i)
        assert label == int(labels[i])
        torch.testing.assert_close(torch.tensor(feature), expected[i], rtol=1e-5, atol=1e-6)
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["images"] == len(index)
    assert result["parts"] == len(index.shards) > 1


def test_what_was_stopped_goes_on(shards: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    embed(recipe(shards, run, format="npy", pool="both", stages=[1, 2]))
    parts = sorted((run / "features").glob("*.npy"))
    before = {part.name: part.read_bytes() for part in parts}
    assert np.load(parts[0]).shape[1] == 2 * 2 * 48
    assert len(parts[0].with_suffix(".jsonl").read_text().splitlines()) == len(np.load(parts[0]))
    parts[1].unlink()
    (run / "status.json").write_text(json.dumps({"state": "preempted"}))
    stamp = parts[0].stat().st_mtime_ns
    embed(recipe(shards, run, format="npy", pool="both", stages=[1, 2]))
    assert {part.name: part.read_bytes() for part in parts} == before
    assert parts[0].stat().st_mtime_ns == stamp, "what was there is not made again"
    (run / "status.json").write_text(json.dumps({"state": "preempted"}))
    facts = json.loads((run / "features.json").read_text())
    (run / "features.json").write_text(json.dumps(facts | {"encoder": "another"}))
    with pytest.raises(InputError, match=r"features\.json: the parts beside it have another encoder; give another"):
        embed(recipe(shards, run, format="npy", pool="both", stages=[1, 2]))


def test_bad_images_are_left_out_and_named(tmp_path: Path) -> None:
    write_images(tmp_path / "images", classes=1, per_class=6)
    victim = sorted((tmp_path / "images" / "class_0").iterdir())[2]
    pack(str(tmp_path / "images"), tmp_path / "shards", shuffle=False)
    shard = next((tmp_path / "shards").glob("*.tar"))
    content = shard.read_bytes()
    start = content.index(victim.read_bytes())
    shard.write_bytes(
        content[: start + 20] + bytes(victim.stat().st_size - 20) + content[start + victim.stat().st_size :]
    )
    embed(recipe(tmp_path / "shards", tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert (result["images"], result["bad_samples"]) == (5, 1)
    named = [
        json.loads(line) for line in (tmp_path / "run" / "features" / "part-000000.bad.jsonl").read_text().splitlines()
    ]
    assert "shard-000000.tar: key" in named[0]["name"]


@pytest.mark.processes
def test_two_processes_write_the_same(shards: Path, tmp_path: Path) -> None:
    embed(recipe(shards, tmp_path / "one"))
    words = [
        f"data.train={shards}", "data.mean=[0.5,0.5,0.5]", "data.std=[0.5,0.5,0.5]", "data.crop_pct=1.0",
        "run.workers=0", "mixed_precision=no", f"run.dir={tmp_path / 'two'}",
        *(f"encoder.{key}={json.dumps(value)}" for key, value in TINY_ENCODER.items()),
    ]  # fmt: skip
    done = run_python(
        "-m",
        "accelerate.commands.launch",
        "--config_file",
        "configs/accelerate/cpu_2.yaml",
        "pipelines/embed.py",
        *words,
    )
    assert done.returncode == 0, done.stderr
    one, two = rows(tmp_path / "one"), rows(tmp_path / "two")
    assert list(one) == list(two)
    for key, (label, feature) in one.items():
        assert two[key][0] == label
        np.testing.assert_allclose(two[key][1], feature, rtol=1e-5, atol=1e-6)
