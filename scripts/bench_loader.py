#!/usr/bin/env python
"""Image loaders side by side: the same files, cores, batch and crops.

    python scripts/bench_loader.py --data imagenet-sample.tar
    python scripts/bench_loader.py --data FOLDER --rounds 7 --out loader.json
    python scripts/bench_loader.py --data imagenet-sample.tar --epochs 20        memory of ours over 20 epochs, alone
    python scripts/bench_loader.py --data imagenet-sample.tar --remote           ours over HTTP, 50 ms away, alone

Contenders: (a) ours end to end, shards to stacked batches; (b) the official MAE loader's way: a folder of files, PIL,
torchvision's transforms to normalised floats, DataLoader; (c) webdataset's pipeline over the same shards, decoded by
PIL, the same transforms; (d) decoding and cropping alone in one thread a core: the limit; (e) ours over shards packed
with resize=384; ours with the 2 + 10 crops of iBOT, decoded once; litdata and mosaicml-streaming if installed.
Every image is one RandomResizedCrop of 224 px (scale 0.2 to 1, bicubic) and a flip, drawn anew by each contender.

Rounds are interleaved; a row has the median and range of the rounds. CPU time stands beside images/s because it hardly
depends on what else the machine does. Memory is the resident memory of all processes together, pages they share
counted in each, and of the largest worker.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import importlib.util
import io
import json
import multiprocessing
import os
import re
import statistics
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch
from PIL import Image
from timm.data.constants import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor
from torch.utils.data import DataLoader, RandomSampler

from ssl_vit.data.decode import BadSample, decode
from ssl_vit.data.formats import EXTENSIONS, extension_of
from ssl_vit.data.index import Index
from ssl_vit.data.loader import Pixels, TrainBatches, View, iterate
from ssl_vit.data.multicrop import ColourView, MaskRule, MultiCropView
from ssl_vit.data.order import Order, Stream
from ssl_vit.data.pack import PackOptions, pack
from ssl_vit.data.sources import open_source
from ssl_vit.data.views import CropView

SIDE, SCALE, RATIO = 224, (0.2, 1.0), (3 / 4, 4 / 3)
VIEW = CropView((SIDE, SIDE), SCALE, RATIO, flip=0.5, interpolation="bicubic")
OURS, OFFICIAL, LIMIT = "(a) ours", "(b) official MAE", "(d) decode + crop only"


class Setting(NamedTuple):
    """What all contenders share."""

    files: Path
    """A folder with one folder of image files."""
    shards: Path
    cores: int
    batch: int
    images: int
    """Images of a round."""


Contender = Callable[[Setting], Iterable[int]]
"""Yields the number of images of each batch, at least ``images`` and the warm-up in all."""


def batches_of(index: Index, batch: int, view: View = VIEW, num_lanes: int = 64) -> TrainBatches:
    """Our training set."""
    stream = Stream([Order(index.shard_sizes.tolist(), seed=0, num_lanes=num_lanes)], seed=0)
    return TrainBatches([index], stream, view, Pixels(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), 0, batch, batch)


def ours(shards: Path, view: View = VIEW) -> Contender:
    """Batches as the trainer reads them, uint8; they are normalised on the device."""

    def read(setting: Setting) -> Iterator[int]:
        loaded = iterate(batches_of(open_source(str(shards)), setting.batch, view), range(10**9), setting.cores)
        return (len(batch["index"]) for batch, _ in loaded)

    return read


def float_transform() -> Any:
    """The transforms of the official loader."""
    from torchvision import transforms

    return transforms.Compose([
        transforms.RandomResizedCrop(SIDE, scale=SCALE, interpolation=transforms.InterpolationMode.BICUBIC),
        transforms.RandomHorizontalFlip(),
        transforms.ToTensor(),
        transforms.Normalize(IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD),
    ])  # fmt: skip


def official(setting: Setting) -> Iterator[int]:
    """ImageFolder and DataLoader, endless, so that starting workers does not count."""
    from torchvision.datasets import ImageFolder

    dataset = ImageFolder(str(setting.files), float_transform())
    sampler = RandomSampler(dataset, num_samples=10**6)
    loader = DataLoader(dataset, setting.batch, sampler=sampler, num_workers=setting.cores, drop_last=True)
    return (len(images) for images, _ in loader)


def webdataset(setting: Setting) -> Iterator[int]:
    """The pipeline of webdataset's documentation."""
    wds: Any = importlib.import_module("webdataset")  # it names its parts for no type checker
    urls = [str(path) for path in sorted(setting.shards.glob("*.tar"))]
    dataset = (
        wds.WebDataset(urls, shardshuffle=len(urls), seed=0, empty_check=False)
        .repeat()
        .shuffle(256, initial=32)
        .decode("pil")
        .to_tuple("jpg;jpeg;png;webp")
        .map_tuple(float_transform())
        .batched(setting.batch)
    )
    loader = wds.WebLoader(dataset, batch_size=None, num_workers=setting.cores)
    return (len(images) for (images,) in loader)


def litdata(setting: Setting) -> Iterator[int]:
    """litdata's chunks of image files, decoded by PIL."""
    lit: Any = importlib.import_module("litdata")
    folder = setting.files.parent / "litdata"
    if not folder.exists():
        # fork: it would set another way of starting processes for all contenders
        lit.optimize(
            file_item, image_files(setting), str(folder), chunk_bytes="16MB", num_workers=1, start_method="fork"
        )
    dataset = lit.StreamingDataset(str(folder), shuffle=True, drop_last=True, transform=OfficialItem())
    return endless(lit.StreamingDataLoader(dataset, batch_size=setting.batch, num_workers=setting.cores))


def mosaic(setting: Setting) -> Iterator[int]:
    """mosaicml-streaming's MDS shards of image files, decoded by PIL."""
    streaming: Any = importlib.import_module("streaming")
    folder, view = setting.files.parent / "mosaic", OfficialItem()
    if not folder.exists():
        with streaming.MDSWriter(out=str(folder), columns={"image": "bytes"}, size_limit="16mb") as writer:
            for path in image_files(setting):
                writer.write(file_item(path))

    class Views(streaming.StreamingDataset):
        def __getitem__(self, at: Any) -> Any:
            return view(super().__getitem__(at))

    dataset = Views(local=str(folder), shuffle=True, batch_size=setting.batch)
    return endless(DataLoader(dataset, setting.batch, num_workers=setting.cores))


def image_files(setting: Setting) -> list[str]:
    """Paths of all images."""
    return sorted(str(path) for path in setting.files.rglob("*") if path.is_file())


def file_item(path: str) -> dict[str, bytes]:
    """What peers store of an image: its file, as it is."""
    return {"image": Path(path).read_bytes()}


class OfficialItem:
    """A stored file as the official loader's tensor."""

    def __init__(self) -> None:
        self.transform = float_transform()

    def __call__(self, item: dict[str, bytes]) -> Tensor:
        """One view."""
        return self.transform(Image.open(io.BytesIO(item["image"])).convert("RGB"))


def endless(loader: Iterable[Tensor]) -> Iterator[int]:
    """Epoch after epoch."""
    while True:
        yield from map(len, loader)


def limit(setting: Setting) -> Iterator[int]:
    """Batches of images that are decoded and cropped, and nothing else, by one thread a core."""
    files = [Path(path).read_bytes() for path in image_files(setting)]

    def crop(start: int) -> int:
        for i in range(start, start + setting.batch):
            VIEW.crop(decode(files[i % len(files)]))
        return setting.batch

    with ThreadPoolExecutor(setting.cores) as pool:
        count = -(-setting.images // setting.batch) + 2 * setting.cores
        yield from pool.map(crop, range(0, count * setting.batch, setting.batch))


class Usage:
    """Of this process and its children while the block runs: peak resident bytes, sampled, and CPU seconds."""

    def __enter__(self) -> Usage:
        self.peak = self.worker = 0
        self.cpu = -cpu_seconds()
        self._done = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.cpu += cpu_seconds()
        self._done.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._done.wait(0.5):
            own, workers = resident()
            self.peak = max(self.peak, own + sum(workers))
            self.worker = max([self.worker, *workers])


def processes() -> list[psutil.Process]:
    """This process, and its children."""
    return [psutil.Process(), *psutil.Process().children(recursive=True)]


def resident() -> tuple[int, list[int]]:
    """Resident bytes of this process, and of each of its children."""
    own, *children = [process.memory_info().rss for process in processes()]
    return own, children


def cpu_seconds() -> float:
    """What this process and its children have computed."""
    return sum(sum(process.cpu_times()[:2]) for process in processes())


def timed(contender: Contender, setting: Setting) -> tuple[float, Usage, float]:
    """Images a second after each worker has given two batches, what that used, and CPU milliseconds an image."""
    batches = iter(contender(setting))
    for _ in range(2 * setting.cores):
        next(batches)
    images, start = 0, time.perf_counter()
    with Usage() as usage:
        while images < setting.images:
            images += next(batches)
        seconds = time.perf_counter() - start
    return images / seconds, usage, usage.cpu / images * 1e3


def prepared(data: Path, scratch: Path, setting: argparse.Namespace) -> Setting:
    """The image files in a folder of their own, and packed into shards, more of them than workers."""
    files = scratch / "files"
    (files / "all").mkdir(parents=True)
    count = 0
    for name, content in contents(data):
        try:
            decode(content)
        except BadSample as error:
            print(f"left out: {name}: {error}", file=sys.stderr)
            continue
        (files / "all" / f"{count:06d}.{extension_of(name)}").write_bytes(content)
        count += 1
    if not count:
        sys.exit(f"{data}: no images in it; give a folder of image files or a tar of them")
    pack(str(files), scratch / "shards", maxcount=max(count // 8, 1))
    cores = len(os.sched_getaffinity(0))
    return Setting(files, scratch / "shards", cores, setting.batch, max(setting.images, count))


def contents(data: Path) -> Iterator[tuple[str, bytes]]:
    """Names and bytes of the image files in a tar or a folder."""
    if data.is_dir():
        for path in sorted(data.rglob("*")):
            if path.is_file() and extension_of(path.name) in EXTENSIONS:
                yield path.name, path.read_bytes()
        return
    with tarfile.open(data) as tar:
        for member in tar:
            if member.isfile() and extension_of(member.name) in EXTENSIONS:
                yield member.name, tar.extractfile(member).read()  # pyright: ignore[reportOptionalMemberAccess]


def contenders(setting: Setting, scratch: Path) -> dict[str, Contender]:
    """Who takes part, the rows of the table in order."""
    crop = ColourView((SIDE, SIDE), (0.32, 1.0), RATIO, 0.5, "bicubic")
    small = ColourView((96, 96), (0.05, 0.32), RATIO, 0.5, "bicubic")
    mask = MaskRule((14, 14), (0.0, 0.3), (0.0, 0.2), "block")
    found: dict[str, Contender] = {
        OURS: ours(setting.shards),
        OFFICIAL: official,
        "(c) webdataset, PIL": webdataset,
        LIMIT: limit,
    }
    for name, module, peer in (("litdata", "litdata", litdata), ("mosaicml-streaming", "streaming", mosaic)):
        if importlib.util.find_spec(module):
            found[f"{name}, PIL"] = peer
    if "resize" in PackOptions.model_fields:
        pack(str(setting.files), scratch / "small", maxcount=1000, resize=384)
        found["(e) ours, packed with resize=384"] = ours(scratch / "small")
    else:
        print("left out: (e), packing has no resize", file=sys.stderr)
    found["ours, 2 + 10 crops of an image"] = ours(setting.shards, MultiCropView(crop, crop, small, 10, mask))
    return found


def first_batch(setting: Setting, step: int) -> float:
    """Seconds until an untouched loader has the batch of a step."""
    batches = batches_of(open_source(str(setting.shards)), setting.batch)
    start = time.perf_counter()
    batches[step]
    return time.perf_counter() - start


def late_step(setting: Setting) -> dict[str, float]:
    """Time to the first batch of step 100,000 over that of step 0: of this data, and of the order alone at 1.28 M."""

    def order_of(step: int) -> float:
        stream = Stream([Order([1000] * 1281, seed=0)], seed=0)
        start = time.perf_counter()
        for position in range(step * 4096, (step + 1) * 4096):
            stream.locate(position)
        return time.perf_counter() - start

    found = {}
    for name, seconds in (("batch", lambda step: first_batch(setting, step)), ("order", order_of)):
        times = [(seconds(0), seconds(100_000)) for _ in range(7)]
        found[name] = statistics.median(late for _, late in times) / statistics.median(first for first, _ in times)
    return found


class SlowServer(SimpleHTTPRequestHandler):
    """Files and ranges of them, each answer late; the bytes sent are counted."""

    late = 0.05
    sent: Any = None

    def do_GET(self) -> None:
        """One file, or ``Range: bytes=FIRST-[LAST]`` of it."""
        time.sleep(self.late)
        path = Path(self.translate_path(self.path))
        if not path.is_file():
            self.send_error(404)
            return
        size, asked = path.stat().st_size, re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        first, last = (int(asked[1]), int(asked[2] or size - 1)) if asked else (0, size - 1)
        content = path.read_bytes()[first : last + 1]
        self.send_response(206 if asked else 200)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content)))
        if asked:
            self.send_header("Content-Range", f"bytes {first}-{first + len(content) - 1}/{size}")
        self.end_headers()
        self.wfile.write(content)
        with self.sent.get_lock():
            self.sent.value += len(content)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing."""


def serve(folder: Path, sent: Any, port: Any) -> None:
    """Serve a folder until this process is ended."""
    SlowServer.sent = sent
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(SlowServer, directory=str(folder))) as server:
        port.value = server.server_address[1]
        server.serve_forever()


def epoch_speed(index: Index, setting: Setting) -> float:
    """Images a second of one epoch, after the first shard of each lane; as many lanes as cores."""
    batches = batches_of(index, setting.batch, num_lanes=setting.cores)
    images, start, skipped = 0, 0.0, setting.cores * int(index.shard_sizes.max())
    for batch, _ in iterate(batches, range(batches.stream.epoch_size // setting.batch), setting.cores):
        images += len(batch["index"])
        if not start and images >= skipped:
            start, skipped = time.perf_counter(), images
    return (images - skipped) / (time.perf_counter() - start)


def remote(setting: Setting, scratch: Path, rounds: int) -> dict[str, float]:
    """Ours from a server 50 ms away over ours from the disk, in turns; the bytes moved an epoch over the shards'."""
    context = multiprocessing.get_context("spawn")
    sent, port = context.Value("q", 0), context.Value("i", 0)
    server = context.Process(target=serve, args=(setting.shards, sent, port), daemon=True)
    server.start()
    try:
        while not port.value:
            time.sleep(0.05)
        found = []
        for number in range(rounds):
            local = epoch_speed(open_source(str(setting.shards)), setting)
            before = sent.value
            index = open_source(f"http://127.0.0.1:{port.value}", cache=scratch / f"cache{number}")
            found.append((epoch_speed(index, setting), local, sent.value - before))
            print("round {}: remote {:.0f} images/s, local {:.0f}, {} bytes".format(number + 1, *found[-1]), flush=True)
    finally:
        server.terminate()
        server.join()
    speed, local, moved = (statistics.median(column) for column in zip(*found, strict=True))
    size = sum(path.stat().st_size for path in setting.shards.glob("*.tar"))
    return {"remote": speed, "local": local, "ratio": speed / local, "bytes_over_shards": moved / size}


def grow(setting: Setting, epochs: int) -> list[dict[str, float]]:
    """Resident memory of ours after each epoch, in MB."""
    rows, batches, images = [], iter(ours(setting.shards)(setting)), 0
    length = len(open_source(str(setting.shards)))
    for epoch in range(1, epochs + 1):
        while images < epoch * length:
            images += next(batches)
        own, workers = resident()
        rows.append({"epoch": epoch, "main_mb": own / 1e6, "worker_mb": max(workers) / 1e6})
        print(f"epoch {epoch:3}: main {own / 1e6:7.1f} MB, largest worker {max(workers) / 1e6:7.1f} MB", flush=True)
    return rows


def table(rounds: dict[str, list[tuple[float, Usage, float]]], cores: int) -> list[dict[str, Any]]:
    """A row for each contender."""
    middle = {name: statistics.median(speed for speed, _, _ in found) for name, found in rounds.items()}
    rows = []
    for name, found in rounds.items():
        speeds = sorted(speed for speed, _, _ in found)
        rows.append({
            "loader": name, "images_per_second": middle[name], "range": [speeds[0], speeds[-1]],
            "per_core": middle[name] / cores, "times_official": middle[name] / middle[OFFICIAL],
            "times_limit": middle[name] / middle[LIMIT], "cpu_ms": statistics.median(cpu for _, _, cpu in found),
            "peak_mb": max(usage.peak for _, usage, _ in found) / 1e6,
            "worker_mb": max(usage.worker for _, usage, _ in found) / 1e6,
        })  # fmt: skip
    return rows


def show(rows: list[dict[str, Any]]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| loader | images/s (range) | per core | times (b) | times (d) | CPU ms an image | peak MB | MB a worker |",
        "|---" * 8 + "|",
    ]
    for row in rows:
        low, high = row["range"]
        lines.append(
            f"| {row['loader']} | {row['images_per_second']:.0f} ({low:.0f} to {high:.0f}) | {row['per_core']:.0f} | "
            f"{row['times_official']:.2f} | {row['times_limit']:.2f} | {row['cpu_ms']:.2f} | {row['peak_mb']:.0f} | "
            f"{row['worker_mb']:.0f} |"
        )
    return "\n".join(lines)


def parse(words: list[str]) -> argparse.Namespace:
    """``--key value``, ``--key=value`` or ``key=value``."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="a tar or a folder of image files")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--images", type=int, default=2000, help="images of a round")
    parser.add_argument("--epochs", type=int, default=0, help="only the memory of ours, over so many epochs")
    parser.add_argument("--remote", action="store_true", help="only ours over HTTP, 50 ms away, beside the local disk")
    parser.add_argument("--out", type=Path, help="a JSON file")
    return parser.parse_args([f"--{word}" if re.match(r"\w+=", word) else word for word in words])


def main() -> None:
    """Print the table, and write it as JSON where asked."""
    options = parse(sys.argv[1:])
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        setting = prepared(options.data, Path(folder), options)
        facts: dict[str, Any] = {"cores": setting.cores, "torch": torch.__version__, "date": time.strftime("%Y-%m-%d")}
        if options.epochs:
            facts["epochs"] = grow(setting, options.epochs)
        elif options.remote:
            facts["remote"] = remote(setting, Path(folder), options.rounds)
            print("remote / local {ratio:.2f}; bytes moved / shards {bytes_over_shards:.3f}".format(**facts["remote"]))
        else:
            facts["rows"] = compare(setting, Path(folder), options)
            facts["late_step"] = late_step(setting)
            print(show(facts["rows"]))
            print("first batch of step 100,000 / of step 0: {batch:.2f}; order alone, 1.28 M: {order:.2f}".format(
                **facts["late_step"]))  # fmt: skip
    if options.out:
        options.out.write_text(json.dumps(facts, indent=1) + "\n")


def compare(setting: Setting, scratch: Path, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Interleaved rounds of all contenders."""
    found = contenders(setting, scratch)
    rounds: dict[str, list[tuple[float, Usage, float]]] = {name: [] for name in found}
    for number in range(options.rounds):
        for name, contender in found.items():
            rounds[name].append(timed(contender, setting))
            speed, _, cpu = rounds[name][-1]
            print(f"round {number + 1}: {name:32} {speed:6.0f} images/s, {cpu:.2f} CPU ms an image", file=sys.stderr)
    return table(rounds, setting.cores)


if __name__ == "__main__":
    main()
