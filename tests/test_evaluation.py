"""Evaluations against brute force and independent implementations; sets, splits and counting."""

from __future__ import annotations

import statistics
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from conftest import TINY_ENCODER, write_images
from PIL import Image
from sklearn.linear_model import LogisticRegression
from torch.nn import functional as F

from ssl_vit.config import InputError
from ssl_vit.data.loader import Pixels
from ssl_vit.data.sources import open_source
from ssl_vit.encoders.base import create_encoder
from ssl_vit.evaluation import knn
from ssl_vit.evaluation.base import Subject, Subset, split_by_key
from ssl_vit.evaluation.few_shot import FewShot
from ssl_vit.evaluation.knn import KNN, knn_correct, nearest
from ssl_vit.evaluation.linear import Linear
from ssl_vit.evaluation.linear_heads import Choice, LinearHeads
from ssl_vit.evaluation.logistic import fit_path, fit_selected, stratified_folds
from ssl_vit.evaluation.pictures import sheet, to_rgb
from ssl_vit.evaluation.rank import Rank
from ssl_vit.evaluation.sweep import Sweep
from ssl_vit.objectives.base import Objective
from ssl_vit.recipe import DataSection
from ssl_vit.splits import open_sets

PIXELS = Pixels((0.5,) * 3, (0.5,) * 3, crop_pct=1.0)


def blobs(n: int = 120, dim: int = 8, classes: int = 3, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, dim, generator=torch.Generator().manual_seed(1))
    return centres[labels] + 1.5 * torch.randn(n, dim, generator=generator), labels


def subject(images: Path, **kwargs: object) -> Subject:
    torch.manual_seed(0)
    objective = Objective(create_encoder(**TINY_ENCODER)).eval()
    sets = open_sets(DataSection(val=f"folder:{images}"))
    return Subject(
        objective, objective.encoder.pool, (32, 32), PIXELS, torch.device("cpu"), sets.images, sets.probe, sets.val,
        batch_size=7, **kwargs,  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_knn_equals_brute_force(chunk: int) -> None:
    bank, bank_labels = blobs(seed=2)
    queries, labels = blobs(n=41, seed=3)
    expected = []
    for k in (1, 5, 50):
        right = 0
        for query, label in zip(F.normalize(queries, dim=1), labels, strict=True):
            similarity = F.normalize(bank, dim=1) @ query
            votes = [0.0] * 3
            for i in similarity.argsort(descending=True)[:k]:
                votes[int(bank_labels[i])] += float((similarity[i] / 0.07).exp())
            right += int(np.argmax(votes) == int(label))
        expected.append(right)
    assert knn_correct(bank, bank_labels, queries, labels, [1, 5, 50], 0.07, 3, chunk).tolist() == expected


@pytest.mark.parametrize("block", [1, 7, 60, 119])
def test_knn_compares_blocks_of_the_bank(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The neighbours of every query are those among all at once, its own place left out wherever it lies."""
    bank, bank_labels = blobs(seed=2)
    queries, labels = torch.cat([blobs(n=41, seed=3)[0], bank[::9]]), torch.cat([blobs(n=41)[1], bank_labels[::9]])
    own = torch.cat([torch.full((41,), -1), torch.arange(0, 120, 9)])
    arguments = (bank, bank_labels, queries, labels, [1, 5, 50, 119], 0.07, 3, 11, own)
    unit = F.normalize(queries, dim=1)
    whole, places = nearest(bank, unit, 50, own)
    expected = knn_correct(*arguments)
    monkeypatch.setattr(knn, "BLOCK", block)
    found, same = nearest(bank, unit, 50, own)
    torch.testing.assert_close(found, whole, rtol=0, atol=1e-6)
    assert torch.equal(places, same)
    assert torch.equal(knn_correct(*arguments), expected)


def test_knn_leaves_an_image_out_of_its_own_vote() -> None:
    """Scored on the images that vote, each is judged by the others alone (leave one out)."""
    features, labels = blobs(n=31)
    expected = 0
    for i in range(31):
        rest = torch.arange(31) != i
        expected += int(knn_correct(features[rest], labels[rest], features[i:][:1], labels[i:][:1], [5], 0.07, 3, 9)[0])
    assert int(knn_correct(features, labels, features, labels, [5], 0.07, 3, 9, torch.arange(31))[0]) == expected < 31
    assert int(knn_correct(features, labels, features, labels, [1], 0.07, 3, 9)[0]) == 31


@pytest.mark.parametrize("penalty", [1.0, 1e-2, 1e-4])
def test_logistic_regression_equals_scikit_learn(penalty: float) -> None:
    features, labels = blobs()
    queries, _ = blobs(n=60, seed=5)
    classifier = fit_path(features, labels, 3, [penalty])[0]
    standard = ((features.double() - classifier.mean) / classifier.std).numpy()
    reference = LogisticRegression(C=1 / (penalty * len(features)), tol=1e-10, max_iter=10_000).fit(
        standard, labels.numpy()
    )
    ours = ((queries.double() - classifier.mean) / classifier.std) @ classifier.weight.T + classifier.bias
    theirs = reference.decision_function(((queries.double() - classifier.mean) / classifier.std).numpy())
    np.testing.assert_allclose(torch.softmax(ours, 1), torch.softmax(torch.from_numpy(theirs), 1), atol=2e-5)


def test_logistic_regression_on_fewer_images_than_features_equals_scikit_learn() -> None:
    features, labels = blobs(n=12, dim=40)
    classifier = fit_path(features, labels, 3, [1e-2])[0]
    standard = ((features.double() - classifier.mean) / classifier.std).numpy()
    reference = LogisticRegression(C=1 / (1e-2 * 12), tol=1e-12, max_iter=10_000).fit(standard, labels.numpy())
    centred = classifier.weight - classifier.weight.mean(dim=0)
    np.testing.assert_allclose(centred, reference.coef_ - reference.coef_.mean(axis=0), atol=1e-5)


def test_logistic_regression_survives_constant_features() -> None:
    features, labels = blobs()
    features[:, 3] = 7.0
    classifier = fit_path(features, labels, 3, [1e-3])[0]
    assert classifier.weight.isfinite().all()
    assert classifier.accuracy(features, labels) > 0.7


@pytest.mark.parametrize("counts", [[1, 1, 1], [2, 1, 1], [2, 1]])
def test_a_penalty_for_a_few_images(counts: list[int]) -> None:
    """Where every class has one image none can be held out: the strongest penalty, as few_shot says."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    features, _ = blobs(n=len(labels))
    classifier, penalty = fit_selected(features, labels, 3, [1e-3, 1.0], folds=5, seed=0)
    assert classifier.weight.isfinite().all()
    assert penalty == 1.0 or max(counts) > 1


def test_penalty_is_chosen_without_the_validation_set() -> None:
    features, labels = blobs(n=90, dim=60)
    penalties = [1.0, 1e-3, 1e-6]
    classifier, chosen = fit_selected(features, labels, 3, penalties, folds=5, seed=0)
    assigned = stratified_folds(labels, 5, torch.Generator().manual_seed(0))
    held = assigned == 0
    scores = [c.accuracy(features[held], labels[held]) for c in fit_path(features[~held], labels[~held], 3, penalties)]
    assert chosen == penalties[int(np.argmax(scores))]
    assert torch.allclose(classifier.weight, fit_path(features, labels, 3, [chosen])[0].weight, atol=1e-4)


def test_the_classifiers_of_a_sweep_are_those_of_torch_alone() -> None:
    """Classifiers trained side by side equal each one trained by torch's SGD on its own columns of the features."""
    features, labels = blobs(n=64, dim=10)
    columns = {(1, "token"): torch.arange(0, 4), (2, "both"): torch.arange(10)}
    grid = [Choice(1, "token", 0.1, 0.0), Choice(1, "token", 0.5, 0.1), Choice(2, "both", 0.2, 0.01)]
    heads = LinearHeads(features.double(), grid, columns, 3)
    batches = [torch.arange(start, start + 16) for start in (0, 16, 32, 48)] * 3
    factors = [1 - i / 12 for i in range(12)]
    for batch, factor in zip(batches, factors, strict=True):
        heads.step(features[batch].double(), labels[batch], factor)
    standard = (features.double() - features.double().mean(dim=0)) / features.double().std(dim=0, unbiased=False)
    for choice, score in zip(grid, heads.accuracies(features.double(), labels, chunk=7), strict=True):
        inputs = standard[:, columns[(choice.last, choice.pool)]]
        alone = torch.nn.Linear(inputs.shape[1], 3).double()
        torch.nn.init.zeros_(alone.weight), torch.nn.init.zeros_(alone.bias)
        groups = [{"params": [alone.weight], "weight_decay": choice.decay}, {"params": [alone.bias]}]
        sgd = torch.optim.SGD(groups, lr=choice.rate, momentum=0.9)
        for batch, factor in zip(batches, factors, strict=True):
            sgd.param_groups[0]["lr"] = sgd.param_groups[1]["lr"] = choice.rate * factor
            sgd.zero_grad()
            F.cross_entropy(alone(inputs[batch]), labels[batch]).backward()
            sgd.step()
        group = next(g for g in heads.groups if grid.index(choice) in g.members)
        own = group.weight[:, group.members.index(grid.index(choice))]
        torch.testing.assert_close(own[:-1].T, alone.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(own[-1], alone.bias, rtol=1e-9, atol=1e-9)
        assert score == pytest.approx((alone(inputs).argmax(dim=1) == labels).double().mean().item())


def test_a_sweep_chooses_on_a_part_of_the_training_set(images: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    judged = subject(images)
    seen: list[int] = []
    sets: list[set[int]] = []
    plain = Sweep._features

    def spy(self: Sweep, judged: Subject, subset: Subset, views: int) -> tuple[torch.Tensor, torch.Tensor]:
        sets.append(set(subset.samples.tolist()))
        seen.append(views)
        return plain(self, judged, subset, views)

    monkeypatch.setattr(Sweep, "_features", spy)
    result = Sweep(last_blocks=[1, 2], learning_rates=[0.03, 0.1], min_steps=60, batch_size=16, views=1)(judged)
    fitting, selection, again, val = sets
    assert seen == [1, 0, 1, 0], "selection and scores are on centre crops, training has views beside them"
    assert not fitting & selection
    assert again == selection
    assert val == set(judged.subset("val").samples.tolist())
    assert fitting | selection == set(judged.subset("probe").samples.tolist())
    assert Sweep().design(judged.subset("probe"), 0) == {"fit": len(fitting), "selection": len(selection)}
    assert 0.5 < result["top1"] <= 1
    assert result["classifiers"] == 2 * 3 * 2 * 3
    assert Sweep(last_blocks=[1], learning_rates=[0.1], views=1)(subject(images)) == Sweep(
        last_blocks=[1], learning_rates=[0.1], views=1
    )(subject(images)), "views are a function of the seed and the sample"
    with pytest.raises(InputError, match=r"evals\.sweep\.last_blocks=\[9\]: stage -3: allowed for vit_tiny"):
        Sweep(last_blocks=[9])(judged)


def test_folds_are_stratified() -> None:
    labels = torch.tensor([0] * 50 + [1] * 10 + [2] * 3)
    folds = stratified_folds(labels, 5, torch.Generator().manual_seed(3))
    assert torch.bincount(folds[:50], minlength=5).tolist() == [10] * 5
    assert torch.bincount(folds[50:60], minlength=5).tolist() == [2] * 5
    assert sorted(torch.bincount(folds[60:], minlength=5).tolist()) == [0, 0, 1, 1, 1]


def test_features_are_those_of_the_encoder_in_order(images: Path) -> None:
    judged = subject(images)
    features, labels = judged.features("val")
    index, samples = judged.subset("val").index, judged.subset("val").samples
    assert labels.tolist() == index.samples["label"][samples].tolist()
    from ssl_vit.data.decode import decode
    from ssl_vit.data.reader import Reader

    reader = Reader(index)
    pixels = torch.stack([decode(reader.read(int(s))) for s in samples]).float() / 255
    expected = judged.pool(judged.objective({"image": (pixels - 0.5) / 0.5}, call="encode"))
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_evaluations_count_each_sample_once_and_name_bad_ones(tmp_path: Path) -> None:
    from ssl_vit.data.pack import pack

    images = write_images(tmp_path / "images", classes=2, per_class=11)
    pack(f"folder:{images}", tmp_path / "shards", shuffle=False)
    shard = next((tmp_path / "shards").glob("*.tar"))
    index = open_source(str(tmp_path / "shards"))
    record = index.samples[5]
    data = bytearray(shard.read_bytes())
    data[int(record["offset"]) : int(record["offset"]) + int(record["size"])] = b"x" * int(record["size"])
    shard.write_bytes(bytes(data))
    reports: list = []
    torch.manual_seed(0)
    objective = Objective(create_encoder(**TINY_ENCODER)).eval()
    everything = Subset.all(open_source(str(tmp_path / "shards")))
    judged = Subject(
        objective, objective.encoder.pool, (32, 32), PIXELS, torch.device("cpu"), everything, everything, everything,
        batch_size=4, on_bad=reports.extend,
    )  # fmt: skip
    features, labels = judged.features("val")
    assert len(features) == len(labels) == 21
    assert [report.name for report in reports] == [everything.index.describe(5)]
    judged.val = Subset(everything.index, everything.samples[5:6])
    with pytest.raises(InputError, match=r"none of the 1 images decodes; the first: .*is not an image"):
        judged.features("val")


def test_probe_sets_follow_the_contract(images: Path, tmp_path: Path) -> None:
    other = write_images(tmp_path / "two", classes=2, per_class=5)
    flat = tmp_path / "flat"
    flat.mkdir()
    for i, file in enumerate(sorted(other.rglob("*.png"))):
        Image.open(file).save(flat / f"{i}.png")
    labelled, unlabelled, smaller = f"folder:{images}", f"folder:{flat}", f"folder:{other}"
    same = open_sets(DataSection(train=labelled, val=labelled))
    assert same.probe is not None
    assert len(same.probe.samples) == 72
    split = open_sets(DataSection(train=unlabelled, val=labelled))
    assert split.probe is not None
    assert split.val is not None
    assert (len(split.probe.samples), len(split.val.samples)) == (57, 15)
    assert not set(split.probe.samples) & set(split.val.samples)
    assert open_sets(DataSection(train=smaller, val=labelled)).rule.startswith("probes train on 80 %")
    assert open_sets(DataSection(train=unlabelled)).val is None
    with pytest.raises(InputError, match=r"data\.val=.*no labels"):
        open_sets(DataSection(train=labelled, val=unlabelled))
    with pytest.raises(InputError, match=r"data\.probe=.*classes of data\.val"):
        open_sets(DataSection(train=labelled, val=labelled, probe=smaller))


def test_split_is_stratified_and_decided_by_keys(images: Path) -> None:
    everything = Subset.all(open_source(f"folder:{images}"))
    first, second = split_by_key(everything, 0.2)
    assert np.bincount(second.labels).tolist() == [5, 5, 5]
    backwards, again = split_by_key(Subset(everything.index, everything.samples[::-1].copy()), 0.2)
    assert set(again.samples) == set(second.samples)
    assert set(backwards.samples) == set(first.samples)


def test_each_evaluation_gives_sane_numbers(images: Path) -> None:
    judged = subject(images)
    knn, linear = KNN(k=[5, 20, 500])(judged), Linear()(judged)
    few = FewShot(shots=[1, 3], draws=4)(judged)
    assert few["top1"] == few["top1_shots3"] > 0.5
    assert few["top1_shots1"] > 0.4
    assert knn["top1"] == knn["top1_k5"]
    assert "top1_k57" in knn, "k is cut to the probe set"
    for result in (knn, linear, few):
        assert 0.5 < result["top1"] <= 1
        assert 0 <= result["standard_error"] < 0.2
    labels = torch.from_numpy(judged.subset("probe").labels)
    held = int((stratified_folds(labels, 5, torch.Generator().manual_seed(0)) == 0).sum())
    assert Linear().design(judged.subset("probe"), 0) == {"fit": 57 - held, "selection": held}
    assert Linear([1.0]).design(judged.subset("probe"), 0)["selection"] == 0
    assert FewShot(draws=3).design(judged.subset("probe"), 7) == {"seeds": [7, 8, 9]}
    rank = Rank()(judged)
    assert 1 <= rank["effective_rank"] <= 48
    with pytest.raises(InputError, match=r"evals\.few_shot\.shots=\[30\]"):
        FewShot(shots=[30]).check(judged.probe)
    with pytest.raises(InputError, match=r"evals\.sweep: 1 labelled images of 1 classes leave too few to choose on"):
        Sweep().check(Subset(judged.subset("probe").index, judged.subset("probe").samples[:1]))


def test_few_shot_is_the_mean_of_its_draws_with_their_spread() -> None:
    """Draw i is the one draw of seed i, whatever the encoder."""
    sets = {"probe": blobs(), "val": blobs(n=60, seed=5)}

    def few(seed: int, draws: int) -> dict[str, float]:
        judged: Any = SimpleNamespace(features=sets.get, num_classes=3, seed=seed)
        return FewShot(shots=[1], draws=draws)(judged)

    together, alone = few(0, 4), [few(seed, 1)["top1"] for seed in range(4)]
    assert together["top1"] == pytest.approx(statistics.fmean(alone))
    assert together["spread_shots1"] == pytest.approx(statistics.stdev(alone))
    assert len(set(alone)) > 1


def test_rank_of_a_collapsed_encoder_is_one(images: Path) -> None:
    judged = subject(images)
    judged._features[id(judged.images)] = (torch.ones(50, 48), torch.zeros(50))
    assert Rank()(judged)["effective_rank"] == pytest.approx(1.0, abs=1e-3)
    judged._features[id(judged.images)] = (torch.eye(48), torch.zeros(48))
    assert Rank()(judged)["effective_rank"] == pytest.approx(48.0, rel=1e-3)


def test_picture_sheets() -> None:
    grey = to_rgb(torch.tensor([[[[0.0, 1.0], [2.0, -1.0]]]]))
    assert grey[0, :, 0, 1].tolist() == [255] * 3
    assert grey[0, 0].tolist() == [[0, 255], [255, 0]]
    assert to_rgb(torch.zeros(2, 5, 4, 4)).shape == (2, 3, 4, 4)
    image = sheet([torch.zeros(3, 3, 32, 32, dtype=torch.uint8)] * 4)
    assert image.shape == (4 + 3 * 100, 4 + 4 * 100, 3)
