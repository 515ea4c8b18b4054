"""From positions to batches: seeds, replacement of bad samples, ranks and micro-batches, views, normalisation."""

from __future__ import annotations

import pickle
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import write_images
from hypothesis import given
from hypothesis import strategies as st
from torchvision.transforms import RandomResizedCrop

from ssl_vit.config import InputError
from ssl_vit.data import loader
from ssl_vit.data.cropping import random_box
from ssl_vit.data.decode import decode
from ssl_vit.data.index import Index
from ssl_vit.data.loader import VIEW_SEED, Pixels, TrainBatches, iterate
from ssl_vit.data.masking import random_mask, visible_count
from ssl_vit.data.multicrop import ColourView, MaskRule, MultiCropView
from ssl_vit.data.order import Order, Stream, derive_seed
from ssl_vit.data.pack import pack
from ssl_vit.data.reader import Reader, ReadError
from ssl_vit.data.sources import open_source
from ssl_vit.data.views import CentreView, CropView, MaskedView, seed_generators
from ssl_vit.data.workers import PREFETCH

PIXELS = Pixels((0.5, 0.4, 0.3), (0.2, 0.3, 0.4))
VIEW = MaskedView((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("loader")
    images = write_images(folder / "images", classes=2, per_class=30, size=24)
    pack(f"folder:{images}", folder / "shards", maxcount=17)
    return folder / "shards"


def batches(index: Index, **changes: Any) -> TrainBatches:
    order = Order(index.shard_sizes.tolist(), 5, changes.pop("num_lanes", 4), 8)
    settings: dict[str, Any] = {"seed": 3, "batch_size": 12, "micro_batch_size": 12, **changes}
    stream = settings.pop("stream", None) or Stream([order], 5, repeats=settings.pop("repeats", 1))
    return TrainBatches([index], stream, VIEW, PIXELS, **settings)


def damage(folder: Path, samples: list[int]) -> Index:
    """Overwrite the image bytes of some samples."""
    index = open_source(str(folder))
    for sample in samples:
        record, file = index.samples[sample], index.path(index.shard_of(sample))
        with open(file, "r+b") as shard:
            shard.seek(int(record["offset"]))
            shard.write(b"\0" * int(record["size"]))
    return open_source(str(folder))


def equal(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> bool:
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def joined(parts: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """Batches put together and sorted by position."""
    whole = {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
    order = whole["index"].argsort()
    return {key: value[order] for key, value in whole.items()}


@pytest.mark.parametrize(("ranks", "micro", "lanes"), [(1, 3, 4), (2, 6, 4), (3, 2, 4), (4, 1, 4), (2, 3, 5)])
def test_ranks_and_micro_batches_see_the_same_views(shards: Path, ranks: int, micro: int, lanes: int) -> None:
    index = open_source(str(shards))
    for step in (0, 3, 7):  # 60 images in batches of 12: across ends of epochs
        whole = joined([batches(index, num_lanes=lanes)[step][0]])
        parts = []
        for rank in range(ranks):
            mine = batches(index, num_lanes=lanes, micro_batch_size=micro, rank=rank, num_ranks=ranks)
            parts += [mine[step * mine.accumulation + i][0] for i in range(mine.accumulation)]
        assert equal(joined(parts), whole)
        assert whole["index"].tolist() == list(range(step * 12, step * 12 + 12))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_do_not_change_batches_nor_the_callers_generators(shards: Path, workers: int) -> None:
    data = batches(open_source(str(shards)), micro_batch_size=4)
    torch.manual_seed(1)
    before = torch.get_rng_state()
    found = [batch for batch, _ in iterate(data, range(5, 11), workers)]
    assert torch.equal(torch.get_rng_state(), before)
    assert all(equal(batch, data[item][0]) for batch, item in zip(found, range(5, 11), strict=True))


def test_a_batch_stays_as_it_was_while_workers_run_ahead(shards: Path) -> None:
    data = batches(open_source(str(shards)), micro_batch_size=4)
    kept = []
    for item, (batch, _) in enumerate(iterate(data, range(4 * PREFETCH), 1)):
        kept.append((batch, {key: value.clone() for key, value in batch.items()}))
        if item % PREFETCH == 1:
            time.sleep(0.2)  # the worker has made all that it may
    assert [equal(batch, copy) for batch, copy in kept] == [True] * (4 * PREFETCH)
    assert all(equal(batch, data[item][0]) for item, (batch, _) in enumerate(kept))


def test_each_position_has_its_own_view(shards: Path) -> None:
    """B20: nothing repeats over epochs, repeats and seeds; the same position repeats exactly."""
    index = open_source(str(shards))
    data = batches(index)
    masks = torch.cat([data[step][0]["mask"] for step in range(10)])  # two epochs
    images = torch.cat([data[step][0]["image"] for step in range(10)])
    assert len(torch.unique(images.flatten(1), dim=0)) == 120
    assert len(torch.unique(masks, dim=0)) > 100, "of 1,820 possible masks"
    assert equal(data[4][0], batches(index)[4][0])
    assert not torch.equal(data[4][0]["image"], batches(index, seed=4)[4][0]["image"])
    order = Order(index.shard_sizes.tolist(), 5, 4, 8)
    twice = TrainBatches([index], Stream([order], 5, repeats=2), VIEW, PIXELS, 3, 12, 12)[0][0]
    assert not torch.equal(twice["image"][0], twice["image"][1])
    assert Stream([order], 5, repeats=2).locate(0) == Stream([order], 5, repeats=2).locate(1)


def test_a_view_is_a_function_of_seed_and_position(shards: Path) -> None:
    index = open_source(str(shards))
    data = batches(index)
    batch, _ = data[2]
    position = 24 + 5
    _, sample = data.stream.locate(position)
    seed_generators(derive_seed(3, VIEW_SEED, position))
    expected = VIEW({"image": decode(Reader(index).read(sample)), "label": 0})
    assert torch.equal(batch["image"][5], expected["image"])
    assert torch.equal(batch["mask"][5], expected["mask"])


def test_bad_samples_are_replaced_from_the_same_batch_under_their_own_seed(shards: Path, tmp_path: Path) -> None:
    """B38, B40: named, counted; the replacement is the next good position, seen as position P would be."""
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    good = batches(open_source(str(shards)))
    bad_positions = [26, 27, 35]  # two in a row, and the last of the batch: the search wraps
    samples = [good.stream.locate(p)[1] for p in bad_positions]
    index = damage(copy, samples)
    batch, reports = batches(index)[2]
    assert [(report.position, report.name) for report in reports] == [
        (p, index.describe(s)) for p, s in zip(bad_positions, samples, strict=True)
    ]
    assert batch["index"].tolist() == list(range(24, 36))
    for position, replacement in ((26, 28), (27, 28), (35, 24)):
        seed_generators(derive_seed(3, VIEW_SEED, position))
        image = decode(Reader(index).read(good.stream.locate(replacement)[1]))
        assert torch.equal(batch["image"][position - 24], VIEW({"image": image, "label": 0})["image"])
    reference = good[2][0]
    untouched = [i for i in range(12) if i + 24 not in bad_positions]
    assert torch.equal(batch["image"][untouched], reference["image"][untouched])
    parts = [batches(index, rank=rank, num_ranks=2, micro_batch_size=6)[2][0] for rank in range(2)]
    assert equal(joined(parts), joined([batch])), "the same on two processes"


def test_a_good_sample_costs_no_look_at_the_rest_of_its_batch(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader, "replacement_positions", lambda *_: (pytest.fail("drew one") for _ in range(1)))
    batches(open_source(str(shards)))[2]


def test_policies_for_bad_samples(shards: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    index = damage(copy, list(range(60)))
    with pytest.raises(InputError, match=r"none of the 12 samples .* decodes"):
        batches(index)[0]
    with pytest.raises(InputError, match=r"shard-\d+\.tar: key .*data\.bad_samples=skip"):
        batches(index, on_bad="stop")[0]


def test_a_read_error_is_not_a_bad_sample(shards: Path, tmp_path: Path) -> None:
    import shutil

    copy = tmp_path / "shards"
    shutil.copytree(shards, copy)
    data = batches(open_source(str(copy)))
    for shard in copy.glob("*.tar"):
        with open(shard, "r+b") as file:
            file.truncate(1000)
    with pytest.raises(ReadError, match=r"shard-\d+\.tar"):
        data[0]


def test_a_file_stays_open_while_it_is_read(shards: Path) -> None:
    """Also when the cache of open files drops it at once, as it may when threads race."""
    index = open_source(str(shards))
    assert [Reader(index, max_open=0).read(i) for i in range(60)] == [Reader(index).read(i) for i in range(60)]


def test_normalisation_happens_on_the_device_in_float32() -> None:
    image = torch.randint(0, 256, (2, 3, 4, 4), dtype=torch.uint8)
    batch = {"image": image, "mask": torch.ones(2, 4, dtype=torch.bool), "target_image": image}
    moved = PIXELS.to_device(batch, torch.device("cpu"))
    expected = (image.double() / 255 - torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1)) / torch.tensor(
        [0.2, 0.3, 0.4]
    ).view(3, 1, 1)
    torch.testing.assert_close(moved["image"].double(), expected.double(), rtol=1e-5, atol=1e-6)
    assert moved["image"].dtype == torch.float32
    assert moved["mask"].dtype == torch.bool
    assert moved["target_image"].dtype == torch.uint8


@given(st.integers(1, 20), st.integers(1, 20), st.floats(0.01, 0.99))
def test_masks_have_the_published_count(height: int, width: int, ratio: float) -> None:
    count = height * width
    keep = int(count * (1 - ratio))
    if not 0 < keep < count:
        with pytest.raises(ValueError, match="mask_ratio"):
            visible_count(count, ratio)
        return
    mask = random_mask((height, width), ratio)
    assert mask.shape == (count,)
    assert int((~mask).sum()) == keep


def test_masks_are_uniform() -> None:
    torch.manual_seed(0)
    share = torch.stack([random_mask((14, 14), 0.75) for _ in range(10_000)]).double().mean(dim=0)
    assert (share - 0.75).abs().max() < 5 * (0.75 * 0.25 / 10_000) ** 0.5
    assert visible_count(196, 0.75) == 49
    assert visible_count(256, 0.75) == 64


def test_crops_keep_to_their_ranges() -> None:
    image = torch.zeros(3, 40, 60, dtype=torch.uint8)
    image[0] = torch.arange(60, dtype=torch.uint8)
    for interpolation in ("bicubic", "bilinear"):
        view = CropView((8, 8), (0.9, 1.0), (1.4, 1.6), 0.0, interpolation)
        seen = view({"image": image, "label": 2})
        assert seen["image"].shape == (3, 8, 8)
        assert seen["image"].dtype == torch.uint8
        assert (seen["image"][0].int().diff(dim=1) > 0).all(), "never flipped"
        assert int(seen["label"]) == 2
    flipped = CropView((8, 8), (0.9, 1.0), (1.4, 1.6), 1.0, "bilinear")({"image": image, "label": 0})
    assert (flipped["image"][0].int().diff(dim=1) < 0).all()
    assert pickle.loads(pickle.dumps(VIEW)) == VIEW
    for changes in ({"crop_scale": (0.0, 1.0)}, {"crop_scale": (0.5, 2.0)}, {"crop_ratio": (2.0, 1.0)}, {"flip": 1.5}):
        settings = {"img_size": (8, 8), "crop_scale": (0.2, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.5} | changes
        with pytest.raises(ValueError, match=next(iter(changes))):
            CropView(**settings, interpolation="bicubic")


@pytest.mark.parametrize(("height", "width"), [(40, 60), (60, 40), (32, 32), (10, 300), (1, 1)])
def test_the_evaluation_view_is_a_centre_crop(height: int, width: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    for size in ((32, 32), (16, 48)):
        view = CentreView(size, 0.875, "bicubic")
        first, second = (view({"image": image, "label": 1})["image"] for _ in range(2))
        assert first.shape == (3, *size)
        assert torch.equal(first, second), "nothing random"
    whole = CentreView((32, 32), 1.0, "bicubic")({"image": image, "label": 1})["image"]
    if (height, width) == (32, 32):
        assert torch.equal(whole, image)


def test_the_generators_follow_the_seed() -> None:
    import random

    drawn = []
    for seed in (7, 7, 8):
        seed_generators(derive_seed(seed))
        drawn.append((random.random(), float(np.random.rand()), float(torch.rand(()))))
    assert drawn[0] == drawn[1] != drawn[2]


@given(
    st.integers(0, 2**63),
    st.integers(1, 900),
    st.integers(1, 900),
    st.sampled_from([(0.2, 1.0), (0.05, 0.32), (1, 1)]),
    st.sampled_from([(3 / 4, 4 / 3), (1.0, 1.0), (0.5, 0.9)]),
)
def test_random_boxes_are_torchvisions(seed, height, width, scale, ratio):
    """The same boxes, and the generator left in the same state."""
    image = torch.empty(1).expand(3, height, width)
    seed_generators(seed)
    expected = RandomResizedCrop.get_params(image, list(scale), list(ratio)), torch.rand(3).tolist()
    seed_generators(seed)
    assert (random_box(height, width, scale, ratio), torch.rand(3).tolist()) == expected


def test_several_crops_of_a_sample_decode_it_once(shards: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    decoded = []
    monkeypatch.setattr(loader, "decode", lambda *args, **settings: decoded.append(1) or decode(*args, **settings))
    crop = ColourView((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic")
    view = MultiCropView(crop, crop, crop, 6, MaskRule((4, 4), (0.3,), (0.0,), "random"))
    order = Order(open_source(str(shards)).shard_sizes.tolist(), 5)
    batch, _ = TrainBatches([open_source(str(shards))], Stream([order], 5), view, PIXELS, 3, 12, 12)[0]
    assert batch["global_views"].shape[:2] == (12, 2)
    assert batch["local_views"].shape[:2] == (12, 6)
    assert len(decoded) == 12
