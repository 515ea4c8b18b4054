import io
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_vit.config import InputError
from ssl_vit.data.index import read_index
from ssl_vit.data.pack import pack
from ssl_vit.data.reader import Reader
from ssl_vit.data.sources import open_source


def png(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("L", (4, 4), value).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for number in range(20):
        folder = tmp_path / "images" / "ab"[number % 2]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{number}.png").write_bytes(png(number))
    return tmp_path / "images"


@pytest.fixture
def shards(images: Path, tmp_path: Path) -> Path:
    pack(str(images), tmp_path / "shards", maxcount=4)
    return tmp_path / "shards"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch) -> Path:
    monkeypatch.setenv("SSL_VIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def contents(index) -> list[bytes]:
    reader = Reader(index)
    return [reader.read(i) for i in range(len(index))]


def test_a_folder_of_images_is_packed_once_and_again_when_it_changes(images, cache, capsys):
    first = open_source(f"folder:{images}")
    assert (len(first), first.classes, first.labelled) == (20, ["a", "b"], True)
    assert "packing" in capsys.readouterr().out
    assert open_source(f"folder:{images}/").root == first.root
    assert capsys.readouterr().out == ""
    assert open_source(f"folder:{images}", labels="none").classes is None
    (images / "a" / "0.png").write_bytes(png(99))
    changed = open_source(f"folder:{images}")
    assert changed.root != first.root
    assert png(99) in contents(changed)
    assert set(map(str, cache.iterdir())) >= {first.root, changed.root}


def test_folder_range_and_glob_of_shards_agree(shards, cache):
    whole = open_source(str(shards))
    assert len(whole) == 20
    for spec in ("shard-{000000..000004}.tar", "shard-*.tar"):
        index = open_source(f"{shards}/{spec}")
        assert contents(index) == contents(whole)
        assert index.fingerprint == whole.fingerprint
    part = open_source(f"{shards}/shard-{{000001,000003}}.tar")
    assert contents(part) == contents(whole)[4:8] + contents(whole)[12:16]
    assert (part.classes, part.key(5)) == (["a", "b"], "000000013")
    assert len(open_source(f"{shards}/shard-000002.tar")) == 4


def test_shards_without_index_are_indexed_at_first_use(shards, cache, capsys):
    wanted = read_index(shards)
    for name in ("index.json", "index.samples.npy"):
        os.remove(shards / name)
    part = open_source(f"{shards}/shard-00000[01].tar")
    assert contents(part) == contents(wanted)[:8]
    assert str(cache) in part.root
    index = open_source(str(shards))
    np.testing.assert_array_equal(index.samples, wanted.samples)
    assert (shards / "index.json").exists()
    assert "indexing 5 shards" in capsys.readouterr().out


def test_an_index_of_a_read_only_folder_goes_to_the_cache(shards, cache, monkeypatch):
    for name in ("index.json", "index.samples.npy"):
        os.remove(shards / name)
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    index = open_source(str(shards))
    assert index.root.startswith(str(cache))
    assert len(contents(index)) == 20
    assert not (shards / "index.json").exists()


def test_a_hole_in_the_numbering_is_named_at_once(shards, cache):
    """B29."""
    os.remove(shards / "shard-000003.tar")
    with pytest.raises(InputError, match=r"1 of 5 not found: .*shard-000003\.tar"):
        open_source(f"{shards}/shard-{{000000..000004}}.tar")
    with pytest.raises(InputError, match=r"shard-000003\.tar.*missing"):
        open_source(str(shards))


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{images}", "write folder:.*images"),
        ("{images}/nowhere", "no such folder"),
        ("folder:{images}/nowhere", "no such folder"),
        ("folder:{images}/a/0.png", "is a file"),
        ("{images}/*.tar", "1 of 1 not found"),
        ("foldr:/images", "did you mean 'folder'"),
        ("builtin:cifar", "allowed: digits, digits-train, digits-test"),
        ("hf:/nowhere", "hf:/nowhere"),
        ("{images}/shard-{{0..", "not"),
    ],
)
def test_mistakes_say_what_to_write(spec, message, images, cache):
    with pytest.raises(InputError, match=message):
        open_source(spec.format(images=images))


def test_builtin_digits(cache):
    whole, train, test = (open_source(f"builtin:{part}") for part in ("digits", "digits-train", "digits-test"))
    assert (len(whole), len(train), len(test)) == (1797, 1438, 359)
    assert whole.classes == train.classes == test.classes == [str(i) for i in range(10)]
    assert min(np.bincount(test.samples["label"])) >= 34
    assert sorted(contents(train) + contents(test)) == sorted(contents(whole))
    pixels = np.asarray(Image.open(io.BytesIO(Reader(test).read(0))))
    assert (pixels.shape, pixels.dtype, pixels.max()) == ((8, 8), np.uint8, 255)


def test_two_processes_may_open_the_same_source(images, cache):
    code = "import sys; from ssl_vit.data.sources import open_source; print(len(open_source(sys.argv[1])))"
    command = [sys.executable, "-c", code, f"folder:{images}"]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    printed = [process.communicate()[0] for process in processes]
    assert [text.splitlines()[-1] for text in printed] == ["20", "20"]
    assert sum("packing" in text for text in printed) == 1
    assert [path.name[:7] for path in cache.iterdir() if not path.name.startswith(".")] == ["folder-"]
