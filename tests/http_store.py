"""An HTTP store with ranges and ETags, on loopback, that can be slow, fail and be down."""

import contextlib
import hashlib
import random
import re
import socketserver
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path


class Store(socketserver.ThreadingMixIn, HTTPServer):
    """Serves the files of a folder.

    Attributes:
      latency: seconds before each answer.
      failing: share of the requests that are answered with 503.
      down_until: time before which every request is answered with 503.
      knows_ranges: else files are sent whole, as by `python -m http.server`.
      moved_to: else each request is sent on to the same path there.
      says_lengths: else no answer has a Content-Length.
      requests: requests so far; ranges: those for a range; tokens: what they gave to be let in; encodings: what they
        would have answers compressed by.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, folder: Path, *, latency: float = 0.0, failing: float = 0.0) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.folder, self.latency, self.failing = folder, latency, failing
        self.down_until, self.requests, self.ranges = 0.0, 0, 0
        self.knows_ranges, self.says_lengths, self.moved_to = True, True, ""
        self.tokens: set[str | None] = set()
        self.encodings: set[str | None] = set()
        self.random = random.Random(0)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request, client_address):
        """Clients may go away."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self):
        self._answer(body=False)

    def do_GET(self):
        self._answer(body=True)

    def _answer(self, *, body):
        store = self.server
        with store.lock:
            store.requests += 1
            store.tokens.add(self.headers.get("Authorization"))
            store.encodings.add(self.headers.get("Accept-Encoding"))
            fails = store.random.random() < store.failing or time.monotonic() < store.down_until
        time.sleep(store.latency)
        if fails:
            self._send(503, b"")
            return
        if store.moved_to:
            self._send(302, b"", {"Location": store.moved_to + self.path})
            return
        file = store.folder / self.path.lstrip("/")
        if not file.is_file():
            self._send(404, b"")
            return
        size = file.stat().st_size
        tag = hashlib.sha256(f"{file}{file.stat().st_mtime_ns}{size}".encode()).hexdigest()[:16]
        headers = {"ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        asked = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if asked is None or not body or not store.knows_ranges:
            self._send(200, file.read_bytes() if body else b"", headers, length=size)
            return
        with store.lock:
            store.ranges += 1
        first, last = int(asked[1]), min(int(asked[2] or size), size - 1)
        if first >= size:
            self._send(416, b"")
            return
        with file.open("rb") as stream:
            stream.seek(first)
            content = stream.read(last - first + 1)
        self._send(206, content, headers | {"Content-Range": f"bytes {first}-{last}/{size}"})

    def _send(self, status, content, headers=None, length=None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        if self.server.says_lengths:
            self.send_header("Content-Length", str(len(content) if length is None else length))
        else:
            self.close_connection = True
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        """Says nothing."""


@contextlib.contextmanager
def serving(folder, **options):
    store = Store(folder, **options)
    thread = threading.Thread(target=store.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield store
    finally:
        store.shutdown()
        store.server_close()
        thread.join()
