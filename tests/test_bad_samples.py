"""Samples that do not decode: each position of training counts, each sample of evaluations once, on all processes."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import in_process, tiny_recipe, write_shard
from test_evaluation import PIXELS
from test_trainer import train
from torch import nn

from ssl_vit import distributed
from ssl_vit.config import InputError, to_yaml
from ssl_vit.data.bad_samples import BadReport, BadSamples
from ssl_vit.data.sources import open_source
from ssl_vit.evaluation.base import Subject, Subset
from ssl_vit.evaluation.pictures import fixed_images

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def damaged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of 50 is cut."""
    folder = tmp_path_factory.mktemp("damaged")
    write_shard(folder / "shard-000000.tar", 50, cut={17})
    return folder


def recipe(train: Path, val: Path, folder: Path, **overrides: Any) -> dict[str, Any]:
    """Epochs of 50 in 5 steps, judged at 0, 5 and 10."""
    judged = {"knn": {"k": [5], "every": "5 steps"}, "linear": {"every": "5 steps"}, "pictures": {"count": 50}}
    values = tiny_recipe(Path(), folder, evals=judged, optim__batch_size=10, optim__epochs="10 steps", **overrides)
    values["data"] |= {"train": str(train), "val": str(val), "num_lanes": 10}
    return values


def named(run: Path) -> list[tuple[int, str, int]]:
    lines = [json.loads(line) for line in (run / "bad_samples.jsonl").read_text().splitlines()]
    return [(line["step"], line["name"], line["position"]) for line in lines]


def counts(run: Path) -> tuple[int, int]:
    result = json.loads((run / "result.json").read_text())
    return result["bad_samples"], result["bad_samples_left_out"]


def test_a_cut_image_among_fifty(damaged: Path, tmp_path: Path) -> None:
    """B38: trained over, left out of kNN, probe and pictures, named; counted once an epoch and once in evaluations."""
    run = train(recipe(damaged, damaged, tmp_path / "run", data__max_bad_fraction=0.05))
    assert counts(run) == (2, 1)
    found = named(run)
    assert {name for _, name, _ in found} == {"shard-000000.tar: key 017"}
    assert found[0][::2] == (0, -1), "an evaluation meets it first, and the later ones do not repeat it"
    assert [(position // 50, position // 10 + 1) for _, _, position in found[1:]] == [
        (epoch, step) for epoch, (step, _, _) in enumerate(found[1:])
    ]
    assert (run / "train.log").read_text().count("bad sample: shard-000000.tar: key 017: ") == 3


def test_more_than_the_limit_stop_the_run(damaged: Path, tmp_path: Path) -> None:
    """B38: one of 50 where one of 100 is allowed, as soon as chance is no excuse."""
    values = recipe(damaged, damaged, tmp_path / "run", data__max_bad_fraction=0.01)
    values |= {"evals": {}, "optim": {**values["optim"], "batch_size": 50, "epochs": "40 steps"}}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    done = in_process("pipelines/pretrain_mae.py", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert "22 of 1100 samples did not decode, more than data.max_bad_fraction=0.01; they are named in" in message
    assert [step for step, _, _ in named(tmp_path / "run")] == list(range(1, 23))
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["exit_code"]) == ("failed", 2)


def test_evaluations_do_not_count_for_training(damaged: Path, tmp_path: Path) -> None:
    """30 of 50 validation images, seen three times by three evaluations; the training shard is nearly good."""
    write_shard(tmp_path / "val" / "shard-000001.tar", 50, cut=range(30))
    run = train(recipe(damaged, tmp_path / "val", tmp_path / "run"))
    assert counts(run) == (2, 31), "the probe trains on data.train"
    found = named(run)
    assert len({(name, position) for _, name, position in found}) == len(found) == 31 + 2


def test_a_resumed_run_counts_on(damaged: Path, tmp_path: Path) -> None:
    """From between the two bad positions, with a line that a kill has cut."""
    values = recipe(damaged, damaged, tmp_path / "run")
    values["run"] |= {"save_every": "5 steps"}
    run = train(values)
    before, result = named(run), counts(run)
    assert result == (2, 1)
    shutil.rmtree(run / "checkpoints" / "step_00000010")
    (run / "result.json").unlink()
    with open(run / "bad_samples.jsonl", "a") as file:
        file.write('{"step": 10, "sou')
    train(values)
    assert "resumed after step 5 of 10" in (run / "train.log").read_text()
    assert (named(run), counts(run)) == (before, result)


def test_pictures_report_too(damaged: Path) -> None:
    everything, found = Subset.all(open_source(str(damaged))), []
    subject = Subject(nn.Identity(), lambda tokens: tokens.patches, (32, 32), PIXELS, CPU, everything)
    subject.on_bad = found.extend
    assert len(fixed_images(subject, 50)["image"]) == 49
    assert [report.name for report in found] == ["shard-000000.tar: key 017"]


def report(position: int) -> BadReport:
    return BadReport("/data", position, f"shard-000000.tar: key {position}", "truncated", position)


def test_chance_does_not_stop_a_run(tmp_path: Path) -> None:
    """Two in the first batch of 16 say nothing; a share above the limit does, however small its excess, in time."""
    bad = BadSamples(tmp_path / "bad.jsonl", 0.01)
    bad.replaced([report(3), report(7)], step=1)
    bad.check(16, CPU)
    before = BadSamples(tmp_path / "bad.jsonl", 0.01, before=1090)
    before.replaced([report(100_001)], step=6251)
    before.check(100_016, CPU)
    before.replaced([report(100_002)] * 10, step=6252)
    with pytest.raises(InputError, match=r"1101 of 100032 samples.*max_bad_fraction=0\.01"):
        before.check(100_032, CPU)


def test_processes_count_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each has its own samples; the sum is compared with the global number, and each evaluation's sample has a line."""
    ranks = [BadSamples(tmp_path / "bad.jsonl", 0.1, before=4, active=rank == 0) for rank in range(2)]
    for number, rank in enumerate(ranks):
        rank.replaced([report(2 * i + number) for i in range(10)], step=1)
    monkeypatch.setattr(distributed, "all_sum", lambda value: torch.tensor(sum(rank.found for rank in ranks)))
    for rank in ranks:
        assert rank.total(CPU) == 24
        rank.check(140, CPU)
        with pytest.raises(InputError, match="24 of 100 samples did not decode"):
            rank.check(100, CPU)
    judged = [[BadReport("/val", i, f"key {i}", "truncated")] for i in range(2)]
    monkeypatch.setattr(distributed, "all_objects", lambda value: judged)
    for rank in (*ranks, *ranks):
        rank.left_out(judged[ranks.index(rank)], step=1)
    assert [len(rank.evaluated) for rank in ranks] == [2, 2]
    lines = [json.loads(line) for line in (tmp_path / "bad.jsonl").read_text().splitlines()]
    assert [line["name"] for line in lines if line["position"] < 0] == ["key 0", "key 1"]
    assert len(lines) == 22
