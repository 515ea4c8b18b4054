"""Remote files through fsspec: sizes and byte ranges, with time-outs, bounded retries and errors that name the URL."""

from __future__ import annotations

import importlib
import importlib.util
import logging
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from random import SystemRandom
from typing import Any, TypeVar

from ssl_vit.config import InputError, nearest

logger = logging.getLogger(__name__)

LIBRARIES = {"http": "aiohttp", "https": "aiohttp", "s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}
"""The kinds of URLs, and what reads them."""
CONNECT, STALL = 10.0, 60.0
"""Seconds until a server has to answer, and until the next bytes have to come."""
ATTEMPTS, BACKOFF = 6, 1.0
"""Tries of a request, and seconds before the second; each further wait is twice as long."""
BLOCK = 32 << 20
"""Bytes of a request: what a cut connection costs at most."""
PARALLEL = 64
"""Sizes asked for at once."""
WORTH_RETRYING = (408, 425, 429)

Result = TypeVar("Result")
_jitter = SystemRandom()  # the default generator belongs to the views


class ReadError(OSError):
    """Bytes that could not be read. Never the sample's fault: a run retries and stops, it does not skip."""


class Refused(ReadError):
    """The server has no such file, or does not give it: asking again would not help."""


def is_url(spec: str) -> bool:
    """Whether a source is remote."""
    return re.match(r"[A-Za-z][\w+.-]*://", spec) is not None


def check_scheme(url: str) -> None:
    """Refuse URLs that nothing here reads.

    Raises:
        InputError: an unknown kind, or its library is not installed.
    """
    scheme = url.partition("://")[0]
    if scheme not in LIBRARIES:
        raise InputError(f"{url}: unknown kind of URL{nearest(scheme, LIBRARIES)}; allowed: {', '.join(LIBRARIES)}")
    if importlib.util.find_spec(LIBRARIES[scheme]) is None:
        raise InputError(f"{url}: needs {LIBRARIES[scheme]}; cure: bash scripts/setup.sh cloud")


def size(url: str) -> int | None:
    """Bytes of a remote file; None if its server does not say.

    Raises:
        ReadError: as of all functions here, naming the URL and the attempts; :class:`Refused` without further attempts.
    """
    return _persistently(url, lambda system: system.info(url)["size"])


def sizes(urls: Sequence[str]) -> list[int | ReadError | None]:
    """The size of each file, or why it cannot be read; many at a time."""

    def ask(url: str) -> int | ReadError | None:
        try:
            return size(url)
        except ReadError as error:
            return error

    with ThreadPoolExecutor(PARALLEL) as pool:
        return list(pool.map(ask, urls))


def content(url: str) -> bytes:
    """All of a small file."""
    return _persistently(url, lambda system: system.cat_file(url))


def read(url: str, start: int, stop: int, filesize: int) -> bytes:
    """The bytes from ``start`` up to ``stop`` of a file that has ``filesize``."""
    return _from(url, start, stop, filesize)[: stop - start]


def blocks(url: str, filesize: int) -> Iterator[bytes]:
    """A whole file, piece by piece: a connection that is cut goes on behind the last piece."""
    start = 0
    while start < filesize:
        data = _from(url, start, min(start + BLOCK, filesize), filesize)
        yield data
        start += len(data)


def tars(url: str) -> list[str]:
    """The URLs of the shards (``.tar``) in a remote folder, sorted."""

    def names(system: Any) -> list[str]:
        return [system.unstrip_protocol(name) for name in system.ls(url, detail=False)]

    return sorted(name for name in _persistently(url, names) if name.endswith(".tar"))


def _from(url: str, start: int, stop: int, filesize: int) -> bytes:
    """The bytes asked for, or all from ``start`` on where a server that knows no ranges sends the whole file."""

    def ask(system: Any) -> bytes:
        data = system.cat_file(url, start=start, end=stop)
        if len(data) == stop - start:
            return data
        if len(data) == filesize:
            return data[start:]
        raise OSError(f"{len(data)} bytes came instead of {stop - start}")

    return _persistently(url, ask)


def _persistently(url: str, ask: Callable[[Any], Result]) -> Result:
    """Ask until there is an answer, at most ``ATTEMPTS`` times."""
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return ask(_system(url.partition("://")[0]))
        except Exception as error:  # every file system raises its own
            # whatever goes wrong when it asks for a size, fsspec's HTTP says that there is no file
            hidden = isinstance(error, FileNotFoundError) and url.startswith("http")
            cause = error.__cause__ or error if hidden else error
            reason = f"{type(cause).__name__}: {' '.join(str(cause).split())}".removesuffix(": ")
            if refusal := _refusal(cause):
                raise Refused(f"{url}: {refusal}") from error
            if attempt == ATTEMPTS:
                raise ReadError(f"{url}: {ATTEMPTS} attempts failed, the last with {reason}") from error
            wait = BACKOFF * 2 ** (attempt - 1) * (0.5 + _jitter.random())
            logger.warning("%s: attempt %d of %d: %s; again in %.1f s", url, attempt, ATTEMPTS, reason, wait)
            time.sleep(wait)
    raise AssertionError(ATTEMPTS)


def _refusal(error: BaseException) -> str | None:
    """Why asking again would not help, if so."""
    response = getattr(error, "response", None)
    status = getattr(error, "status", None) or getattr(error, "code", None) or getattr(response, "status_code", None)
    if isinstance(error, FileNotFoundError) or status == 404:
        return "no such file (404)"
    if isinstance(error, PermissionError) or status in (401, 403):
        return f"access is denied ({status or 403}); check the URL and your credentials for it"
    if type(error).__name__ == "NoCredentialsError":
        return "no credentials are found; set them, or FSSPEC_S3_ANON=true for a public bucket"
    if isinstance(status, int) and 400 <= status < 500 and status not in WORTH_RETRYING:
        return f"the server refuses with HTTP status {status}"
    return None


def _system(scheme: str) -> Any:
    """fsspec's file system, one a process: it keeps those it made, and makes new ones after a fork."""
    import fsspec

    if scheme in ("http", "https"):
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT, sock_read=STALL)
        return fsspec.filesystem(
            scheme,
            client_kwargs={"timeout": timeout, "trust_env": True},  # proxies, and passwords of ~/.netrc
            headers={"Accept-Encoding": "identity"},  # or a length would be that of compressed bytes
        )
    if scheme == "s3":
        config = {"connect_timeout": CONNECT, "read_timeout": STALL, "retries": {"max_attempts": 0}}
        system: Any = fsspec.filesystem(scheme, config_kwargs=config, use_listings_cache=False)
        system.retries = 1  # attempts are counted here
        return system
    if scheme == "gs":
        # its pauses would draw from the generator of the views
        vars(importlib.import_module("gcsfs.retry"))["random"] = _jitter
        return fsspec.filesystem(scheme, requests_timeout=STALL)
    return fsspec.filesystem(scheme)
