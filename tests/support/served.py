"""Prepared data of several shards, and a local web server for a folder: with or without ranges, failing on request."""

from __future__ import annotations

import contextlib
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

from selftrans.data import resumable
from selftrans.data.manifest import Manifest, Shard
from selftrans.data.shard_file import write_shard
from selftrans.experiments.bench.loading_sampling import random_dataset
from selftrans.storage import sha256_file

ROWS = 10  #: of a shard


def folder_of(folder: Path, shards: int = 6) -> Path:
    """Data of `shards` shards of ROWS rows: the first channel holds the number of the row, the label is that of the shard."""
    random_dataset(folder, (2, 8, 8), 1, classes=max(shards, 2))
    manifest = Manifest.load(folder)
    plan, made = manifest.without_shards(), []
    for k in range(shards):
        moments = np.random.default_rng(k).standard_normal((ROWS, 1, 4, 8, 8)).astype(np.float16)
        moments[:, :, 0] = np.arange(k * ROWS, (k + 1) * ROWS)[:, None, None, None]
        with write_shard(folder / Shard(k, 0, "", ()).file, plan.layout, ROWS) as rows:
            rows.write({"moments": moments, "labels": np.full(ROWS, k)})
        made.append(Shard(k, ROWS, sha256_file(folder / Shard(k, 0, "", ()).file), ()))
    (folder / "manifest.json").unlink()
    resumable.finish(folder, plan, made)
    return folder


class Server:
    """What a server was asked for, and how it answers."""

    def __init__(self, folder: Path, *, ranges: bool) -> None:
        self.folder, self.ranges, self.url = folder, ranges, ""
        self.asked: list[str] = []  #: "name" or "name bytes=a-b" of each request
        self.sent = 0  #: bytes of files
        self.failures = 0  #: of the next requests, with status 503
        self.status = 0  #: of every request, if not 0
        self.cut = 0  #: of the next whole files, which end early


@contextlib.contextmanager
def serving(folder: Path, *, ranges: bool = True) -> Iterator[Server]:
    """Serve a folder at `url` of what this yields."""
    state = Server(folder, ranges=ranges)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            name, asked = self.path.rpartition("/")[2], self.headers.get("Range")
            state.asked.append(f"{name} {asked}" if asked else name)
            if state.failures or state.status:
                state.failures -= bool(state.failures)
                self.send_error(state.status or 503)
                return
            path = state.folder / name
            if not path.is_file():
                self.send_error(404)
                return
            content, status = path.read_bytes(), 200
            if asked and state.ranges:
                first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())  # type: ignore[union-attr]
                content, status = content[first : last + 1], 206
            self.send_response(status)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if state.cut and not asked:
                state.cut -= 1
                content = content[: len(content) // 2]
            state.sent += len(content)
            with contextlib.suppress(OSError):
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    state.url = f"http://127.0.0.1:{server.server_address[1]}/sets/a"
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
