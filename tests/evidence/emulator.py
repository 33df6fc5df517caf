"""A Python for arm64 on any Debian machine: qemu-user, Debian's packages and PyPI's wheels.

Everything is unpacked below ``build/aarch64``; nothing is installed. The package and its tests run
from this checkout. Delete the folder to fetch everything again.
"""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

from cactus_edge import files
from cactus_edge.validate import Python

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "build" / "aarch64"
CPUS = {"neon": "cortex-a72", "neon-dotprod": "cortex-a76"}
"""The CPU that stands for each tier: Raspberry Pi 4 and 5."""

_MODELS = {"neon": "cortex-a72", "neon-dotprod": "neoverse-n1"}
"""LLVM's scheduling models; Neoverse N1 is a Cortex-A76 for servers and has one of its own."""
_GUEST = ("python3-minimal", "libpython3-stdlib", "libstdc++6")
_HOST = ("qemu-user-static", "llvm-19", "libllvm19")
_WHEELS = (
    *("numba", "llvmlite", "numpy", "msgspec", "flatbuffers", "tflite", "hypothesis"),
    *("onnx", "onnxruntime"),
)
_PINNED = {"onnxruntime": "1.26.0"}
"""Versions other than those that run here; the emulator crashes while it loads newer ones."""
_PLATFORMS = ("manylinux_2_28_aarch64", "manylinux2014_aarch64")


class Unavailable(Exception):
    """This machine cannot have the emulator; the message says why."""


def prepare() -> None:
    """Fetch and unpack what is missing.

    Raises:
        Unavailable: no apt-get, or a package or wheel that cannot be had.
    """
    done, wanted = FOLDER / "ready", "\n".join(_wheels()).encode()
    if done.exists() and done.read_bytes() == wanted:
        return
    for tool in ("apt-get", "dpkg-deb"):
        if shutil.which(tool) is None:
            raise Unavailable(f"no {tool}: the emulated Python is made of Debian's packages")
    FOLDER.mkdir(parents=True, exist_ok=True)
    _unpack_host()
    _unpack_guest()
    _unpack_wheels()
    files.write(done, wanted, force=True)


def run(tier: str, arguments: list[str], seconds: int) -> str:
    """What ``python *arguments`` prints, emulated, compiling for the CPU of a tier."""
    result = subprocess.run(
        [str(_qemu()), "-L", str(_guest()), str(_python()), *arguments],
        cwd=ROOT,
        env=_environment(tier),
        capture_output=True,
        text=True,
        timeout=seconds,
        check=False,
    )
    assert result.returncode == 0, f"status {result.returncode}\n{result.stderr}"
    return result.stdout


def python(cpu: str, *folders: Path, seconds: float = 3600) -> Python:
    """The arm64 Python on an emulated CPU; ``folders`` come before its packages."""
    paths = [*folders, FOLDER / "site", ROOT]
    environment = {
        **_environment(next(tier for tier, name in CPUS.items() if name == cpu)),
        "PYTHONPATH": ":".join(map(str, paths)),
    }
    command = (str(_qemu()), "-cpu", cpu, "-L", str(_guest()), str(_python()))
    return Python(command, environment, seconds)


def haswell(seconds: float = 3600) -> Python:
    """This environment's Python on an emulated processor with AVX2 and nothing newer."""
    emulator = _qemu().with_name("qemu-x86_64-static")
    return Python((str(emulator), "-cpu", "Haswell", sys.executable), None, seconds)


def cycles(tier: str, assembly: str, iterations: int = 200) -> float:
    """Cycles that llvm-mca gives a loop's body, on the model of the tier's CPU."""
    library = next((FOLDER / "host").rglob("libLLVM*.so.1*")).parent
    result = subprocess.run(
        [
            *(str(next((FOLDER / "host").rglob("bin/llvm-mca"))), "-mtriple=aarch64"),
            *(f"-mcpu={_MODELS[tier]}", "-mattr=+dotprod", f"-iterations={iterations}"),
        ],
        env={**os.environ, "LD_LIBRARY_PATH": str(library)},
        input=assembly,
        capture_output=True,
        text=True,
        check=True,
    )
    (line,) = (text for text in result.stdout.splitlines() if text.startswith("Total Cycles:"))
    return int(line.split(":")[1]) / iterations


def _environment(tier: str) -> dict[str, str]:
    libraries = [_guest() / "usr/lib/aarch64-linux-gnu", _guest() / "lib/aarch64-linux-gnu"]
    return {
        "HOME": str(FOLDER),
        "LD_LIBRARY_PATH": ":".join(map(str, libraries)),
        "PYTHONHOME": str(_guest() / "usr"),
        "PYTHONPATH": f"{FOLDER / 'site'}:{ROOT}",
        "NUMBA_CACHE_DIR": str(FOLDER / "cache"),
        "NUMBA_CPU_NAME": CPUS[tier],
    }


def _guest() -> Path:
    return FOLDER / "guest"


def _qemu() -> Path:
    return FOLDER / "host/usr/bin/qemu-aarch64-static"


def _python() -> Path:
    return next(path for path in sorted((_guest() / "usr/bin").glob("python3.*")))


def _unpack_host() -> None:
    _call(["apt-get", "download", *_HOST], cwd=_made("packages"))
    for package in (FOLDER / "packages").glob("*.deb"):
        _call(["dpkg-deb", "-x", str(package), str(_made("host"))])


def _unpack_guest() -> None:
    """Debian's Python for arm64 and all that it needs, by an apt that knows no other package."""
    state = _made("apt")
    for folder in ("state/lists/partial", "cache/archives/partial"):
        (state / folder).mkdir(parents=True, exist_ok=True)
    (state / "status").touch()
    options = [
        'APT::Architecture "arm64";',
        'APT::Architectures { "arm64"; };',
        f'Dir::State "{state}/state";',
        f'Dir::State::status "{state}/status";',
        f'Dir::Cache "{state}/cache";',
        'APT::Sandbox::User "root";',
        'APT::Install-Recommends "0";',
    ]
    files.write(state / "apt.conf", "\n".join(options).encode(), force=True)
    environment = {**os.environ, "APT_CONFIG": str(state / "apt.conf")}
    _call(["apt-get", "update", "-q"], env=environment)
    _call(["apt-get", "install", "-qy", "--download-only", *_GUEST], env=environment)
    for package in (state / "cache/archives").glob("*.deb"):
        _call(["dpkg-deb", "-x", str(package), str(_made("guest"))])


def _wheels() -> list[str]:
    return [f"{name}=={_PINNED.get(name) or importlib.metadata.version(name)}" for name in _WHEELS]


def _unpack_wheels() -> None:
    for name in ("wheels", "site"):  # of other versions
        shutil.rmtree(FOLDER / name, ignore_errors=True)
    version = _python().name.removeprefix("python")
    folder = _made("wheels")
    platforms = [part for name in _PLATFORMS for part in ("--platform", name)]
    command = [sys.executable, "-m", "pip", "download", "-q", "-d", str(folder), *platforms]
    _call([*command, "--python-version", version, "--only-binary=:all:", *_wheels()])
    for wheel in folder.glob("*.whl"):
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(_made("site"))


def _made(name: str) -> Path:
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _call(command: list[str], *, cwd: Path = ROOT, env: dict[str, str] | None = None) -> None:
    result = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True, check=False)
    if result.returncode:
        raise Unavailable(f"{' '.join(command[:3])}: {result.stderr.strip()[-300:]}")
