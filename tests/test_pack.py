import contextlib
import io
import json
import os
import pickle
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import datasets
import numpy as np
import pytest
import webdataset
from PIL import Image

from ssl_vit.config import InputError
from ssl_vit.data.commands import index_main, pack_main, verify_main
from ssl_vit.data.index import build_index, read_index
from ssl_vit.data.pack import pack
from ssl_vit.data.reader import Reader, ReadError
from ssl_vit.data.tars import scan_shard
from ssl_vit.data.verify import verify

ROOT = Path(__file__).parents[1]
CIFAR = ROOT.parent / "shared" / "data" / "cifar10.tar"


def png(colour: tuple[int, int, int] = (0, 0, 0), kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), colour).save(file, kind)
    return file.getvalue()


def write(root: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return root


def write_tar(path: Path, members: list[tuple[str, bytes]], kind: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=kind) as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def samples_of(folder: Path) -> list[dict]:
    """The samples as webdataset reads them."""
    shards = sorted(map(str, folder.glob("*.tar")))
    with contextlib.closing(webdataset.WebDataset(shards, shardshuffle=False, empty_check=False)) as dataset:
        return list(dataset)


def paths_of(folder: Path) -> list[str]:
    return [json.loads(sample["json"])["path"] for sample in samples_of(folder)]


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Two classes of 15, every image of another colour, equal base names in both."""
    return write(
        tmp_path / "images", {f"{c}/{i:04d}.png": png((200 * k, i, 7)) for k, c in enumerate("ab") for i in range(15)}
    )


def test_shards_read_back_identically_through_webdataset(tree, tmp_path):
    out = tmp_path / "shards"
    summary = pack(f"folder:{tree}", out, maxcount=8)
    assert summary["packed"] == summary["found"] == 30
    assert (summary["shards"], summary["classes"], summary["modes"]) == (4, ["a", "b"], {"RGB": 30})
    index = read_index(out)
    reader = Reader(index)
    read = samples_of(out)
    assert len(read) == len(index) == 30
    for i, sample in enumerate(read):
        path = json.loads(sample["json"])["path"]
        assert sample["__key__"] == index.key(i)
        assert sample["png"] == reader.read(i) == (tree / path).read_bytes()
        assert int(sample["cls"]) == index.samples["label"][i] == "ab".index(path[0])
    assert index.labelled
    assert verify(out) == []


def test_same_input_same_bytes_and_a_seeded_order(tree, tmp_path):
    for name, settings in {"one": {}, "two": {"workers": 3}, "other": {"seed": 1}, "plain": {"shuffle": False}}.items():
        pack(str(tree), tmp_path / name, **settings)
    assert read_index(tmp_path / "one").fingerprint == read_index(tmp_path / "two").fingerprint
    assert paths_of(tmp_path / "plain") == sorted(paths_of(tmp_path / "one")) != paths_of(tmp_path / "one")
    assert paths_of(tmp_path / "other") != paths_of(tmp_path / "one")


def test_dots_in_names_do_not_fuse_images(tmp_path):
    """B01."""
    tree = write(tmp_path / "images", {f"a/IMG.2021.0{i}.jpg": png((i, 0, 0), "JPEG") for i in range(3)})
    pack(str(tree), tmp_path / "shards")
    assert len(samples_of(tmp_path / "shards")) == 3
    foreign = write_tar(tmp_path / "f.tar", [(f"IMG.2021.0{i}.jpg", png()) for i in range(3)])
    with pytest.raises(InputError, match=r"key 'IMG' has two images.*pack\.py"):
        scan_shard(foreign)


def test_all_extensions_are_found(tmp_path, capsys):
    """B03."""
    kinds = {
        "a.JPG": "JPEG",
        "b.Jpeg": "JPEG",
        "c.jfif": "JPEG",
        "d.TIF": "TIFF",
        "e.webp": "WEBP",
        "f": "PNG",
        "g.jpg": "PNG",
    }
    tree = write(tmp_path / "images", {name: png(kind=kind) for name, kind in kinds.items()} | {"notes.txt": b"hello"})
    summary = pack(str(tree), tmp_path / "shards")
    assert (summary["packed"], summary["skipped"], summary["refused"]) == (7, 1, 0)
    assert "notes.txt" in capsys.readouterr().out
    fields = Counter(key for sample in samples_of(tmp_path / "shards") for key in sample if key[0] != "_")
    assert fields == {"jpg": 3, "tif": 1, "webp": 1, "png": 2, "json": 7}


def test_members_in_pieces_are_refused(tmp_path):
    """B04."""
    shard = write_tar(tmp_path / "s.tar", [("0.jpg", png()), ("1.jpg", png()), ("0.cls", b"0"), ("1.cls", b"1")])
    with pytest.raises(InputError, match=r"s\.tar: key '0' appears again at byte \d+, '0\.cls'.*--sort=name"):
        build_index([shard], tmp_path)


@pytest.mark.parametrize("again", ["0.png", "9.png"])
def test_a_member_twice_is_refused(again, tmp_path):
    """B05: appended after others, or right after itself.

    Refused for the whole shard when it is indexed, whatever ``data.bad_samples`` says: which of the two is meant is
    unknown, and a shard that tools have appended to may hold more of the kind.
    """
    shard = write_tar(tmp_path / "s.tar", [(f"{i}.png", png()) for i in range(10)])
    with tarfile.open(shard, "a") as tar:
        tar.addfile(tarfile.TarInfo(again), io.BytesIO())
    with pytest.raises(InputError, match=f"s.tar.*'{again}'"):
        scan_shard(shard)


def test_equal_base_names_keep_their_labels(tmp_path):
    """B06."""
    tree = write(tmp_path / "images", {"red/1.png": png((255, 0, 0)), "blue/1.png": png((0, 0, 255))})
    pack(str(tree), tmp_path / "shards")
    index = read_index(tmp_path / "shards")
    for i in range(2):
        pixel = Image.open(io.BytesIO(Reader(index).read(i))).getpixel((0, 0))
        assert (index.classes or [])[index.samples["label"][i]] == ("red" if pixel == (255, 0, 0) else "blue")


def test_a_target_is_never_mixed(tree, tmp_path):
    """B07: a rerun into the same folder."""
    out = tmp_path / "shards"
    pack(str(tree), out, maxcount=8)
    with pytest.raises(InputError, match=r"not empty.*overwrite=yes"):
        pack(str(tree), out)
    pack(str(tree), out, overwrite=True)
    assert [path.name for path in sorted(out.iterdir())] == [
        "index.json", "index.samples.npy", "refused.jsonl", "shard-000000.tar",
    ]  # fmt: skip
    assert (len(read_index(out)), verify(out)) == (30, [])
    with pytest.raises(InputError, match="does not delete it"):
        pack(str(tree), tree, overwrite=True)
    assert len(paths_of(out)) == len(list(tree.rglob("*.png"))) == 30
    assert not list(tmp_path.glob(".*"))


def test_hidden_and_tool_files_are_no_class(tmp_path, capsys):
    """B09."""
    junk = [".ipynb_checkpoints/a-checkpoint.jpg", "a/._1.jpg", "__MACOSX/a/1.png", "a/Thumbs.db", "b/.DS_Store"]
    tree = write(tmp_path / "images", {"a/1.png": png(), "b/1.png": png(), **dict.fromkeys(junk, b"junk")})
    summary = pack(str(tree), tmp_path / "shards")
    assert (summary["classes"], summary["packed"], summary["ignored"]) == (["a", "b"], 2, 5)
    assert "._1.jpg" in capsys.readouterr().out


PACK_AND_READ = """
import sys
from pathlib import Path
from ssl_vit.data.bad_samples import BadSamples
from ssl_vit.data.commands import pack_main
from ssl_vit.data.loader import EvalBatches, Pixels
from ssl_vit.data.sources import open_source
from ssl_vit.data.views import CentreView
tree, out, foreign = sys.argv[1:]
pack_main([tree, out, "max_refused=0.5", "verify=no"])
for shards in (out, foreign):
    index = open_source(shards)
    view, pixels = CentreView((8, 8), 1.0, "bicubic"), Pixels((0.5,) * 3, (0.5,) * 3)
    batch, reports = EvalBatches(index, range(len(index)), view, pixels, 16)[0]
    BadSamples(Path(out + ".jsonl")).left_out(reports, 0)
"""


def test_names_that_are_not_utf8(tmp_path):
    """B11: packed and read, bad samples named, under LANG=C as well."""
    names = [
        "a/caf\udce9.png",
        "b/naïve é 日本 🎈.png",
        f"b/{'x' * 240}.png",
        "caf\udce9/broken.png",
        "caf\udce9/cut.png",
    ]
    good, cut = [*names[:3], "caf\udce9/ok.png", "é/2.png"], png()[:45]
    tree = write(tmp_path / "images", {**dict.fromkeys(good, png()), names[3]: b"", names[4]: cut})
    write_tar(tmp_path / "f.tar", [("caf\udce9.png", cut), ("日本.png", png())], tarfile.GNU_FORMAT)
    words = [str(tree), str(tmp_path / "shards"), str(tmp_path / "f.tar")]
    environment = {**os.environ, "LANG": "C", "LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = subprocess.run([sys.executable, "-c", PACK_AND_READ, *words], cwd=ROOT, env=environment, capture_output=True)
    assert done.returncode == 0, done.stderr
    index, paths = read_index(tmp_path / "shards"), paths_of(tmp_path / "shards")
    wanted = ["a/caf\\xe9.png", names[1], names[2], "caf\\xe9/cut.png", "caf\\xe9/ok.png", "é/2.png"]
    assert sorted(paths) == sorted(wanted)
    assert index.classes == ["a", "b", "caf\\xe9", "é"]
    keys = [index.key(i) for i in range(6)]
    assert all(key.isascii() for key in keys)
    bad = [json.loads(line)["name"] for line in (tmp_path / "shards.jsonl").read_text().splitlines()]
    assert bad == [f"shard-000000.tar: key {keys[paths.index(wanted[3])]}", "f.tar: key caf\\xe9"]


def save_dataset(folder: Path, columns: dict, features: dict) -> str:
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder)
    return f"hf:{folder}"


def test_datasets_with_any_column_names(tmp_path):
    """B12."""
    image, text = datasets.Image(), datasets.Value("string")
    cell = {"bytes": png((9, 0, 0), "JPEG"), "path": None}
    label = datasets.ClassLabel(names=["x", "y"])
    spec = save_dataset(
        tmp_path / "one",
        {"img": [cell, None, cell], "caption": list("abc"), "fine_label": [0, 1, 1]},
        {"img": image, "caption": text, "fine_label": label},
    )
    summary = pack(spec, tmp_path / "shards", max_refused=0.5)
    assert (summary["packed"], summary["refused"], summary["classes"]) == (2, 1, ["x", "y"])
    refused = json.loads((tmp_path / "shards" / "refused.jsonl").read_text())
    assert refused == {"path": f"{spec}#1", "refused": "the row holds no image"}
    assert {sample["jpg"] for sample in samples_of(tmp_path / "shards")} == {cell["bytes"]}
    two = save_dataset(tmp_path / "two", {"left": [cell], "right": [cell]}, {"left": image, "right": image})
    with pytest.raises(InputError, match=r"2 image columns: left, right.*image_column="):
        pack(two, tmp_path / "no")
    with pytest.raises(InputError, match="did you mean 'right'"):
        pack(two, tmp_path / "no", image_column="rigth")
    assert pack(two, tmp_path / "right", image_column="right")["packed"] == 1
    raw = save_dataset(
        tmp_path / "raw", {"data": [png()], "n": [3]}, {"data": datasets.Value("binary"), "n": datasets.Value("int64")}
    )
    with pytest.raises(InputError, match=r"no column of type Image.*data, n"):
        pack(raw, tmp_path / "no")
    assert pack(raw, tmp_path / "raws", image_column="data", label_column="n")["classes"] == ["0", "1", "2", "3"]
    write(tmp_path, {"elsewhere.png": png()})
    paths = {"file": [str(tmp_path / "elsewhere.png"), str(tmp_path / "nowhere.png")]}
    named = save_dataset(tmp_path / "named", paths, {"file": datasets.Value("string")})
    assert pack(named, tmp_path / "paths", image_column="file", max_refused=0.5)["packed"] == 1


def test_splits_of_a_dataset(tmp_path):
    cell = {"bytes": png(), "path": None}
    features = datasets.Features({"image": datasets.Image()})
    part = datasets.Dataset.from_dict({"image": [cell]}, features)
    datasets.DatasetDict({"train": part, "test": part}).save_to_disk(tmp_path / "d")
    assert pack(f"hf:{tmp_path / 'd'}", tmp_path / "train")["packed"] == 1
    with pytest.raises(InputError, match=r"no split 'tets' \(did you mean 'test'"):
        pack(f"hf:{tmp_path / 'd'}:tets", tmp_path / "no")
    part.to_parquet(tmp_path / "p" / "train.parquet")
    assert pack(f"hf:{tmp_path / 'p'}", tmp_path / "parquet")["packed"] == 1


def test_broken_files_are_refused_by_name(tmp_path, capsys):
    """B38, B40."""
    big = io.BytesIO()
    Image.effect_noise((64, 64), 90).save(big, "JPEG")
    broken = {"a.jpg": b"", "b.jpg": b"404 Not Found", "c.jpg": bytes(10**6), "half.jpg": big.getvalue()[:1500]}
    tree = write(tmp_path / "images", {**{f"{i}.png": png() for i in range(20)}, **broken})
    (tree / "nowhere.png").symlink_to(tree / "absent")
    summary = pack(str(tree), tmp_path / "shards")
    assert (summary["found"], summary["packed"], summary["refused"]) == (25, 20, 5)
    lines = [json.loads(line) for line in (tmp_path / "shards" / "refused.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["refused"] for line in lines}
    assert set(reasons) == {*broken, "nowhere.png"}
    assert "0 bytes" in reasons["a.jpg"]
    assert "404" in reasons["b.jpg"]
    assert "b.jpg" in capsys.readouterr().out
    with pytest.raises(InputError, match=r"5 of 25 images refused.*refused\.jsonl.*max_refused=0\.2") as caught:
        pack(str(tree), tmp_path / "strict", max_refused=0.1)
    assert not (tmp_path / "strict").exists()
    assert (tmp_path / "strict.refused.jsonl").exists()
    assert "\n" not in str(caught.value)


def test_labels_need_two_folders_that_hold_all_images(tmp_path):
    tree = write(tmp_path / "images", {"a/x/1.png": png(), "b/1.png": png()})
    assert pack(str(tree), tmp_path / "1")["classes"] == ["a", "b"]
    assert pack(str(tree), tmp_path / "2", labels="none")["classes"] is None
    assert pack(str(tree / "a"), tmp_path / "3")["classes"] is None
    write(tree, {"c.png": png()})
    assert pack(str(tree), tmp_path / "4")["classes"] is None
    assert not read_index(tmp_path / "4").labelled


def test_the_limit_of_pixels_is_that_of_the_options(tree, tmp_path):
    """B41."""
    with pytest.raises(InputError, match="has 4 x 4 pixels, more than max_pixels=15"):
        pack(str(tree), tmp_path / "shards", max_pixels=15)


def test_links_to_folders_are_followed_once(tmp_path):
    tree = write(tmp_path / "images", {"a/1.png": png(), "b/2.png": png()})
    (tree / "a" / "up").symlink_to(tree)
    write(tmp_path / "elsewhere", {"3.png": png()})
    (tree / "c").symlink_to(tmp_path / "elsewhere")
    assert pack(str(tree), tmp_path / "shards")["packed"] == 3


def test_a_link_never_takes_the_place_of_its_folder(tmp_path, capsys):
    tree = write(tmp_path / "images", {"y/1.png": png(), "z/2.png": png(), "z/in/3.png": png()})
    write(tmp_path / "elsewhere", {"deep/4.png": png()})
    for link, target in {"aa": "z", "y/below": "../z/in", "c": "../elsewhere", "b": "../elsewhere/deep"}.items():
        (tree / link).symlink_to(target)
    summary = pack(str(tree), tmp_path / "shards")
    assert sorted(paths_of(tmp_path / "shards")) == ["b/4.png", "y/1.png", "z/2.png", "z/in/3.png"]
    assert (summary["classes"], summary["repeated"]) == (["b", "y", "z"], 3)
    assert "links    aa -> z, c/deep -> b, y/below -> z/in: not followed" in capsys.readouterr().out


def test_what_cannot_be_entered_is_refused_by_name(tmp_path, monkeypatch):
    tree = write(tmp_path / "images", {"a/1.png": png(), "b/2.png": png(), "c/3.png": png()})
    (tree / "a" / "loop.png").symlink_to("loop.png")
    (tree / "b" / "loop").symlink_to("loop")

    def scandir(path):
        if getattr(path, "name", "") == "c":
            raise PermissionError(13, "Permission denied")
        return scan(path)

    scan = os.scandir
    monkeypatch.setattr("ssl_vit.data.images.os.scandir", scandir)
    summary = pack(str(tree), tmp_path / "shards", max_refused=0.5)
    assert (summary["packed"], summary["refused"], summary["skipped"]) == (2, 2, 1)
    assert summary["classes"] == ["a", "b", "c"]
    lines = [json.loads(line) for line in (tmp_path / "shards" / "refused.jsonl").read_text().splitlines()]
    reasons = {line["path"]: line["refused"] for line in lines}
    assert reasons.keys() == {"a/loop.png", "c/"}
    assert reasons["a/loop.png"] == "Too many levels of symbolic links"
    monkeypatch.setattr("ssl_vit.data.images.os.scandir", lambda path: scandir(Path("c")))
    with pytest.raises(InputError, match="images: cannot be read: Permission denied"):
        pack(str(tree), tmp_path / "none")


def test_images_that_nothing_here_decodes_are_refused(tmp_path):
    """B03: they claim to be images, so they count."""
    heic = b"\0\0\0\x18ftypheic" + bytes(99)
    scan = png(kind="TIFF")
    files = {f"{i}.HEIC": heic for i in range(9)} | {"raw.nef": scan, "good.png": png(), "renamed.heic": png()}
    tree = write(tmp_path / "images", files)
    with pytest.raises(InputError, match=r"10 of 12 images refused .*is a heic file, which is not decoded here; conv"):
        pack(str(tree), tmp_path / "shards")
    assert len((tmp_path / "shards.refused.jsonl").read_text().splitlines()) == 10
    assert pack(str(tree), tmp_path / "shards", max_refused=0.9)["packed"] == 2


@pytest.mark.parametrize("kind", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_foreign_shards_are_indexed(kind, tmp_path):
    long = "d/" * 30 + "k" * 90
    members = [
        (f"./{long}.JPG", png((1, 0, 0), "JPEG")), (f"./{long}.cls", b"2\n"),
        ("7.json", b'{"label": 4}'), ("7.png", png((2, 0, 0))), ("README", b"no sample"), ("._x.jpg", b"nor this"),
    ]  # fmt: skip
    index = build_index([write_tar(tmp_path / "s.tar", members, kind)], tmp_path, ["a", "b", "c", "d", "e"])
    assert [index.key(i) for i in range(2)] == [f"./{long}", "7"]
    assert index.samples["label"].tolist() == [2, 4]
    assert [Reader(index).read(i) for i in range(2)] == [members[0][1], members[3][1]]
    assert index.describe(1) == "s.tar: key 7"
    content = json.loads((tmp_path / "index.json").read_text())
    assert (content["__kind__"], content["wids_version"]) == ("wids-shard-index-v1", 1)
    assert content["shardlist"][0].items() >= {"url": "s.tar", "nsamples": 2}.items()


@pytest.mark.parametrize("block", range(1, 60, 4))
def test_a_cut_shard_is_never_taken_for_whole(block, tmp_path):
    """B22: cut at any block, at a member's border or inside."""
    shard = write_tar(tmp_path / "s.tar", [(f"{i}.png", png() + bytes(700)) for i in range(20)])
    data = shard.read_bytes()
    shard.write_bytes(data[: block * 512 + (block % 3) * 100])
    with pytest.raises(InputError, match=r"s\.tar.*(cut short|not a tar)"):
        scan_shard(shard)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"<?xml version='1.0'?><Error>AccessDenied</Error>" * 50, r"is not a tar archive, it begins with b.<\?xml"),
        (b"", "empty"),
    ],
)
def test_what_is_no_tar_says_what_it_is(data, message, tmp_path):
    """B30."""
    write(tmp_path, {"s.tar": data})
    with pytest.raises(InputError, match=message):
        build_index([tmp_path / "s.tar"], tmp_path)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([("0.cls", b"1"), ("0.txt", b"")], "key '0' has no image, only cls, txt"),
        ([("0.jpg", b""), ("0.png", b"")], "two images"),
        ([("0.jpg", b""), ("0.cls", b"cat")], r"'0\.cls' is b'cat'"),
        ([("0.jpg", b""), ("0.cls", b"-5")], "allowed: a class number"),
        ([("../../etc/x", b"")], "no samples"),
    ],
)
def test_odd_samples_are_refused(members, message, tmp_path):
    with pytest.raises(InputError, match=message):
        build_index([write_tar(tmp_path / "s.tar", members)], tmp_path)


def test_an_index_that_does_not_fit_is_refused(tree, tmp_path):
    out = tmp_path / "shards"
    pack(str(tree), out, maxcount=10)
    shard = out / "shard-000001.tar"
    data = shard.read_bytes()
    for change, message in (
        (
            lambda: shard.write_bytes(data[:-512]),
            rf"shard-000001\.tar has {len(data) - 512} bytes instead of {len(data)}",
        ),
        (lambda: shard.unlink(), r"shard-000001\.tar of 3 shards .*missing"),
        (lambda: write(out, {shard.name: data, "new.tar": data}), r"new\.tar not in index\.json"),
    ):
        change()
        with pytest.raises(InputError, match=message):
            read_index(out)
    (out / "new.tar").unlink()
    np.save(out / "index.samples.npy", np.zeros(3))
    with pytest.raises(InputError, match=r"does not belong.*pipelines/index\.py"):
        read_index(out)
    index_main([str(out)])
    assert read_index(out).classes == ["a", "b"]
    assert verify(out) == []


def test_a_read_error_names_shard_and_key(tree, tmp_path):
    pack(str(tree), tmp_path / "shards")
    index = read_index(tmp_path / "shards")
    reader = pickle.loads(pickle.dumps(Reader(index, max_open=1)))
    assert reader.read(3) == Reader(index).read(3)
    with open(index.path(0), "r+b") as file:
        file.truncate(int(index.samples["offset"][29]) + 5)
    with pytest.raises(ReadError, match=r"shard-000000\.tar: key 000000029: 5 of \d+ bytes"):
        reader.read(29)
    os.remove(index.path(0))
    with pytest.raises(ReadError, match="No such file"):
        Reader(index).read(0)


def test_verify_names_what_is_bad(tree, tmp_path, capsys):
    out = tmp_path / "shards"
    pack(str(tree), out, maxcount=10)
    index = read_index(out)
    with open(index.path(1), "r+b") as file:
        file.seek(int(index.samples["offset"][12]) + 20)
        file.write(bytes(40))
    with pytest.raises(SystemExit) as caught:
        verify_main([str(out)])
    assert caught.value.code == 2
    printed = capsys.readouterr()
    assert "shard-000001.tar: its bytes have changed" in printed.out
    assert "shard-000001.tar: key 000000012: " in printed.out
    assert len(printed.err.splitlines()) == 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["SRC"], "SOURCE and OUT needed"),
        (["SRC", "OUT", "shufle=no"], "did you mean 'shuffle'"),
        (["SRC", "OUT", "--maxcount=0"], "maxcount=0"),
        (["SRC", "OUT", "labels=some"], "'auto' or 'none'"),
        (["SRC", "OUT", "--fast"], "should be key=value"),
        (["/nowhere", "OUT"], "no such folder"),
        (["builtin:digit", "OUT"], "did you mean 'digits'"),
    ],
)
def test_mistakes_end_with_one_line_and_code_2(words, message, tree, tmp_path, capsys):
    named = {"SRC": str(tree), "OUT": str(tmp_path / "shards")}
    with pytest.raises(SystemExit) as caught:
        pack_main([named.get(word, word) for word in words])
    printed = capsys.readouterr().err
    assert caught.value.code == 2
    assert message in printed
    assert len(printed.splitlines()) == 1
    assert not (tmp_path / "shards").exists()


@pytest.mark.parametrize("main", [pack_main, index_main, verify_main])
def test_help_lists_every_key(main, capsys):
    main(["--help"])
    printed = capsys.readouterr().out
    assert "usage: python pipelines/" in printed
    assert "default" in printed


@pytest.mark.skipif(not CIFAR.exists(), reason="needs shared/data/cifar10.tar")
def test_real_photographs(tmp_path):
    with tarfile.open(CIFAR) as tar:
        chosen = [info for _, info in zip(range(400), tar, strict=False) if info.isfile()]
        for info in chosen:
            write(tmp_path / "images", {info.name: tar.extractfile(info).read()})  # type: ignore[union-attr]
    summary = pack(str(tmp_path / "images"), tmp_path / "shards")
    assert summary["packed"] == len(chosen)
    assert summary["modes"] == {"RGB": len(chosen)}
    assert verify(tmp_path / "shards") == []
