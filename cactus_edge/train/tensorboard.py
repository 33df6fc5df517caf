"""TensorBoard beside a training run, on this machine alone."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path

from cactus_edge.errors import MissingExtraError, ToolError
from cactus_edge.train.logs import DIRECTORY

HOST = "127.0.0.1"
_ADDRESS = re.compile(r"at (http://\S+)")
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
        ToolError: it does not start, for one because another program has the port.
    """
    require()
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
