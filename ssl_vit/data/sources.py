"""From what a recipe calls its data to an index of shards: there is one reading path."""

from __future__ import annotations

import fcntl
import glob
import hashlib
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from ssl_vit.config import InputError, nearest
from ssl_vit.data.formats import say
from ssl_vit.data.images import open_images
from ssl_vit.data.index import INDEX, Index, build_index, read_index
from ssl_vit.data.pack import PackOptions, pack_images
from ssl_vit.data.presence import check_last_images
from ssl_vit.data.remote import is_url
from ssl_vit.data.remote_index import expand, open_remote
from ssl_vit.data.shard_cache import ShardCache
from ssl_vit.data.staging import unfinished

PACKED = ("folder", "list", "hf", "builtin")
_LAYOUT = 1  # raised whenever packing writes something else, so that old caches are left alone


def cache_folder() -> Path:
    """Where packed sources and indexes of read-only folders are kept: ``$SSL_VIT_CACHE`` or ``~/.cache/ssl_vit``."""
    return Path(os.environ.get("SSL_VIT_CACHE") or Path.home() / ".cache" / "ssl_vit")


def open_source(spec: str, labels: str = "auto", cache: Path | None = None, cache_size: float | None = None) -> Index:
    """The index of a source.

    Args:
        spec: a folder of shards, a brace range or glob of tars, or the URL of one of them; or ``folder:PATH``,
            ``list:FILE``, ``hf:NAME[:SPLIT]``, ``builtin:digits[-train|-test]``, which are packed into the cache when
            they are new or have changed.
        labels: ``"auto"``, or ``"none"`` to leave classes out when packing.
        cache: instead of :func:`cache_folder`.
        cache_size: GB that remote shards may take there; None: what the disk has; 0: they are read by ranges.

    Raises:
        InputError: the source cannot be read; the message says what to write instead.
        ReadError: a server does not answer.
    """
    index = _opened(spec, labels, cache or cache_folder(), cache_size)
    check_last_images(index)
    return index


def _opened(spec: str, labels: str, cache: Path, cache_size: float | None) -> Index:
    limit = None if cache_size is None else round(cache_size * 1e9)
    shards = None if limit == 0 else ShardCache(cache / "shards", limit)
    if is_url(spec):
        return open_remote(spec, cache, shards)
    kind, colon, _ = spec.partition(":")
    if colon and kind in PACKED:
        return _packed(spec, labels, cache)
    if kind == "pipe" and colon:
        raise InputError(f"{spec}: recipes run no programs, so pipes are refused; give a folder of shards or a URL")
    if colon and re.fullmatch(r"[a-z]+", kind) and not os.path.exists(spec):
        raise InputError(f"{spec}: unknown kind{nearest(kind, PACKED)}; allowed: a path, URL, or {', '.join(PACKED)}")
    if any(character in spec for character in "{*?[") and not os.path.exists(spec):
        return _index_of_files(_expand(spec), cache)
    path = Path(spec).expanduser()
    if path.is_file():
        return _index_of_files([path], cache)
    if not path.is_dir():
        missing = f"{spec}: no such folder; give a folder of shards, or folder:PATH for a folder of images"
        raise InputError(unfinished(path) or missing)
    return _index_of_folder(path, cache, shards)


def _packed(spec: str, labels: str, cache: Path) -> Index:
    images = open_images(spec, labels)
    settings = PackOptions.model_validate({"labels": labels})
    kind, _, rest = spec.partition(":")
    place = os.path.abspath(os.path.expanduser(rest)) if kind in ("folder", "list") else spec
    facts = [_LAYOUT, place, images.fingerprint(), settings.content()]
    name = re.sub(r"[^A-Za-z0-9]+", "-", os.path.basename(rest.rstrip("/"))).strip("-")[:40]
    folder = cache / f"{kind}-{name}-{_digest(facts)}"
    with _locked(folder):
        if not folder.exists():
            say(f"packing {spec} into {folder} (once)")
            try:
                pack_images(images, spec, folder, settings)
            except OSError as error:
                # Where locks do not work, another process may have been first.
                if not (folder / INDEX).exists():
                    raise InputError(f"{folder}: cannot be written: {error.strerror}; set SSL_VIT_CACHE") from None
    return read_index(folder)


def _index_of_folder(folder: Path, cache: Path, shards: ShardCache | None) -> Index:
    if (folder / INDEX).exists():
        return read_index(folder, cache=shards)
    files = sorted(folder.glob("*.tar"))
    if not files:
        raise InputError(f"{folder}: no shards (*.tar) in it; for a folder of images write folder:{folder}")
    if os.access(folder, os.W_OK):
        return _built(files, folder)
    return _index_of_files(files, cache)


def _index_of_files(files: Sequence[Path], cache: Path) -> Index:
    """The part of their folder's index, if there is one; else an index of just these files, in the cache."""
    homes = {file.parent for file in files}
    if len(homes) == 1 and (home := homes.pop()).joinpath(INDEX).exists():
        index = read_index(home)
        numbers = {shard.url: i for i, shard in enumerate(index.shards)}
        return index.subset([numbers[file.name] for file in files])
    facts = [_LAYOUT, [(str(file.absolute()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]]
    folder = cache / f"index-{files[0].stem[:40]}-{_digest(facts)}"
    if (folder / INDEX).exists():
        return read_index(folder)
    return _built(files, folder)


def _built(files: Sequence[Path], folder: Path) -> Index:
    with _locked(folder):
        if (folder / INDEX).exists():
            return read_index(folder)
        say(f"indexing {len(files)} shards into {folder} (once)")
        return build_index(files, folder)


def _expand(spec: str) -> list[Path]:
    """The files of a brace range or glob, missing ones of a range named."""
    words = expand(os.path.expanduser(spec))
    files: list[Path] = []
    missing: list[str] = []
    for word in words:
        found = sorted(glob.glob(word)) or ([word] if os.path.exists(word) else [])
        files += map(Path, found)
        missing += [] if found else [word]
    if missing:
        names = ", ".join(missing[:5]) + (f" and {len(missing) - 5} more" if len(missing) > 5 else "")
        raise InputError(
            f"{spec}: {len(missing)} of {len(words)} not found: {names}; copy them there, or correct the range"
        )
    return list(dict.fromkeys(files))


def _digest(facts: object) -> str:
    return hashlib.sha256(repr(facts).encode("utf-8", "backslashreplace")).hexdigest()[:16]


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Let one process at a time work on a cached folder; where locks do not work, renames still keep it whole."""
    lock = folder.parent / f".{folder.name}.lock"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = lock.open("w")
    except OSError as error:
        raise InputError(f"{folder.parent}: cannot be written: {error.strerror}; set SSL_VIT_CACHE") from None
    with file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
