"""A page in the browser that shows the verdicts of a certificate while it is written.

It reads ``OUTPUT.partial`` as far as that has grown, so it costs the certification nothing while
nobody looks, and can as well watch a run of another process. It is served on 127.0.0.1 alone, and
answers only requests that name this machine, so that no page of another site can read it.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Generator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import msgspec

from cactus_edge.certificate import Head, Tally, head_of
from cactus_edge.certificate_stream import TAIL, read_line
from cactus_edge.certify.partial import partial_of
from cactus_edge.errors import DataError, UsageError

__all__ = ["Counts", "Watch", "serving"]

HOST = "127.0.0.1"
_PAGE = Path(__file__).with_name("page.html")
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
_LARGEST_PORT = 65535
_WATCHING, _PATIENCE = 3.0, 2.0
"""Seconds since a page asked, while which it counts as open, and to wait until it saw the end."""


class Counts(msgspec.Struct, frozen=True):
    """What a certificate holds so far; ``total`` is 0 until it is begun.

    ``correct``: samples that are decided as labelled, robust or not. ``finished``: its last line
    is written. ``problem``: why nothing can be read, empty where it can.
    """

    file: str
    models: tuple[str, ...] = ()
    data: str = ""
    radius: str = ""
    total: int = 0
    done: int = 0
    correct: int = 0
    verdicts: dict[str, int] = {}
    finished: bool = False
    problem: str = ""


class Watch:
    """Reads a certificate on, from where it was left.

    Args:
        output: where the certificate will be; its partial file is read until it is there.
    """

    def __init__(self, output: Path) -> None:
        self._output = output
        self._lock = threading.Lock()
        self._begun = False
        self._asked = -_WATCHING
        self._shown = threading.Event()
        self._forget()

    def _forget(self) -> None:
        self._read, self._correct = 0, 0
        self._head: Head | None = None
        self._first = b""
        self._tally = Tally()
        self._finished = False

    def counts(self) -> Counts:
        """What is written by now; lines that are not whole yet do not count."""
        with self._lock:
            self._asked = time.monotonic()
            try:
                self._catch_up()
            except (OSError, DataError) as error:
                return Counts(str(self._output), problem=str(error))
            head = self._head
            if head is None:
                return Counts(str(self._output))
            if self._finished:
                self._shown.set()
            summary = self._tally.summary(attacked=False)
            return Counts(
                file=str(self._output),
                models=tuple(model.file for model in head.models),
                data=f"{head.data.name} {head.data.split}" if head.data else "",
                radius=f"{head.property.kind} {head.property.radius}".strip(),
                total=head.data.count if head.data else 0,
                done=self._tally.samples,
                correct=self._correct,
                verdicts=summary.verdicts,
                finished=self._finished,
            )

    def until_shown(self) -> None:
        """Wait a moment, where a page is open that has not seen the last line."""
        if time.monotonic() - self._asked < _WATCHING:
            self._shown.wait(_PATIENCE)

    def _catch_up(self) -> None:
        """Take in the lines that came since."""
        partial = partial_of(self._output)
        if partial.exists():
            path, self._begun = partial, True
        elif self._begun and self._output.exists():  # an older certificate is not of this run
            path = self._output
        else:
            return
        with path.open("rb") as stream:
            anew = stream.read(len(self._first)) != self._first  # of another claim
            if anew or path.stat().st_size < self._read:  # begun anew, or a torn end was cut off
                self._forget()
            stream.seek(self._read)
            while (line := read_line(stream)) and line.endswith(b"\n"):
                if self._head is None:
                    self._head, self._first = head_of(line), line
                elif line.startswith(TAIL):
                    self._finished = True
                else:
                    brief = self._tally.sample(line)
                    self._correct += brief.label == brief.prediction and brief.verdict != "error"
                self._read += len(line)


@contextmanager
def serving(output: Path, port: int = 0) -> Generator[str]:
    """Serve the page while the block runs; its address.

    Args:
        output: where the certificate will be.
        port: of this machine; 0 takes a free one.

    Raises:
        UsageError: there is no such port, or another program has it.
    """
    watch = Watch(output)

    class Handler(_Handler):
        counts = staticmethod(watch.counts)

    try:
        if not 0 <= port <= _LARGEST_PORT:
            raise UsageError(f"port {port}: a number from 0 to {_LARGEST_PORT} is needed")
        server = ThreadingHTTPServer((HOST, port), Handler)
    except OSError as error:
        raise UsageError(f"port {port}: {error.strerror}; --port 0 takes a free one") from None
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.1,), daemon=True)
    thread.start()
    try:
        yield f"http://{HOST}:{server.server_port}/"
        watch.until_shown()
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    """``/`` is the page, ``/counts`` the figures as JSON."""

    timeout = 10
    server_version, sys_version = "cactus-edge", ""

    @staticmethod
    def counts() -> Counts:
        """Of the certificate that is served."""
        raise NotImplementedError

    def do_GET(self) -> None:
        """Answer a request."""
        name = self.headers.get("Host", "").partition(":")[0]  # a tunnel may have another port
        if name not in (HOST, "localhost"):
            self._answer(403, "text/plain", b"this page is for the machine that serves it\n")
        elif self.path == "/":
            self._answer(200, "text/html; charset=utf-8", _PAGE.read_bytes())
        elif self.path == "/counts":
            self._answer(200, "application/json", msgspec.json.encode(self.counts()))
        else:
            self._answer(404, "text/plain", b"there is / and /counts\n")

    def _answer(self, status: int, kind: str, content: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.send_header("Content-Security-Policy", _POLICY)
        self.send_header("X-Content-Type-Options", "nosniff")
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the terminal belongs to the certification."""
