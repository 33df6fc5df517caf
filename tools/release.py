"""Prepares a release: dependencies with their hashes, and its software bill of materials.

    python tools/release.py lock    writes requirements/release.txt
    python tools/release.py sbom    writes build/release/sbom.cdx.json

``lock`` takes the versions of constraints.txt, for Linux on x86-64 and Python 3.11. torch is left
out, and what it needs for CUDA: tools/install_torch.py chooses its wheel, at the version that
constraints.txt pins. ``sbom`` installs exactly these files into a fresh environment, refusing any
other hash, and lists what is there with CycloneDX. Both need `pip install -e '.[release]'`.
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements" / "release.txt"
OUTPUT = ROOT / "build" / "release"
EXTRAS = (
    *("train", "digits", "images", "onnx", "report"),
    *("runtimes", "serial", "sign", "sim", "verify"),
)
LEFT_OUT = re.compile(r"(torch|triton|nvidia|cuda)\b", re.IGNORECASE)
HEADER = """\
# What a release is tested with: Linux on x86-64, Python 3.11, all extras but dev and docs. By
# `python tools/release.py lock`. Without torch, which `python tools/install_torch.py` installs.
#
#     pip install --require-hashes --no-deps -r requirements/release.txt
"""


def call(*command: str | Path) -> None:
    """Run a command, in the repository's root."""
    subprocess.run(command, cwd=ROOT, check=True)


def lock() -> None:
    """Write requirements/release.txt."""
    with tempfile.TemporaryDirectory() as folder:
        found = Path(folder) / "found.txt"
        extras = [part for extra in EXTRAS for part in ("--extra", extra)]
        call(
            *(sys.executable, "-m", "uv", "pip", "compile", "pyproject.toml", *extras),
            *("--constraints", "constraints.txt", "--generate-hashes", "--no-annotate"),
            *("--python-version", "3.11", "--python-platform", "x86_64-manylinux_2_28"),
            *("--no-header", "--quiet", "--output-file", found),
        )
        blocks = re.split(r"\n(?=\S)", found.read_text(encoding="utf-8").strip())
    kept = [block for block in blocks if not LEFT_OUT.match(block)]
    LOCK.parent.mkdir(exist_ok=True)
    LOCK.write_text(HEADER + "\n".join(kept) + "\n", encoding="utf-8")
    print(f"{LOCK.relative_to(ROOT)}: {len(kept)} packages")


def sbom() -> None:
    """Write build/release/sbom.cdx.json, of a fresh environment with the wheel in it."""
    environment = OUTPUT / "environment"
    shutil.rmtree(OUTPUT, ignore_errors=True)
    call(sys.executable, "-m", "venv", environment)
    python = environment / "bin" / "python"
    install = (python, "-m", "pip", "install", "-q", "--disable-pip-version-check")
    call(python, "tools/install_torch.py")
    call(*install, "--require-hashes", "--no-deps", "-r", LOCK)
    call(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", OUTPUT, ".")
    (wheel,) = OUTPUT.glob("*.whl")
    call(*install, "--no-deps", wheel)
    call(python, "-m", "pip", "check")
    written = OUTPUT / "sbom.cdx.json"
    call(
        *(sys.executable, "-m", "cyclonedx_py", "environment", python),
        *("--pyproject", "pyproject.toml", "--output-reproducible", "--of", "JSON"),
        *("-o", written),
    )
    print(written.relative_to(ROOT))


if __name__ == "__main__":
    {"lock": lock, "sbom": sbom}[sys.argv[1] if len(sys.argv) == 2 else ""]()
