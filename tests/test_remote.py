"""Remote shards: the bytes of local ones, whatever a server does in between, each downloaded once."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from conftest import in_process, tiny_recipe, write_images
from shard_server import ShardServer, serving
from test_signals import TWO, start, status
from test_trainer import losses, train

from ssl_vit.config import InputError, to_yaml
from ssl_vit.data import remote
from ssl_vit.data.ahead import coming
from ssl_vit.data.index import Index
from ssl_vit.data.loader import EvalBatches, Pixels, TrainBatches, iterate
from ssl_vit.data.order import Order, Stream
from ssl_vit.data.pack import pack
from ssl_vit.data.reader import Reader, ReadError
from ssl_vit.data.shard_cache import RemoteShard, ShardCache
from ssl_vit.data.sources import open_source
from ssl_vit.data.views import CentreView, MaskedView
from ssl_vit.training.checkpoint import Checkpoints
from ssl_vit.training.signals import Preempted

VIEW = MaskedView((16, 16), (0.3, 1.0), (0.75, 1.33), 0.5, "bicubic", grid_size=(4, 4), mask_ratio=0.75)
PIXELS = Pixels((0.5,) * 3, (0.25,) * 3)
SHARD = "shard-000002.tar"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten shards of six images."""
    folder = tmp_path_factory.mktemp("remote")
    images = write_images(folder / "images", classes=2, per_class=30, size=32)
    pack(f"folder:{images}", folder / "shards", maxcount=6)
    return folder / "shards"


@pytest.fixture
def server(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[ShardServer]:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 3)
    shutil.copytree(packed, tmp_path / "served")
    with serving(tmp_path / "served") as running:
        yield running


def remote_shards(server: ShardServer) -> list[RemoteShard]:
    index = open_source(server.url)
    return [shard for number in range(10) if (shard := index.remote(number)) is not None]


def contents(index: Index) -> list[bytes]:
    reader = Reader(index)
    return [reader.read(sample) for sample in range(len(index))]


def batches(index: Index, num_lanes: int = 1, **changes: Any) -> TrainBatches:
    order = Order(index.shard_sizes.tolist(), 5, num_lanes, 4)
    settings: dict[str, Any] = {"seed": 3, "batch_size": 4, "micro_batch_size": 4, **changes}
    return TrainBatches([index], Stream([order], 5), VIEW, PIXELS, **settings)


@pytest.mark.parametrize("ranges", [True, False])
def test_remote_shards_hold_what_local_ones_do(server: ShardServer, packed: Path, ranges: bool) -> None:
    server.ranges = ranges
    local = open_source(str(packed))
    index = open_source(server.url)
    assert index.fingerprint == local.fingerprint
    assert contents(index) == contents(local)
    assert [index.key(i) for i in (0, 17)] == [local.key(i) for i in (0, 17)]
    moved = sum(size for name, _, size in server.gets if name.endswith(".tar"))
    assert moved == sum(shard.filesize for shard in local.shards), "each byte once"
    server.gets.clear()
    part = open_source(f"{server.url}/shard-{{000001,000003}}.tar")
    assert contents(part) == contents(local)[6:12] + contents(local)[18:24]
    assert {name for name, _, _ in server.gets} == {"index.json"}, "all the rest was here"


def test_without_a_cache_each_image_is_a_request(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    index = open_source(server.url, cache_size=0)
    server.gets.clear()
    assert contents(index)[:3] == contents(open_source(str(packed)))[:3]
    assert len(server.gets) == 60
    assert [size for _, _, size in server.gets] == index.samples["size"].tolist()
    assert index.describe(7) == open_source(str(packed)).describe(7)
    assert not (tmp_path / "cache" / "shards").exists()


@pytest.mark.parametrize("fault", ["503", "429", "stall", "cut", "short"])
def test_a_request_that_fails_is_made_again(
    server: ShardServer, packed: Path, fault: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """And each time the log names URL, attempt and reason."""
    monkeypatch.setattr(remote, "STALL", 0.2)
    index = open_source(server.url)
    server.faults[SHARD] = [fault, fault]
    assert contents(index)[12:18] == contents(open_source(str(packed)))[12:18]
    assert server.count(SHARD) == 3
    told = [record.getMessage() for record in caplog.records if SHARD in record.getMessage()]
    assert len(told) == 2
    for attempt, line in enumerate(told, start=1):
        assert re.fullmatch(rf"{server.url}/{SHARD}: attempt {attempt} of 3: .+; again in 0\.0 s", line), line


def test_a_cut_download_goes_on(server: ShardServer, packed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BLOCK", 5_000)
    index = open_source(server.url)
    server.faults[SHARD] = ["", "", "cut"]
    assert Reader(index).read(12) == Reader(open_source(str(packed))).read(12)
    starts = [start for name, start, _ in server.gets if name == SHARD]
    assert starts == sorted([10_000, *range(0, (packed / SHARD).stat().st_size, 5_000)])


def test_the_last_error_names_url_and_attempts(server: ShardServer, tmp_path: Path) -> None:
    index = open_source(server.url)
    server.always[SHARD] = "503"
    with pytest.raises(ReadError, match=rf"{server.url}/{SHARD}: 3 attempts failed, the last with .*503"):
        Reader(index).read(12)
    assert not list((tmp_path / "cache" / "shards").glob("*.part"))
    server.always[SHARD] = "404"
    server.gets.clear()
    with pytest.raises(ReadError, match=rf"{SHARD}: no such file \(404\)"):
        Reader(index).read(12)
    assert server.count(SHARD) == 1, "not asked again"


def test_nobody_answers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A host that takes no connection, as behind a firewall that drops packets: the queue of this socket is full."""
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    monkeypatch.setattr(remote, "ATTEMPTS", 2)
    monkeypatch.setattr(remote, "CONNECT", 0.2)
    with socket.create_server(("127.0.0.1", 0), backlog=0) as deaf, contextlib.ExitStack() as queued:
        for _ in range(2):
            queued.enter_context(client := socket.socket())
            client.setblocking(False)
            client.connect_ex(deaf.getsockname())
        start = time.monotonic()
        with pytest.raises(ReadError, match=r"2 attempts failed, the last with \w*Timeout"):
            remote.content(f"http://127.0.0.1:{deaf.getsockname()[1]}/index.json")
        assert 0.4 <= time.monotonic() - start < 10


def test_nobody_listens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "BACKOFF", 0.001)
    with serving(Path()) as gone:
        url = gone.url
    with pytest.raises(ReadError, match="attempts failed"):
        remote.content(f"{url}/index.json")


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("404", r"1 of 10 shards in the index cannot be read: .*shard-000002\.tar: no such file \(404\); upload"),
        ("403", r"shard-000002\.tar: access is denied \(403\)"),
        ("short", r"1 of 10 shards in the index differ from it: .*shard-000002\.tar has \d+ bytes instead of \d+"),
    ],
)
def test_shards_are_looked_at_before_the_first_step(server: ShardServer, fault: str, message: str) -> None:
    """B22, B29: missing, refused and cut shards, by name, without reading them."""
    server.always[SHARD] = fault
    with pytest.raises(InputError, match=message):
        open_source(server.url)
    assert server.count(SHARD) <= 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{url}/nowhere", r"no index is found \(.*/nowhere/index.json: no such file \(404\)\).*pipelines/index.py"),
        ("{url}/shard-{{000000..000011}}.tar", r"2 of 12 are not in the index.json there: .*shard-000010"),
        ("{url}/shard-{{000000..", "a brace is not closed"),
        ("ftp://host/shards", r"unknown kind of URL.*allowed: http, https, s3, gs, hf"),
        ("pipe:curl https://host/shard.tar", "recipes run no programs, so pipes are refused"),
        ("simplecache::s3://bucket/shards", "unknown kind"),
    ],
)
def test_mistakes_say_what_to_write(server: ShardServer, spec: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        open_source(spec.format(url=server.url))


def test_an_error_page_instead_of_a_shard(server: ShardServer) -> None:
    """B30: the index tells by length, and who makes one by the first bytes."""
    (server.folder / SHARD).write_text("<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>")
    with pytest.raises(InputError, match=rf"{SHARD} has \d+ bytes instead of"):
        open_source(server.url)
    done = in_process("pipelines/index.py", f"{server.url}/{SHARD}")
    assert done.returncode == 2
    assert f"{server.url}/{SHARD}: is not a tar archive, it begins with" in done.stderr


def test_other_bytes_than_the_index_says(server: ShardServer, tmp_path: Path) -> None:
    index = open_source(server.url)
    server.always[SHARD] = "garbage"
    with pytest.raises(ReadError, match=rf"{SHARD}: what came is not what the index says, its sha256 is"):
        Reader(index).read(12)
    assert [path.name for path in (tmp_path / "cache" / "shards").iterdir()] == [".lock"]


@pytest.mark.parametrize("place", ["cache", "out"])
@pytest.mark.parametrize("spec", ["", "/shard-{000000..000009}.tar"])
def test_shards_without_index_are_indexed_once(server: ShardServer, tmp_path: Path, spec: str, place: str) -> None:
    local = open_source(str(server.folder))
    wanted, records = contents(local), np.array(local.samples)
    for name in ("index.json", "index.samples.npy"):
        (server.folder / name).unlink()
    out = [f"out={tmp_path / 'out'}"] if place == "out" else []
    done = in_process("pipelines/index.py", f"{server.url}{spec}", *out)
    assert done.returncode == 0, done.stderr
    assert "indexed 60 samples in 10 shards" in done.stdout
    index = open_source(str(tmp_path / "out") if out else f"{server.url}{spec}")
    np.testing.assert_array_equal(index.samples, records)
    assert contents(index) == wanted
    assert not list((tmp_path / "cache" / "scanned").glob("*.tar"))


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_an_index_of_other_shards_stands_on_the_server(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    """What is said at every step leads on to an index that is read."""
    wanted = contents(open_source(str(packed)))
    pack(f"shards:{packed}", tmp_path / "others", maxcount=7, seed=3)
    for name in ("index.json", "index.samples.npy"):
        shutil.copy(tmp_path / "others" / name, server.folder / name)
    advised = rf"make it anew: python pipelines/index.py {server.url} out=FOLDER, and use data\.train=FOLDER"
    with pytest.raises(InputError, match=rf"differ from it: .*{advised}"):
        open_source(server.url)
    done = in_process("pipelines/index.py", server.url, "workers=2")
    assert done.returncode == 0, done.stderr
    assert f"data.train={server.url} reads another index, which stands beside the shards; out=FOLDER" in done.stdout
    made = re.search(r"use it as data\.train=(\S+)\n", done.stdout)
    assert made
    assert contents(open_source(made[1])) == wanted
    assert open_source(made[1]).classes == ["class_0", "class_1"]
    done = in_process("pipelines/index.py", server.url, f"out={tmp_path / 'out'}")
    assert f"use it as data.train={tmp_path / 'out'}\n" in done.stdout
    assert contents(open_source(str(tmp_path / "out"))) == wanted
    (server.folder / SHARD).write_bytes(b"other")
    anew = rf"make it anew: python pipelines/index.py {server.url} out={tmp_path / 'out'}"
    with pytest.raises(InputError, match=rf"{SHARD} has 5 bytes instead of .*{anew}"):
        open_source(str(tmp_path / "out"))


def test_sorted_remote_shards_are_told_and_packed_again(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    done = in_process("pipelines/index.py", server.url)
    assert f"use it as data.train={server.url}\n" in done.stdout, "the index beside the shards is the same"
    assert "  mixed    3 stored neighbours hold" in done.stdout
    pack(f"shards:{server.url}", tmp_path / "again", maxcount=20)
    pack(f"shards:{packed}", tmp_path / "local", maxcount=20)
    assert [path.read_bytes() for path in sorted((tmp_path / "again").iterdir())] == [
        path.read_bytes() for path in sorted((tmp_path / "local").iterdir())
    ]


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
def test_remote_shards_are_verified(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    """Good ones, a shard of other bytes, one that is refused, and an image that does not decode, by name."""
    for source in (server.url, f"{server.url}/shard-{{000000..000009}}.tar"):
        done = in_process("pipelines/verify.py", source, "workers=2")
        assert (done.returncode, done.stdout) == (0, f"{source}: all shards and images are good\n"), done.stderr
    assert sum(name.endswith(".tar") for name, _, _ in server.gets) == 20, "each once"
    data = bytearray((server.folder / SHARD).read_bytes())
    first = int(open_source(str(packed)).samples["offset"][12])
    data[first : first + 40] = bytes(40)
    (server.folder / SHARD).write_bytes(data)
    done = in_process("pipelines/verify.py", server.url)
    assert done.returncode == 2
    assert f"bad  {server.url}/{SHARD}: what came is not what the index says" in done.stdout
    done = in_process("pipelines/index.py", server.url, f"out={tmp_path / 'out'}")
    assert done.returncode == 0, done.stderr
    server.always["shard-000004.tar"] = "garbage"
    done = in_process("pipelines/verify.py", str(tmp_path / "out"), "workers=1")
    assert done.returncode == 2
    bad = done.stdout.splitlines()
    assert bad[0].startswith(f"bad  {SHARD}: key 000000012: is not an image")
    assert bad[1].startswith(f"bad  {server.url}/shard-000004.tar: what came is not what the index says")
    assert len(bad) == 2
    server.always["shard-000004.tar"] = "404"
    assert "1 of 10 shards in the index cannot be read" in in_process("pipelines/verify.py", server.url).stderr
    server.always["index.json"] = "503"
    done = in_process("pipelines/verify.py", server.url)
    assert (done.returncode, "index.json: 3 attempts failed" in done.stderr) == (2, True)
    assert [path.name for path in (tmp_path / "cache").glob("verify-*")] == []


def test_the_limit_of_the_cache_is_kept(
    server: ShardServer, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """B31: room for three of ten shards, two epochs, all as if they were local."""
    sizes = [shard.filesize for shard in open_source(str(packed)).shards]
    limit = 3 * max(sizes)
    index = open_source(server.url, cache_size=limit / 1e9)
    remote_batches, local = batches(index), batches(open_source(str(packed)))
    reserve, taken = ShardCache._reserve, [0]

    def recorded(*args: Any) -> bool:
        """A download has its whole room before its first byte: this is when the cache is fullest."""
        done = reserve(*args)
        for entry in os.scandir(tmp_path / "cache" / "shards"):
            with contextlib.suppress(FileNotFoundError):
                found.append(entry.stat().st_size)
        taken.append(sum(found))
        found.clear()
        return done

    found: list[int] = []
    monkeypatch.setattr(ShardCache, "_reserve", recorded)
    for item in range(30):
        seen, expected = remote_batches[item][0], local[item][0]
        assert all((seen[key] == expected[key]).all() for key in expected)
    assert max(sizes) < max(taken) <= limit
    assert len(server.gets) < 2 * 2 * 10, "few shards twice an epoch"


def test_what_is_read_stays(server: ShardServer, tmp_path: Path) -> None:
    shards = remote_shards(server)
    cache = ShardCache(tmp_path / "small", 2 * max(shard.filesize for shard in shards))
    with cache.opened(shards[0]) as file:
        for shard in shards[1:]:
            assert cache.read(shard, 0, 512)
            assert cache.holds(shards[0])
        assert len(file.read()) == shards[0].filesize
        assert not cache.fetch(shards[4], ahead=True, keep={shards[9].name}), "there is no room without what is needed"
        assert cache.fetch(shards[4], ahead=True)
    assert not cache.holds(shards[9])


@pytest.mark.processes
def test_processes_download_once(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    """B27: four processes with one cache folder, which ask at the same moment for the same two shards."""
    shards = remote_shards(server)[2:4]
    wanted = [(packed / f"shard-00000{number}.tar").read_bytes() for number in (2, 3)]
    cache, begin = ShardCache(tmp_path / "shared"), tmp_path / "begin"
    children = []
    for _ in range(4):
        if (child := os.fork()) == 0:
            code = 1
            try:
                while not begin.exists():
                    time.sleep(0.001)
                code = 2 * ([cache.read(shard, 0, shard.filesize) for shard in shards] != wanted)
            finally:
                os._exit(code)
        children.append(child)
    begin.touch()
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0] * 4
    assert [server.count(f"shard-00000{number}.tar") for number in (2, 3)] == [1, 1]


def test_other_urls_are_other_files(server: ShardServer, tmp_path: Path) -> None:
    """The whole URL counts: the same name and length in another folder, or on another host, is another shard."""
    for folder in ("a", "b"):
        (server.folder / folder).mkdir()
        (server.folder / folder / "shard-000000.tar").write_bytes(folder.encode() * 1000)
    cache = ShardCache(tmp_path / "urls")
    shards = [RemoteShard(f"{server.url}/{folder}/shard-000000.tar", 1000, "") for folder in ("a", "b")]
    shards.append(RemoteShard(shards[0].url.replace("127.0.0.1", "localhost"), 1000, ""))
    assert [cache.read(shard, 0, 3) for shard in shards] == [b"aaa", b"bbb", b"aaa"]
    assert len({shard.name for shard in shards}) == len(list((tmp_path / "urls").glob("*.tar"))) == 3


def test_a_cut_file_in_the_cache_is_downloaded_again(server: ShardServer, packed: Path, tmp_path: Path) -> None:
    """Not taken for samples that do not decode: a disk or machine has failed meanwhile."""
    index, local = open_source(server.url), open_source(str(packed))
    assert contents(index)[12:18] == contents(local)[12:18]
    shard = remote_shards(server)[2]
    os.truncate(tmp_path / "cache" / "shards" / shard.name, shard.filesize // 2)
    before = server.count(SHARD)
    assert contents(index)[12:18] == contents(local)[12:18]
    assert server.count(SHARD) == before + 1
    with pytest.raises(ReadError, match=rf"{SHARD}: 10 of 100 bytes are there at"):
        ShardCache(tmp_path / "cache" / "shards").read(shard, shard.filesize - 10, 100)


@pytest.mark.parametrize("workers", [0, 1])
def test_a_cache_that_is_smaller_than_a_shard_is_refused(server: ShardServer, workers: int) -> None:
    """Where no plan was made, e.g. by an evaluation of its own: at the first read, instead of waiting for room."""
    index = open_source(server.url, cache_size=2e-6)
    data = EvalBatches(index, range(8), CentreView((16, 16), 1.0, "bicubic"), PIXELS, 4)
    with pytest.raises(
        InputError, match=r"data\.cache_size=2e-06: http.*shard-.* alone has .* GB; give more, or 0 for"
    ):
        next(iterate(data, range(2), workers))


@pytest.mark.processes
def test_a_download_that_was_killed_leaves_nothing(server: ShardServer, tmp_path: Path) -> None:
    """B27: kill -9 in the middle of a download."""
    shard, other = remote_shards(server)[2:4]
    cache = ShardCache(tmp_path / "killed")
    server.faults[SHARD] = ["stall"]
    child = os.fork()
    if child == 0:
        cache.fetch(shard)
        os._exit(0)
    while server.faults[SHARD]:
        time.sleep(0.01)
    parts = list((tmp_path / "killed").glob("*.part"))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    assert parts[0].exists()
    assert cache.fetch(other)
    assert not parts[0].exists(), "removed by the next who needs room"
    assert cache.fetch(shard)
    assert sorted(path.suffix for path in (tmp_path / "killed").iterdir()) == ["", ".tar", ".tar"]


@pytest.mark.parametrize(("lanes", "window", "repeats"), [(1, 4, 1), (4, 3, 1), (8, 50, 1), (4, 2, 3)])
def test_what_is_read_next_was_seen_coming(packed: Path, lanes: int, window: int, repeats: int) -> None:
    """All that the present windows read, and the next ones."""
    index = open_source(str(packed))
    stream = Stream([Order(index.shard_sizes.tolist(), 7, lanes, window)], 7, repeats=repeats)
    for position in range(0, 200 * repeats, 7):
        seen = coming([index], stream, position, range(lanes))
        assert len(set(seen)) == len(seen)
        row = position // repeats // lanes
        until = (row - row % window + window) * lanes * repeats
        read = {(0, index.shard_of(stream.locate(p)[1])) for p in range(position, max(until, position + 1))}
        assert read <= set(seen)


def test_workers_look_ahead(server: ShardServer, tmp_path: Path) -> None:
    """What comes next is downloaded while nothing more is read, by a process that shares no memory with this one."""
    data, shards = batches(open_source(server.url)), remote_shards(server)
    loader = iterate(data, range(1), 1)
    next(loader)
    read = {shards[data.indexes[0].shard_of(data.stream.locate(p)[1])].name for p in data.positions(0)}
    expected = {shards[number].name for _, number in coming(data.indexes, data.stream, 0, data.lanes())}
    found, end = set[str](), time.monotonic() + 20
    while found != expected and time.monotonic() < end:
        time.sleep(0.02)
        found = {path.name for path in (tmp_path / "cache" / "shards").glob("*.tar")}
    assert found == expected > read


ONE_LANE = {"num_lanes": 1, "window": 4, "val": None}


@pytest.fixture(scope="module")
def straight(packed: Path, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[int, float]]:
    """The losses on local shards."""
    values = tiny_recipe(packed, tmp_path_factory.mktemp("straight") / "run", data__train=str(packed))
    values["data"] |= ONE_LANE
    return losses(train(values))


@pytest.mark.parametrize(("cache_size", "workers", "served"), [(0, 0, 60), (1, 1, 7)], ids=["ranges", "cache"])
def test_a_server_that_fails_in_the_middle(
    server: ShardServer, straight: list[tuple[int, float]], tmp_path: Path, cache_size: int, workers: int, served: int
) -> None:
    """The run saves, says which URL, ends with 75, and goes on to the very losses of local shards."""
    values = tiny_recipe(Path(), tmp_path / "run", data__train=server.url)
    values["data"] |= {**ONE_LANE, "cache_size": cache_size}
    values["run"] |= {"workers": workers}
    (tmp_path / "recipe.yaml").write_text(to_yaml(values))
    server.fail_after = served
    done = in_process("pipelines/pretrain_mae.py", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 75, done.stderr
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(server.url)
    assert "3 attempts failed, the last with" in message
    assert "saved after step" in message
    assert "Traceback" not in done.stderr
    stopped_at = losses(tmp_path / "run")[-1][0]
    assert 0 < stopped_at < 12
    server.fail_after = None
    done = in_process("pipelines/pretrain_mae.py", "--config", str(tmp_path / "recipe.yaml"))
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "run") == straight
    assert "remote: " in (tmp_path / "run" / "train.log").read_text()


@pytest.mark.processes
def test_two_processes_stop_together(server: ShardServer, tmp_path: Path) -> None:
    """Whichever finds no data: neither waits for the other in the middle of a step, and both save the same."""
    values = tiny_recipe(Path(), tmp_path / "run", data__train=server.url, optim__epochs="9000 steps")
    values["data"] |= {**ONE_LANE, "cache_size": 0}
    values["run"] |= {"save_every": "9000 steps"}
    server.fail_after, server.fail_with = 300, "403"  # which is not asked for again
    process = start(values, tmp_path / "run", TWO)
    process.communicate(timeout=150)
    left = status(tmp_path / "run")
    assert (left["state"], left["exit_code"]) == ("preempted", 75), left
    assert re.match(rf"{server.url}/shard-\d+\.tar: access is denied.*saved after step {left['step']}", left["message"])
    assert Checkpoints(tmp_path / "run" / "checkpoints").steps()[-1] == left["step"] == losses(tmp_path / "run")[-1][0]


def test_a_server_that_does_not_answer_at_the_start(server: ShardServer, tmp_path: Path) -> None:
    """Not the user's mistake: a scheduler may start the run again."""
    server.always["index.json"] = "503"
    done = in_process("pipelines/pretrain_mae.py", f"data.train={server.url}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 75
    message = done.stderr.strip().splitlines()[-1]
    assert message.startswith(f"{server.url}/index.json: 3 attempts failed, the last with ")
    assert message.endswith("stopped; kept: what was saved before; start the same command again to go on")
    server.always["index.json"] = "403"
    done = in_process("pipelines/pretrain_mae.py", f"data.train={server.url}", f"run.dir={tmp_path / 'run'}")
    assert done.returncode == 2
    assert "access is denied (403); check the URL and your credentials" in done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize(("name", "served"), [("knn", 30), ("pictures", 5), ("neighbours", 65)])
def test_a_server_that_fails_in_an_evaluation(
    server: ShardServer, packed: Path, tmp_path: Path, name: str, served: int
) -> None:
    """Of labelled sets, of a few pictures, of those that were found to be alike."""
    values = tiny_recipe(packed, tmp_path / "run", data__train=str(packed), data__val=server.url, evals={name: {}})
    values["data"] |= {"probe": str(packed), "cache_size": 0}
    server.fail_after = served
    with pytest.raises(Preempted, match=r"3 attempts failed.*saved after step 0"):
        train(values)
    server.fail_after = None
    assert len(losses(train(values))) == 12


@pytest.fixture(scope="module")
def bucket(packed: Path) -> Iterator[str]:
    """``s3://`` URL of the shards on a server that speaks S3."""
    import boto3
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0)
    server.start()
    host, port = server.get_host_and_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://{host}:{port}")
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
            patch.setenv(name, "test")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        client = boto3.client("s3")
        client.create_bucket(Bucket="images")
        for file in packed.iterdir():
            client.upload_file(str(file), "images", f"train/{file.name}")
            if file.suffix == ".tar":
                client.upload_file(str(file), "images", f"bare/{file.name}")
        yield "s3://images"
    server.stop()


def test_shards_in_s3(bucket: str, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "BLOCK", 10_000)
    local = contents(open_source(str(packed)))
    assert contents(open_source(f"{bucket}/train")) == local
    assert contents(open_source(f"{bucket}/train/shard-{{000000..000009}}.tar", cache_size=0))[:8] == local[:8]
    with pytest.raises(InputError, match=r"s3://images/nowhere: no index is found"):
        open_source(f"{bucket}/nowhere")
    done = in_process("pipelines/index.py", f"{bucket}/bare")
    assert done.returncode == 0, done.stderr
    assert contents(open_source(f"{bucket}/bare")) == local
    with pytest.raises(ReadError, match=r"s3://images/train/shard-9\.tar: no such file \(404\)"):
        remote.read(f"{bucket}/train/shard-9.tar", 0, 10, 100)
