"""What goes wrong when data is read: workers that die or stand still, too little memory, too few shards."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import namedtuple
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from conftest import ROOT, in_process, run_python, tiny_recipe, write_images, write_shard
from test_embed import recipe as embedding
from test_trainer import losses, start_process, train, wait_for_step
from torch.utils.data import get_worker_info

from ssl_vit.config import InputError, check, to_yaml
from ssl_vit.data import reading_plan, worker_count
from ssl_vit.data.decode import BadSample
from ssl_vit.data.index import Index
from ssl_vit.data.loader import EvalBatches, Pixels, TrainBatches, iterate
from ssl_vit.data.order import Order, Stream
from ssl_vit.data.pack import pack
from ssl_vit.data.reader import Reader
from ssl_vit.data.reading_plan import ReadingPlan, view_bytes
from ssl_vit.data.sources import open_source
from ssl_vit.data.views import CentreView, MaskedView
from ssl_vit.data.worker_count import cores_of_a_process, waiting_advice, worker_rate
from ssl_vit.data.workers import PREFETCH, SLOTS, LoaderFailed
from ssl_vit.embed import embed
from ssl_vit.recipe import Recipe, check_recipe
from ssl_vit.run import run
from ssl_vit.splits import limited
from ssl_vit.training.signals import StopRequest

VIEW = MaskedView((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)
PIXELS = Pixels((0.5,) * 3, (0.25,) * 3)


@pytest.fixture(scope="module")
def four(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four shards of ten images."""
    folder = tmp_path_factory.mktemp("four")
    images = write_images(folder / "images", classes=2, per_class=20, size=24)
    pack(f"folder:{images}", folder / "shards", maxcount=10)
    return folder / "shards"


def batches(index: Index, view: Any = VIEW, **changes: Any) -> TrainBatches:
    stream = Stream([Order(index.shard_sizes.tolist(), 5, 4, 8)], 5)
    settings: dict[str, Any] = {"seed": 3, "batch_size": 8, "micro_batch_size": 8, **changes}
    return TrainBatches([index], stream, view, PIXELS, **settings)


@pytest.mark.parametrize(
    ("free", "environment", "expected"),
    [
        (96, {}, 96),
        (96, {"LOCAL_WORLD_SIZE": "8"}, 12),
        (4, {"LOCAL_WORLD_SIZE": "8"}, 1),
        # eight tasks of Slurm, their cores bound to them or not
        (12, {"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}, 12),
        (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "8", "SLURM_CPUS_PER_TASK": "12"}, 12),
        # a launcher with eight processes in one task
        (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_NTASKS_PER_NODE": "1", "SLURM_CPUS_PER_TASK": "96"}, 12),
        (96, {"LOCAL_WORLD_SIZE": "8", "SLURM_CPUS_PER_TASK": "96"}, 12),
    ],
)
def test_the_cores_of_a_process(
    free: int, environment: dict[str, str], expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("LOCAL_WORLD_SIZE", "SLURM_NTASKS_PER_NODE", "SLURM_CPUS_PER_TASK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(worker_count, "cores", lambda: free)
    assert cores_of_a_process() == expected


class Napping:
    """A view that takes 10 ms."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        time.sleep(0.01)
        return VIEW(sample)


@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more than this machine has cores
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("workers", [0, 2, 6])
def test_fewer_shards_than_workers(four: Path, workers: int, ranks: int) -> None:
    """B13, B18: all of an epoch, once, whatever the workers; no sample on two ranks."""
    index, seen = open_source(str(four)), []
    for rank in range(ranks):
        data = batches(index, rank=rank, num_ranks=ranks, micro_batch_size=8 // ranks)
        found = [batch["index"].tolist() for batch, _ in iterate(data, range(5), workers)]
        seen.append([data.stream.locate(position)[1] for batch in found for position in batch])
    assert sorted(sample for part in seen for sample in part) == list(range(40))
    if ranks == 2:
        assert not set(seen[0]) & set(seen[1])


@pytest.mark.processes
@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_epoch_is_as_long_with_any_workers(four: Path, tmp_path: Path) -> None:
    """B16: two epochs of 20 samples in batches of 4 are 10 steps with 0, 1 and 4 workers, and the very same ones."""
    runs = []
    for workers in (0, 1, 4):
        folder = tmp_path / str(workers)
        values = tiny_recipe(four, folder, data__train=str(four), data__limit=20, optim__batch_size=4)
        values["optim"] |= {"epochs": 2}
        values["data"] |= {"num_lanes": 4, "val": None}
        values["run"] |= {"workers": workers, "log_samples": True}
        train(values)
        lines = (folder / "samples" / "rank_0.jsonl").read_text().splitlines()
        runs.append((losses(folder), [name for line in lines for name in json.loads(line)["samples"]]))
    steps, names = runs[0]
    assert [step for step, _ in steps] == list(range(1, 11))
    assert len(set(names[:20])) == len(set(names[20:])) == 20, "each sample once an epoch"
    assert runs[1] == runs[0]
    assert runs[2] == runs[0]


LOADER = (
    "import sys; sys.path.insert(0, 'tests')\n"
    "from test_reading_faults import *\n"
    "data = batches(open_source(sys.argv[1]))\n"
    "data[0]\n"  # what is imported here need not be by each worker
)


@pytest.mark.processes
def test_a_loader_that_is_left_early_is_quiet(four: Path) -> None:
    """B25: there are no pipes that could break: no process stays, nothing is said, and a crash ends the workers too."""
    code = LOADER + (
        "for epoch in range(3):\n"
        "    loader = iterate(data, range(100), 2)\n"
        "    next(loader)\n"
        "    del loader\n"
        "print(len(psutil.Process().children()), flush=True)\n"
        "loader = iterate(data, range(100), 2)\n"
        "raise ValueError('on purpose')\n"
    )
    done = run_python("-c", code, str(four), timeout=100)
    assert (done.returncode, done.stdout.strip()) == (1, "0")
    assert done.stderr.startswith("Traceback")
    assert done.stderr.count("Error") == 1


class Blocking(MaskedView):
    """A view that stands still in the middle of a batch."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        threading.Event().wait()
        return {}


@pytest.mark.processes
def test_a_worker_that_stands_still(four: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """B97: stacks of all processes, what is waited for, no process left."""
    view = Blocking((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)
    loader = iterate(batches(open_source(str(four)), view), range(5), 2, stall_timeout=1.0)
    children = psutil.Process().children()
    with pytest.raises(LoaderFailed, match=r"no batch for run\.stall_timeout=1 s.*worker 0 at shard-.*: key"):
        next(loader)
    stacks = capfd.readouterr().err
    assert len(re.findall(r'test_reading_faults.py", line \d+ in __call__', stacks)) == 2
    assert "loader worker 1, pid" in stacks
    assert "in _stalled" in stacks, "of this process too"
    assert len(children) == 2
    del loader
    assert not psutil.wait_procs(children, timeout=10)[1]


def stand_still(monkeypatch: pytest.MonkeyPatch, view: type) -> None:
    """Make a view stand still in workers; the plan of a run tries it in this process."""
    plain: Any = view.__call__

    def call(*words: Any) -> Any:
        if get_worker_info() is not None:
            threading.Event().wait()
        return plain(*words)

    monkeypatch.setattr(view, "__call__", call)


@pytest.mark.processes
@pytest.mark.parametrize("view", [MaskedView, CentreView], ids=["training", "evaluation"])
def test_a_run_whose_loader_stands_still(
    four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, view: type
) -> None:
    """B97: saved, told and ended as resumable, also where an evaluation waits."""
    stand_still(monkeypatch, view)
    values = tiny_recipe(four, tmp_path / "run", data__train=str(four), data__val=str(four), evals={"knn": {}})
    if view is MaskedView:
        values["evals"] = {}
    values["run"] |= {"workers": 1, "stall_timeout": 0.5}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    done = in_process("pipelines/pretrain_mae.py", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 75, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith("no batch for run.stall_timeout=0.5 s, the stacks are above; worker 0 at shard-")
    assert message.endswith("saved after step 0; start the same command again to go on")


@pytest.mark.processes
def test_features_whose_loader_stands_still(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_still(monkeypatch, CentreView)
    features = embedding(four, tmp_path / "run")
    features.run.workers, features.run.stall_timeout = 1, 0.5
    with pytest.raises(LoaderFailed, match=r"no batch for run\.stall_timeout=0\.5 s"):
        embed(features)


class BusError(MaskedView):
    """A view that meets a page of shared memory for which there is no room."""

    def __call__(self, sample: dict[str, Any]) -> dict[str, torch.Tensor]:
        os.kill(os.getpid(), signal.SIGBUS)
        return {}


@pytest.mark.processes
def test_a_full_shared_memory_is_named(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B95: where the plan did not see it coming, e.g. because other programs filled it."""
    monkeypatch.setattr("ssl_vit.data.workers.CHECK", 0.2)
    view = BusError((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)
    with pytest.raises(LoaderFailed, match=r"worker 0 was killed by SIGBUS while reading shard-.*: /dev/shm is too"):
        next(iterate(batches(open_source(str(four)), view), range(5), 1))


@pytest.mark.processes
def test_a_killed_worker_ends_the_run_as_resumable(images: Path, tmp_path: Path) -> None:
    """The killer of processes that are out of memory sends SIGKILL: named, saved, and exact when it goes on."""
    values = tiny_recipe(images, tmp_path / "straight", optim__epochs="40 steps")
    values["run"] |= {"save_every": "1000 steps"}
    straight = train(values)
    folder = tmp_path / "run"
    values["run"] |= {"dir": str(folder), "workers": 2}
    shared = set(os.listdir("/dev/shm"))
    process = start_process(values, folder)
    wait_for_step(folder, 2, process)
    workers = psutil.Process(process.pid).children()
    workers[1].send_signal(signal.SIGKILL)
    message = process.communicate(timeout=100)[1].strip().splitlines()[-1]
    assert process.returncode == 75, message
    assert "loader worker" in message
    assert "was killed by SIGKILL while reading shard-" in message
    assert "out of memory; lower run.workers" in message
    assert not psutil.wait_procs(workers, timeout=10)[1]
    assert not {name for name in set(os.listdir("/dev/shm")) - shared if name.startswith("torch_")}
    left = json.loads((folder / "status.json").read_text())
    assert (left["state"], left["exit_code"], left["step"]) == ("preempted", 75, losses(folder)[-1][0])
    process = start_process(values, folder)
    process.communicate(timeout=100)
    assert process.returncode == 0
    assert losses(folder) == losses(straight)


def test_a_signal_does_not_cut_off_the_saving_of_a_run_without_data() -> None:
    with StopRequest() as stop:
        stop.waits = True
        stop.no_data("https://host/shard.tar: 6 attempts failed")
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.name() == "https://host/shard.tar: 6 attempts failed"


@pytest.mark.processes
def test_a_killed_run_takes_its_workers_along(four: Path) -> None:
    code = LOADER + (
        "loader = iterate(data, range(100), 2)\n"
        "next(loader)\n"
        "print(*[child.pid for child in psutil.Process().children()], flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code, str(four)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    workers = [psutil.Process(int(pid)) for pid in process.stdout.readline().split()]
    assert len(workers) == 2
    process.kill()
    process.communicate(timeout=30)
    assert not psutil.wait_procs(workers, timeout=15)[1]


Usage = namedtuple("Usage", ["total", "used", "free"])


def plan(index: Index, **changes: Any) -> ReadingPlan:
    stream = Stream([Order(index.shard_sizes.tolist(), 5, 4, 4)], 5)
    size = view_bytes(VIEW, 3)
    settings: dict[str, Any] = {"batch_size": 32, "micro_batch_size": 16, "num_ranks": 2, "local_ranks": 2, **changes}
    return ReadingPlan([index], stream, workers=settings.pop("workers", 3), view_bytes=size, **settings)


def test_shared_memory_is_looked_at_before_the_start(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B95: on 2 processes of this machine 3 workers x 5 batches, and as many of an evaluation beside them."""
    found = plan(open_source(str(four)))
    batch, reports = batches(open_source(str(four)))[0]
    assert not reports
    assert found.view_bytes == sum(tensor.nbytes for tensor in batch.values()) / 8 - batch["index"].element_size()
    assert found.shared_memory == 2 * 3 * SLOTS * 16 * found.view_bytes
    assert found.memory == found.shared_memory + 2 * 2 * 16 * found.view_bytes, "and the two steps that may begin"
    copied = plan(open_source(str(four)), pinned=True)
    assert copied.memory == found.memory + found.shared_memory * PREFETCH / SLOTS, "and what waits in pinned memory"
    evaluated = plan(open_source(str(four)), eval_images=41, eval_batch_size=1, eval_view_bytes=1000)
    assert evaluated.shared_memory == found.shared_memory + 2 * 3 * SLOTS * 1000
    few = plan(open_source(str(four)), eval_images=41, eval_batch_size=8, eval_view_bytes=1000)
    assert few.shared_memory == found.shared_memory + 2 * 21 * 1000, "a small set fills less"
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(64 << 20, 0, found.shared_memory))
    found.check()
    with pytest.raises(InputError, match=r"run\.workers=3: .* do not fit into /dev/shm.*--shm-size=2g\), or lower"):
        evaluated.check()
    plan(open_source(str(four)), workers=0).check()


def remote_index(four: Path, tmp_path: Path, cache_size: float | None) -> Index:
    """The shards as if they were remote; nothing here asks for them."""
    local = open_source(str(four), cache=tmp_path, cache_size=cache_size)
    return Index("https://host/shards", local.shards, local.samples, local.classes, open_cache(tmp_path, cache_size))


def open_cache(folder: Path, cache_size: float | None) -> Any:
    from ssl_vit.data.shard_cache import ShardCache

    return None if cache_size == 0 else ShardCache(folder / "shards", round(cache_size * 1e9) if cache_size else None)


def test_the_cache_is_looked_at_before_the_start(four: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """B31: the limit must hold what is read at a time, and the disk what the limit allows."""
    total = sum(shard.filesize for shard in open_source(str(four)).shards)
    plan(remote_index(four, tmp_path, None)).check()
    with pytest.raises(
        InputError, match=r"data\.cache_size=0\.0001: .* of shards are read at a time, in 4 lanes; give"
    ):
        plan(remote_index(four, tmp_path, 1e-4)).check()
    with pytest.raises(InputError, match=r"data\.cache_size=2e-06: https://host/shards/shard-.* alone has .* GB; give"):
        plan(open_source(str(four), cache_size=2e-6), evaluated=[remote_index(four, tmp_path, 2e-6)]).check()
    monkeypatch.setattr(reading_plan, "SHARED_MEMORY", tmp_path / "none")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(0, 0, total))
    with pytest.raises(InputError, match=r"to be kept there, and there is room for .* set data\.cache to a larger"):
        plan(remote_index(four, tmp_path, None)).check()
    plan(remote_index(four, tmp_path, 0)).check()


def test_the_plan_is_told(four: Path, tmp_path: Path) -> None:
    local = plan(open_source(str(four))).describe()
    assert len(local) == 2
    rated = plan(open_source(str(four))).describe(rate=100.0)[2]
    together = min(3, cores_of_a_process()) * 100
    assert rated.startswith(f"loader: a core reads about 100 images/s, 3 workers about {together}; a process (of 2)")
    assert local[0].startswith("reading: 40 images in 4 shards, 2 processes x 3 workers x 4 lanes, about 0.")
    assert local[1].startswith("read ahead: 17 batches of 0.0 MB a process")
    assert "a request for each image, up to 40 an epoch" in plan(remote_index(four, tmp_path, 0)).describe()[2]
    assert "are read whole into" in plan(remote_index(four, tmp_path, None)).describe()[2]
    assert "each epoch, 0.1 MB at a time" in plan(remote_index(four, tmp_path, 1e-4)).describe()[2]


def test_the_rate_of_a_worker_is_measured_and_nothing_else_happens(four: Path, tmp_path: Path) -> None:
    states = random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist()  # pyright: ignore
    threads = torch.get_num_threads()
    slow = batches(open_source(str(four)), view=Napping())
    assert 0 < (worker_rate(slow, 3) or 0) < 100, "a view takes 10 ms and more"
    assert torch.get_num_threads() == threads
    assert states == (
        random.getstate()[1][:5], np.random.get_state()[1][:5].tolist(), torch.get_rng_state().tolist()  # pyright: ignore
    )  # fmt: skip
    assert worker_rate(batches(remote_index(four, tmp_path, None)), 0) is None


def test_a_rate_that_cannot_be_measured_is_no_error(four: Path, tmp_path: Path) -> None:
    """What is wrong is said when the run comes to it."""
    shutil.copytree(four, tmp_path / "shards")
    index = open_source(str(tmp_path / "shards"))
    for shard in (tmp_path / "shards").glob("*.tar"):
        shard.write_bytes(shard.read_bytes()[:100])
    assert worker_rate(batches(index, on_bad="stop"), 0) is None


def test_the_bytes_of_a_step_follow_the_weights(four: Path, tmp_path: Path) -> None:
    write_shard(tmp_path / "other" / "shard-000000.tar", 10)
    indexes = [open_source(str(four)), open_source(str(tmp_path / "other"))]
    orders = [Order(index.shard_sizes.tolist(), 5, 2, 4) for index in indexes]
    weighted = replace(plan(indexes[0]), indexes=indexes, stream=Stream(orders, 5, [1, 3]), batch_size=32_000)
    small, large = (index.samples["size"].mean() for index in indexes)
    assert small != pytest.approx(large, rel=0.05)
    assert f"about {32_000 * (small + 3 * large) / 4 / 1e6:.1f} MB of images a step" in weighted.describe()[0]


@pytest.mark.parametrize("count", [1, 7, 20, 39, 40, 100])
def test_a_limit_keeps_the_classes(four: Path, count: int) -> None:
    index = open_source(str(four))
    part = limited(index, count)
    assert len(part) == min(count, 40) == part.shard_sizes.sum()
    labels = np.bincount(part.samples["label"], minlength=2)
    assert abs(int(labels[0]) - int(labels[1])) <= 1
    keys = [index.key(i) for i in range(40)]
    assert {part.key(i) for i in range(len(part))} <= set(keys)
    whole, some = Reader(index), Reader(part)
    assert [some.read(i) for i in range(len(part))] == [whole.read(keys.index(part.key(i))) for i in range(len(part))]
    assert (part.fingerprint == index.fingerprint) == (count >= 40)


def test_a_limited_run_resumes_exactly(images: Path, tmp_path: Path) -> None:
    values = tiny_recipe(images, tmp_path / "straight", data__limit=20, evals={"knn": {"k": [5]}})
    straight = train(values)
    assert "data: 20 images in 1 shards; an epoch is 16" in (straight / "train.log").read_text()
    values["run"] |= {"dir": str(tmp_path / "again")}
    again = train(values, resume=str(straight / "checkpoints" / "step_00000008"))
    assert losses(again) == losses(straight)[8:]


def test_any_exception_of_a_decoder_is_a_bad_sample(four: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaced in training; left out, counted and named in evaluation."""
    from PIL import Image

    for error in (SyntaxError("broken PNG"), MemoryError(), struct_error(), ZeroDivisionError(), BadSample("no image")):

        def fail(*args: object, error: Exception = error, **kwargs: object) -> None:
            raise error

        with monkeypatch.context() as patch:
            patch.setattr(Image, "open", fail)
            index = open_source(str(four))
            found, reports = EvalBatches(index, np.arange(3), CentreView((16, 16), 1.0, "bicubic"), PIXELS, 8)[0]
            assert not found
            assert [report.name for report in reports] == [index.describe(i) for i in range(3)]
            with pytest.raises(InputError, match="none of the 8 samples"):
                batches(index)[0]


def struct_error() -> Exception:
    import struct

    return struct.error("unpack requires a buffer of 4 bytes")


@pytest.mark.parametrize("cut", ["half", "member", "empty", "page"])
def test_a_broken_shard_is_named_before_the_first_step(four: Path, tmp_path: Path, cut: str) -> None:
    """B22, B23, B30: at the door, without a traceback, and with what to do.

    A cut shard is never read over with the rest of it lost: what lies behind the cut is unknown, so there is no policy
    to skip it. One that is cut while a run reads it ends the run as resumable.
    """
    shutil.copytree(four, tmp_path / "shards")
    index = open_source(str(tmp_path / "shards"))
    shard = tmp_path / "shards" / "shard-000001.tar"
    data = shard.read_bytes()
    length = {"half": len(data) // 2, "member": int(index.samples[17]["header"]), "empty": 0, "page": 0}[cut]
    shard.write_bytes(data[:length] if cut != "page" else b"<?xml version='1.0'?><Error>AccessDenied</Error>")
    done = in_process("pipelines/pretrain_mae.py", f"data.train={tmp_path / 'shards'}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    message = done.stderr.strip().splitlines()[-1]
    assert f"shard-000001.tar has {shard.stat().st_size} bytes instead of {len(data)}" in message
    assert "copy them again, or if they are right, make it anew: python pipelines/index.py" in message
    for name in ("index.json", "index.samples.npy"):  # shards of others have none: the first look reads them all
        (tmp_path / "shards" / name).unlink()
    with pytest.raises(InputError, match=r"shard-000001\.tar: (the shard is cut short|is not a tar archive)"):
        open_source(str(tmp_path / "shards"))


def test_a_stop_at_a_bad_sample_has_one_sentence(four: Path, tmp_path: Path) -> None:
    """Also from a worker: no traceback of it in the message."""
    shutil.copytree(four, tmp_path / "shards")
    index = open_source(str(tmp_path / "shards"))
    for shard in (tmp_path / "shards").glob("*.tar"):
        with open(shard, "r+b") as file:
            file.seek(512)
            file.write(bytes(200))
    with pytest.raises(InputError, match=r"data\.bad_samples=skip") as caught:
        list(iterate(batches(index, on_bad="stop"), range(5), 1))
    assert "\n" not in str(caught.value)


def test_a_probe_on_unlabelled_data_is_one_sentence(four: Path, tmp_path: Path) -> None:
    shutil.copytree(four, tmp_path / "shards")
    index = open_source(str(tmp_path / "shards"))
    samples = np.array(index.samples)
    samples["label"] = -1
    np.save(tmp_path / "shards" / "index.samples.npy", samples)
    unlabelled = str(tmp_path / "shards")
    for key, message in (
        ("val", "data.val=.*: has no labels; give class folders"),
        ("probe", "data.probe=.*no labels"),
    ):
        values = tiny_recipe(four, tmp_path / "run", data__train=unlabelled, data__val=str(four), evals={"linear": {}})
        values["data"][key] = unlabelled
        with pytest.raises(InputError, match=message) as caught:
            train(values)
        assert "\n" not in str(caught.value)
    values = tiny_recipe(four, tmp_path / "supervised", data__train=unlabelled, data__val=str(four))
    values["objective"] = {"name": "classification"}
    with pytest.raises(InputError, match="40 of 40 images have no label"):
        train(values)


@pytest.mark.processes
def test_stopped_workers_do_not_delay(four: Path) -> None:
    """A loader that is dropped while its workers wait for something ends them at once."""
    view = Blocking((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)
    loader = iterate(batches(open_source(str(four)), view), range(5), 2)
    children, start = psutil.Process().children(), time.monotonic()
    del loader
    assert not psutil.wait_procs(children, timeout=5)[1]
    assert time.monotonic() - start < 4


def test_waiting_steps_say_what_would_help() -> None:
    """3 of 4 parts of the time waiting: four times the workers."""
    text = waiting_advice(0.75, workers=2, images_per_second=100.0, cores=16)
    assert "2 workers give 100 images/s, the steps could take 400; run.workers=8 would keep up" in text
    assert "cores" not in text
    assert "but there are 4 cores: pack smaller images" in waiting_advice(0.75, 2, 100.0, cores=4)


def test_a_slow_loader_is_told_once(images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Views that take 20 ms beside steps that take a few."""
    values = tiny_recipe(images, tmp_path / "run", optim__epochs="8 steps", evals={})
    values["run"] |= {"log_every": 2, "workers": 0}
    with caplog.at_level("WARNING"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            MaskedView, "__call__", lambda self, sample, plain=MaskedView.__call__: slowly(plain, self, sample)
        )
        run(check_recipe(check(Recipe, values)))
    told = [record.getMessage() for record in caplog.records if "steps wait for images" in record.getMessage()]
    assert len(told) == 1
    assert told[0].startswith("step 4: ")


def slowly(function: Any, *arguments: Any) -> Any:
    time.sleep(0.02)
    return function(*arguments)
