"""Packing as a job: other sources, worker processes, parts on several machines, kills, smaller images."""

from __future__ import annotations

import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
import tarfile
import time
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import psutil
import pytest
import tifffile
import torch
from conftest import ROOT, in_process
from PIL import Image
from test_pack import write

from ssl_vit.config import InputError
from ssl_vit.data import pack as pack_module
from ssl_vit.data.decode import decode
from ssl_vit.data.images import open_images
from ssl_vit.data.index import build_index, read_index
from ssl_vit.data.loader import Pixels, TrainBatches
from ssl_vit.data.mixing import ENOUGH, mixing
from ssl_vit.data.order import Order, Stream
from ssl_vit.data.pack import PackOptions, pack
from ssl_vit.data.processes import cores, spread
from ssl_vit.data.reader import Reader
from ssl_vit.data.sources import open_source
from ssl_vit.data.tars import ShardWriter, member_name
from ssl_vit.data.verify import verify
from ssl_vit.data.views import CropView


def encoded(pixels: np.ndarray, kind: str = "PNG", **settings: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind, **settings)
    return file.getvalue()


def noise(height: int, width: int, *channels: int, seed: int = 0) -> np.ndarray:
    """Smooth colours with some noise, which JPEG keeps well."""
    shape = (height, width, *channels)
    ramp = np.linspace(0, 200, width)[None, :, *(None for _ in channels)]
    return (ramp + np.random.default_rng(seed).integers(0, 50, shape)).astype(np.uint8)


def bands(photometric: str, pixels: np.ndarray, **settings: Any) -> bytes:
    """A TIFF of many bands or pages."""
    tifffile.imwrite(file := io.BytesIO(), pixels, photometric=photometric, **settings)
    return file.getvalue()


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a folder, names and bytes."""
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def facts(folder: Path) -> list[tuple[str, int, bytes]]:
    """Source path, label and bytes of each packed sample, sorted."""
    index, found = read_index(folder), []
    for shard in index.shards:
        with tarfile.open(folder / shard.url) as tar:
            members = {info.name: tar.extractfile(info).read() for info in tar}  # type: ignore[union-attr]
        found += [json.loads(data)["path"] for name, data in members.items() if name.endswith(".json")]
    labels, reader = index.samples["label"].tolist(), Reader(index)
    return sorted((path, labels[i], reader.read(i)) for i, path in enumerate(found))


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two classes of 20 pictures and two files that are none."""
    files = {f"{c}/{i:02d}.png": encoded(np.full((4, 4), ord(c) + i, np.uint8)) for c in "ab" for i in range(20)}
    return write(tmp_path_factory.mktemp("packing") / "images", files | {"a/bad.jpg": b"<html>", "b/empty.png": b""})


# sources


def test_a_list_of_files(tree: Path, tmp_path: Path) -> None:
    rows = [(path, path.parent.name) for path in sorted(tree.rglob("*.png"))][::3]
    relative = "".join(f"images/{path.relative_to(tree)}\t{name}\r\n\n" for path, name in rows)
    (tree.parent / "list.txt").write_text(f"{relative}images/a/nowhere.png\tb\n")
    summary = pack(f"list:{tree.parent / 'list.txt'}", tmp_path / "relative", shuffle=False)
    assert (summary["classes"], summary["packed"], summary["refused"]) == (["a", "b"], len(rows), 1)
    assert "images/a/nowhere.png" in (tmp_path / "relative" / "refused.jsonl").read_text()
    assert [data for _, _, data in facts(tmp_path / "relative")] == [path.read_bytes() for path, _ in rows]
    assert [label for _, label, _ in facts(tmp_path / "relative")] == ["ab".index(name) for _, name in rows]

    (tmp_path / "numbers.txt").write_text("".join(f"{path}\t{7 * (name == 'a')}\n" for path, name in rows))
    assert pack(f"list:{tmp_path / 'numbers.txt'}", tmp_path / "n")["classes"] == [str(i) for i in range(8)]
    assert {label for _, label, _ in facts(tmp_path / "n")} == {0, 7}
    (tmp_path / "plain.txt").write_text("".join(f"{path}\n" for path, _ in rows))
    assert pack(f"list:{tmp_path / 'plain.txt'}", tmp_path / "plain")["classes"] is None
    assert not read_index(tmp_path / "plain").labelled


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no images; write one path a line"),
        ("a.png\tx\nb.png\n", "line 2 is 'b.png'; allowed: a path, or a path, one TAB and a label"),
        ("a.png\n\nb.png\tx\ty\n", r"line 3 is 'b\.png\\tx\\ty'"),
        ("a.png\t\n", "line 1"),
        ("nowhere.png\n", r"1 of 1 images refused \(nowhere.png No such file or directory\)"),
    ],
)
def test_lists_that_are_none(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text(text)
    with pytest.raises(InputError, match=message):
        pack(f"list:{tmp_path / 'list.txt'}", tmp_path / "out")
    with pytest.raises(InputError, match="No such file"):
        pack(f"list:{tmp_path / 'no.txt'}", tmp_path / "out")
    assert not list(tmp_path.glob(".out*"))


def test_shards_are_packed_again(tree: Path, tmp_path: Path) -> None:
    pack(str(tree), tmp_path / "first", maxcount=7)
    again = pack(f"shards:{tmp_path / 'first'}", tmp_path / "again", maxcount=11, seed=5)
    assert (again["shards"], again["classes"], again["refused"]) == (4, ["a", "b"], 0)
    assert facts(tmp_path / "again") == facts(tmp_path / "first"), "paths, labels and bytes"
    assert pack(f"shards:{tmp_path}/first/shard-*.tar", tmp_path / "bare", labels="none")["classes"] is None
    assert not read_index(tmp_path / "bare").labelled

    picture = encoded(noise(4, 4))
    members = [("x/k1.png", picture), ("x/k1.cls", b"3"), ("k2.json", b'{"label": 5}'), ("k2.png", picture)]
    with tarfile.open(tmp_path / "foreign.tar", "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    assert pack(f"shards:{tmp_path}/foreign.tar", tmp_path / "ours")["classes"] is None
    assert facts(tmp_path / "ours") == [("k2", 5, picture), ("x/k1", 3, picture)]


def test_a_shard_that_cannot_be_read_stops_it(tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(str(tree), tmp_path / "first")
    images = open_images(f"shards:{tmp_path / 'first'}")
    os.truncate(tmp_path / "first" / "shard-000000.tar", 700)
    for fail in (images.name, images.read):
        with pytest.raises(InputError, match=r"shard-000000\.tar"):
            fail(20)
    monkeypatch.setattr("ssl_vit.data.pack.open_images", lambda *words: images)
    with pytest.raises(InputError, match=r"shard-000000\.tar"):
        pack("any", tmp_path / "out", max_refused=1)
    assert not (tmp_path / "out").exists()


def test_a_folder_of_parquet(tmp_path: Path) -> None:
    """B12: bytes as stored, classes from the file's own schema."""
    cells = [{"bytes": encoded(noise(8, 8, 3, seed=i), "JPEG"), "path": None} for i in range(6)]
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["x", "y", "z"])})
    rows = datasets.Dataset.from_dict({"picture": cells, "kind": [0, 2, 1, 0, 2, 2]}, features)
    for part in range(2):
        rows.select(range(3 * part, 3 * part + 3)).to_parquet(tmp_path / "p" / f"train-{part}.parquet")
    assert pack(f"hf:{tmp_path / 'p'}", tmp_path / "out")["classes"] == ["x", "y", "z"]
    found = {(label, data) for _, label, data in facts(tmp_path / "out")}
    assert found == {(label, cell["bytes"]) for label, cell in zip([0, 2, 1, 0, 2, 2], cells, strict=True)}


# processes


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_any_number_of_processes_writes_the_same_bytes(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pack_module, "_CHUNK", 2)
    for workers in (1, 2, 3):
        pack(str(tree), tmp_path / str(workers), workers=workers, maxcount=9)
    assert contents(tmp_path / "1") == contents(tmp_path / "2") == contents(tmp_path / "3")
    assert verify(tmp_path / "1", workers=2) == []


def _square(number: int) -> int:
    if number == 7:
        raise InputError("seven: is not allowed")
    return number * number


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_work_is_spread_in_order_and_a_mistake_keeps_its_message() -> None:
    assert list(spread(_square, range(7), 3)) == [number * number for number in range(7)]
    with pytest.raises(InputError, match=r"^seven: is not allowed$"):
        list(spread(_square, range(20), 2))
    assert not multiprocessing.active_children()


def _die(number: int) -> int:
    if number == 3:
        signal.raise_signal(signal.SIGKILL)
    return number


@pytest.mark.processes
def test_a_killed_worker_is_one_message() -> None:
    before = signal.getsignal(signal.SIGCHLD)
    with pytest.raises(InputError, match=r"a worker process was killed .*memory.*workers="):
        list(spread(_die, range(10), 2))
    assert signal.getsignal(signal.SIGCHLD) is before


def test_members_are_those_of_tarfile(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "s.tar")
    sizes = (0, 1, 511, 512, 100_000)
    for number, size in enumerate(sizes):
        writer.add(f"{number:09d}", "jpeg", bytes(size), 2**31 - 1, {"path": "é" * size})
    writer.close()
    with tarfile.open(tmp_path / "s.tar") as tar:
        infos = tar.getmembers()
    data = (tmp_path / "s.tar").read_bytes()
    for info in infos:
        plain = tarfile.TarInfo(info.name)
        plain.size = info.size
        assert data[info.offset : info.offset + 512] == plain.tobuf(tarfile.USTAR_FORMAT)
    assert [info.size for info in infos[::3]] == list(sizes)


# parts


def test_parts_are_one_corpus(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    for part, left in ((4, "parts 1, 2, 3 of 5 are"), (2, "parts 1, 3 of 5 are"), (1, "part 3 of 5 is")):
        if part == 4:
            pack(str(tree), out, part="5/5", maxcount=3)
        summary = pack(str(tree), out, part=f"{part}/5", maxcount=3)
        assert summary["missing"] == [p for p in range(1, 6) if str(p) in left.partition(" of")[0]]
        for read in (open_source, lambda spec: read_index(Path(spec)), lambda spec: verify(Path(spec))):
            with pytest.raises(InputError, match=f"{left} missing; pack them with part=I/5"):
                read(str(out))
    done = in_process("pipelines/index.py", str(out))
    assert (done.returncode, "part 3 of 5 is missing" in done.stderr) == (2, True)
    assert pack(str(tree), out, part="3/5", maxcount=3) | {"found": 42, "packed": 40, "missing": []} == pack(
        str(tree), tmp_path / "again", part="1/1", maxcount=3
    ) | {"shards": 15, "bytes": sum(path.stat().st_size for path in out.glob("*.tar"))}
    index = read_index(out)
    assert {shard.url for shard in index.shards} == {f"shard-{i:06d}.tar" for i in range(15)}
    assert facts(out) == facts(tmp_path / "again")
    keys = [index.key(i) for i in range(len(index))]
    assert keys == sorted(set(keys)), "positions in one order over the whole source"
    assert keys == [read_index(tmp_path / "again").key(i) for i in range(40)]
    assert verify(out) == []
    assert sorted(path.name for path in tmp_path.iterdir()) == ["again", "out"]


@pytest.mark.parametrize("part", ["0/2", "3/2", "1", "a/b", "1/2/3"])
def test_parts_that_are_none(part: str, tree: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"allowed: i/n with i from 1 to n"):
        pack(str(tree), tmp_path / "out", part=part)
    assert not list(tmp_path.iterdir())


def test_more_parts_than_images_and_a_part_refused_whole(tmp_path: Path) -> None:
    write(tmp_path / "images", {"1.png": encoded(noise(4, 4)), "2.png": b""})
    for part in (1, 2, 3):
        summary = pack(str(tmp_path / "images"), tmp_path / "out", part=f"{part}/3", max_refused=0.5)
    assert (summary["packed"], summary["refused"], summary["shards"]) == (1, 1, 1)  # pyright: ignore
    assert verify(tmp_path / "out") == []


def test_too_many_refused_images_keep_the_parts(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(tree), out, part="1/2")
    with pytest.raises(InputError, match=r"2 of 42 images refused .*max_refused=0\.05, which keeps the parts"):
        pack(str(tree), out, part="2/2", max_refused=0.01)
    assert pack(str(tree), out, part="2/2", max_refused=0.05)["packed"] == 40


@pytest.mark.processes
def test_one_process_a_part(tree: Path, tmp_path: Path) -> None:
    pack(str(tree), tmp_path / "out", part="1/2")
    code = "import fcntl, sys; file = open(sys.argv[1], 'w'); fcntl.lockf(file, fcntl.LOCK_EX); print(); input()"
    lock = tmp_path / ".out.packing" / "journal" / "part-0002.lock"
    with subprocess.Popen(
        [sys.executable, "-uc", code, lock], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout
        other.stdout.readline()
        with pytest.raises(InputError, match="another process is packing part 2 of it"):
            pack(str(tree), tmp_path / "out", part="2/2")
        other.communicate("go")
    assert pack(str(tree), tmp_path / "out", part="2/2")["missing"] == []


@pytest.mark.processes
def test_parts_at_the_same_time(tree: Path, tmp_path: Path) -> None:
    for part in range(1, 5):
        pack(str(tree), tmp_path / "one-by-one", part=f"{part}/4", maxcount=3)
    fork = multiprocessing.get_context("fork")
    words = [(str(tree), str(tmp_path / "out"), f"part={part}/4", "maxcount=3", "workers=1") for part in range(1, 5)]
    processes = [fork.Process(target=in_process, args=("pipelines/pack.py", *some)) for some in words]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert contents(tmp_path / "out") == contents(tmp_path / "one-by-one")
    assert not list(tmp_path.glob(".*"))


# kills


class Killed(BaseException):
    """Nothing catches it, as nothing catches SIGKILL."""


def steps_until(monkeypatch: pytest.MonkeyPatch, last: int) -> None:
    """Let the process die just before its ``last``-th step that changes a disk; texts are left half-written."""
    left = [last]

    def dying(step: Callable[..., Any]) -> Callable[..., Any]:
        def run(*words: Any, **settings: Any) -> Any:
            if left[0] == 0:
                if step is write_text:
                    step(words[0], words[1][: len(words[1]) // 2], **settings)
                raise Killed
            left[0] -= 1
            return step(*words, **settings)

        return run

    write_text = Path.write_text
    for place, name in (
        (ShardWriter, "add"), (ShardWriter, "close"), (np, "save"), (Path, "write_text"), (Path, "rename"),
        (Path, "mkdir"), (Path, "unlink"), (pack_module.spread.__globals__["os"], "replace"), (shutil, "rmtree"),
    ):  # fmt: skip
        monkeypatch.setattr(place, name, dying(getattr(place, name)))


@pytest.mark.parametrize("parts", [1, 2])
def test_killed_at_any_step_and_resumed_it_is_the_same_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, parts: int
) -> None:
    """B07."""
    monkeypatch.setattr("os.fsync", lambda file: None)
    files = {f"{c}/{i}.png": encoded(np.full((4, 4), ord(c) + i, np.uint8)) for c in "ab" for i in range(5)}
    tree = write(tmp_path / "images", files | {"a/bad.jpg": b"<html>", "b/empty.png": b""})

    def run(out: Path) -> None:
        for part in range(1, parts + 1):
            if not out.exists():  # the first part joins all if only that was left
                pack(str(tree), out, maxcount=3, part=f"{part}/{parts}", workers=1)

    run(tmp_path / "whole")
    whole = contents(tmp_path / "whole")
    for step in range(1000):
        out = tmp_path / f"{step}"
        with pytest.MonkeyPatch.context() as patch:
            steps_until(patch, step)
            try:
                run(out)
                break
            except Killed:
                pass
        if not (out / "index.json").exists():
            with pytest.raises(InputError):
                open_source(str(out))
            run(out)
        assert contents(out) == whole, f"killed at step {step}"
    assert step > 40  # pyright: ignore[reportPossiblyUnboundVariable]


def test_what_is_finished_is_not_made_again_and_never_mixed(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """B07."""
    images, out = tmp_path / "images", tmp_path / "out"
    shutil.copytree(tree, images)
    with pytest.MonkeyPatch.context() as patch:
        steps_until(patch, 30)
        with pytest.raises(Killed):
            pack(str(images), out, maxcount=8, workers=1)
    capsys.readouterr()
    for change, message in (({"maxcount": 9}, "maxcount 8 -> 9"), ({"labels": "none"}, "labels 'auto' -> 'none'")):
        with pytest.raises(InputError, match=f"unfinished packing.*{message}.*remove that folder"):
            pack(str(images), out, **{"maxcount": 8} | change)
    (images / "a" / "new.png").write_bytes(encoded(noise(4, 4)))
    with pytest.raises(InputError, match=r"found 42 -> 43, fingerprint"):
        pack(str(images), out, maxcount=8)
    (images / "a" / "new.png").unlink()
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / ".out.packing" / "journal").glob("*.json")}
    assert len(finished) == 2
    written: list[Path] = []
    monkeypatch.setattr(pack_module, "ShardWriter", lambda path: written.append(path) or ShardWriter(path))
    pack(str(images), out, maxcount=8, max_refused=0.5, workers=2)
    assert [path.name for path in written] == [f"part-0001-{number:06d}.tar" for number in (2, 3, 4)]
    assert "going on after" in capsys.readouterr().out


@pytest.mark.processes
def test_a_killed_packing_goes_on(tmp_path: Path) -> None:
    """B07: kill -9 of the main process alone; its workers end by themselves."""
    images = write(tmp_path / "images", {f"{i:05d}.png": encoded(noise(4, 4, seed=i)) for i in range(1500)})
    out = tmp_path / "out"
    words = ["pipelines/pack.py", str(images), str(out), "maxcount=300", "workers=2"]
    process = multiprocessing.get_context("fork").Process(target=in_process, args=words)
    process.start()
    while process.is_alive() and len(list(tmp_path.glob(".out.packing/journal/*.json"))) < 2:
        time.sleep(0.005)
    assert process.pid
    workers = psutil.Process(process.pid).children()
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert len(workers) == 2
    assert not out.exists()
    done = in_process(*words)
    assert (done.returncode, "going on after" in done.stdout) == (0, True)
    pack(str(images), tmp_path / "whole", maxcount=300)
    assert contents(out) == contents(tmp_path / "whole")
    assert not psutil.wait_procs(workers, timeout=30)[1]


def test_a_full_disk_is_one_message_and_what_is_finished_stays(
    tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*words: Any) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(ShardWriter, "close", full)
        with pytest.raises(InputError, match=r"out: cannot be written: No space left on device; the same command"):
            pack(str(tree), tmp_path / "out")
    assert pack(str(tree), tmp_path / "out")["packed"] == 40


# smaller images


def test_only_larger_images_are_encoded_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    profile = {"icc_profile": b"some profile"}
    deep = Image.fromarray((np.arange(100 * 120).reshape(100, 120) * 5).astype(np.uint16))
    deep.save(file := io.BytesIO(), "PNG")
    large = {
        "photo.jpg": encoded(noise(100, 160, 3), "JPEG", quality=95, exif=exif, progressive=True, **profile),
        "grey.jpg": encoded(noise(90, 80), "JPEG"),
        "scan.tif": encoded(noise(64, 300, 3), "TIFF"),
    }
    Image.fromarray(noise(96, 96, 4), "CMYK").save(cmyk := io.BytesIO(), "JPEG")
    large["print.jpg"] = cmyk.getvalue()
    kept = {
        "small.jpg": encoded(noise(48, 300, 3), "JPEG", exif=exif),
        "alpha.png": encoded(noise(100, 100, 4)),
        "deep.png": file.getvalue(),
        "bands.tif": bands("rgb", noise(64, 64, 5), extrasamples=(0, 0)),
        "pages.tif": bands("minisblack", noise(4, 64, 64)),
    }
    pack(str(write(tmp_path / "images", large | kept)), tmp_path / "out", resize=48, quality=85)
    packed = {path: data for path, _, data in facts(tmp_path / "out")}
    assert {name: packed[name] for name in kept} == kept
    sizes = {"photo.jpg": (48, 77), "grey.jpg": (48, 54), "scan.tif": (225, 48), "print.jpg": (48, 48)}
    for name, size in sizes.items():
        image = Image.open(io.BytesIO(packed[name]))
        assert (image.format, image.size, dict(image.getexif())) == ("JPEG", size, {})
        assert image.mode == ("L" if name == "grey.jpg" else "RGB")
        assert not {"progressive", "icc_profile"} & set(image.info)
        before, after = (decode(data).float() for data in (large[name], packed[name]))
        expected = torch.nn.functional.interpolate(before[None], after.shape[1:], mode="bicubic", antialias=True)[0]
        assert (expected - after).abs().mean() < 8, "the same pixels, turned once"
    printed = capsys.readouterr().out
    assert "resized  4 images to 48 pixels, re-encoded as JPEG, which loses detail for good" in printed
    assert "4 others copied" in printed
    assert "1 5xuint8, 1 4 pages of L" in printed
    assert "prefer resize=384 to 512 for MAE and BEiT" in printed
    index = read_index(tmp_path / "out")
    names = [member_name(Path(index.path(0)), int(header)) for header in index.samples["header"]]
    assert sorted(name.rpartition(".")[2] for name in names) == ["jpg"] * 5 + ["png"] * 2 + ["tif"] * 2
    assert pack(str(tmp_path / "images"), tmp_path / "as-they-are")["short_sides"] == {"32-63": 1, "64-127": 8}
    assert {path: data for path, _, data in facts(tmp_path / "as-they-are")} == large | kept
    assert "resized" not in capsys.readouterr().out


def test_a_broken_large_image_is_refused(tmp_path: Path) -> None:
    whole = encoded(noise(200, 200, 3), "JPEG")
    write(tmp_path / "images", {"good.jpg": whole, "cut.jpg": whole[: len(whole) // 2]})
    assert pack(str(tmp_path / "images"), tmp_path / "out", resize=64, max_refused=0.5)["refused"] == 1


# index and verify


def test_sorted_shards_are_told_from_mixed_ones(tmp_path: Path) -> None:
    generator = np.random.default_rng(0)
    for classes, size in ((2, 64), (10, 1000), (1000, 100_000)):
        labels = np.sort(generator.integers(0, classes, size))
        window, found, expected = mixing(labels)
        assert found < ENOUGH * expected, "sorted"
        assert window == min(4096, size // 16)
        shuffled = [mixing(generator.permutation(labels)).found for _ in range(20)]
        assert np.mean(shuffled) == pytest.approx(expected, rel=0.02)
        assert min(shuffled) > ENOUGH * expected, "no set mixed by chance"


def test_index_advises_to_mix_what_is_sorted(tmp_path: Path) -> None:
    files = {f"{c}/{i:03d}.png": encoded(np.full((4, 4), i, np.uint8)) for c in "abcd" for i in range(40)}
    pack(str(write(tmp_path / "images", files)), tmp_path / "sorted", shuffle=False, maxcount=50)
    pack(f"shards:{tmp_path / 'sorted'}", tmp_path / "mixed")
    done = in_process("pipelines/index.py", str(tmp_path / "sorted"), "workers=2")
    assert done.returncode == 0, done.stderr
    assert "indexed 160 samples in 4 shards, 4 labels" in done.stdout
    assert "10 stored neighbours hold 1.0 classes on average, 3.8 if they were shuffled" in done.stdout
    assert f"python pipelines/pack.py shards:{tmp_path / 'sorted'} OUT" in done.stdout
    done = in_process("pipelines/index.py", str(tmp_path / "mixed"))
    assert "  mixed    10 stored neighbours" in done.stdout


def test_index_and_verify_name_every_bad_shard(tree: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    pack(str(tree), out, maxcount=10)
    data = {number: (out / f"shard-00000{number}.tar").read_bytes() for number in range(4)}
    (out / "shard-000001.tar").write_bytes(bytes(len(data[1])))
    (out / "shard-000003.tar").write_bytes(b"<html>".ljust(len(data[3])))
    for workers in (1, 2):
        findings = verify(out, workers)
        for number in range(4):
            assert any(f"shard-00000{number}.tar" in line for line in findings) == (number in (1, 3))
        with pytest.raises(InputError, match=r"shard-000001\.tar.*; .*shard-000003\.tar: is not a tar"):
            build_index(sorted(out.glob("*.tar")), out, workers=workers)


def test_a_shard_of_equal_length_with_other_images_is_refused(tmp_path: Path) -> None:
    """A tar's length is a multiple of 10,240 bytes, so it says little."""
    for name, first in (("one", 0), ("two", 100)):
        files = {f"{i}.png": encoded(noise(20, 20, seed=first + i)) for i in range(30)}
        pack(str(write(tmp_path / f"{name}-images", files)), tmp_path / name, maxcount=10)
    shard = "shard-000001.tar"
    assert (tmp_path / "one" / shard).stat().st_size == (tmp_path / "two" / shard).stat().st_size
    shutil.copy(tmp_path / "two" / shard, tmp_path / "one" / shard)
    for spec in ("one", "one/shard-{000000..000001}.tar"):
        with pytest.raises(InputError, match=rf"1 of \d shards hold other images than the index says: .*{shard}; copy"):
            open_source(str(tmp_path / spec))
    assert any(f"{shard}: its bytes have changed" in line for line in verify(tmp_path / "one"))
    assert len(open_source(str(tmp_path / "two"))) == 30


def test_large_small_and_long_images_among_others(tmp_path: Path) -> None:
    """B41: what is too large is refused by name, and all others become views."""
    header = bytearray(encoded(noise(4, 4)))
    header[16:24] = struct.pack(">II", 20_000, 20_000)
    header[29:33] = struct.pack(">I", zlib.crc32(header[12:29]))
    sizes = {"strip": (40, 30_000), "tower": (30_000, 40), "dot": (1, 1), **{f"n{i}": (50, 60) for i in range(6)}}
    files = {f"{name}.png": encoded(np.full(size, 7, np.uint8)) for name, size in sizes.items()}
    summary = pack(str(write(tmp_path / "images", files | {"scan.png": bytes(header)})), tmp_path / "out")
    assert (summary["packed"], summary["short_sides"]) == (9, {"0-31": 1, "32-63": 8})
    assert "scan.png" in (refused := (tmp_path / "out" / "refused.jsonl").read_text())
    assert "has 20000 x 20000 pixels, more than max_pixels=178956970" in refused
    index = open_source(str(tmp_path / "out"))
    view, pixels = CropView((32, 32), (0.2, 1.0), (0.75, 1.33), 0.5, "bicubic"), Pixels((0.5,) * 3, (0.25,) * 3)
    batch, reports = TrainBatches([index], Stream([Order([9], 0, 1, 9)], 0), view, pixels, 0, 9, 9)[0]
    assert (batch["image"] == 7).all()
    assert not reports


# documentation


def test_the_documented_commands(tree: Path, tmp_path: Path) -> None:
    shutil.copytree(tree, tmp_path / "data" / "images")
    pack(str(tree), tmp_path / "their" / "shards", shuffle=False)
    text = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").partition("## Packing")[2].partition("\n## ")[0]
    commands = [line.split("#")[0].split() for line in text.splitlines() if line.startswith("python pipelines/")]
    assert len(commands) == 7
    for _, script, *words in commands:
        done = in_process(script, *[re.sub("/(?=data/|their/)", f"{tmp_path}/", word) for word in words])
        assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "data").iterdir()} == {
        "images", "shards", ".corpus.packing", "shards384", "shards512", "mixed",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ({}, cores()),
        ({"verify": False}, 1),
        ({"verify": False, "resize": 64}, cores()),
        ({"verify": False, "workers": 3}, 3),
    ],
)
def test_processes_where_there_is_something_to_decode(words: dict[str, Any], expected: int) -> None:
    assert PackOptions.model_validate(words).processes == expected
