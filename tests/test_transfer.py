"""Many labelled sets in one job: the same numbers as each set alone, limits, what is not at hand, going on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import TINY_ENCODER, write_images
from test_judging_faults import nameless

from ssl_vit.config import InputError, check
from ssl_vit.evaluation.base import Subset, first_by_key, held_count, hold_out, split_by_key
from ssl_vit.recipe import DataSection, EvaluationRecipe, TransferRecipe, check_recipe
from ssl_vit.run import evaluate
from ssl_vit.splits import open_data, open_sets
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
    gone = {"name": "gone", "train": "nowhere", "val": "nowhere", "hf": "some/body"}
    with pytest.raises(InputError, match=r"sets\.gone: .*nowhere.*; it is some/body on the Hugging Face Hub"):
        transfer(recipe({}, tmp_path / "none", missing="skip", sets=[gone]))


def test_a_limited_training_set(folders: dict[str, Path], tmp_path: Path) -> None:
    """So many images, whatever the packing; with a sweep a fifth of them chooses."""
    spec = f"folder:{folders['three']}"
    sets = open_sets(DataSection(probe=spec, val=spec, probe_images=20))
    assert sets.probe is not None
    assert sets.val is not None
    assert len(sets.probe.samples) == 20 < len(sets.val.samples) == 30
    assert "training on 20 images" in sets.rule
    fitting, selection = hold_out(sets.probe, 0.2)
    assert (len(fitting.samples), len(selection.samples)) == (16, 4)
    whole = open_sets(DataSection(probe=spec, val=spec)).probe
    assert whole is not None
    keys = {whole.index.key(int(s)) for s in first_by_key(whole, 20).samples}
    assert keys == {sets.probe.index.key(int(s)) for s in sets.probe.samples}


@pytest.fixture(scope="module")
def many_classes(tmp_path_factory: pytest.TempPathFactory) -> Subset:
    """1,000 samples of 400 classes, none to 9 of each, as a draw of a set with that many classes has."""
    labels = np.random.default_rng(0).integers(0, 400, 1000)
    path = tmp_path_factory.mktemp("many") / "shard.tar"
    return Subset.all(open_data(DataSection(), str(nameless(path, labels.tolist()))))


def test_a_fifth_chooses_however_many_classes(many_classes: Subset) -> None:
    """VTAB's 800 and 200; a function of the keys; no class is lost from those that are trained on."""
    fitting, selection = hold_out(many_classes, 0.2)
    assert (len(fitting.samples), len(selection.samples)) == (800, 200)
    assert not set(fitting.samples) & set(selection.samples)
    assert set(fitting.labels) == set(many_classes.labels)
    backwards, again = hold_out(Subset(many_classes.index, many_classes.samples[::-1].copy()), 0.2)
    assert set(again.samples) == set(selection.samples)
    assert set(backwards.samples) == set(fitting.samples)
    assert np.bincount(selection.labels).max() <= 2, "a fifth of the largest class"
    assert held_count(np.arange(5), 0.2) == 0, "of one sample a class none can be spared"


def test_of_classes_of_one_size_each_gives_the_same(folders: dict[str, Path]) -> None:
    everything = Subset.all(open_data(DataSection(), f"folder:{folders['three']}"))
    for ours, stratified in zip(hold_out(everything, 0.2), split_by_key(everything, 0.2), strict=True):
        assert ours.samples.tolist() == stratified.samples.tolist()


def test_sets_have_names_of_their_own(folders: dict[str, Path], tmp_path: Path) -> None:
    twice = [{"name": "a", "train": "x", "val": "x"}] * 2
    with pytest.raises(InputError, match=r"sets=\['a', 'a'\]: at least one is needed, each with a name of its own"):
        recipe(folders, tmp_path, sets=twice)
    with pytest.raises(InputError, match=r"sets.*name"):
        recipe(folders, tmp_path, sets=[{"name": "../up", "train": "x", "val": "x"}])
