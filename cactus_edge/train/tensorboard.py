"""TensorBoard beside a training run, on this machine alone."""

from __future__ import annotations

import importlib.util
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cactus_edge.errors import MissingExtraError, ToolError, UsageError
from cactus_edge.train.logs import DIRECTORY

HOST = "127.0.0.1"
_ADDRESS = re.compile(r"at (http://\S+)")
_LARGEST_PORT = (1 << 16) - 1
_PATIENCE = 120.0
"""Seconds that TensorBoard may take to start, on a machine that is busy."""


def require() -> None:
    """Raise MissingExtraError when TensorBoard is not installed; call it before work."""
    if importlib.util.find_spec("tensorboard") is None:
        raise MissingExtraError("tensorboard", "train", "--serve")


@contextmanager
def serving(output: Path, port: int = 0) -> Generator[str]:
    """TensorBoard on the logs of a run while the block runs, in a process of its own; its address.

    Args:
        output: directory of the run, which need not exist yet.
        port: of this machine; 0 takes a free one.

    Raises:
        MissingExtraError: TensorBoard is not installed.
        UsageError: there is no such port, or another program has it.
        ToolError: it does not start.
    """
    require()
    _refuse_port(port)
    command = [sys.executable, "-m", "tensorboard.main", "--logdir", str(output / DIRECTORY)]
    command += ["--host", HOST, "--port", str(port), "--reload_interval", "2"]
    with tempfile.TemporaryDirectory() as folder:
        said = Path(folder) / "said"
        with said.open("wb") as stream:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=stream, stderr=subprocess.STDOUT
            )
        try:
            yield _address(process, said)
        finally:
            process.terminate()
            process.wait()


def _refuse_port(port: int) -> None:
    """Say of a port what ``live`` says of one, before TensorBoard exits with a trace."""
    if not 0 <= port <= _LARGEST_PORT:
        raise UsageError(f"port {port}: a number from 0 to {_LARGEST_PORT} is needed")
    with socket.socket() as tried:
        tried.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            tried.bind((HOST, port))
        except OSError as error:
            raise UsageError(f"port {port}: {error.strerror}; --port 0 takes a free one") from None


def _address(process: subprocess.Popen[bytes], said: Path) -> str:
    """What TensorBoard prints when it is ready."""
    started = time.monotonic()
    while time.monotonic() - started < _PATIENCE:
        stopped = process.poll() is not None  # asked first: then all that it said is in the file
        text = said.read_text(encoding="utf-8", errors="replace")
        if (found := _ADDRESS.search(text)) is not None:
            return found[1]
        if stopped:
            last = text.strip().rpartition("\n")[2] or f"exit code {process.returncode}"
            raise ToolError(f"TensorBoard does not start: {last}")
        time.sleep(0.1)
    raise ToolError(f"TensorBoard does not start within {_PATIENCE:.0f} s")
