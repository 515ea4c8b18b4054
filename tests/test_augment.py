"""Views of supervised training: what they do to pixels, that the seed decides them, and their refusals."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from ssl_vit.data.augment import AugmentSection, SupervisedView, erased, posterize, three_augment
from ssl_vit.data.views import from_pil, seed_generators, to_pil

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
PLAIN = {"crop_scale": (1.0, 1.0), "crop_ratio": (1.0, 1.0), "flip": 0.0}


def view(**changes: Any) -> SupervisedView:
    section = AugmentSection(**changes)
    return SupervisedView((32, 32), mean=MEAN, std=STD, **dict(section))


def picture(size: int = 32) -> torch.Tensor:
    return torch.randint(0, 256, (3, size, size), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


EVERYTHING = {"auto_augment": "rand-m9-mstd0.5-inc1", "color_jitter": 0.3, "erase": 0.5}


@pytest.mark.parametrize("changes", [EVERYTHING, {**EVERYTHING, "auto_augment": "3a"}], ids=["rand", "3a"])
def test_the_seed_decides_a_view(changes: dict[str, Any]) -> None:
    made, again = view(**changes), pickle.loads(pickle.dumps(view(**changes)))
    assert made == again
    assert made != view(**{**changes, "erase": 0.4})
    sample = {"image": picture(48), "label": 3}
    views = []
    for seed in range(20):
        pair = []
        for each in (made, again):
            seed_generators(seed)
            pair.append(each(sample)["image"])
        assert torch.equal(*pair)
        assert (pair[0].shape, pair[0].dtype) == ((3, 32, 32), torch.uint8)
        views.append(pair[0].numpy().tobytes())
    assert len(set(views)) == 20


def test_without_augmentation_the_image_is_left_alone() -> None:
    made = view(**PLAIN)({"image": picture(), "label": 7})
    assert torch.equal(made["image"], picture())
    assert made["label"] == 7


def test_rand_augment_is_timms_with_the_published_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same operations on the same PIL image, from the same seed, as timm's own training transform."""
    from timm.data.auto_augment import rand_augment_transform

    hparams: dict[str, Any] = {
        "translate_const": int(32 * 0.45),
        "img_mean": (124, 116, 104),
        "interpolation": Image.Resampling.BICUBIC,
    }
    # Pillow's own formula before it refused 0 bits
    monkeypatch.setattr(
        "timm.data.auto_augment.ImageOps.posterize",
        lambda image, bits: image.point(lambda v: v & ~(2 ** (8 - bits) - 1)),
    )
    reference = rand_augment_transform("rand-m9-mstd0.5-inc1", hparams)
    changed = 0
    for seed in range(30):
        seed_generators(seed)
        found = view(**PLAIN, auto_augment="rand-m9-mstd0.5-inc1")._auto_augment(to_pil(picture()))
        seed_generators(seed)
        expected = reference(to_pil(picture()))
        assert np.array_equal(np.array(found), np.array(expected))
        changed += not torch.equal(from_pil(found), picture())
    assert changed > 15


def test_the_strongest_posterizing_is_black() -> None:
    """Magnitude 10 keeps no bits: published code makes black, newer Pillows would end the run."""
    image = to_pil(picture())
    assert not np.array(posterize(image, 0)).any()
    assert np.array_equal(np.array(posterize(image, 3)), np.array(image) & 0b11100000)
    seed_generators(0)
    strongest = view(**PLAIN, auto_augment="rand-m10-n4-p1-inc1")
    for _ in range(200):
        strongest({"image": picture(), "label": 0})


def test_three_augment_is_one_of_three_as_often() -> None:
    image = to_pil(picture())
    grey, solarised = np.array(image.convert("L")), np.array(ImageOps.solarize(image, 128))
    counts = {"grey": 0, "solarised": 0, "blurred": 0}
    seed_generators(0)
    for _ in range(3000):
        made = np.array(three_augment(image))
        if np.array_equal(made, np.stack([grey] * 3, axis=-1)):
            counts["grey"] += 1
        elif np.array_equal(made, solarised):
            counts["solarised"] += 1
        else:
            assert made.std() < np.array(image).std()
            counts["blurred"] += 1
    assert all(abs(count - 1000) < 4 * (3000 * 2 / 9) ** 0.5 for count in counts.values()), counts


def test_erasing_writes_noise_into_one_box() -> None:
    """Random Erasing as published: 2 to 33 % of the area, noise around the data's mean, and nothing outside."""
    image = torch.full((3, 64, 64), 255, dtype=torch.uint8)
    areas, touched, values = [], 0, []
    for seed in range(1000):
        seed_generators(seed)
        made = erased(image, 0.25, MEAN, (0.1, 0.1, 0.1))
        changed = (made != image).any(dim=0)
        if not changed.any():
            assert torch.equal(made, image)
            continue
        touched += 1
        rows, columns = changed.any(dim=1).nonzero(), changed.any(dim=0).nonzero()
        box = (slice(int(rows.min()), int(rows.max()) + 1), slice(int(columns.min()), int(columns.max()) + 1))
        assert changed[box].float().mean() > 0.99
        areas.append(changed.float().mean().item())
        values.append(made[:, box[0], box[1]].float().mean(dim=(1, 2)) / 255)
    assert abs(touched - 250) < 4 * (1000 * 0.25 * 0.75) ** 0.5
    assert 0.015 < min(areas) < 0.06
    assert 0.25 < max(areas) < 0.35
    torch.testing.assert_close(torch.stack(values).mean(dim=0), torch.tensor(MEAN), atol=0.01, rtol=0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"auto_augment": "randaugment"}, "auto_augment='randaugment': allowed: 3a, or RandAugment"),
        ({"auto_augment": "rand-x9"}, "auto_augment='rand-x9'"),
        ({"crop_scale": (0.0, 1.0)}, "crop_scale"),
    ],
)
def test_mistakes_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        view(**changes)


def test_colours_need_three_channels_and_training_needs_labels() -> None:
    for changes in ({"auto_augment": "3a"}, {"color_jitter": 0.3}):
        with pytest.raises(ValueError, match="these images have 1 channels"):
            SupervisedView((32, 32), mean=(0.5,), std=(0.5,), **dict(AugmentSection(**changes)))
    with pytest.raises(ValueError, match="label=-1"):
        view()({"image": picture(), "label": -1})
