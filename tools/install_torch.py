"""Installs the pinned torch without the gigabytes of CUDA that PyPI's Linux wheel brings along.

Run it with the Python of the virtual environment, before the extras. It asks pip which wheel the
present configuration (indexes, links, caches) leads to. A wheel without CUDA is installed as it
is; otherwise the same version comes from PyTorch's CPU index. With torch in place, later calls of
pip leave it alone, because constraints.txt names the same version.

Set CACTUS_EDGE_TORCH=cuda to take whatever wheel pip finds.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

CONSTRAINTS = Path(__file__).resolve().parent.parent / "constraints.txt"
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
CUDA_PACKAGES = re.compile(r"^(nvidia|cuda|triton|pytorch-triton)\b", re.IGNORECASE)


def pinned_version(constraints: Path) -> str:
    """The version of torch that the constraints name."""
    for line in constraints.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"torch==([^\s;]+)", line):
            return match.group(1)
    raise SystemExit(f"install_torch: {constraints} names no version of torch")


def installed_version() -> str | None:
    """The version of torch in this environment, if there is one."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return None


def pip_install(*arguments: str, quiet: bool = False) -> bool:
    """Runs `pip install` and says whether it succeeded."""
    command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    output = subprocess.DEVNULL if quiet else None
    return subprocess.run(command, stdout=output, stderr=output, check=False).returncode == 0


def applies_here(requirement: str) -> bool:
    """Whether the environment marker of a requirement holds on this machine."""
    # pip is the only package that is certain to be here, and it carries the parser of markers.
    from pip._vendor.packaging.requirements import Requirement

    marker = Requirement(requirement).marker
    return marker is None or marker.evaluate({"extra": ""})


def cuda_requirements(version: str) -> list[str]:
    """The CUDA packages that torch would pull in under the present configuration of pip."""
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.json"
        # Without dependencies: an index that serves no separate metadata would make pip download
        # every one of the CUDA wheels only to report on them.
        asked = pip_install(
            "--dry-run",
            "--ignore-installed",
            "--no-deps",
            "--report",
            str(report),
            f"torch=={version}",
            quiet=True,
        )
        if not asked:
            raise SystemExit(
                f"install_torch: pip finds no torch {version} for Python "
                f"{sys.version_info.major}.{sys.version_info.minor} here; check the network and "
                "`pip config list`, or build the environment with Python 3.11"
            )
        (item,) = json.loads(report.read_text(encoding="utf-8"))["install"]
    requirements = item["metadata"].get("requires_dist", [])
    return sorted(r for r in requirements if CUDA_PACKAGES.match(r) and applies_here(r))


def main() -> None:
    """Installs torch, or explains in one line why it cannot."""
    version = pinned_version(CONSTRAINTS)
    present = installed_version()
    if present is not None and present.split("+")[0] == version:
        return
    choice = os.environ.get("CACTUS_EDGE_TORCH", "cpu")
    if choice not in {"cpu", "cuda"}:
        raise SystemExit(f"install_torch: CACTUS_EDGE_TORCH is {choice!r}, use `cpu` or `cuda`")
    if choice == "cpu" and (cuda := cuda_requirements(version)):
        print(f"install_torch: pip would add {len(cuda)} CUDA packages, using {CPU_INDEX}")
        # The label +cpu cannot match a wheel of another index that the configuration names.
        wheel = f"torch=={version}+cpu"
        if not pip_install(
            "--no-deps", "--retries", "1", "--index-url", CPU_INDEX, wheel, quiet=True
        ):
            raise SystemExit(
                f"install_torch: no {wheel} from {CPU_INDEX} for this Python and platform; point "
                "PIP_FIND_LINKS at a folder with that wheel, or run again with "
                "CACTUS_EDGE_TORCH=cuda to download the CUDA build (several GB)"
            )
    # The wheel itself if it is not there yet, and in every case what it depends on.
    if not pip_install("--constraint", str(CONSTRAINTS), f"torch=={version}"):
        raise SystemExit(f"install_torch: pip could not install torch {version}, see above")


if __name__ == "__main__":
    main()
