"""Where the matrix runs what: this machine, other versions of runtimes, emulated processors.

Other versions are PyPI's wheels, unpacked below ``build/runtimes`` and put in front of the path;
nothing is installed. Wheels for arm64 run in the emulated Python of ``emulator``. Kernels that are
the same code on every processor of a family, the reference ones and TFLite Micro's, run on one.
"""

from __future__ import annotations

import os
import platform
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from cactus_edge.validate import Peer, Python, onnx_peer, peers
from tests.evidence import emulator

FOLDER = emulator.ROOT / "build" / "runtimes"
LITERT = ("2.1.0", "1.4.0")
"""Older releases beside the installed one."""
NOT_ON_ARM = ("2.3.0",)
"""Releases whose interpreter ends with a segmentation fault under qemu-user 7.2."""
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
_GLIBC = (17, 24, 26, 27, 28, 31, 34, 35)
_PURE = ("tqdm", "typing_extensions", "backports.strenum")
_LITERT_MODES = {
    "reference": ("BUILTIN_REF", "litert-reference"),
    "optimized": ("BUILTIN_WITHOUT_DEFAULT_DELEGATES", "litert-{cpu}"),
    "default": ("AUTO", "litert-xnnpack-{cpu}"),
}
_TFLITE_MODES = {
    "reference": ("BUILTIN_REF", "tflite-reference"),
    "optimized": ("BUILTIN_WITHOUT_DEFAULT_DELEGATES", "tflite-{cpu}"),
    "default": ("AUTO", "tflite-{cpu}"),
    "XNNPACK": ("XNNPACK", "tflite-xnnpack-{cpu}"),
}


@dataclass(frozen=True)
class Place:
    """A runtime at a place; ``missing`` says why it cannot be had there, or is empty."""

    machine: str
    peer: Peer
    missing: str = ""

    @property
    def emulated(self) -> bool:
        """Whether it is slow."""
        return self.machine != NATIVE

    @property
    def shows_layers(self) -> bool:
        """Whether it is given files, of which any tensor can be the output."""
        return self.peer.extra == "runtimes"

    @property
    def key(self) -> str:
        """A name for files."""
        parts = (self.machine, self.peer.name, self.peer.version)
        return "-".join(parts).lower().replace(" ", "-")


NATIVE = platform.machine()


def places() -> Iterator[Place]:
    """All of them, those on this machine first."""
    for peer in (*peers(), onnx_peer()):
        yield Place(NATIVE, peer, peer.absence)
    for version in LITERT:
        for peer in _peers("LiteRT", "ai-edge-litert", version, _LITERT_MODES, "x86"):
            yield _fetched(NATIVE, peer, "x86_64")
    yield from _arm("Cortex-A72", "cortex-a72")
    yield from (place for place in _arm("Cortex-A76", "cortex-a76") if _dispatched(place.peer))
    yield from _haswell()


def _dispatched(peer: Peer) -> bool:
    """Whether its kernels are chosen by the processor, and no newer release is run there."""
    return not (peer.mode == "BUILTIN_REF" or peer.package == "tflite-micro"
                or peer.installed in LITERT[1:])  # fmt: skip


def _haswell() -> Iterator[Place]:
    stock = [peer for peer in peers() if peer.extra == "runtimes" and _dispatched(peer)]
    try:
        emulator.prepare()
    except emulator.Unavailable as error:
        yield from (Place("Haswell", peer, str(error)) for peer in stock)
        return
    for peer in stock:
        moved = replace(peer, python=emulator.haswell(), installed=peer.version)
        yield Place("Haswell", moved, peer.absence)


def _arm(name: str, cpu: str) -> Iterator[Place]:
    own = Peer(
        "numba", "numba", "tests.evidence.session_runtime", "", "micro", "tflite-micro",
        installed="own",
    )  # fmt: skip
    stock = [*_peers("tflite", "tflite-runtime", "2.14.0", _TFLITE_MODES, "arm")]
    for version in LITERT:
        stock += _peers("LiteRT", "ai-edge-litert", version, _LITERT_MODES, "arm")
    try:
        emulator.prepare()
    except emulator.Unavailable as error:
        yield from (Place(name, peer, str(error)) for peer in (own, *stock))
        return
    yield Place(name, replace(own, package="", python=emulator.python(cpu)))
    for peer in stock:
        yield _fetched(name, peer, "aarch64", cpu)
    for version in NOT_ON_ARM:
        for peer in _peers("LiteRT", "ai-edge-litert", version, _LITERT_MODES, "arm"):
            why = "its interpreter ends with a segmentation fault under qemu-user 7.2"
            yield Place(name, peer, why)


def _peers(
    name: str, package: str, version: str, modes: dict[str, tuple[str, str]], cpu: str
) -> list[Peer]:
    module = {"tflite-runtime": "tflite_runtime", "ai-edge-litert": "ai_edge_litert"}[package]
    return [
        Peer(
            f"{name} {mode}", package, f"{module}.interpreter", "runtimes", resolver,
            profile.format(cpu=cpu), installed=version,
        )
        for mode, (resolver, profile) in modes.items()
    ]  # fmt: skip


def _fetched(machine: str, peer: Peer, architecture: str, cpu: str = "") -> Place:
    try:
        folder = fetch(peer.package, peer.installed, architecture)
    except emulator.Unavailable as error:
        return Place(machine, peer, str(error))
    if cpu:
        python = emulator.python(cpu, folder)
    else:
        python = Python(environment={**os.environ, "PYTHONPATH": str(folder)})
    return Place(machine, replace(peer, python=python))


def fetch(package: str, version: str, architecture: str) -> Path:
    """A folder with a release of a package and what it imports beside NumPy.

    Raises:
        Unavailable: there is no such wheel.
    """
    folder = FOLDER / f"{package}-{version}-{architecture}"
    if (folder / "ready").exists():
        return folder
    wheels = FOLDER / "wheels" / folder.name
    wheels.mkdir(parents=True, exist_ok=True)
    tags = [f"manylinux_2_{minor}_{architecture}" for minor in _GLIBC]
    platforms = [part for tag in tags for part in ("--platform", tag)]
    platforms += ["--platform", f"manylinux2014_{architecture}"]
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(wheels), "--no-deps"]
    command += [*platforms, "--python-version", PYTHON, "--only-binary=:all:"]
    done = subprocess.run(
        [*command, f"{package}=={version}", *_PURE], capture_output=True, text=True, check=False
    )
    if done.returncode:
        reason = done.stderr.strip().splitlines()[-1]
        raise emulator.Unavailable(f"{package} {version} for {architecture}: {reason}")
    for wheel in wheels.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(folder)
    (folder / "ready").touch()
    return folder
