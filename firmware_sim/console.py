"""An emulated board with its serial port on this computer: a pseudo terminal, or a TCP socket.

What ``cactus-edge validate --device`` does with a board on the desk it does with this one, by the
same bytes. The port is one of unicorn's memory-mapped devices; where the firmware waits for a byte,
the emulator waits for the line, so an idle board takes no time.
"""

from __future__ import annotations

import os
import re
import select
import socket
import tempfile
import threading
from collections import deque
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from string import Template
from typing import Any, Protocol

from cactus_edge.csource import CSource
from cactus_edge.errors import CactusEdgeError, ToolError, UsageError
from firmware_sim import build
from firmware_sim.boards import KIB, Board, Cpu, board_named
from firmware_sim.emulator import Machine
from firmware_sim.image import read_image

UART = 0x40004000
_DATA, _STATE = 0, 4
_RECEIVER_FULL = 2  # and never too full to send
_CHUNK = 4096
_MAIN = "board.c"


class Line(Protocol):
    """The host's side of the port: a file descriptor to wait for, bytes in and out."""

    address: str

    def fileno(self) -> int: ...  # noqa: D102

    def read(self) -> bytes: ...  # noqa: D102

    def write(self, data: bytes) -> None: ...  # noqa: D102

    def close(self) -> None: ...  # noqa: D102


class PseudoTerminal:
    """A terminal whose other end, ``address``, is a path that programs open as a serial port."""

    def __init__(self) -> None:
        """Open it, raw.

        Raises:
            UsageError: this system has none.
        """
        try:
            import tty

            self._master, self._slave = os.openpty()
        except (AttributeError, ImportError):
            raise UsageError("this system has no pseudo terminals; give --listen") from None
        # It stays open here as well, so that clients may come and go.
        tty.setraw(self._slave)
        self.address = os.ttyname(self._slave)

    def fileno(self) -> int:
        """To wait for."""
        return self._master

    def read(self) -> bytes:
        """What has come."""
        return os.read(self._master, _CHUNK)

    def write(self, data: bytes) -> None:
        """All of it, waiting while nobody reads."""
        while data:
            data = data[os.write(self._master, data) :]

    def close(self) -> None:
        """Close both ends."""
        os.close(self._slave)
        os.close(self._master)


class Socket:
    """A TCP server with one client at a time; ``address`` is a URL for pyserial."""

    def __init__(self, host: str, port: int) -> None:
        """Listen; port 0 is any free one.

        Raises:
            UsageError: nobody can listen there.
        """
        try:
            self._server = socket.create_server((host, port))
        except (OSError, OverflowError) as error:
            raise UsageError(f"cannot listen on {host}:{port} ({error})") from None
        self._client: socket.socket | None = None
        self.address = f"socket://{host}:{self._server.getsockname()[1]}"

    def fileno(self) -> int:
        """The client, or the next one."""
        return (self._client or self._server).fileno()

    def read(self) -> bytes:
        """What has come; nothing when a client comes or goes."""
        if self._client is None:
            self._client, _ = self._server.accept()
            return b""
        try:
            data = self._client.recv(_CHUNK)
        except OSError:
            data = b""
        if not data:
            self._client.close()
            self._client = None
        return data

    def write(self, data: bytes) -> None:
        """To the client; lost without one, as on a line."""
        if self._client is not None:
            try:
                self._client.sendall(data)
            except OSError:
                self._client.close()
                self._client = None

    def close(self) -> None:
        """Close both."""
        for end in (self._client, self._server):
            if end is not None:
                end.close()


class Served:
    """A booted board; ``run`` gives it the line until ``stop``."""

    def __init__(self, texts: Mapping[str, str], board: Board, line: Line, *, layers: bool) -> None:
        """Compile and boot.

        Args:
            texts: model and console, see ``console_texts``.
            board: a microcontroller.
            line: where its port leads.
            layers: build so that every layer can be asked for.

        Raises:
            DoesNotFitError: the board is too small.
            ToolError: the compiler or the emulator failed.
        """
        self._line = line
        self._received: deque[int] = deque()
        self._sent = bytearray()
        self._polled = False
        self._wake = os.pipe()
        with tempfile.TemporaryDirectory(prefix="cactus-edge-") as name:
            image = read_image(console_program(texts, Path(name), board, layers=layers))
        self._machine = Machine(board, image, before=self._attach)

    def run(self) -> None:
        """Emulate; returns after ``stop``.

        Raises:
            ToolError: a fault in the firmware.
        """
        self._machine.resume()

    def stop(self) -> None:
        """End ``run``, from another thread."""
        os.write(self._wake[1], b"\0")

    def close(self) -> None:
        """Free what waits for ``stop``."""
        for end in self._wake:
            os.close(end)

    def _attach(self, machine: Machine) -> None:
        machine.engine.mmio_map(UART, 4 * KIB, self._read, None, self._write, None)

    def _read(self, engine: Any, offset: int, size: int, user: object) -> int:
        again, self._polled = self._polled, offset == _STATE
        if offset == _DATA:
            return self._received.popleft() if self._received else 0
        if offset != _STATE:
            return 0
        # It asks before it sends, too. Who asks twice in a row waits for a byte.
        if again and not self._received:
            self._wait(engine)
        return _RECEIVER_FULL if self._received else 0

    def _write(self, engine: Any, offset: int, size: int, value: int, user: object) -> None:
        self._polled = False
        if offset == _DATA:
            self._sent.append(value & 0xFF)

    def _wait(self, engine: Any) -> None:
        """Until there is a byte for the board, or an end."""
        if self._sent:
            ready, writable, _ = select.select([self._wake[0]], [self._line], [])
            if ready:
                engine.emu_stop()
                return
            if writable:
                self._line.write(bytes(self._sent))
                self._sent.clear()
        ready, _, _ = select.select([self._wake[0], self._line], [], [])
        if self._wake[0] in ready:
            engine.emu_stop()
            return
        self._received.extend(self._line.read())


def console_texts(folder: Path) -> dict[str, str]:
    """Sources of model and console in a folder of ``export-c --console``.

    Raises:
        UsageError: the folder has none.
    """
    found = sorted(path for path in folder.glob("*_console.c") if path.name != "main_console.c")
    if len(found) != 1:
        raise UsageError(
            f"{folder}: {len(found)} consoles; give a folder that `cactus-edge export-c MODEL -o "
            f"{folder} --console` wrote"
        )
    prefix = found[0].name.removesuffix("_console.c")
    names = (f"{prefix}.c", f"{prefix}.h", f"{prefix}_console.c", f"{prefix}_console.h")
    try:
        return {name: (folder / name).read_text(encoding="utf-8") for name in names}
    except OSError as error:
        raise UsageError(f"{folder}: {error.strerror}: {error.filename}") from None


def texts_of(source: CSource) -> dict[str, str]:
    """Sources of model and console of what was generated; none where it has no console."""
    names = (f"{source.prefix}_console.c", f"{source.prefix}_console.h")
    found = {name: source.surroundings[name] for name in names if name in source.surroundings}
    return {**source.files, **found} if found else {}


def console_program(
    texts: Mapping[str, str],
    folder: Path,
    board: Board,
    *,
    layers: bool = False,
    cpu: Cpu | None = None,
    uart: int = UART,
) -> Path:
    """An ELF file with the console on the port at ``uart``; arguments as for ``build.firmware``."""
    prefix = next(name for name in texts if name.endswith("_console.c")).removesuffix("_console.c")
    main = Template(build.data_file("console.c")).substitute(prefix=prefix, uart=f"{uart:#x}u")
    return build.firmware(
        {**texts, _MAIN: main},
        folder,
        board,
        main=_MAIN,
        cpu=cpu,
        options=[f"-D{prefix.upper()}_TRACE"] if layers else [],
    )


def listening(text: str) -> Socket:
    """``HOST:PORT`` as a server.

    Raises:
        UsageError: it is something else, or nobody can listen there.
    """
    found = re.fullmatch(r"(.*):([0-9]{1,5})", text)
    if found is None:
        raise UsageError(f"--listen {text}: give HOST:PORT, such as localhost:5000")
    return Socket(found[1] or "localhost", int(found[2]))


@contextmanager
def serving(
    texts: Mapping[str, str],
    board: str | Board,
    line: Line | None = None,
    *,
    layers: bool = False,
) -> Generator[str]:
    """A board that answers on ``line``, a new pseudo terminal if None, while the block runs.

    Yields:
        What pyserial opens.

    Raises:
        UsageError: no such board, or no pseudo terminals.
        DoesNotFitError: the board is too small.
        ToolError: the compiler or the emulator failed.
    """
    port = line or PseudoTerminal()
    failures: list[CactusEdgeError] = []
    try:
        served = Served(texts, board_named(board), port, layers=layers)

        def emulate() -> None:
            try:
                served.run()
            except ToolError as error:
                failures.append(error)

        thread = threading.Thread(target=emulate, daemon=True)
        thread.start()
        try:
            yield port.address
        finally:
            served.stop()
            thread.join()
            served.close()
    finally:
        port.close()
    if failures:
        raise failures[0]
