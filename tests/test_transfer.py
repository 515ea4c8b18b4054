"""Many labelled sets in one job: the same numbers as each set alone, limits, what is not at hand, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_ENCODER, write_images

from ssl_vit.config import InputError, check
from ssl_vit.evaluation.base import first_by_key, split_by_key
from ssl_vit.recipe import DataSection, EvaluationRecipe, TransferRecipe, check_recipe
from ssl_vit.run import evaluate
from ssl_vit.splits import open_sets
from ssl_vit.transfer import transfer

DATA = {"mean": [0.5] * 3, "std": [0.5] * 3, "crop_pct": 1.0}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("sets")
    return {
        "two": write_images(root / "two", classes=2, per_class=14),
        "three": write_images(root / "three", classes=3, per_class=10),
    }


def recipe(folders: dict[str, Path], run: Path, **values: Any) -> TransferRecipe:
    sets = [
        {"name": name, "group": "small" if name == "two" else "other", "train": f"folder:{f}", "val": f"folder:{f}"}
        for name, f in folders.items()
    ]
    return check_recipe(check(TransferRecipe, {
        "encoder": dict(TINY_ENCODER), "mixed_precision": "no", "data": dict(DATA), "sets": sets,
        "evals": {"knn": {"k": [3]}}, "run": {"dir": str(run), "workers": 0, "tensorboard": False}, **values,
    }))  # fmt: skip


def test_every_set_as_alone(folders: dict[str, Path], tmp_path: Path) -> None:
    transfer(recipe(folders, tmp_path / "run"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    alone = {}
    for name, folder in folders.items():
        values = {
            "encoder": dict(TINY_ENCODER), "mixed_precision": "no", "evals": {"knn": {"k": [3]}},
            "data": {**DATA, "probe": f"folder:{folder}", "val": f"folder:{folder}"},
            "run": {"dir": str(tmp_path / name), "workers": 0, "tensorboard": False},
        }  # fmt: skip
        evaluate(check_recipe(check(EvaluationRecipe, values)))
        alone[name] = json.loads((tmp_path / name / "result.json").read_text())["evaluations"]["final"]["knn/top1"]
        assert result["sets"][name]["numbers"]["knn/top1"] == alone[name]
    assert result["means"]["all"] == {"sets": 2, "knn/top1": pytest.approx(np.mean(list(alone.values())))}
    assert result["means"]["small"] == {"sets": 1, "knn/top1": alone["two"]}
    text = (tmp_path / "run" / "transfer.md").read_text()
    assert f"| two | small | 28 | 28 | {alone['two']:.3f} ± " in text
    # stopped before its first set was through: the same command goes on
    for name in ("result.json", "transfer.md"):
        (tmp_path / "run" / name).unlink()
    stamp = (tmp_path / "run" / "sets" / "two" / "result.json").stat().st_mtime_ns
    (tmp_path / "run" / "sets" / "three" / "status.json").write_text('{"state": "preempted"}')
    transfer(recipe(folders, tmp_path / "run"))
    assert json.loads((tmp_path / "run" / "result.json").read_text())["means"] == result["means"]
    assert (tmp_path / "run" / "sets" / "two" / "result.json").stat().st_mtime_ns == stamp, "finished sets rest"


def test_what_is_not_at_hand(folders: dict[str, Path], tmp_path: Path) -> None:
    more = {**folders, "gone": tmp_path / "nowhere"}
    with pytest.raises(InputError, match=r"sets\.gone: .*nowhere.*; missing=skip leaves out what is not at hand"):
        transfer(recipe(more, tmp_path / "stopped"))
    assert not (tmp_path / "stopped" / "sets").exists(), "nothing is measured before"
    transfer(recipe(more, tmp_path / "run", missing="skip"))
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["means"]["all"]["sets"] == 2
    assert "nowhere" in result["sets"]["gone"]["absent"]
    assert "| gone | other | not at hand, not verified |" in (tmp_path / "run" / "transfer.md").read_text()
    with pytest.raises(InputError, match=r"sets\.gone: "):
        transfer(recipe({"gone": tmp_path / "nowhere"}, tmp_path / "none", missing="skip"))


def test_a_limited_training_set(folders: dict[str, Path], tmp_path: Path) -> None:
    """So many images, whatever the packing; with a sweep a fifth of them chooses: VTAB's 800 and 200."""
    spec = f"folder:{folders['three']}"
    sets = open_sets(DataSection(probe=spec, val=spec, probe_images=20))
    assert sets.probe is not None
    assert sets.val is not None
    assert len(sets.probe.samples) == 20 < len(sets.val.samples) == 30
    assert "training on 20 images" in sets.rule
    fitting, selection = split_by_key(sets.probe, 0.2)
    assert len(fitting.samples) + len(selection.samples) == 20
    assert 3 <= len(selection.samples) <= 5, "a fifth, rounded in each class"
    whole = open_sets(DataSection(probe=spec, val=spec)).probe
    assert whole is not None
    keys = {whole.index.key(int(s)) for s in first_by_key(whole, 20).samples}
    assert keys == {sets.probe.index.key(int(s)) for s in sets.probe.samples}


def test_sets_have_names_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    twice = [{"name": "a", "train": "x", "val": "x"}] * 2
    with pytest.raises(InputError, match=r"sets=\['a', 'a'\]: at least one is needed, each with a name of its own"):
        recipe(folders, tmp_path, sets=twice)
    with pytest.raises(InputError, match=r"sets.*name"):
        recipe(folders, tmp_path, sets=[{"name": "../up", "train": "x", "val": "x"}])
