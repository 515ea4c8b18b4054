"""A real HTTP server on this machine that serves a folder, and misbehaves as it is told."""

from __future__ import annotations

import re
import threading
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any


class ShardServer(ThreadingHTTPServer):
    """Serves ``folder``; ``faults[name]`` are what the next GETs of a file get instead, ``always[name]`` all of them;
    after ``fail_after`` GETs every one gets ``fail_with``.

    Faults: ``"503"`` and other statuses, ``"stall"`` (half of the body, then nothing), ``"cut"`` (half of it, then the
    connection ends), ``"short"`` (a whole reply that lacks the last 100 bytes), ``"garbage"`` (the right length).
    """

    daemon_threads = True

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.ranges = folder, True
        self.faults: dict[str, list[str]] = defaultdict(list)
        self.always: dict[str, str] = {}
        self.fail_after: int | None = None
        self.fail_with = "503"
        self.gets: list[tuple[str, int, int]] = []
        """(name, first byte, bytes sent) of each GET."""
        self.released = threading.Event()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def count(self, name: str) -> int:
        return sum(name == got for got, _, _ in self.gets)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that gives up is what these tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: ShardServer  # pyright: ignore[reportIncompatibleVariableOverride]
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        name = self.path.lstrip("/")
        file = self.server.folder / name
        fault = self.server.always.get(name, "")
        status = int(fault) if fault.isdigit() else 200 if file.is_file() else 404
        self.send_response(status)
        self.send_header("Content-Length", str(file.stat().st_size - 100 * (fault == "short") if status == 200 else 0))
        self.end_headers()

    def do_GET(self) -> None:
        server, name = self.server, self.path.lstrip("/")
        file = server.folder / name
        fault = server.faults[name].pop(0) if server.faults[name] else server.always.get(name, "")
        if server.fail_after is not None and len(server.gets) >= server.fail_after:
            fault = server.fail_with
        if name == "":
            data = "".join(f'<a href="{path.name}">{path.name}</a>' for path in server.folder.iterdir()).encode()
        elif fault.isdigit() or not file.is_file():
            server.gets.append((name, 0, 0))
            self.send_error(int(fault) if fault else 404)
            return
        else:
            data = file.read_bytes()
        start, total = 0, len(data)
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", "")) if server.ranges else None
        if asked:
            start = int(asked[1])
            data = data[start : int(asked[2]) + 1]
        data = {"short": data[:-100], "garbage": bytes(len(data))}.get(fault, data)
        server.gets.append((name, start, len(data)))
        self.send_response(206 if asked else 200)
        if asked:
            self.send_header("Content-Range", f"bytes {start}-{start + len(data) - 1}/{total}")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if fault in ("stall", "cut") else data)
        self.wfile.flush()
        if fault == "stall":
            server.released.wait(30)
        if fault in ("stall", "cut"):
            self.close_connection = True
            self.connection.close()


@contextmanager
def serving(folder: Path) -> Iterator[ShardServer]:
    server = ShardServer(folder)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
