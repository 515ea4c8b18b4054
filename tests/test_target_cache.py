"""Recurring views, and the targets that are computed for them once."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from conftest import TINY_BEIT, TINY_BEIT_ENCODER, TINY_ENCODER, tiny_recipe, tiny_teacher, tokenizer_file
from hypothesis import given, settings
from hypothesis import strategies as st
from test_loader import batches, damage, equal
from test_loader import shards as shards  # a fixture
from test_trainer import losses, train

from ssl_vit.config import InputError, check
from ssl_vit.data.order import Order, Stream
from ssl_vit.data.sources import open_source
from ssl_vit.modules.target_cache import TargetCache
from ssl_vit.modules.teacher import Teacher
from ssl_vit.modules.tokenizer import EncoderTokenizer, TokenizerFile, load_tokenizer, save_tokenizer
from ssl_vit.recipe import Recipe, check_recipe


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.lists(st.integers(0, 20), min_size=1, max_size=4).filter(any), min_size=1, max_size=3),
    repeats=st.integers(1, 3),
    passes=st.integers(1, 3),
    position=st.integers(0, 10**6),
)
def test_a_stream_begins_again(sizes: list[list[int]], repeats: int, passes: int, position: int) -> None:
    orders = [Order(shard_sizes, i, 4, 8) for i, shard_sizes in enumerate(sizes)]
    endless, fixed = Stream(orders, 5, repeats=repeats), Stream(orders, 5, repeats=repeats, fixed_passes=passes)
    period = fixed.epoch_size * repeats * passes
    assert fixed.period == period
    assert endless.period is None
    assert endless.recurring(position) == position
    assert fixed.locate(position) == fixed.locate(position + period) == endless.locate(position % period)


def test_views_recur_and_replacements_have_no_place(shards: Path, tmp_path: Path) -> None:
    import shutil

    index = open_source(str(shards))
    order = Order(index.shard_sizes.tolist(), 5, 4, 8)
    fixed = batches(index, stream=Stream([order], 5, fixed_passes=1))
    assert fixed.stream.period == 60
    first, again, other = fixed[0][0], fixed[5][0], fixed[1][0]
    assert torch.equal(first["image"], again["image"])
    assert again["place"].tolist() == first["place"].tolist() == list(range(12))
    assert again["index"].tolist() == list(range(60, 72))
    assert not torch.equal(first["image"], other["image"])
    endless = batches(index)
    assert equal(endless[0][0], {key: value for key, value in first.items() if key != "place"})
    assert not torch.equal(endless[5][0]["image"], endless[0][0]["image"])

    shutil.copytree(shards, tmp_path / "shards")
    damaged = batches(damage(tmp_path / "shards", [order.sample(3)]), stream=fixed.stream)
    assert damaged[0][0]["place"].tolist() == [0, 1, 2, -1, *range(4, 12)]


def test_what_is_known_is_not_computed_again(tmp_path: Path) -> None:
    key = {"target": "a", "view": "b"}
    first, second = TargetCache(tmp_path, key, 10), TargetCache(tmp_path, key, 10)  # two processes
    values = torch.randn(10, 3)

    def fail() -> torch.Tensor:
        raise AssertionError("computed again")

    def of(places: torch.Tensor) -> torch.Tensor:
        return values[places]

    for cache, places in ((first, [0, 1, 2]), (second, [5, 6, 7]), (first, [2, 3, -1]), (second, [8, 9, 4])):
        found = cache.get(torch.tensor(places), lambda places=places: of(torch.tensor(places)))
        assert torch.equal(found, values[places])
    for cache in (first, second, TargetCache(tmp_path, key, 10)):
        assert torch.equal(cache.get(torch.arange(10).flip(0), fail), values.flip(0))
    assert torch.equal(first.get(torch.tensor([0, -1]), lambda: values[:2] + 1), values[:2] + 1), "one is not known"
    assert TargetCache(tmp_path, {**key, "view": "c"}, 10).path != first.path
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"objective\.target_cache=.*give a folder that can be written"):
        TargetCache(tmp_path / "file", key, 10)


def beit(
    images: Path, tmp_path: Path, name: str, cache: bool = True, stirred: bool = False, **changes: Any
) -> dict[str, Any]:
    objective = {"name": "beit", **TINY_BEIT, "tokenizer": tokenizer_file()}
    if stirred:
        tokenizer: Any = load_tokenizer(TokenizerFile(**tokenizer_file()))
        tokenizer.quantiser.to_logits.weight.add_(1.0)
        facts = save_tokenizer(tokenizer, tmp_path / "stirred")
        objective["tokenizer"] = {"path": str(tmp_path / "stirred"), "sha256": facts["sha256"]}
    objective |= {"target_cache": str(tmp_path / "targets")} if cache else {}
    values = tiny_recipe(images, tmp_path / name, objective=objective, data__fixed_passes=2, **changes)
    values["encoder"] = dict(TINY_BEIT_ENCODER)
    return values


def deit(
    images: Path, tmp_path: Path, name: str, cache: bool = True, teacher: int = 4, **changes: Any
) -> dict[str, Any]:
    torch.manual_seed(teacher)
    objective = {"name": "deit", "teacher": tiny_teacher(tmp_path / f"teacher_{teacher}"), "distillation": "soft"}
    objective |= {"target_cache": str(tmp_path / "targets")} if cache else {}
    values = tiny_recipe(images, tmp_path / name, objective=objective, data__fixed_passes=2, **changes)
    values["encoder"] = {**TINY_ENCODER, "name": "deit_tiny_distilled_patch16_224"}
    return values


@pytest.mark.parametrize("precision", ["no", "bf16"])
@pytest.mark.parametrize(
    ("recipe", "network", "call"), [(beit, EncoderTokenizer, "codes_of"), (deit, Teacher, "forward")]
)
def test_a_run_with_a_cache_is_the_run_without(
    recipe: Any, network: type, call: str, precision: str, images: Path, tmp_path: Path
) -> None:
    """The frozen network runs in the first passes only, and not at all in a second run; every loss is what it was."""
    recipe = functools.partial(recipe, mixed_precision=precision)
    expected = losses(train(recipe(images, tmp_path, "plain", cache=False)))
    real, calls = getattr(network, call), []

    def counted(self: Any, image: torch.Tensor) -> torch.Tensor:
        calls.append(len(image))
        return real(self, image)

    with patch.object(network, call, counted):
        folder = train(recipe(images, tmp_path, "cached"))
        assert losses(folder) == expected
        assert sum(calls) == 2 * 72 < 12 * 16
        resumed = train(recipe(images, tmp_path, "resumed"), resume=str(folder / "checkpoints" / "step_00000008"))
        assert losses(resumed) == expected[8:]
        assert losses(train(recipe(images, tmp_path, "second"))) == expected
        assert sum(calls) == 2 * 72


@pytest.mark.parametrize(
    ("recipe", "changes"),
    [
        (beit, {"tokenizer": {"stirred": True}, "view": {"objective__flip": 0.0}}),
        (deit, {"teacher": {"teacher": 5}, "view": {"objective__augment": {"crop_scale": [0.5, 1.0]}}}),
    ],
)
def test_what_changes_the_targets_begins_another_file(
    recipe: Any, changes: dict[str, Any], images: Path, tmp_path: Path
) -> None:
    """Another seed, view, tokenizer or teacher of the same form; not another learning rate."""
    short: dict[str, Any] = {"optim__epochs": "1 steps", "optim__warmup_epochs": 0}
    changes = {"nothing": {}, "lr": {"optim__base_lr": 1e-2}, "seed": {"seed": 1}, **changes}
    found = {}
    for name, change in changes.items():
        before = set((tmp_path / "targets").glob("*"))
        train(recipe(images, tmp_path, name, **short, **change))
        found[name] = len(set((tmp_path / "targets").iterdir()) - before)
    assert found == {name: int(name != "lr") for name in changes}


def test_a_cache_that_cannot_be_right_is_refused(images: Path, tmp_path: Path) -> None:
    values = beit(images, tmp_path, "run")
    values["data"]["fixed_passes"] = None
    with pytest.raises(InputError, match=r"objective\.target_cache=.*needs data\.fixed_passes=K"):
        check_recipe(check(Recipe, values))
    values = deit(images, tmp_path, "run")
    values["objective"]["mix"] = {"cutmix": 1.0}
    with pytest.raises(InputError, match=r"allowed with mix\.mixup=0 and mix\.cutmix=0 only \(now 0\.0 and 1\.0\)"):
        train(values)
