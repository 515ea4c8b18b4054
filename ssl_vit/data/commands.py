"""The command lines of packing, indexing and verifying: ``COMMAND WORDS... key=value ...``."""

from __future__ import annotations

import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import Field

from ssl_vit.config import EXIT_BAD_INPUT, InputError, Section, check, help_lines, load
from ssl_vit.data.formats import say
from ssl_vit.data.processes import cores
from ssl_vit.data.remote import ReadError

Options = TypeVar("Options", bound=Section)


class IndexOptions(Section):
    """The settings of indexing."""

    classes: Path | None = Field(None, description="text file with the class names, one a line, by label")
    workers: int = Field(default_factory=cores, ge=1, description="processes that read")
    out: Path | None = Field(None, description="folder for the index of remote shards; default: the cache")


class VerifyOptions(Section):
    """The settings of verifying."""

    workers: int = Field(default_factory=cores, ge=1, description="processes that read and decode")
    max_pixels: int = Field(178_956_970, ge=1, description="larger images are bad, as by data.max_pixels")


def pack_main(argv: Sequence[str] | None = None) -> None:
    """``pack.py SOURCE OUT [key=value ...]``."""
    from ssl_vit.data.pack import PackOptions, pack

    def run(words: list[str], options: PackOptions) -> None:
        pack(words[0], Path(words[1]).expanduser(), **options.model_dump())

    text = (
        "Pack images into a folder of shards.\n"
        "SOURCE is PATH or folder:PATH of images, list:FILE of paths (each with a TAB and a label, or none),\n"
        "shards:PATH of tars, hf:NAME_OR_PATH[:SPLIT], builtin:digits, builtin:digits-train or -test."
    )
    command("pack.py", text, ["SOURCE", "OUT"], PackOptions, run, argv)


def index_main(argv: Sequence[str] | None = None) -> None:
    """``index.py SHARDS [key=value ...]``."""

    def run(words: list[str], options: IndexOptions) -> None:
        from ssl_vit.data.index import build_index
        from ssl_vit.data.mixing import advice
        from ssl_vit.data.remote import is_url
        from ssl_vit.data.staging import unfinished

        if is_url(words[0]):
            return _index_url(words[0], options)
        folder = Path(words[0]).expanduser()
        shards = sorted(folder.glob("*.tar"))
        if not shards:
            nothing = f"{folder}: no shards (*.tar) in it; give the folder that holds them"
            raise InputError(unfinished(folder) or nothing)
        index = build_index(shards, folder, _class_names(options.classes, folder), options.workers)
        labels = f"{len(set(index.samples['label'].tolist()))} labels" if index.labelled else "unlabelled"
        say(f"{folder}: indexed {len(index)} samples in {len(shards)} shards, {labels}")
        if index.labelled:
            say(advice(index.samples["label"], folder))

    text = "Index tar shards, made by anybody: a folder, or the URL of a folder or range of them."
    command("index.py", text, ["SHARDS"], IndexOptions, run, argv)


def _index_url(url: str, options: IndexOptions) -> None:
    from ssl_vit.data.mixing import advice
    from ssl_vit.data.remote_index import gives, index_remote
    from ssl_vit.data.sources import cache_folder

    names = _class_names(options.classes, Path()) if options.classes else None
    index, folder = index_remote(url, cache_folder(), options.out, names, options.workers)
    source = url if options.out is None and gives(url, index, cache_folder()) else str(folder)
    what = f"{len(index)} samples in {len(index.shards)} shards"
    say(f"{url}: indexed {what} into {folder}; use it as data.train={source}")
    if options.out is None and source != url:
        say(f"  data.train={url} reads another index, which stands beside the shards; out=FOLDER keeps this one there")
    if index.labelled:
        say(advice(index.samples["label"], source))


def verify_main(argv: Sequence[str] | None = None) -> None:
    """``verify.py SHARDS [key=value ...]``."""

    def run(words: list[str], options: VerifyOptions) -> None:
        from ssl_vit.data.verify import verify

        source = words[0]
        findings = verify(source, options.workers, options.max_pixels)
        say("\n".join([f"bad  {line}" for line in findings] or [f"{source}: all shards and images are good"]))
        if findings:
            raise InputError(f"{source}: {len(findings)} findings; pack again, or copy the named shards again")

    text = "Check shards against their index and decode all images: a folder, or the URL of a folder or range of them."
    command("verify.py", text, ["SHARDS"], VerifyOptions, run, argv)


def _class_names(file: Path | None, folder: Path) -> list[str] | None:
    """Class names from a text file; else those that an index made earlier holds, which a new index must not lose."""
    from ssl_vit.data.index import known_classes

    if file is None:
        return known_classes(folder)
    try:
        return file.read_text(encoding="utf-8").split("\n")[: -1 if file.read_bytes().endswith(b"\n") else None]
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"classes={file}: cannot be read: {error}") from None


def command(
    name: str,
    text: str,
    places: list[str],
    section: type[Options],
    run: Callable[[list[str], Options], None],
    argv: Sequence[str] | None,
) -> None:
    """Parse ``argv``, run, and end with exit code 2 and one message if the input is bad.

    Args:
        name: of the pipeline.
        text: what it does, the head of its help.
        places: words it needs, by name; the last may be ``NAME...``, one or more.
        section: its settings.
        run: called with the words and the checked settings.
        argv: the command line; default: this process's.
    """
    words = list(sys.argv[1:] if argv is None else argv)
    usage = f"usage: python pipelines/{name} {' '.join(places)} [key=value ...]"
    if {"--help", "-h"} & set(words):
        print("\n".join([text, usage, *help_lines(section)]))
        return
    # A key has no slash or dot before its =, so ./a=b is a path.
    settings = [word for word in words if re.match(r"-|\w+=", word)]
    given = [word for word in words if word not in settings]
    try:
        many = places[-1].endswith("...")
        if len(given) < len(places) or (len(given) > len(places) and not many):
            raise InputError(f"{len(given)} words given, {' and '.join(places)} needed; {usage}")
        run(given, check(section, load([], settings)))
    except (InputError, ReadError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        raise SystemExit(EXIT_BAD_INPUT) from None
    except KeyboardInterrupt:
        print(f"{name}: interrupted; give the same command again", file=sys.stderr)
        raise SystemExit(128 + signal.SIGINT) from None
